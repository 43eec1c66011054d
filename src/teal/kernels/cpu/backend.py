"""The numba backend: which products it computes, and which kernel computes them."""

from torch import Tensor

from teal.kernels.cpu import gemv, quantized_gemv
from teal.kernels.cpu.gemv import ELEMENTS, MAX_ROWS
from teal.kernels.operands import MAX_PARTS, Operands, QuantParams
from teal.kernels.reference.backend import multiply


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
        return quantized_gemv.obstacle(operands, quant)

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
            return gemv.compute(operands)
        if _limit(operands) is None:
            return quantized_gemv.compute(operands, quant)
        weight = quantized_gemv.dequantized(operands, quant)
        return multiply(operands._replace(weight=weight))


def _limit(operands: Operands) -> str | None:
    """Return which limit of the kernels the sizes of a product exceed."""
    if len(operands.output_sizes) > MAX_PARTS:
        return f"there are more than {MAX_PARTS} parts"
    if operands.rows > MAX_ROWS:
        return f"x has more than {MAX_ROWS} rows: torch is faster"
    return None
