"""Times sparse products with quantized weights beside their own dense ones and those of floats."""

import torch
from torch import Tensor

from teal.benchmark.gemv import ACTIVATION, Product, copies_of
from teal.benchmark.shapes import Shape
from teal.benchmark.timing import Timing
from teal.kernels import ops
from teal.kernels.operands import Operands, QuantParams
from teal.quantization import QuantizedWeight, Scheme, round_to_nearest


class QuantizedProduct(Product):
    """One shape with its inputs, the weights being quantized.

    Attributes:
        shape: What is multiplied.
        codes: Quantized weights in rotation.
        x: Activations, (rows, in_features).
        format: Of the codes.
    """

    def __init__(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, rows: int, scheme: Scheme
    ) -> None:
        self._scheme = scheme
        super().__init__(shape, dtype, device, rows)
        self.format = scheme.format

    @property
    def copies(self) -> int:
        """How many weights are in rotation."""
        return len(self.codes)

    def hold(self, weight: Tensor) -> None:
        """Keep copies of a weight, quantized, that no cache holds."""
        first = round_to_nearest(weight, self._scheme)
        copies = copies_of(first.bytes, weight.device)
        self.codes = [first, *(_copy(first) for _ in range(1, copies))]

    def sparse(self, number: int, threshold: float) -> Tensor:
        """Compute the product with one of the weights through the operation that decode uses."""
        codes, output_sizes = self.codes[number % self.copies], self.shape.output_sizes
        weight = (codes.codes, codes.scales, codes.zeros, codes.group_size)
        thresholds = [threshold] * len(output_sizes)
        if self.shape.form == "gated":
            return ops.quantized_glu(self.x, *weight, thresholds, ACTIVATION)
        return ops.quantized_linear(self.x, *weight, thresholds, output_sizes)

    def operands(self, number: int, threshold: float) -> tuple[Operands, QuantParams | None]:
        """Return what the kernels are given for one of the weights."""
        weight = self.codes[number]
        quant = QuantParams(weight.scales, weight.zeros, weight.group_size)
        return self._operands(weight.codes, threshold), quant

    def by_torch(self, kept: Tensor) -> Tensor:
        """Multiply with the first weight in float32 or wider, rounded to the dtype of `kept`."""
        wide = torch.promote_types(kept.dtype, torch.float32)
        return (kept.to(wide) @ self.codes[0].dequantize(wide)).to(kept.dtype)

    def read_bytes(self, read: float) -> float:
        """Return the bytes that a product reads; of scales and zeros all of them."""
        first = self.codes[0]
        return first.bytes - (1 - read) * first.codes.nbytes

    def time_dense(self) -> Timing:
        """Measure our own product that keeps everything."""
        return self.time_sparse(-1.0)

    def time_floats(self) -> Timing | None:
        """Measure the fastest dense product with floats."""
        return Product(self.shape, self.x.dtype, self.x.device, len(self.x)).time_dense()


def _copy(weight: QuantizedWeight) -> QuantizedWeight:
    tensors = {name: tensor.clone() for name, tensor in weight.tensors().items()}
    return QuantizedWeight.from_tensors(tensors, weight.group_size)
