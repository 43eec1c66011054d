"""The products with quantized weights on the CPU: which the kernel computes, and its call."""

from torch import Tensor

from teal.kernels import cpu_gemv
from teal.kernels.cpu_gemv import ELEMENTS
from teal.kernels.cpu_quantized_compiled import FP8_CODES, INT4_CODES, INT8_CODES, product
from teal.kernels.operands import Grid, Operands
from teal.kernels.reference_quantized import FP8, INT4, INT8

_CODES = {FP8: FP8_CODES, INT4: INT4_CODES, INT8: INT8_CODES}


def can_compute(operands: Operands, grid: Grid) -> bool:
    """Say whether the kernel computes this, or the reference has to."""
    tensors = (operands.weight, grid.scales, grid.zeros)
    return (
        cpu_gemv.can_compute(operands)
        and grid.scales.dtype in ELEMENTS
        and all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    )


def compute(operands: Operands, grid: Grid) -> Tensor:
    """Multiply the kept activations with a quantized weight, accumulating in float32.

    Codes are read exactly, the sum of a group is scaled once, and the result is rounded once, after
    bias, activation and residual. It has the same bits whatever the number of threads.

    Args:
        operands: Checked, with codes as the weight; such that `can_compute`. Codes of fp8 that are
            no number count as 480.
        grid: What the codes stand for.

    Returns:
        (..., out_features), or (..., out_features / 2) with an activation, in the dtype of `x`.
    """
    codes = operands.weight
    scales, zeros, group_size = grid
    weight = (
        codes.data_ptr(),
        scales.data_ptr(),
        0 if zeros is None else zeros.data_ptr(),
        codes.shape[1],
        _CODES[codes.dtype],
        group_size,
        ELEMENTS[scales.dtype],
    )
    return cpu_gemv.launch(product, operands, weight, (len(codes), scales.shape[1]))
