"""The door to the kernels for quantized weights: their operations, beside those of `ops`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from teal.kernels import dispatch_quantized
from teal.kernels.registration import NORM, VECTORS, registered

_WEIGHT = "Tensor x, Tensor codes, Tensor scales, Tensor? zeros, int group_size"
_SCHEMAS = (
    f"quantized_linear({_WEIGHT}, float[] thresholds, SymInt[] output_sizes, {VECTORS}, "
    f"Tensor? residual=None, {NORM}) -> Tensor",
    f"quantized_glu({_WEIGHT}, float[] thresholds, str activation, {VECTORS}, {NORM}) -> Tensor",
)


def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    thresholds: Sequence[float],
    output_sizes: Sequence[int],
    score_scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Compute `ops.sparse_linear` with a weight that `reference_quantized.dequantized` explains.

    Args:
        x: Activations, (..., in_features); hidden states before the norm where `norm_weight` is
            given.
        codes: Channel-major codes of parts beside each other: int8 or float8_e4m3fn
            (in_features, out_features), or int4 in uint8, (in_features, ⌈out_features / 2⌉).
        scales: One per group and output, (groups, out_features), any float dtype.
        zeros: Code of zero, (groups, out_features), uint8, or `None`; int4 only.
        group_size: Input channels per group; the last may be shorter.
        thresholds: One per part; a part with one below zero is dense.
        output_sizes: Columns of each part, summing to out_features.
        score_scale: Score weights, (parts, in_features).
        shift: Centre per channel, (in_features,).
        bias: Added to the product, (out_features,).
        residual: Added to the result, (..., out_features).
        norm_weight: Weight of an RMSNorm that `x` goes through first, (in_features,).
        eps: Of that norm.

    Returns:
        Products beside each other, (..., out_features), in the dtype of `x`; float32 accumulation.

    Raises:
        UserError: Shapes or dtypes do not fit together.
    """
    result: Tensor = torch.ops.teal.quantized_linear(
        x, codes, scales, zeros, group_size, thresholds, output_sizes,
        score_scale, shift, bias, residual, norm_weight, eps,
    )  # fmt: skip
    return result


def quantized_glu(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    thresholds: Sequence[float],
    activation: str,
    score_scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Compute `ops.sparse_glu` with a quantized weight.

    Args:
        x: Activations, (..., in_features); hidden states before the norm where `norm_weight` is
            given.
        codes: As in `quantized_linear`, of gate and up beside each other.
        scales: As in `quantized_linear`.
        zeros: As in `quantized_linear`.
        group_size: As in `quantized_linear`.
        thresholds: Of gate and of up.
        activation: "silu" or "gelu_pytorch_tanh".
        score_scale: Score weights, (2, in_features).
        shift: Centre per channel, (in_features,).
        bias: Added to the products, (2 · intermediate_size,).
        norm_weight: Weight of an RMSNorm that `x` goes through first, (in_features,).
        eps: Of that norm.

    Returns:
        (..., intermediate_size), in the dtype of `x`; float32 accumulation.

    Raises:
        UserError: Shapes or dtypes do not fit together, or the activation is unknown.
    """
    result: Tensor = torch.ops.teal.quantized_glu(
        x, codes, scales, zeros, group_size, thresholds, activation,
        score_scale, shift, bias, norm_weight, eps,
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
    {"quantized_linear": _fake_parts, "quantized_glu": _fake_gated},
)
