"""The door to the kernels for quantized weights: their operations, beside those of `ops`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from teal.kernels import dispatch_quantized
from teal.kernels.registration import NORM, VECTORS, registered

_WEIGHT = "Tensor x, Tensor codes, Tensor scales, Tensor? zeros, int group_size"
_SCHEMAS = (
    f"quantized_parts({_WEIGHT}, float[] thresholds, SymInt[] widths, {VECTORS}, "
    f"Tensor? residual=None, {NORM}) -> Tensor",
    f"quantized_gated({_WEIGHT}, float[] thresholds, str activation, {VECTORS}, {NORM}) -> Tensor",
)


def quantized_parts(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    thresholds: Sequence[float],
    widths: Sequence[int],
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gain: Tensor | None = None,
    epsilon: float = 0.0,
) -> Tensor:
    """Compute `ops.sparse_parts` with a weight that `reference_quantized.dequantized` explains.

    Args:
        x: Activations, (..., in_features); hidden states before the norm where `gain` is given.
        codes: Channel-major codes of parts beside each other: int8 or float8_e4m3fn
            (in_features, out_features), or int4 in uint8, (in_features, ⌈out_features / 2⌉).
        scales: One per group and output, (groups, out_features), any float dtype.
        zeros: Code of zero, (groups, out_features), uint8, or `None`; int4 only.
        group_size: Input channels per group; the last may be shorter.
        thresholds: One per part; a part with one below zero is dense.
        widths: Columns of each part, summing to out_features.
        scale: Score weights, (parts, in_features).
        shift: Centre per channel, (in_features,).
        bias: Added to the product, (out_features,).
        residual: Added to the result, (..., out_features).
        gain: Weight of an RMSNorm that `x` goes through first, (in_features,).
        epsilon: Of that norm.

    Returns:
        Products beside each other, (..., out_features), in the dtype of `x`; float32 accumulation.

    Raises:
        UserError: Shapes or dtypes do not fit together.
    """
    result: Tensor = torch.ops.teal.quantized_parts(
        x, codes, scales, zeros, group_size, thresholds, widths,
        scale, shift, bias, residual, gain, epsilon,
    )  # fmt: skip
    return result


def quantized_gated(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    thresholds: Sequence[float],
    activation: str,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    epsilon: float = 0.0,
) -> Tensor:
    """Compute `ops.sparse_gated` with a quantized weight.

    Args:
        x: Activations, (..., in_features); hidden states before the norm where `gain` is given.
        codes: As in `quantized_parts`, of gate and up beside each other.
        scales: As in `quantized_parts`.
        zeros: As in `quantized_parts`.
        group_size: As in `quantized_parts`.
        thresholds: Of gate and of up.
        activation: "silu" or "gelu_pytorch_tanh".
        scale: Score weights, (2, in_features).
        shift: Centre per channel, (in_features,).
        bias: Added to the products, (2 · intermediate_size,).
        gain: Weight of an RMSNorm that `x` goes through first, (in_features,).
        epsilon: Of that norm.

    Returns:
        (..., intermediate_size), in the dtype of `x`; float32 accumulation.

    Raises:
        UserError: Shapes or dtypes do not fit together, or the activation is unknown.
    """
    result: Tensor = torch.ops.teal.quantized_gated(
        x, codes, scales, zeros, group_size, thresholds, activation,
        scale, shift, bias, gain, epsilon,
    )  # fmt: skip
    return result


def _fake_parts(x: Tensor, codes: Tensor, scales: Tensor, *rest: object) -> Tensor:
    del codes, rest
    return x.new_empty((*x.shape[:-1], scales.shape[1]))


def _fake_gated(x: Tensor, codes: Tensor, scales: Tensor, *rest: object) -> Tensor:
    del codes, rest
    return x.new_empty((*x.shape[:-1], scales.shape[1] // 2))


# The registration lives as long as this object.
_LIBRARY = registered(
    "FRAGMENT",
    _SCHEMAS,
    dispatch_quantized.IMPLEMENTATIONS,
    {"quantized_parts": _fake_parts, "quantized_gated": _fake_gated},
)
