"""Operands for the tests of CPU kernels, and what these have to give."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from teal.kernels.operands import Operands, QuantParams
from teal.kernels.reference import matmul as reference
from teal.quantization import QuantizedWeight, Scheme, round_to_nearest
from tests.helpers import assert_as_precise_as_torch
from tests.kernels.cases import draw, exact

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

SCHEMES = {
    "int8": Scheme(format="int8"),
    "fp8": Scheme(format="fp8"),
    "int4 in groups of 32": Scheme(format="int4", group_size=32),
    "int4 in groups of 128": Scheme(format="int4"),
    "int4 with zeros": Scheme(format="int4", group_size=64, symmetric=False),
}
schemes = pytest.mark.parametrize("scheme", SCHEMES)


def quantized(scheme: str, shape: tuple[int, int], dtype: torch.dtype) -> QuantizedWeight:
    """Draw a weight and round it."""
    return round_to_nearest(draw(*shape, dtype=dtype, seed=1), SCHEMES[scheme])


def quant_params(weight: QuantizedWeight) -> QuantParams:
    """Return what decodes a weight."""
    return QuantParams(weight.scales, weight.zeros, weight.group_size)


def operands_of(
    x: Tensor, weight: Tensor, threshold: float, out_features: int | None = None, **vectors: Any
) -> Operands:
    """Return the operands of one part; `weight` may be codes, which do not tell `out_features`."""
    columns = weight.shape[1] if out_features is None else out_features
    if "score_scale" in vectors:
        vectors["score_scale"] = vectors["score_scale"][None]
    return Operands(x, weight, [threshold], [columns], **vectors)


def parts(dtype: torch.dtype, rows: int, output_sizes: Sequence[int], **changes: Any) -> Operands:
    """Draw the operands of parts with everything that a product can have but a residual."""
    in_features = changes.pop("in_features", 700)
    columns = sum(output_sizes)
    operands = Operands(
        x=3 * draw(rows, in_features, dtype=dtype),
        weight=draw(in_features, columns, dtype=dtype, seed=1),
        thresholds=[0.4, 0.9, 0.1][: len(output_sizes)],
        output_sizes=output_sizes,
        score_scale=draw(len(output_sizes), in_features, seed=2).abs(),
        shift=0.1 * draw(in_features, seed=3),
        bias=20 * draw(columns, dtype=dtype, seed=4),
        norm_weight=draw(in_features, dtype=dtype, seed=5),
        eps=1e-5,
    )
    return operands._replace(**changes)


def exact_result(operands: Operands, weight: Tensor) -> Tensor:
    """Compute a product in float64, with the norm and the masks of the dtype of `x`.

    Args:
        operands: Operands whose weight is not used.
        weight: The exact weight in float64, (in_features, out_features).
    """
    o = operands
    masks: Sequence[Tensor | None] = [None] * len(o.output_sizes)
    rules = zip(
        weight.split(list(o.output_sizes), dim=1),
        o.thresholds,
        masks if o.score_scale is None else o.score_scale,
        strict=True,
    )
    x = _normed(o)
    products = [exact(x, w, t, score_scale=s, shift=o.shift) for w, t, s in rules]
    return _finished(torch.cat(products, dim=-1), o, bias=o.bias)


def torch_result(operands: Operands) -> Tensor:
    """Compute a product as the reference does, in the dtype of `x`."""
    o = operands
    products = reference.sparse_linear(
        _normed(o), o.weight, o.thresholds, o.output_sizes, o.score_scale, o.shift, o.bias
    )
    return _finished(products, o)


def assert_precise(result: Tensor, operands: Operands) -> None:
    """Check a product with a float weight against torch's."""
    expected = exact_result(operands, operands.weight.double())
    assert result.shape == expected.shape
    assert_as_precise_as_torch(result, torch_result(operands), expected)


def _normed(operands: Operands) -> Tensor:
    x, norm_weight = operands.x, operands.norm_weight
    return x if norm_weight is None else reference.rms_norm(x, norm_weight, operands.eps)


def _finished(products: Tensor, operands: Operands, bias: Tensor | None = None) -> Tensor:
    o = operands
    result = products if bias is None else products + bias.to(products.dtype)
    result = result if o.residual is None else result + o.residual.to(products.dtype)
    return result if o.activation is None else reference.gate_and_up(result, o.activation)
