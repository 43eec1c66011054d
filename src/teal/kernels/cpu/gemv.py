"""The numba backend of products: which it computes, and how the kernels are launched."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from teal.foundation.errors import UserError
from teal.kernels.cpu import dequantize
from teal.kernels.cpu.gemv_kernel import GELU, LINEAR, SILU, product
from teal.kernels.cpu.numerics import ELEMENTS
from teal.kernels.cpu.quantized_kernel import FP8_CODES, INT4_CODES, INT8_CODES, Weight
from teal.kernels.cpu.quantized_kernel import product as quantized_product
from teal.kernels.cpu.threads import run_threaded, thread_count
from teal.kernels.operands import MAX_PARTS, Operands, QuantParams, padded_thresholds
from teal.kernels.reference import matmul as reference
from teal.kernels.reference.backend import multiply
from teal.kernels.reference.quantized import FP8, INT4, INT8

# With more rows, nearly every channel is kept by one of them, and torch's dense product is faster.
MAX_ROWS = 8

_FORMS = {None: LINEAR, "silu": SILU, "gelu_pytorch_tanh": GELU}
_CODES = {FP8: FP8_CODES, INT4: INT4_CODES, INT8: INT8_CODES}


class NumbaBackend:
    """Products on the CPU by kernels that numba compiles."""

    name = "numba"

    def can_run(self, operands: Operands, quant: QuantParams | None) -> str | None:
        """Return why a product cannot be computed, or `None` if it can.

        Args:
            operands: Checked operands on the CPU.
            quant: What the codes stand for if the weight is quantized.

        Returns:
            The reason as a clause, such as "x has more than 8 rows: torch is faster".
        """
        dtype = operands.x.dtype
        if dtype not in ELEMENTS:
            return f"x is {str(dtype).removeprefix('torch.')}, not float32, bfloat16 or float16"
        if quant is None:
            return _limit(operands)
        return quantized_obstacle(operands, quant)

    def run(self, operands: Operands, quant: QuantParams | None) -> Tensor:
        """Compute a product.

        A quantized weight is dequantized for more rows or parts than the kernel takes, and the
        reference multiplies.

        Args:
            operands: Operands for which `can_run` returns `None`.
            quant: What the codes stand for if the weight is quantized.

        Returns:
            (..., out_features), or (..., out_features / 2) with an activation, in the dtype of `x`;
            float32 accumulation.

        Raises:
            UserError: The columns of a float weight do not lie side by side.
        """
        if quant is None:
            return compute(operands)
        if _limit(operands) is None:
            return compute_quantized(operands, quant)
        weight = dequantized(operands, quant)
        return multiply(operands._replace(weight=weight))


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


def quantized_obstacle(operands: Operands, quant: QuantParams) -> str | None:
    """Return why the kernels cannot read a quantized weight, or `None` if they can."""
    if quant.scales.dtype not in ELEMENTS:
        dtype = str(quant.scales.dtype).removeprefix("torch.")
        return f"scales are {dtype}, not float32, bfloat16 or float16"
    tensors = {"codes": operands.weight, "scales": quant.scales, "zeros": quant.zeros}
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} are not contiguous"
    return None


def compute_quantized(operands: Operands, quant: QuantParams) -> Tensor:
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
    return launch(quantized_product, operands, _quantized_weight(operands.weight, quant), shape)


def dequantized(operands: Operands, quant: QuantParams) -> Tensor:
    """Return the weight as floats, bit-equal to the reference.

    Args:
        operands: Operands with codes as the weight, such that `quantized_obstacle` returns `None`.
        quant: What the codes stand for.

    Returns:
        (in_features, out_features), in the dtype of `x`.
    """
    shape = (len(operands.weight), quant.scales.shape[1])
    weight = _quantized_weight(operands.weight, quant)
    return dequantize.dequantized(weight, shape, operands.x.dtype)


def _limit(operands: Operands) -> str | None:
    """Return which limit of the kernels the sizes of a product exceed."""
    if len(operands.output_sizes) > MAX_PARTS:
        return f"there are more than {MAX_PARTS} parts"
    if operands.rows > MAX_ROWS:
        return f"x has more than {MAX_ROWS} rows: torch is faster"
    return None


def _quantized_weight(codes: Tensor, quant: QuantParams) -> Weight:
    return (
        codes.data_ptr(),
        quant.scales.data_ptr(),
        0 if quant.zeros is None else quant.zeros.data_ptr(),
        codes.shape[1],
        _CODES[codes.dtype],
        quant.group_size,
        ELEMENTS[quant.scales.dtype],
    )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
