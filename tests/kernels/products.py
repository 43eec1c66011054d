"""Weights of every format, and what their products shall be, for the tests of the CUDA kernel."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teal.kernels.cuda.gemv import compute
from teal.kernels.cuda.tile_config import TileConfig
from teal.kernels.operands import Operands, QuantParams
from teal.kernels.reference import matmul as reference
from teal.quantization import QuantizedWeight, Scheme, round_to_nearest
from tests.helpers import TOLERANCES, assert_as_precise_as_torch, relative_error
from tests.kernels.cases import draw
from tests.kernels.emulation import DEVICE

SCHEMES = {
    "floats": None,
    "int8": Scheme(format="int8"),
    "fp8": Scheme(format="fp8"),
    "int4 in 32": Scheme(format="int4", group_size=32),
    "int4 in 64 with zeros": Scheme(format="int4", group_size=64, symmetric=False),
    "int4 in 128": Scheme(format="int4", group_size=128),
}


@dataclass(frozen=True)
class Weight:
    """A weight on the GPU, and what it stands for.

    Attributes:
        tensor: Floats or codes, (K, …).
        quant: What codes stand for.
        exact: The weight in float64, (K, N).
    """

    tensor: Tensor
    quant: QuantParams | None
    exact: Tensor

    def operands(self, x: Tensor, thresholds: Sequence[float], **rest: Any) -> Operands:
        output_sizes = rest.pop("output_sizes", [self.exact.shape[1]])
        return Operands(x, self.tensor, thresholds, output_sizes, **rest)

    def times(
        self, x: Tensor, thresholds: Sequence[float], config: TileConfig | None = None, **rest: Any
    ) -> Tensor:
        return compute(self.operands(x, thresholds, **rest), self.quant, config)


def weight_of(
    scheme: str, in_features: int, columns: int, dtype: torch.dtype, device: str = DEVICE
) -> Weight:
    floats = draw(in_features, columns, dtype=dtype, seed=1)
    wanted = SCHEMES[scheme]
    if wanted is None:
        return Weight(floats.to(device), None, floats.double().to(device))
    return of_quantized(round_to_nearest(floats, wanted).to(device))


def of_quantized(weight: QuantizedWeight) -> Weight:
    quant = QuantParams(weight.scales, weight.zeros, weight.group_size)
    return Weight(weight.codes, quant, weight.dequantize(torch.float64))


def by_torch(weight: Weight, operands: Operands, dtype: torch.dtype) -> Tensor:
    """Compute the product in float32 (in float64 for `dtype` float64) and round it to `dtype`."""
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
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = x if norm_weight is None else reference.rms_norm(x, norm_weight, eps)
    centred = x if shift is None else (x.float() - shift.float()).to(x.dtype)
    products = []
    for part, columns in enumerate(weight.exact.to(wide).split(list(output_sizes), dim=1)):
        score = None if score_scale is None else score_scale[part]
        keep = reference.keep_mask(x, thresholds[part], score, shift)
        products.append(torch.where(keep, centred, 0).to(wide) @ columns)
    product = torch.cat(products, dim=-1)
    product = product if bias is None else product + bias.to(wide)
    product = product if residual is None else product + residual.to(wide)
    return (product if activation is None else reference.gate_and_up(product, activation)).to(dtype)


def assert_right(weight: Weight, operands: Operands, config: TileConfig | None = None) -> None:
    result = compute(operands, weight.quant, config)
    expected = by_torch(weight, operands, torch.float64)
    rounded = by_torch(weight, operands, result.dtype)
    if operands.activation is None:
        assert_as_precise_as_torch(result, rounded, expected)
        return
    # The exponential of an activation is good to one eps.
    allowed = TOLERANCES["product_factor"] * relative_error(rounded, expected)
    assert relative_error(result, expected) <= allowed + torch.finfo(result.dtype).eps
