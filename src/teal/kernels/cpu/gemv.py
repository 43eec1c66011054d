"""Launches the CPU kernel of products with float weights, and shares the launch with others."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from teal.foundation.errors import UserError
from teal.kernels.cpu.gemv_kernel import GELU, LINEAR, SILU, product
from teal.kernels.cpu.threads import run_threaded, thread_count
from teal.kernels.operands import Operands, padded_thresholds
from teal.kernels.reference import matmul as reference

# numba has neither bfloat16 nor float16. The type of these zeros tells a kernel how to read bits.
ELEMENTS = {
    torch.bfloat16: np.uint16(0),
    torch.float16: np.int16(0),
    torch.float32: np.float32(0),
}
# With more rows, nearly every channel is kept by one of them, and torch's dense product is faster.
MAX_ROWS = 8

_FORMS = {None: LINEAR, "silu": SILU, "gelu_pytorch_tanh": GELU}


def compute(operands: Operands) -> Tensor:
    """Multiply the kept activations with the weight, accumulating in float32.

    Same meaning as the reference, but rounded once, after bias, activation and residual. The order
    of sums, and so the result, does not depend on the number of threads. A weight row is read once
    for all rows of `x`, if any of them keeps its channel.

    Args:
        operands: Checked operands for which `NumbaBackend.can_run` returns `None`.

    Returns:
        (..., out_features), or (..., out_features / 2) with an activation, in the dtype of `x`.

    Raises:
        UserError: The columns of the weight do not lie side by side.
    """
    weight = operands.weight
    if weight.stride(1) != 1 and weight.shape[1] > 1:
        raise UserError(
            f"The weight has strides {weight.stride()}. Its columns must lie side by side: "
            "make it channel-major with weight.contiguous()."
        )
    return launch(product, operands, (weight.data_ptr(), weight.stride(0)), weight.shape)


def launch(
    kernel: Callable[..., None],
    operands: Operands,
    weight: tuple[object, ...],
    shape: Sequence[int],
) -> Tensor:
    """Call a compiled product.

    Args:
        kernel: `gemv_kernel.product`, or another that differs in the form of the weight only.
        operands: Operands of the product; their weight is not read.
        weight: The weight in the form that the kernel takes.
        shape: in_features and out_features.

    Returns:
        (..., out_features), or (..., out_features / 2) with an activation, in the dtype of `x`.
    """
    o = operands
    x, norm_weight, score_scale = o.x, o.norm_weight, o.score_scale
    thresholds, output_sizes = o.thresholds, o.output_sizes
    dtype = x.dtype
    if norm_weight is not None and norm_weight.dtype != dtype:
        x, norm_weight = reference.rms_norm(x, norm_weight, o.eps), None
    if reference.keeps_everything(thresholds):
        thresholds, score_scale = [-1.0], None
    in_features, out_features = shape
    if score_scale is None and min(thresholds) == max(thresholds):
        # One mask serves all parts.
        thresholds, output_sizes = thresholds[:1], [out_features]
    threads = thread_count(in_features, out_features)
    # These names keep copies alive until the kernel is done.
    x, bias, residual = x.contiguous(), _contiguous(o.bias), _contiguous(o.residual)
    norm_weight, score_scale = _contiguous(norm_weight), _float(score_scale)
    shift = _float(o.shift)
    columns = out_features if o.activation is None else out_features // 2
    result = torch.empty((*o.x.shape[:-1], columns), dtype=dtype)
    run_threaded(
        threads,
        kernel,
        ELEMENTS[dtype],
        (x.data_ptr(), _address(norm_weight), _address(score_scale), _address(shift)),
        weight,
        (_address(bias), _address(residual), result.data_ptr()),
        (o.rows, in_features, out_features),
        (len(output_sizes), *output_sizes, 0, 0)[:4],
        padded_thresholds(thresholds),
        _FORMS[o.activation],
        o.eps,
        threads,
    )
    return result


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
