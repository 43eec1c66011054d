"""Who computes an operation: checks of its operands, then the kernel of the device."""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teal.kernels.checks import check_attend, check_lm_head, check_product, glu_output_sizes
from teal.kernels.operands import Operands
from teal.kernels.reference import attention as reference_attention
from teal.kernels.reference import matmul as reference

try:
    from teal.kernels.triton import attention as triton_attention
    from teal.kernels.triton import gemv as triton_gemv
except ImportError:
    triton_gemv = None  # type: ignore[assignment]
try:
    from teal.kernels.cuda import gemv as cuda_gemv
except ImportError:
    cuda_gemv = None  # type: ignore[assignment]
try:
    from teal.kernels.cpu import attention as cpu_attention
    from teal.kernels.cpu import gemv as cpu_gemv
    from teal.kernels.cpu import lm_head
    from teal.kernels.cpu.backend import NumbaBackend

    numba_backend = NumbaBackend()
except ImportError:
    cpu_gemv = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

Compute = Callable[[Operands], Tensor]


def _gemv(
    compute: Compute,
    x: Tensor,
    weight: Tensor,
    threshold: float,
    score_scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    scales = None if score_scale is None else score_scale[None]
    return _checked(
        compute, Operands(x, weight, [threshold], weight.shape[1:], scales, shift, bias)
    )


def _parts(compute: Compute, *operands: Any) -> Tensor:
    return _checked(compute, Operands(*operands))


def _gated(compute: Compute, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return _checked(compute, gated_operands(x, weight, weight.shape, *rest))


def gated_operands(
    x: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    thresholds: Sequence[float],
    activation: str,
    score_scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Operands:
    """Return the operands of gate and up from the arguments of an operation.

    Args:
        x: As `ops.sparse_glu`, and so the rest.
        weight: Floats or codes.
        shape: Of the weight as floats.
        thresholds: Of gate and of up.
        activation: Of the gate.
        score_scale: Score weights.
        shift: Centre per channel.
        bias: Added to the products.
        norm_weight: Of an RMSNorm in front.
        eps: Of that norm.

    Raises:
        UserError: The activation is unknown, or the weight is not two halves.
    """
    output_sizes = glu_output_sizes(shape, activation)
    return Operands(
        x,
        weight,
        thresholds,
        output_sizes,
        score_scale,
        shift,
        bias,
        None,
        norm_weight,
        eps,
        activation,
    )


def _checked(compute: Compute, operands: Operands) -> Tensor:
    check_product(operands)
    return compute(operands)


def by_reference(operands: Operands) -> Tensor:
    """Compute a product in plain PyTorch."""
    o = operands
    parts = reference.sparse_linear(
        normed(o), o.weight, o.thresholds, o.output_sizes, o.score_scale, o.shift, o.bias
    )
    return finished(parts, o)


def normed(operands: Operands) -> Tensor:
    """Return the activations that are multiplied."""
    x, norm_weight = operands.x, operands.norm_weight
    return x if norm_weight is None else reference.rms_norm(x, norm_weight, operands.eps)


def finished(parts: Tensor, operands: Operands) -> Tensor:
    """Return the result of a product from its parts beside each other."""
    residual, activation = operands.residual, operands.activation
    parts = parts if residual is None else parts + residual
    return parts if activation is None else reference.gate_and_up(parts, activation)


def _on_cuda(operands: Operands) -> Tensor:
    if cuda_gemv is not None and cuda_gemv.can_compute(operands, None):
        return cuda_gemv.compute(operands)
    if not _has_triton_kernel(operands):
        return by_reference(operands)
    x = operands.x
    contiguous: Iterator[Any] = (
        operand.contiguous() if isinstance(operand, Tensor) else operand
        for operand in operands._replace(x=x.reshape(-1, x.shape[-1]))
    )
    with torch.cuda.device(x.device):
        result = triton_gemv.launch(Operands(*contiguous))
    return result.view(*x.shape[:-1], result.shape[-1])


def _has_triton_kernel(operands: Operands) -> bool:
    if triton_gemv is None:
        _say_once("Triton is not installed: some products skip nothing. Try: pip install triton")
        return False
    return (
        not reference.keeps_everything(operands.thresholds)
        and 1 <= operands.rows <= triton_gemv.MAX_ROWS
        and len(operands.output_sizes) <= triton_gemv.MAX_PARTS
        and operands.x.dtype in triton_gemv.DTYPES
    )


def _on_cpu(operands: Operands) -> Tensor:
    if has_numba() and numba_backend.can_run(operands, None) is None:
        return numba_backend.run(operands, None)
    return by_reference(operands)


def has_numba() -> bool:
    """Say whether there are CPU kernels; tell once that there are none."""
    if cpu_gemv is None:
        _say_once("numba is not installed: on a CPU nothing is skipped. Try: pip install numba")
    return cpu_gemv is not None


@functools.cache
def _say_once(message: str) -> None:
    _log.warning(message)


def _attend(qkv: Tensor, *tensors: Tensor, **options: Any) -> Tensor:
    check_attend(qkv, *tensors)
    return reference_attention.attend(qkv.contiguous(), *tensors, **options)


def _attend_on_cpu(qkv: Tensor, *tensors: Tensor, **options: Any) -> Tensor:
    check_attend(qkv, *tensors)
    if has_numba() and qkv.dtype in cpu_gemv.ELEMENTS:
        return cpu_attention.attend(qkv.contiguous(), *tensors, **options)
    return reference_attention.attend(qkv.contiguous(), *tensors, **options)


def _attend_on_cuda(qkv: Tensor, *tensors: Tensor, **options: Any) -> Tensor:
    check_attend(qkv, *tensors)
    keys, cosines = tensors[0], tensors[3]
    if triton_gemv is None or not triton_attention.fits(keys.shape[-1], cosines, qkv.dtype):
        return reference_attention.attend(qkv.contiguous(), *tensors, **options)
    with torch.cuda.device(qkv.device):
        return triton_attention.attend(qkv.contiguous(), *tensors, **options)


def _lm_head_gemv(x: Tensor, weight: Tensor) -> Tensor:
    check_lm_head(x, weight)
    return F.linear(x, weight)


def _lm_head_gemv_on_cpu(x: Tensor, weight: Tensor) -> Tensor:
    check_lm_head(x, weight)
    if has_numba() and lm_head.can_compute(x, weight):
        return lm_head.lm_head_gemv(x, weight)
    return F.linear(x, weight)


def _products(compute: Compute) -> Mapping[str, Callable[..., Tensor]]:
    forms = {"sparse_gemv": _gemv, "sparse_linear": _parts, "sparse_glu": _gated}
    return {name: functools.partial(form, compute) for name, form in forms.items()}


# By dispatch key of torch; the first serves every device that has no kernels of its own.
IMPLEMENTATIONS: Mapping[str, Mapping[str, Callable[..., Tensor]]] = {
    "CompositeExplicitAutograd": {
        **_products(by_reference),
        "attend": _attend,
        "lm_head_gemv": _lm_head_gemv,
    },
    "CPU": {
        **_products(_on_cpu),
        "attend": _attend_on_cpu,
        "lm_head_gemv": _lm_head_gemv_on_cpu,
    },
    "CUDA": {**_products(_on_cuda), "attend": _attend_on_cuda},
}
