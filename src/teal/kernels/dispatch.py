"""Who computes an operation: an ordered table of backends per device, the reference last.

Every function of `ops` arrives here. Its operands are checked once, then the first backend that
can compute it does.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from teal.kernels.backend import Backend, Candidate, NotInstalled
from teal.kernels.checks import (
    check_attend,
    check_lm_head,
    check_product,
    check_quantized,
    glu_output_sizes,
)
from teal.kernels.operands import Operands, QuantParams
from teal.kernels.reference import attention as reference_attention
from teal.kernels.reference.backend import ReferenceBackend

try:
    from teal.kernels.triton.attention import TritonAttention
    from teal.kernels.triton.gemv import TritonBackend
except ImportError:
    TritonBackend = None  # type: ignore[assignment, misc]
try:
    from teal.kernels.cuda.gemv import CudaBackend
except ImportError:
    CudaBackend = None  # type: ignore[assignment, misc]
try:
    from teal.kernels.cpu.attention import NumbaAttention
    from teal.kernels.cpu.gemv import NumbaBackend
    from teal.kernels.cpu.lm_head import NumbaHead
except ImportError:
    NumbaBackend = None  # type: ignore[assignment, misc]

_log = logging.getLogger(__name__)

# Reasons that a user can do something about are warnings; the others are only informative.
_ADVICE = {
    "numba is not installed": "on a CPU nothing is skipped. Try: pip install numba",
    "Triton is not installed": "some products skip nothing. Try: pip install triton",
}

_NUMBA = NotInstalled("numba", "numba is not installed")
_TRITON = NotInstalled("triton", "Triton is not installed")
# ROCm builds of torch call their devices "cuda" too, and do not come with NVIDIA's bindings.
_CUDA = NotInstalled(
    "cuda",
    "NVIDIA's Python bindings are not installed"
    if torch.version.hip is None
    else "it needs an NVIDIA GPU",
)

# Backends of products by torch's device type, in the order in which they are asked. The reference
# computes what none of them can, and everything on other devices.
BACKENDS: dict[str, list[Backend]] = {
    "cpu": [_NUMBA if NumbaBackend is None else NumbaBackend()],
    "cuda": [
        _CUDA if CudaBackend is None else CudaBackend(),
        _TRITON if TritonBackend is None else TritonBackend(),
    ],
}
# The same for `attend` and `lm_head_gemv`, whose arguments `can_run` and `run` take.
ATTENTION_BACKENDS: dict[str, list[Candidate]] = {
    "cpu": [_NUMBA if NumbaBackend is None else NumbaAttention()],
    "cuda": [_TRITON if TritonBackend is None else TritonAttention()],
}
LM_HEAD_BACKENDS: dict[str, list[Candidate]] = {
    "cpu": [_NUMBA if NumbaBackend is None else NumbaHead()],
}

_REFERENCE = ReferenceBackend()

AnyBackend = TypeVar("AnyBackend", bound=Candidate)


def register_backend(device_type: str, backend: Backend) -> None:
    """Put a backend before those that a type of device has.

    Args:
        device_type: `device.type` in torch, such as "cpu", "cuda", "xpu" or "mps".
        backend: Asked first from now on, for every product of every thread.
    """
    BACKENDS.setdefault(device_type, []).insert(0, backend)


def backend_for(operands: Operands, quant: QuantParams | None) -> Backend:
    """Return the backend that computes a product.

    Args:
        operands: Checked operands.
        quant: Decodes the weight; `None` for floats.
    """
    backend = _first(BACKENDS, operands.x, operands, quant)
    return _REFERENCE if backend is None else backend


def reasons(operands: Operands, quant: QuantParams | None) -> dict[str, str]:
    """Return why backends cannot compute a product, by the names of those that cannot.

    Args:
        operands: Checked operands.
        quant: Decodes the weight; `None` for floats.
    """
    backends = BACKENDS.get(operands.x.device.type, ())
    refusals = ((backend.name, backend.can_run(operands, quant)) for backend in backends)
    return {name: reason for name, reason in refusals if reason is not None}


def _first(
    backends: Mapping[str, Sequence[AnyBackend]], x: Tensor, *arguments: Any
) -> AnyBackend | None:
    """Return the first backend for the device of `x` that can run, or `None` for the reference.

    Logs once why those before it cannot.
    """
    # `x.device.type` makes a string, which takes four times as long as asking twice.
    device_type = "cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type
    chosen, refusals = None, []
    for backend in backends.get(device_type, ()):
        reason = backend.can_run(*arguments)
        if reason is None:
            chosen = backend
            break
        refusals.append((backend.name, reason))
    for name, reason in refusals:
        _log_choice(device_type, name, reason, "the reference" if chosen is None else chosen.name)
    return chosen


@functools.cache
def _log_choice(device_type: str, refused: str, reason: str, chosen: str) -> None:
    """Log why a backend is passed over, once: the cache remembers what was said."""
    if reason in _ADVICE:
        _warn(reason)
    else:
        _log.info("On %s, %s computes what %s cannot: %s", device_type, chosen, refused, reason)


@functools.cache
def _warn(reason: str) -> None:
    _log.warning("%s: %s", reason, _ADVICE[reason])


def _computed(operands: Operands, quant: QuantParams | None = None) -> Tensor:
    if quant is None:
        check_product(operands)
    else:
        check_quantized(operands, quant)
    return backend_for(operands, quant).run(operands, quant)


def _sparse_gemv(
    x: Tensor,
    weight: Tensor,
    threshold: float,
    score_scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    tuning: str = "",
) -> Tensor:
    scales = None if score_scale is None else score_scale[None]
    return _computed(
        Operands(
            x, weight, [threshold], weight.shape[1:], scales, shift, bias, None, None, 0.0, None,
            tuning,
        )
    )  # fmt: skip


def _sparse_linear(
    x: Tensor,
    weight: Tensor,
    thresholds: Sequence[float],
    output_sizes: Sequence[int],
    score_scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    tuning: str = "",
    *,
    quant: QuantParams | None = None,
) -> Tensor:
    operands = Operands(
        x, weight, thresholds, output_sizes, score_scale, shift, bias, residual, norm_weight, eps,
        None, tuning,
    )  # fmt: skip
    return _computed(operands, quant)


def _glu_operands(
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
    tuning: str = "",
) -> Operands:
    sizes = glu_output_sizes(shape, activation)
    return Operands(
        x, weight, thresholds, sizes, score_scale, shift, bias, None, norm_weight, eps,
        activation, tuning,
    )  # fmt: skip


def _sparse_glu(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return _computed(_glu_operands(x, weight, weight.shape, *rest))


def _quantized_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, *rest: Any
) -> Tensor:
    return _sparse_linear(x, codes, *rest, quant=QuantParams(scales, zeros, group_size))


def _quantized_glu(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, *rest: Any
) -> Tensor:
    quant = QuantParams(scales, zeros, group_size)
    return _computed(_glu_operands(x, codes, scales.shape, *rest), quant)


def _attend(qkv: Tensor, keys: Tensor, values: Tensor, *tensors: Tensor, **options: Any) -> Tensor:
    check_attend(qkv, keys, values, *tensors)
    backend = _first(ATTENTION_BACKENDS, qkv, qkv, keys, values, *tensors)
    attend = reference_attention.attend if backend is None else backend.run
    return attend(qkv.contiguous(), keys, values, *tensors, **options)


def _lm_head_gemv(x: Tensor, weight: Tensor) -> Tensor:
    check_lm_head(x, weight)
    backend = _first(LM_HEAD_BACKENDS, x, x, weight)
    return F.linear(x, weight) if backend is None else backend.run(x, weight)


# By the name of the operation in `ops`.
IMPLEMENTATIONS: Mapping[str, Callable[..., Tensor]] = {
    "sparse_gemv": _sparse_gemv,
    "sparse_linear": _sparse_linear,
    "sparse_glu": _sparse_glu,
    "quantized_linear": _quantized_linear,
    "quantized_glu": _quantized_glu,
    "attend": _attend,
    "lm_head_gemv": _lm_head_gemv,
}
