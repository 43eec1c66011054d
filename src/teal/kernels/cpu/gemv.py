"""The products on the CPU: which the compiled kernel computes, and its call."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from teal.foundation.errors import UserError
from teal.kernels.cpu.gemv_kernel import BESIDE, GELU, SILU, product
from teal.kernels.cpu.threads import run_threaded, thread_count
from teal.kernels.operands import Operands
from teal.kernels.reference import matmul as reference

# numba knows neither bfloat16 nor float16: the type of a zero tells the kernel how to read bits.
ELEMENTS = {
    torch.bfloat16: np.uint16(0),
    torch.float16: np.int16(0),
    torch.float32: np.float32(0),
}
# With more rows most weight rows are kept by one of them, and torch's product is the faster one.
MAX_ROWS = 8
MAX_PARTS = 3

_FORMS = {None: BESIDE, "silu": SILU, "gelu_pytorch_tanh": GELU}


def can_compute(operands: Operands) -> bool:
    """Say whether the kernel computes this, or the reference has to."""
    return (
        operands.x.dtype in ELEMENTS
        and len(operands.output_sizes) <= MAX_PARTS
        and operands.rows <= MAX_ROWS
    )


def compute(operands: Operands) -> Tensor:
    """Multiply the kept activations with the weight, accumulating in float32.

    Same meaning as the reference; rounded once, after bias, activation and residual. The result
    has the same bits whatever the number of threads: the order of sums does not depend on it. A
    strip is read when any row keeps its channel, once for all rows.

    Args:
        operands: Checked, and such that `can_compute`.

    Returns:
        (..., out_features), or (..., out_features / 2) with an activation, in the dtype of `x`.
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
        kernel: `cpu_compiled.product` or another that takes the same, but for the weight.
        operands: As in `compute`; of the weight nothing is read here.
        weight: How the kernel gets the weight.
        shape: Its in_features and out_features.

    Returns:
        As `compute`.
    """
    (
        x,
        _,
        thresholds,
        output_sizes,
        score_scale,
        shift,
        bias,
        residual,
        norm_weight,
        eps,
        activation,
        _,
    ) = operands
    dtype = x.dtype
    if norm_weight is not None and norm_weight.dtype != dtype:
        x, norm_weight = reference.rms_norm(x, norm_weight, eps), None
    if reference.keeps_everything(thresholds):
        thresholds, score_scale = [-1.0], None
    in_features, out_features = shape
    if score_scale is None and min(thresholds) == max(thresholds):
        # One list of kept channels serves all parts.
        thresholds, output_sizes = thresholds[:1], [out_features]
    rows = operands.rows
    threads = thread_count(in_features, out_features)
    # Copies have to live until the kernel is done.
    x, bias, residual = x.contiguous(), _contiguous(bias), _contiguous(residual)
    norm_weight, score_scale, shift = _contiguous(norm_weight), _float(score_scale), _float(shift)
    columns = out_features if activation is None else out_features // 2
    result = torch.empty((*operands.x.shape[:-1], columns), dtype=dtype)
    run_threaded(
        threads,
        kernel,
        ELEMENTS[dtype],
        (_address(x), _address(norm_weight), _address(score_scale), _address(shift)),
        weight,
        (_address(bias), _address(residual), result.data_ptr()),
        (rows, in_features, out_features),
        (len(output_sizes), *output_sizes, 0, 0)[:4],
        (*thresholds, 0.0, 0.0)[:3],
        _FORMS[activation],
        eps,
        threads,
    )
    return result


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
