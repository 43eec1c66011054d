from pathlib import Path

import pytest
import torch

from teal.benchmark import gemv
from teal.benchmark.gemv import Product
from teal.benchmark.model_configs import CONFIGS, Shape, shapes_of
from teal.benchmark.tuning.triton import candidates, tune
from teal.foundation.errors import UserError
from teal.kernels.triton.tile_config import TABLE, TunedConfig, config_for, read_table, table_text

EVERY_SHAPE = [shape for name in CONFIGS for shape in shapes_of(name)]


@pytest.mark.parametrize("shape", EVERY_SHAPE, ids=lambda shape: f"{shape.form} {shape.name}")
def test_every_shape_of_a_known_model_has_candidates(shape: Shape) -> None:
    assert 10 <= len(list(candidates(shape))) <= 80


def test_table_survives_writing_and_reading(tmp_path: Path) -> None:
    (tmp_path / TABLE.file).write_text(table_text(read_table(), "some GPU"))
    assert read_table(str(tmp_path)) == read_table()


def test_shape_in_the_table_gets_its_own_configuration() -> None:
    for row in read_table():
        assert config_for(row.form, row.in_features, row.out_features) == row.config


def test_other_shape_gets_the_configuration_of_the_nearest() -> None:
    rows = {(row.form, row.in_features): row for row in read_table()}
    nearest: TunedConfig = rows["plain", 14336]
    assert config_for("plain", 11008, 4096) == nearest.config


def test_tuning_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemv, "_ROTATION_BYTES", {"cpu": 1 << 16})
    shape = Shape(form="plain", in_features=64, output_sizes=(48,))
    product = Product(shape, torch.float32, torch.device("cpu"), 1)
    with pytest.raises(UserError, match="on a GPU"):
        tune(product)
