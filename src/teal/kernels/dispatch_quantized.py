"""Who computes an operation on a quantized weight: checks, then the kernel of the device."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from teal.kernels.checks import check_quantized
from teal.kernels.dispatch import finished, gated_operands, has_numba, normed, numba_backend
from teal.kernels.operands import Operands, QuantParams
from teal.kernels.reference.matmul import sparse_gemv
from teal.kernels.reference.quantized import INT4, dequantized

try:
    from teal.kernels.cuda import gemv as cuda_gemv
except ImportError:
    cuda_gemv = None  # type: ignore[assignment]

Compute = Callable[[Operands, QuantParams], Tensor]

# Of a weight at a time: prefill shall not need much memory beside weights of few bits.
_MOST_FLOATS = 1 << 22


def _parts(
    compute: Compute,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    *rest: Any,
) -> Tensor:
    return _checked(compute, Operands(x, codes, *rest), QuantParams(scales, zeros, group_size))


def _gated(
    compute: Compute,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    *rest: Any,
) -> Tensor:
    operands = gated_operands(x, codes, scales.shape, *rest)
    return _checked(compute, operands, QuantParams(scales, zeros, group_size))


def _checked(compute: Compute, operands: Operands, quant: QuantParams) -> Tensor:
    check_quantized(operands, quant)
    return compute(operands, quant)


def _by_reference(operands: Operands, quant: QuantParams) -> Tensor:
    """Compute with the weight as floats in the dtype of `x`, of some columns at a time."""
    o, x = operands, normed(operands)
    products = []
    for part, columns in _pieces(o.output_sizes, len(o.weight)):
        weight = _floats(o.weight, quant, columns, x.dtype)
        score_scale = None if o.score_scale is None else o.score_scale[part]
        bias = None if o.bias is None else o.bias[columns]
        products.append(sparse_gemv(x, weight, o.thresholds[part], score_scale, o.shift, bias))
    return finished(torch.cat(products, dim=-1), o)


def _pieces(output_sizes: Sequence[int], in_features: int) -> Iterator[tuple[int, slice]]:
    """Yield parts and columns of each that are few enough to be held as floats."""
    most = max(1, _MOST_FLOATS // in_features)
    start = 0
    for part, width in enumerate(output_sizes):
        for first in range(start, start + width, most):
            yield part, slice(first, min(first + most, start + width))
        start += width


def _floats(codes: Tensor, quant: QuantParams, columns: slice, dtype: torch.dtype) -> Tensor:
    """Return some columns of a weight as floats."""
    if codes.dtype != INT4:
        codes, before = codes[:, columns], 0
    else:
        # Two in a byte: the first may be one that is not asked for.
        codes, before = codes[:, columns.start // 2 : (columns.stop + 1) // 2], columns.start % 2
    wider = slice(columns.start - before, columns.stop)
    zeros = None if quant.zeros is None else quant.zeros[:, wider]
    return dequantized(codes, quant.scales[:, wider], zeros, quant.group_size, dtype)[:, before:]


def _on_cuda(operands: Operands, quant: QuantParams) -> Tensor:
    if cuda_gemv is not None and cuda_gemv.can_compute(operands, quant):
        return cuda_gemv.compute(operands, quant)
    return _by_reference(operands, quant)


def _on_cpu(operands: Operands, quant: QuantParams) -> Tensor:
    if has_numba() and numba_backend.can_run(operands, quant) is None:
        return numba_backend.run(operands, quant)
    return _by_reference(operands, quant)


def _products(compute: Compute) -> Mapping[str, Callable[..., Tensor]]:
    forms = {"quantized_linear": _parts, "quantized_glu": _gated}
    return {name: functools.partial(form, compute) for name, form in forms.items()}


# By dispatch key of torch; the first serves every device that has no kernels of its own.
IMPLEMENTATIONS: Mapping[str, Mapping[str, Callable[..., Tensor]]] = {
    "CompositeExplicitAutograd": _products(_by_reference),
    "CPU": _products(_on_cpu),
    "CUDA": _products(_on_cuda),
}
