"""Launches the CPU kernels of quantized weights: the product, and dequantization."""

from torch import Tensor

from teal.kernels.cpu import dequantize, gemv
from teal.kernels.cpu.gemv import ELEMENTS
from teal.kernels.cpu.quantized_kernel import FP8_CODES, INT4_CODES, INT8_CODES, Weight, product
from teal.kernels.operands import Operands, QuantParams
from teal.kernels.reference.quantized import FP8, INT4, INT8

_CODES = {FP8: FP8_CODES, INT4: INT4_CODES, INT8: INT8_CODES}


def obstacle(operands: Operands, quant: QuantParams) -> str | None:
    """Return why the kernels cannot read a quantized weight, or `None` if they can."""
    if quant.scales.dtype not in ELEMENTS:
        dtype = str(quant.scales.dtype).removeprefix("torch.")
        return f"scales are {dtype}, not float32, bfloat16 or float16"
    tensors = {"codes": operands.weight, "scales": quant.scales, "zeros": quant.zeros}
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} are not contiguous"
    return None


def compute(operands: Operands, quant: QuantParams) -> Tensor:
    """Multiply the kept activations with a quantized weight, accumulating in float32.

    Codes are read exactly, the sum of a group is scaled once, and the result is rounded once, after
    bias, activation and residual. It does not depend on the number of threads.

    Args:
        operands: Checked operands for which `NumbaBackend.can_run` returns `None`, with codes as
            the weight and at most `MAX_ROWS` rows. NaN codes of fp8 count as ±480.
        quant: What the codes stand for.

    Returns:
        (..., out_features), or (..., out_features / 2) with an activation, in the dtype of `x`.
    """
    shape = (len(operands.weight), quant.scales.shape[1])
    return gemv.launch(product, operands, _addresses(operands.weight, quant), shape)


def dequantized(operands: Operands, quant: QuantParams) -> Tensor:
    """Return the weight as floats, bit-equal to the reference.

    Args:
        operands: Operands with codes as the weight, such that `obstacle` returns `None`.
        quant: What the codes stand for.

    Returns:
        (in_features, out_features), in the dtype of `x`.
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
