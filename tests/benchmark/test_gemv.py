import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from teal.benchmark import gemv
from teal.benchmark.gemv import Product, measure
from teal.benchmark.model_configs import Shape
from teal.foundation.errors import UserError
from teal.kernels import ops

SHAPES = [
    Shape(form="plain", in_features=64, output_sizes=(48,)),
    Shape(form="parts", in_features=64, output_sizes=(32, 16, 16)),
    Shape(form="gated", in_features=64, output_sizes=(48, 48)),
]


@pytest.fixture(autouse=True)
def _small_rotation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gemv, "_ROTATION_BYTES", {"cpu": 1 << 16, "cuda": 1 << 16})
    yield


def _product(shape: Shape, device: torch.device, rows: int = 1) -> Product:
    return Product(shape, torch.float32, device, rows)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.form)
def test_record_holds_dense_sparse_and_limit(shape: Shape, device: torch.device) -> None:
    result, sparse = measure(_product(shape, device), [0.0, 0.5], bandwidth=1e9)
    assert (result.read, sparse.read) == (1.0, 0.5)
    assert sparse.limit == pytest.approx(0.5 * 64 * shape.out_features * 4 * 1e-3)
    assert sparse.speed_up == sparse.dense.median / sparse.sparse.median
    record = json.loads(json.dumps(sparse.to_dict()))
    assert record["share_of_limit"] == sparse.limit / sparse.sparse.median


def test_weight_row_counts_as_read_if_any_token_row_keeps_it(device: torch.device) -> None:
    (result,) = measure(_product(SHAPES[0], device, rows=4), [0.5], bandwidth=1e9)
    assert 0.5 < result.read <= 1.0


def test_wrong_product_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.sparse_linear

    def wrong(*arguments: Any, **options: Any) -> torch.Tensor:
        return 1.001 * right(*arguments, **options)

    monkeypatch.setattr(ops, "sparse_linear", wrong)
    with pytest.raises(UserError, match="wrong product"):
        next(measure(_product(SHAPES[0], torch.device("cpu")), [0.5], bandwidth=1e9))
