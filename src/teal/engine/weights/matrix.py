"""A channel-major weight, of floats or quantized, and what the engine asks of either."""

import torch
from torch import Tensor

from teal.kernels.ops import lm_head_gemv, quantized_linear
from teal.kernels.reference import matmul as reference
from teal.quantization import FLOAT, QuantizedWeight

# Every score is ≥ 0, so this threshold drops nothing.
KEEP_ALL = -1.0

# A channel-major weight, (in_features, out_features).
Matrix = Tensor | QuantizedWeight


def head_product(hidden: Tensor, head: Matrix) -> Tensor:
    """Multiply hidden states with the weight of the LM head.

    Args:
        hidden: Hidden states, (..., hidden_size).
        head: Floats, (vocab_size, hidden_size), or quantized, (hidden_size, vocab_size).

    Returns:
        (..., vocab_size), in the dtype of `hidden`; float32 accumulation.
    """
    if isinstance(head, Tensor):
        return lm_head_gemv(hidden, head)
    return quantized_linear(hidden, *quant_operands(head), [KEEP_ALL], [head.out_features])


def fold_shift(weight: Matrix, shift: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the constant that a rule with a shift adds; see `reference.fold_shift`.

    Args:
        weight: Channel-major weight, (in_features, out_features).
        shift: Centre per channel, (in_features,).
        bias: Bias of the projection, (out_features,).
        dtype: Dtype of the activations, which the result gets.

    Returns:
        `bias + shift @ weight`, (out_features,), summed in float32.
    """
    floats = weight if isinstance(weight, Tensor) else weight.dequantize()
    return reference.fold_shift(floats, shift, bias).to(dtype)


def format_of(weight: Matrix) -> str:
    """Return `FLOAT`, "fp8", "int4" or "int8"."""
    return FLOAT if isinstance(weight, Tensor) else weight.format


def bytes_of(weight: Matrix) -> int:
    """Return the size in bytes, including the scales and zeros of a quantized weight."""
    return weight.nbytes if isinstance(weight, Tensor) else weight.bytes


def weight_rows(weight: Matrix) -> Tensor:
    """Return the floats or codes, one row per input channel, (in_features, …)."""
    return weight if isinstance(weight, Tensor) else weight.codes


def quant_operands(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Return codes, scales, zeros and group size, in the order of `ops.quantized_linear`."""
    return weight.codes, weight.scales, weight.zeros, weight.group_size
