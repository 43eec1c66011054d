"""Who computes an operation: checks of its operands, then the kernel of the device."""

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from teal.foundation.errors import UserError, unknown_name
from teal.kernels import reference

try:
    from teal.kernels import triton_launch
except ImportError:
    triton_launch = None  # type: ignore[assignment]
try:
    from teal.kernels import cpu_gemv
except ImportError:
    cpu_gemv = None  # type: ignore[assignment]

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
    _check(x, weight, None if scale is None else scale[None], shift, bias)
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
    _check(x, weight, scale, shift, bias, gain)
    _check_parts(x, weight, thresholds, widths, scale, residual)
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
    widths = _gated_widths(weight, activation)
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
    if not _has_kernel(x, 1):
        return _gemv(x, weight, threshold, scale, shift, bias, product=reference.sparse_gemv)
    scales = None if scale is None else scale[None]
    widths = [weight.shape[-1]]
    _check(x, weight, scales, shift, bias)
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
    if not _has_kernel(x, len(widths)):
        return _parts(
            x, weight, thresholds, widths, scale, shift, bias, residual, gain, epsilon,
            product=reference.sparse_gemv,
        )  # fmt: skip
    _check(x, weight, scale, shift, bias, gain)
    _check_parts(x, weight, thresholds, widths, scale, residual)
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
    if not _has_kernel(x, 2):
        return _gated(
            x, weight, thresholds, activation, scale, shift, bias, gain, epsilon,
            product=reference.sparse_gemv,
        )  # fmt: skip
    widths = _gated_widths(weight, activation)
    _check(x, weight, scale, shift, bias, gain)
    _check_parts(x, weight, thresholds, widths, scale, None)
    return _launch(
        x, weight, thresholds, widths, activation=activation, scale=scale, shift=shift, bias=bias,
        gain=gain, epsilon=epsilon,
    )  # fmt: skip


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


def _has_kernel(x: Tensor, parts: int) -> bool:
    if triton_launch is None:
        _say_once("Triton is not installed: sparse products on the GPU run dense.")
        return False
    rows = math.prod(x.shape[:-1])
    fits = 1 <= rows <= triton_launch.MAX_ROWS and 1 <= parts <= triton_launch.MAX_PARTS
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
    if cpu_gemv is None or x.dtype not in cpu_gemv.ELEMENTS:
        return reference.sparse_gemv(x, weight, threshold, scale, shift, bias)
    return cpu_gemv.sparse_gemv(x, weight, threshold, scale, shift, bias)


@functools.cache
def _say_once(message: str) -> None:
    _log.info(message)


def _check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None = None,
) -> None:
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[0]:
        raise UserError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}. "
            "Give x (..., in_features) and a channel-major weight (in_features, out_features)."
        )
    if x.dtype != weight.dtype or x.device != weight.device:
        raise UserError(
            f"x is {x.dtype} on {x.device}, weight {weight.dtype} on {weight.device}. "
            "Bring both to one dtype and device."
        )
    in_features, out_features = weight.shape
    _check_shape("scale", None if scale is None else scale[0], in_features)
    _check_shape("shift", shift, in_features)
    _check_shape("bias", bias, out_features)
    _check_shape("gain", gain, in_features)


def _check_shape(name: str, vector: Tensor | None, size: int) -> None:
    if vector is not None and vector.shape != (size,):
        raise UserError(f"{name} has shape {tuple(vector.shape)}. Give ({size},).")


def _check_parts(
    x: Tensor,
    weight: Tensor,
    thresholds: Sequence[float],
    widths: Sequence[int],
    scale: Tensor | None,
    residual: Tensor | None,
) -> None:
    scales = len(widths) if scale is None else len(scale)
    if not widths or not len(thresholds) == len(widths) == scales:
        raise UserError(
            f"{len(widths)} widths, {len(thresholds)} thresholds and scales for {scales} parts. "
            "Give one of each per part."
        )
    if min(widths) < 1 or sum(widths) != weight.shape[1]:
        raise UserError(
            f"Widths {list(widths)} do not sum to the {weight.shape[1]} columns of the weight. "
            "Give the columns of every part."
        )
    shape = (*x.shape[:-1], weight.shape[1])
    if residual is not None and residual.shape != shape:
        raise UserError(f"residual has shape {tuple(residual.shape)}. Give {shape}.")


def _gated_widths(weight: Tensor, activation: str) -> list[int]:
    if activation not in reference.GATES:
        raise unknown_name("activation", activation, reference.GATES)
    if weight.ndim != 2 or weight.shape[1] % 2:
        raise UserError(
            f"The weight has shape {tuple(weight.shape)}. "
            "Give gate and up beside each other, (in_features, 2 · intermediate_size)."
        )
    return [weight.shape[1] // 2] * 2


def _composed(product: reference.Product) -> Mapping[str, Callable[..., Tensor]]:
    return {
        "sparse_gemv": functools.partial(_gemv, product=product),
        "sparse_parts": functools.partial(_parts, product=product),
        "sparse_gated": functools.partial(_gated, product=product),
    }


# By dispatch key of torch; the first serves every device that has no kernels of its own.
IMPLEMENTATIONS: Mapping[str, Mapping[str, Callable[..., Tensor]]] = {
    "CompositeExplicitAutograd": _composed(reference.sparse_gemv),
    "CPU": _composed(_cpu_product),
    "CUDA": {
        "sparse_gemv": _cuda_gemv,
        "sparse_parts": _cuda_parts,
        "sparse_gated": _cuda_gated,
    },
}
