"""The backend of last resort: every product on every device, in plain PyTorch."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from teal.kernels.operands import Operands, QuantParams
from teal.kernels.reference import matmul
from teal.kernels.reference.quantized import INT4, dequantized

# Floats of a quantized weight that exist at a time: prefill must not need the memory of a dense
# model beside the quantized one.
_MOST_FLOATS = 1 << 22


class ReferenceBackend:
    """Computes any product as `reference.matmul` and `reference.quantized` define it."""

    name = "reference"

    def can_run(self, operands: Operands, quant: QuantParams | None) -> str | None:
        """Return `None`: there is no product that it cannot compute."""

    def run(self, operands: Operands, quant: QuantParams | None) -> Tensor:
        """Compute a product; see `multiply`."""
        return multiply(operands, quant)


def multiply(operands: Operands, quant: QuantParams | None = None) -> Tensor:
    """Compute a product in plain PyTorch.

    A quantized weight is turned into floats in the dtype of `x`, a few columns at a time.

    Args:
        operands: Checked.
        quant: Decodes the weight; `None` for floats.

    Returns:
        (..., N), or (..., N / 2) with an activation, in the dtype of `x`, accumulated as torch's
        matmul does.
    """
    x, o = operands.x, operands
    if o.norm_weight is not None:
        x = matmul.rms_norm(x, o.norm_weight, o.eps)
    if quant is None:
        parts = matmul.sparse_linear(
            x, o.weight, o.thresholds, o.output_sizes, o.score_scale, o.shift, o.bias
        )
    else:
        parts = torch.cat(list(_quantized_products(x, o, quant)), dim=-1)
    parts = parts if o.residual is None else parts + o.residual
    return parts if o.activation is None else matmul.gate_and_up(parts, o.activation)


def _quantized_products(x: Tensor, operands: Operands, quant: QuantParams) -> Iterator[Tensor]:
    o = operands
    for part, columns in _pieces(o.output_sizes, len(o.weight)):
        weight = _floats(o.weight, quant, columns, x.dtype)
        score_scale = None if o.score_scale is None else o.score_scale[part]
        bias = None if o.bias is None else o.bias[columns]
        yield matmul.sparse_gemv(x, weight, o.thresholds[part], score_scale, o.shift, bias)


def _pieces(output_sizes: Sequence[int], in_features: int) -> Iterator[tuple[int, slice]]:
    """Yield the index of each part with runs of its columns, few enough to be held as floats."""
    most = max(1, _MOST_FLOATS // in_features)
    start = 0
    for part, width in enumerate(output_sizes):
        for first in range(start, start + width, most):
            yield part, slice(first, min(first + most, start + width))
        start += width


def _floats(codes: Tensor, quant: QuantParams, columns: slice, dtype: torch.dtype) -> Tensor:
    """Return some columns of a quantized weight as floats."""
    if codes.dtype != INT4:
        codes, before = codes[:, columns], 0
    else:
        # Two codes share a byte: the first byte may begin with a column that is not asked for.
        codes, before = codes[:, columns.start // 2 : (columns.stop + 1) // 2], columns.start % 2
    wider = slice(columns.start - before, columns.stop)
    zeros = None if quant.zeros is None else quant.zeros[:, wider]
    return dequantized(codes, quant.scales[:, wider], zeros, quant.group_size, dtype)[:, before:]
