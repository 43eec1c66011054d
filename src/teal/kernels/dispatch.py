"""Who computes an operation: checks of its operands, then the kernel of the device."""

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from teal.kernels import reference, reference_attention
from teal.kernels.checks import check_attend, check_parts, check_product, gated_widths

try:
    from teal.kernels import triton_launch
except ImportError:
    triton_launch = None  # type: ignore[assignment]
try:
    from teal.kernels import cpu_gemv
except ImportError:
    cpu_gemv = None  # type: ignore[assignment]

# With more rows most strips are kept by one of them, and torch's product is the faster one.
_CPU_ROWS = 8

_log = logging.getLogger(__name__)


def _gemv(
    x: Tensor,
    weight: Tensor,
    threshold: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    product: reference.Product,
) -> Tensor:
    check_product(x, weight, None if scale is None else scale[None], shift, bias)
    return product(x, weight, threshold, scale, shift, bias)


def _parts(
    x: Tensor,
    weight: Tensor,
    thresholds: Sequence[float],
    widths: Sequence[int],
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gain: Tensor | None = None,
    epsilon: float = 0.0,
    *,
    product: reference.Product,
) -> Tensor:
    check_product(x, weight, scale, shift, bias, gain)
    check_parts(x, weight, thresholds, widths, scale, residual)
    x = x if gain is None else reference.rms_norm(x, gain, epsilon)
    result = reference.sparse_parts(
        x, weight, thresholds, widths, scale, shift, bias, product=product
    )
    return result if residual is None else result + residual


def _gated(
    x: Tensor,
    weight: Tensor,
    thresholds: Sequence[float],
    activation: str,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    epsilon: float = 0.0,
    *,
    product: reference.Product,
) -> Tensor:
    widths = gated_widths(weight, activation)
    both = _parts(
        x, weight, thresholds, widths, scale, shift, bias, None, gain, epsilon, product=product
    )
    return reference.gate_and_up(both, activation)


def _cuda_gemv(
    x: Tensor,
    weight: Tensor,
    threshold: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    if not _has_kernel(x, [threshold]):
        return _gemv(x, weight, threshold, scale, shift, bias, product=reference.sparse_gemv)
    scales = None if scale is None else scale[None]
    widths = [weight.shape[-1]]
    check_product(x, weight, scales, shift, bias)
    return _launch(x, weight, [threshold], widths, scale=scales, shift=shift, bias=bias)


def _cuda_parts(
    x: Tensor,
    weight: Tensor,
    thresholds: Sequence[float],
    widths: Sequence[int],
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gain: Tensor | None = None,
    epsilon: float = 0.0,
) -> Tensor:
    if not _has_kernel(x, thresholds):
        return _parts(
            x, weight, thresholds, widths, scale, shift, bias, residual, gain, epsilon,
            product=reference.sparse_gemv,
        )  # fmt: skip
    check_product(x, weight, scale, shift, bias, gain)
    check_parts(x, weight, thresholds, widths, scale, residual)
    return _launch(
        x, weight, thresholds, widths, scale=scale, shift=shift, bias=bias, residual=residual,
        gain=gain, epsilon=epsilon,
    )  # fmt: skip


def _cuda_gated(
    x: Tensor,
    weight: Tensor,
    thresholds: Sequence[float],
    activation: str,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    epsilon: float = 0.0,
) -> Tensor:
    if not _has_kernel(x, thresholds):
        return _gated(
            x, weight, thresholds, activation, scale, shift, bias, gain, epsilon,
            product=reference.sparse_gemv,
        )  # fmt: skip
    widths = gated_widths(weight, activation)
    check_product(x, weight, scale, shift, bias, gain)
    check_parts(x, weight, thresholds, widths, scale, None)
    return _launch(
        x, weight, thresholds, widths, activation=activation, scale=scale, shift=shift, bias=bias,
        gain=gain, epsilon=epsilon,
    )  # fmt: skip


def _attend(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    cosines: Tensor,
    sines: Tensor,
    **options: Any,
) -> Tensor:
    check_attend(qkv, keys, values, positions, cosines, sines)
    return reference_attention.attend(
        qkv.contiguous(), keys, values, positions, cosines, sines, **options
    )


def _launch(
    x: Tensor, weight: Tensor, thresholds: Sequence[float], widths: Sequence[int], **rest: object
) -> Tensor:
    given = {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in rest.items()}
    with torch.cuda.device(x.device):
        result = triton_launch.launch(
            triton_launch.Operands(
                x=x.reshape(-1, x.shape[-1]).contiguous(),
                weight=weight.contiguous(),
                thresholds=thresholds,
                widths=widths,
                **given,  # type: ignore[arg-type]
            )
        )
    return result.view(*x.shape[:-1], result.shape[-1])


def _has_kernel(x: Tensor, thresholds: Sequence[float]) -> bool:
    if reference.keeps_everything(thresholds):
        return False
    if triton_launch is None:
        _say_once("Triton is not installed: sparse products on the GPU run dense.")
        return False
    rows = math.prod(x.shape[:-1])
    fits = 1 <= rows <= triton_launch.MAX_ROWS and 1 <= len(thresholds) <= triton_launch.MAX_PARTS
    return fits and x.dtype in triton_launch.DTYPES


def _cpu_product(
    x: Tensor,
    weight: Tensor,
    threshold: float,
    scale: Tensor | None,
    shift: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    if cpu_gemv is None:
        _say_once("numba is not installed: sparse products run dense. Try: pip install 'teal[cpu]'")
    many = math.prod(x.shape[:-1]) > _CPU_ROWS
    if cpu_gemv is None or many or x.dtype not in cpu_gemv.ELEMENTS:
        return reference.sparse_gemv(x, weight, threshold, scale, shift, bias)
    return cpu_gemv.sparse_gemv(x, weight, threshold, scale, shift, bias)


@functools.cache
def _say_once(message: str) -> None:
    _log.info(message)


def _composed(product: reference.Product) -> Mapping[str, Callable[..., Tensor]]:
    return {
        "sparse_gemv": functools.partial(_gemv, product=product),
        "sparse_parts": functools.partial(_parts, product=product),
        "sparse_gated": functools.partial(_gated, product=product),
        "attend": _attend,
    }


# By dispatch key of torch; the first serves every device that has no kernels of its own.
IMPLEMENTATIONS: Mapping[str, Mapping[str, Callable[..., Tensor]]] = {
    "CompositeExplicitAutograd": _composed(reference.sparse_gemv),
    "CPU": _composed(_cpu_product),
    "CUDA": {
        "sparse_gemv": _cuda_gemv,
        "sparse_parts": _cuda_parts,
        "sparse_gated": _cuda_gated,
        "attend": _attend,
    },
}
