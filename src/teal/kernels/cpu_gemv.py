"""The sparse product on the CPU: what is checked, and the call of the compiled kernel."""

import math

import numpy as np
import torch
from torch import Tensor

from teal.foundation.errors import UserError
from teal.kernels.cpu_compiled import product
from teal.kernels.cpu_threads import run_threaded, thread_count

# numba knows neither bfloat16 nor float16: the type of a zero tells the kernel how to read bits.
ELEMENTS = {
    torch.bfloat16: np.uint16(0),
    torch.float16: np.int16(0),
    torch.float32: np.float32(0),
}


def sparse_gemv(
    x: Tensor,
    weight: Tensor,
    threshold: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Multiply the kept activations with `weight`, accumulating in float32.

    Same meaning as `reference.sparse_gemv`; rounded once, after bias and residual. The result has
    the same bits whatever the number of threads: each column is summed by one of them, in the
    order of the channels.

    Args:
        x: Activations, (..., in_features), float32, bfloat16 or float16. A few rows: one strip is
            read when any row keeps its channel.
        weight: Channel-major weight, (in_features, out_features), in the dtype of `x`, with unit
            stride along out_features.
        threshold: Cut-off in score units, compared in float32. Below zero keeps every channel.
        scale: Score weight per channel, (in_features,).
        shift: Centre per channel, (in_features,).
        bias: Added to the product, (out_features,), in the dtype of `x`.
        residual: Added to the product, (..., out_features), in the dtype of `x`.

    Returns:
        Product, (..., out_features), in the dtype of `x`.

    Raises:
        UserError: Shapes, dtypes, devices or strides do not fit together.
    """
    in_features, out_features = _check_weight(x, weight)
    shape = (*x.shape[:-1], out_features)
    x = x.contiguous()
    scale = _vector("scale", scale, in_features)
    shift = _vector("shift", shift, in_features)
    bias = _addend("bias", bias, (out_features,), x.dtype)
    residual = _addend("residual", residual, shape, x.dtype)
    result = torch.empty(shape, dtype=x.dtype)
    threads = thread_count(in_features, out_features)
    run_threaded(
        threads,
        product,
        ELEMENTS[x.dtype],
        (x.data_ptr(), _address(scale), _address(shift)),
        (weight.data_ptr(), weight.stride(0)),
        (_address(bias), _address(residual), result.data_ptr()),
        (math.prod(shape[:-1]), in_features, out_features),
        threshold,
        threads,
    )
    return result


def _check_weight(x: Tensor, weight: Tensor) -> tuple[int, int]:
    if x.dtype not in ELEMENTS or x.dtype != weight.dtype:
        raise UserError(
            f"x is {x.dtype} and weight {weight.dtype}. Give both as one of "
            "float32, bfloat16, float16."
        )
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[0]:
        raise UserError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}. "
            "Give x (..., in_features) and a channel-major weight (in_features, out_features)."
        )
    if weight.stride(1) != 1 and weight.shape[1] > 1:
        raise UserError(
            f"The weight has strides {weight.stride()}. Its columns must lie side by side: "
            "make it channel-major with weight.contiguous()."
        )
    if not (x.is_cpu and weight.is_cpu):
        raise UserError(f"x is on {x.device} and weight on {weight.device}. Move both to the CPU.")
    return weight.shape[0], weight.shape[1]


def _vector(name: str, vector: Tensor | None, in_features: int) -> Tensor | None:
    if vector is None:
        return None
    return _addend(name, vector.float(), (in_features,), torch.float32)


def _addend(
    name: str, addend: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor | None:
    if addend is None:
        return None
    if tuple(addend.shape) != shape or addend.dtype != dtype or not addend.is_cpu:
        raise UserError(
            f"{name} is {addend.dtype} {tuple(addend.shape)} on {addend.device}. "
            f"Give {dtype} {shape} on the CPU."
        )
    return addend.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
