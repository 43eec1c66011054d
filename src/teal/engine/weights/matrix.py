"""The products of a layer with a weight that is floats or codes, along the same path."""

from collections.abc import Sequence

import torch
from torch import Tensor

from teal.kernels.ops import (
    lm_head_gemv,
    quantized_glu,
    quantized_linear,
    sparse_glu,
    sparse_linear,
)
from teal.kernels.reference import matmul as reference
from teal.quantization import FLOAT, QuantizedWeight

# Every score is ≥ 0, so this threshold drops nothing.
KEEP_ALL = -1.0

# A channel-major weight, (in_features, out_features).
Matrix = Tensor | QuantizedWeight


def parts(
    x: Tensor,
    weight: Matrix,
    thresholds: Sequence[float],
    output_sizes: Sequence[int],
    *rest: object,
) -> Tensor:
    """Compute products beside each other; `rest` is that of `ops.sparse_linear`.

    Args:
        x: Activations, (T, in_features).
        weight: Of all parts.
        thresholds: One per part.
        output_sizes: Columns of each part.
        rest: scale, shift, bias, residual, norm weight and epsilon, as far as given.

    Returns:
        (T, out_features), in the dtype of `x`.
    """
    if isinstance(weight, Tensor):
        return sparse_linear(x, weight, thresholds, output_sizes, *rest)  # type: ignore[arg-type]
    return quantized_linear(x, *_operands(weight), thresholds, output_sizes, *rest)  # type: ignore[arg-type]


def gated(
    x: Tensor, weight: Matrix, thresholds: Sequence[float], activation: str, *rest: object
) -> Tensor:
    """Compute `activation(x · gate) · (x · up)`; `rest` is that of `ops.sparse_glu`.

    Args:
        x: Activations, (T, in_features).
        weight: Gate and up beside each other.
        thresholds: Of gate and of up.
        activation: Of the gate.
        rest: scale, shift, bias, norm weight and epsilon, as far as given.

    Returns:
        (T, out_features / 2), in the dtype of `x`.
    """
    if isinstance(weight, Tensor):
        return sparse_glu(x, weight, thresholds, activation, *rest)  # type: ignore[arg-type]
    return quantized_glu(x, *_operands(weight), thresholds, activation, *rest)  # type: ignore[arg-type]


def head_product(hidden: Tensor, head: Matrix) -> Tensor:
    """Multiply with a head: rows of floats, or codes that are channel-major as any.

    Args:
        hidden: (..., hidden_size).
        head: Floats (vocab_size, hidden_size), or quantized (hidden_size, vocab_size).

    Returns:
        (..., vocab_size), in the dtype of `hidden`.
    """
    if isinstance(head, Tensor):
        return lm_head_gemv(hidden, head)
    return parts(hidden, head, [KEEP_ALL], [head.out_features])


def fold_shift(weight: Matrix, shift: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the constant that a rule with a shift adds; see `reference.fold_shift`.

    Args:
        weight: The weight.
        shift: Centre per channel, (in_features,).
        bias: Bias of the projection, (out_features,).
        dtype: Of the activations and the result.
    """
    floats = weight if isinstance(weight, Tensor) else weight.dequantize()
    return reference.fold_shift(floats, shift, bias).to(dtype)


def format_of(weight: Matrix) -> str:
    """Return `FLOAT`, "fp8", "int4" or "int8"."""
    return FLOAT if isinstance(weight, Tensor) else weight.format


def bytes_of(weight: Matrix) -> int:
    """Return the bytes of the floats, or of codes, scales and zeros."""
    return weight.nbytes if isinstance(weight, Tensor) else weight.bytes


def weight_rows(weight: Matrix) -> Tensor:
    """Return the tensor that holds a strip per input channel, (in_features, …)."""
    return weight if isinstance(weight, Tensor) else weight.codes


def _operands(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor | None, int]:
    return weight.codes, weight.scales, weight.zeros, weight.group_size
