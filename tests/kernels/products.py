"""Weights of every format and their exact products, for the tests of every backend."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teal.kernels.operands import Operands, QuantParams
from teal.kernels.reference import matmul as reference
from teal.quantization import QuantizedWeight, Scheme, round_to_nearest
from tests.helpers import TOLERANCES, relative_error
from tests.kernels.cases import draw

SCHEMES = {
    "floats": None,
    "int8": Scheme(format="int8"),
    "fp8": Scheme(format="fp8"),
    "int4 in 32": Scheme(format="int4", group_size=32),
    "int4 in 64 with zeros": Scheme(format="int4", group_size=64, symmetric=False),
    "int4 in 128": Scheme(format="int4", group_size=128),
}
QUANTIZED = tuple(name for name, scheme in SCHEMES.items() if scheme is not None)


@dataclass(frozen=True)
class Weight:
    """A weight on a device and its exact values.

    Attributes:
        tensor: Floats or codes, (K, …).
        quant: What decodes it; `None` for floats.
        exact: The weight in float64, (K, N).
    """

    tensor: Tensor
    quant: QuantParams | None
    exact: Tensor

    def operands(self, x: Tensor, thresholds: Sequence[float], **rest: Any) -> Operands:
        output_sizes = rest.pop("output_sizes", [self.exact.shape[1]])
        return Operands(x, self.tensor, thresholds, output_sizes, **rest)


def weight_of(
    scheme: str,
    in_features: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
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
    x, shift, norm_weight = operands.x, operands.shift, operands.norm_weight
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = x if norm_weight is None else reference.rms_norm(x, norm_weight, operands.eps)
    centred = x if shift is None else (x.float() - shift.float()).to(x.dtype)
    products = []
    columns_of_parts = weight.exact.to(wide).split(list(operands.output_sizes), dim=1)
    for part, columns in enumerate(columns_of_parts):
        score_scale = None if operands.score_scale is None else operands.score_scale[part]
        keep = reference.keep_mask(x, operands.thresholds[part], score_scale, shift)
        products.append(torch.where(keep, centred, 0).to(wide) @ columns)
    product = torch.cat(products, dim=-1)
    for added in (operands.bias, operands.residual):
        product = product if added is None else product + added.to(wide)
    activation = operands.activation
    return (product if activation is None else reference.gate_and_up(product, activation)).to(dtype)


def assert_right(weight: Weight, operands: Operands, result: Tensor) -> None:
    """Require that a result errs about as little as torch's product that is rounded once."""
    expected = by_torch(weight, operands, torch.float64)
    rounded = by_torch(weight, operands, result.dtype)
    eps = torch.finfo(result.dtype).eps
    # The exponential of an activation is good to one eps.
    added = TOLERANCES["product_eps"] if operands.activation is None else 1.0
    allowed = TOLERANCES["product_factor"] * relative_error(rounded, expected) + added * eps
    if operands.norm_weight is not None:
        # About one normed activation in a hundred is rounded differently, by one bit.
        allowed = max(allowed, 1.5 * eps)
    assert (result.shape, result.dtype) == (rounded.shape, operands.x.dtype)
    assert relative_error(result, expected) <= allowed


def away_from_thresholds(operands: Operands) -> Operands:
    """Zero the activations whose scores are so near a threshold that rounding may move them across.

    Only a norm in front of the mask rounds differently from backend to backend.
    """
    o = operands
    if o.norm_weight is None:
        return o
    x, shift = o.x, o.shift
    # What is zeroed changes the norm, and with it the scores, a little.
    for _ in range(3):
        normed = reference.rms_norm(x, o.norm_weight, o.eps).float()
        near = torch.zeros_like(x, dtype=torch.bool)
        for part, threshold in enumerate(o.thresholds):
            score = (normed if shift is None else normed - shift).abs()
            score = score if o.score_scale is None else score * o.score_scale[part]
            near |= (score - threshold).abs() < 0.05 * threshold
        x = x.masked_fill(near, 0)
        if shift is not None:
            shift = shift.masked_fill(near.view(-1, near.shape[-1]).any(dim=0), 0)
    return o._replace(x=x, shift=shift)
