"""Inputs of the kernels of a fused decode step, and their exact results."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teal.kernels.cuda.decode_step import UNIT, InputName, Projections, StepMemory
from teal.kernels.cuda.nvrtc import has_clusters
from teal.kernels.operands import QuantParams, padded_thresholds
from teal.kernels.reference.quantized import dequantized
from teal.quantization import Scheme, round_to_nearest
from teal.quantization.weight import FORMATS
from tests.kernels.products import SCHEMES as SCHEMES

EPS = 1e-5
MULTIPLIER = 0.5
HEADS, SPLITS, HEAD_DIM = 4, 8, 32
SIZES = (640, 1120, 352)


@dataclass(frozen=True)
class Wanted:
    """Which projections to draw.

    Attributes:
        input: What their input is made from.
        in_features: Number of channels.
        output_sizes: Columns of each projection.
        scheme: How the weight is quantized; `None` for floats.
        dtype: Dtype of the activations.
        bias: Whether there is a bias.
        seed: Seed of the draw.
    """

    input: InputName
    in_features: int
    output_sizes: Sequence[int]
    scheme: Scheme | None = None
    dtype: torch.dtype = torch.bfloat16
    bias: bool = False
    seed: int = 1


def projections_of(
    wanted: Wanted, thresholds: Sequence[float] | None = None, device: str = "cuda"
) -> Projections:
    """Draw projections; dense if there are no thresholds."""
    generator = torch.Generator().manual_seed(wanted.seed)
    thresholds = thresholds or [-1.0] * len(wanted.output_sizes)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight, quant = 0.1 * draw(wanted.in_features, sum(wanted.output_sizes)).to(wanted.dtype), None
    if wanted.scheme is not None:
        quantized = round_to_nearest(weight, wanted.scheme).to(device)
        weight = quantized.codes
        quant = QuantParams(quantized.scales, quantized.zeros, quantized.group_size)
    norm_weight = 1 + 0.1 * draw(wanted.in_features) if wanted.input == "hidden" else None
    return Projections(
        weight=weight.to(device),
        output_sizes=wanted.output_sizes,
        thresholds=torch.tensor(padded_thresholds(thresholds), device=device),
        input=wanted.input,
        is_dense=max(thresholds) < 0,
        bias=draw(sum(wanted.output_sizes)).to(device, wanted.dtype) if wanted.bias else None,
        norm_weight=None if norm_weight is None else norm_weight.to(device),
        eps=EPS,
        multiplier=MULTIPLIER,
        quant=quant,
    )


def outlined(wanted: Wanted) -> Projections:
    """Return projections on the meta device, to compile for."""
    (in_features, columns), scheme = (wanted.in_features, sum(wanted.output_sizes)), wanted.scheme
    weight, quant = torch.empty(in_features, columns, dtype=wanted.dtype, device="meta"), None
    if scheme is not None:
        group_size = scheme.group_size or in_features
        scales = weight.new_empty(-(-in_features // group_size), columns)
        zeros = None if scheme.symmetric else scales.to(torch.uint8)
        quant = QuantParams(scales, zeros, group_size)
        packed = 2 if scheme.format == "int4" else 1
        dtype = next(dtype for dtype, name in FORMATS.items() if name == scheme.format)
        weight = torch.empty(in_features, columns // packed, dtype=dtype, device="meta")
    return Projections(
        weight=weight,
        output_sizes=wanted.output_sizes,
        thresholds=torch.zeros(3),
        input=wanted.input,
        is_dense=False,
        quant=quant,
    )


def exact_weight(projections: Projections) -> Tensor:
    """Return the weight in float64."""
    weight, quant = projections.weight, projections.quant
    return weight.double() if quant is None else dequantized(weight, *quant, torch.float64)


def exact_product(projections: Projections, x: Tensor) -> Tensor:
    """Return the product of the kept activations in float64, bias included, no multiplier."""
    columns = exact_weight(projections).split(list(projections.output_sizes), dim=1)
    parts = []
    for threshold, columns_of_part in zip(projections.thresholds.tolist(), columns, strict=False):
        kept = torch.where(x.float().abs() <= threshold, 0.0, x.double())
        parts.append(kept @ columns_of_part)
    product = torch.cat(parts)
    return product if projections.bias is None else product + projections.bias.double()


def magnitude(projections: Projections, x: Tensor) -> float:
    """Return the scale of rounding errors: the largest sum of magnitudes."""
    return float((x.double().abs() @ exact_weight(projections).abs()).max())


def normed(hidden: Tensor, projections: Projections, dtype: torch.dtype) -> Tensor:
    """Return the residual stream after the norm in front of projections."""
    assert projections.norm_weight is not None
    factor = torch.rsqrt(hidden.float().square().mean() + EPS)
    return ((hidden.float() * factor).to(dtype).float() * projections.norm_weight).to(dtype)


def memory_of(dtype: torch.dtype, device: str = "cuda") -> StepMemory:
    """Return memory that is large enough for all cases, with all sums zero."""
    hidden_size, intermediate_size, qkv_size = SIZES
    parts = (HEADS, SPLITS, HEAD_DIM)
    return StepMemory(hidden_size, qkv_size, intermediate_size, parts, dtype, torch.device(device))


def fixed(values: Tensor) -> Tensor:
    """Return numbers as fixed-point sums."""
    return (values.double() / UNIT).long()


def in_a_gap(x: Tensor, threshold: float) -> float:
    """Move a threshold into the middle between two neighbouring magnitudes of activations."""
    scores = torch.cat([x.float().abs().unique(), torch.tensor([1e4], device=x.device)])
    above = int(torch.searchsorted(scores, threshold, right=True).clamp(1, len(scores) - 1))
    return float(scores[above - 1] + scores[above]) / 2


def thresholds_at(x: Tensor, sparsity: float, parts: int) -> list[float]:
    """Return thresholds near a sparsity, so that no rounding error moves an activation across."""
    quantile = float(x.float().abs().quantile(sparsity))
    return [in_a_gap(x, quantile + part * 0.01) for part in range(parts)]


def hopper() -> bool:
    """Tell whether the GPU has clusters and dependent launches."""
    return torch.cuda.is_available() and has_clusters(
        torch.device("cuda", torch.cuda.current_device())
    )
