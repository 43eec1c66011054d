"""Who computes an operation on a quantized weight: checks, then the kernel of the device."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from teal.kernels.checks import check_quantized
from teal.kernels.dispatch import by_reference, gated_operands, has_numba
from teal.kernels.operands import Grid, Operands
from teal.kernels.reference_quantized import dequantized

try:
    from teal.kernels import cuda_gemv
except ImportError:
    cuda_gemv = None  # type: ignore[assignment]
try:
    from teal.kernels import cpu_quantized
except ImportError:
    cpu_quantized = None  # type: ignore[assignment]

Compute = Callable[[Operands, Grid], Tensor]


def _parts(
    compute: Compute,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    *rest: Any,
) -> Tensor:
    return _checked(compute, Operands(x, codes, *rest), Grid(scales, zeros, group_size))


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
    return _checked(compute, operands, Grid(scales, zeros, group_size))


def _checked(compute: Compute, operands: Operands, grid: Grid) -> Tensor:
    check_quantized(operands, grid)
    return compute(operands, grid)


def _by_reference(operands: Operands, grid: Grid) -> Tensor:
    """Compute with the weight as floats in the dtype of `x`."""
    weight = dequantized(operands.weight, *grid, operands.x.dtype)
    return by_reference(operands._replace(weight=weight))


def _on_cuda(operands: Operands, grid: Grid) -> Tensor:
    if cuda_gemv is not None and cuda_gemv.can_compute(operands, grid):
        return cuda_gemv.compute(operands, grid)
    return _by_reference(operands, grid)


def _on_cpu(operands: Operands, grid: Grid) -> Tensor:
    if has_numba() and cpu_quantized.can_compute(operands, grid):
        return cpu_quantized.compute(operands, grid)
    if has_numba() and cpu_quantized.can_dequantize(operands, grid):
        return by_reference(operands._replace(weight=cpu_quantized.dequantized(operands, grid)))
    return _by_reference(operands, grid)


def _products(compute: Compute) -> Mapping[str, Callable[..., Tensor]]:
    forms = {"quantized_parts": _parts, "quantized_gated": _gated}
    return {name: functools.partial(form, compute) for name, form in forms.items()}


# By dispatch key of torch; the first serves every device that has no kernels of its own.
IMPLEMENTATIONS: Mapping[str, Mapping[str, Callable[..., Tensor]]] = {
    "CompositeExplicitAutograd": _products(_by_reference),
    "CPU": _products(_on_cpu),
    "CUDA": _products(_on_cuda),
}
