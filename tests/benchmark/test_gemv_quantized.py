from collections.abc import Iterator
from typing import Any

import pytest
import torch

from teal.benchmark import gemv
from teal.benchmark.gemv import measure
from teal.benchmark.gemv_quantized import QuantizedProduct
from teal.benchmark.model_configs import Shape
from teal.foundation.errors import UserError
from teal.kernels import ops
from teal.quantization import Scheme

SHAPES = [
    Shape(form="plain", in_features=64, output_sizes=(48,)),
    Shape(form="parts", in_features=64, output_sizes=(32, 16, 16)),
    Shape(form="gated", in_features=64, output_sizes=(48, 48)),
]
SCHEMES = [
    Scheme(format="int8"),
    Scheme(format="fp8"),
    Scheme(format="int4", group_size=32, symmetric=False),
]


@pytest.fixture(autouse=True)
def _small_rotation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gemv, "_ROTATION_BYTES", {"cpu": 1 << 16, "cuda": 1 << 16})
    yield


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.form)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.format)
def test_limit_counts_kept_codes_and_all_scales_and_zeros(
    shape: Shape, scheme: Scheme, device: torch.device
) -> None:
    product = QuantizedProduct(shape, torch.bfloat16, device, 1, scheme)
    dense, sparse = measure(product, [0.0, 0.5], bandwidth=1e9)
    columns, bits = shape.out_features, 4 if scheme.format == "int4" else 8
    beside = columns * (2 * (2 + 1) if bits == 4 else 2)
    codes = 64 * columns * bits / 8
    assert dense.limit == pytest.approx((codes + beside) * 1e-3)
    assert sparse.limit == pytest.approx((codes / 2 + beside) * 1e-3)
    assert (sparse.format, sparse.dtype) == (scheme.format, "bfloat16")
    assert sparse.floats is not None
    assert sparse.floats.median > 0
    assert product.copies > 2


def test_wrong_product_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.quantized_linear

    def wrong(*arguments: Any, **options: Any) -> torch.Tensor:
        return 1.01 * right(*arguments, **options)

    monkeypatch.setattr(ops, "quantized_linear", wrong)
    product = QuantizedProduct(SHAPES[0], torch.float32, torch.device("cpu"), 1, SCHEMES[0])
    with pytest.raises(UserError, match="wrong product"):
        next(measure(product, [0.5], bandwidth=1e9))
