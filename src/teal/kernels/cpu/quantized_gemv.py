"""The products with quantized weights on the CPU: which the kernel computes, and its call."""

from torch import Tensor

from teal.kernels.cpu import dequantize
from teal.kernels.cpu import gemv as cpu_gemv
from teal.kernels.cpu.gemv import ELEMENTS
from teal.kernels.cpu.quantized_kernel import FP8_CODES, INT4_CODES, INT8_CODES, Weight, product
from teal.kernels.operands import Operands, QuantParams
from teal.kernels.reference.quantized import FP8, INT4, INT8

_CODES = {FP8: FP8_CODES, INT4: INT4_CODES, INT8: INT8_CODES}


def can_compute(operands: Operands, quant: QuantParams) -> bool:
    """Say whether the kernel computes this, or the product has to be one with floats."""
    return cpu_gemv.can_compute(operands) and can_dequantize(operands, quant)


def can_dequantize(operands: Operands, quant: QuantParams) -> bool:
    """Say whether the floats can be had from the kernel, or only from the reference."""
    tensors = (operands.weight, quant.scales, quant.zeros)
    return (
        operands.x.dtype in ELEMENTS
        and quant.scales.dtype in ELEMENTS
        and all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    )


def compute(operands: Operands, quant: QuantParams) -> Tensor:
    """Multiply the kept activations with a quantized weight, accumulating in float32.

    Codes are read exactly, the sum of a group is scaled once, and the result is rounded once, after
    bias, activation and residual. It has the same bits whatever the number of threads.

    Args:
        operands: Checked, with codes as the weight; such that `can_compute`. Codes of fp8 that are
            no number count as 480.
        quant: What the codes stand for.

    Returns:
        (..., out_features), or (..., out_features / 2) with an activation, in the dtype of `x`.
    """
    shape = (len(operands.weight), quant.scales.shape[1])
    return cpu_gemv.launch(product, operands, _addresses(operands.weight, quant), shape)


def dequantized(operands: Operands, quant: QuantParams) -> Tensor:
    """Return the weight as floats, such that `can_dequantize`.

    Returns:
        (in_features, out_features), in the dtype of `x`, bit-equal to the reference.
    """
    shape = (len(operands.weight), quant.scales.shape[1])
    weight = _addresses(operands.weight, quant)
    return dequantize.dequantized(weight, shape, operands.x.dtype)


def _addresses(codes: Tensor, quant: QuantParams) -> Weight:
    return (
        codes.data_ptr(),
        quant.scales.data_ptr(),
        0 if quant.zeros is None else quant.zeros.data_ptr(),
        codes.shape[1],
        _CODES[codes.dtype],
        quant.group_size,
        ELEMENTS[quant.scales.dtype],
    )
