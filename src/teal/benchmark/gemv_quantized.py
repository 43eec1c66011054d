"""Times sparse products with quantized weights, beside dense ones with the same and with floats."""

import torch
from torch import Tensor

from teal.benchmark.gemv import ACTIVATION, Product, copies_of
from teal.benchmark.model_configs import Shape
from teal.benchmark.timing import Timing
from teal.kernels import ops
from teal.kernels.operands import Operands, QuantParams
from teal.quantization import QuantizedWeight, Scheme, round_to_nearest


class QuantizedProduct(Product):
    """One shape with random inputs, its weights quantized.

    Args:
        shape: Shape of the product.
        dtype: Dtype of activations.
        device: Device to compute on.
        rows: Token rows.
        scheme: How the weights are quantized.
        tuning: Folder of tuning tables, or "" for those of the package.

    Attributes:
        codes: Quantized weights in rotation; the other attributes are those of `Product`.
    """

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        rows: int,
        scheme: Scheme,
        *,
        tuning: str = "",
    ) -> None:
        self._scheme = scheme
        super().__init__(shape, dtype, device, rows, tuning=tuning)
        self.format = scheme.format

    @property
    def copies(self) -> int:
        """Number of weights in rotation."""
        return len(self.codes)

    def sparse(self, number: int, threshold: float) -> Tensor:
        """Multiply with weight `number`, modulo their count, through the operation of decoding."""
        codes, output_sizes = self.codes[number % self.copies], self.shape.output_sizes
        weight = (codes.codes, codes.scales, codes.zeros, codes.group_size)
        thresholds = [threshold] * len(output_sizes)
        if self.shape.form == "gated":
            return ops.quantized_glu(self.x, *weight, thresholds, ACTIVATION, tuning=self.tuning)
        return ops.quantized_linear(self.x, *weight, thresholds, output_sizes, tuning=self.tuning)

    def operands(self, number: int, threshold: float) -> tuple[Operands, QuantParams | None]:
        """Return the operands that kernels take, with weight `number`."""
        weight = self.codes[number]
        quant = QuantParams(weight.scales, weight.zeros, weight.group_size)
        return self._operands(weight.codes, threshold), quant

    def read_bytes(self, read: float) -> float:
        """Return the bytes read by a product: kept codes, and all scales and zeros."""
        first = self.codes[0]
        return first.bytes - (1 - read) * first.codes.nbytes

    def time_dense(self) -> Timing:
        """Time our own product with every channel kept."""
        return self.time_sparse(-1.0)

    def time_floats(self) -> Timing | None:
        """Time the fastest dense product with float weights."""
        return Product(self.shape, self.x.dtype, self.x.device, len(self.x)).time_dense()

    def _hold(self, weight: Tensor) -> None:
        """Quantize a weight and store enough copies that no cache holds them all."""
        first = round_to_nearest(weight, self._scheme)
        copies = copies_of(first.bytes, weight.device)
        self.codes = [first, *(_copy(first) for _ in range(1, copies))]

    def _by_torch(self, kept: Tensor) -> Tensor:
        """Multiply with the first weight in float32 or wider; return the dtype of `kept`."""
        wide = torch.promote_types(kept.dtype, torch.float32)
        return (kept.to(wide) @ self.codes[0].dequantize(wide)).to(kept.dtype)


def _copy(weight: QuantizedWeight) -> QuantizedWeight:
    tensors = {name: tensor.clone() for name, tensor in weight.tensors().items()}
    return QuantizedWeight.from_tensors(tensors, weight.group_size)
