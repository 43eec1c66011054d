from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from teal.foundation.errors import UserError
from teal.kernels.triton.tile_config import (
    TileConfig,
    TunedConfig,
    config_for,
    read_table,
    table_text,
)
from teal.kernels.tuning import TRITON_FILE

CONFIG = TileConfig(block_n=16, block_k=512, warps=2, unroll=8)
FORMS = ("plain", "parts", "gated")


def _row(**changes: Any) -> TunedConfig:
    fields = {"form": "plain", "in_features": 320, "out_features": 640, "config": CONFIG}
    return TunedConfig(**{**fields, **changes})


@pytest.mark.parametrize("name", ["block_n", "block_k", "warps", "unroll"])
@pytest.mark.parametrize("value", [0, -2, 3, 2.0, "4"])
def test_sizes_that_are_no_powers_of_two_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{name} .* Give a power of two"):
        TileConfig(**{**asdict(CONFIG), name: value})


def test_a_row_survives_its_json_form() -> None:
    assert TunedConfig.from_dict(_row().to_dict()) == _row()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_rows_and_finds_those_of_its_size(form: str) -> None:
    rows = [row for row in read_table() if row.form == form]
    assert rows
    for row in rows:
        assert config_for(form, row.in_features, row.out_features) == row.config


def test_a_row_of_the_folder_replaces_the_shipped_one_of_its_size(tmp_path: Path) -> None:
    shipped = next(row for row in read_table() if row.config != CONFIG)
    own = TunedConfig(**{**vars(shipped), "config": CONFIG})
    (tmp_path / TRITON_FILE).write_text(table_text([own], "some GPU"))
    size = shipped.form, shipped.in_features, shipped.out_features
    assert config_for(*size, str(tmp_path)) == CONFIG
    assert config_for(*size) == shipped.config
    assert len(read_table(str(tmp_path))) == len(read_table())
