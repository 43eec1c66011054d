"""Launches the products of a fused decode step of one stream; see cuda_step.cu."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from teal.kernels.cuda_compile import FLOAT, INT, Definitions, function, has_clusters, launch
from teal.kernels.cuda_strips import FRACTION_BITS, Cut, strip_definitions
from teal.kernels.operands import Grid
from teal.kernels.reference_quantized import FP8, INT4, INT8

SOURCE = "cuda_step.cu"
UNIT = 2.0**-FRACTION_BITS

# Hidden states are read in pairs, activations of heads in eights.
ALIGNMENT = 8

# What the input of a product is made from.
Input = Literal["hidden", "attention", "silu", "gelu_pytorch_tanh"]
_INPUTS: tuple[Input, ...] = ("hidden", "attention", "silu", "gelu_pytorch_tanh")

# Dense products begin with this many channels of a chunk before their input is known.
_PREFETCH = 8

# By the use of a product, the fastest found for Llama-3-8B at 50 % on an H200; for floats, and for
# codes of 8 and of 4 bits.
_FLOATS = {
    "narrow": Cut(chunk=512, warps_n=1, warps_k=8, unroll=4, blocks=3, cluster=8),
    "wide": Cut(chunk=512, warps_n=2, warps_k=4, unroll=4, blocks=4, cluster=8),
    "attended": Cut(chunk=128, warps_n=1, warps_k=8, unroll=4, blocks=4),
    "gated": Cut(chunk=128, warps_n=1, warps_k=8, unroll=8, blocks=2),
}
# From so many channels on, of Llama-3-70B.
_LONG_FLOATS = {
    "narrow": (8192, Cut(chunk=512, warps_n=2, warps_k=4, unroll=4, blocks=4, cluster=8)),
    "wide": (8192, Cut(chunk=1024, warps_n=2, warps_k=4, unroll=4, blocks=4, cluster=8)),
    "attended": (8192, Cut(chunk=256, warps_n=2, warps_k=4, unroll=4, blocks=4)),
    "gated": (28672, Cut(chunk=256, warps_n=1, warps_k=8, unroll=8, blocks=2)),
}
_OF_8_BITS = {
    "narrow": Cut(chunk=128, warps_n=8, warps_k=1, unroll=2, blocks=2, cluster=8),
    "wide": Cut(chunk=256, warps_n=4, warps_k=1, unroll=2, blocks=4, cluster=8),
    "attended": Cut(chunk=256, warps_n=4, warps_k=2, unroll=1, blocks=3),
    "gated": Cut(chunk=512, warps_n=8, warps_k=2, unroll=2, blocks=1),
}
_OF_4_BITS = {
    "narrow": Cut(chunk=256, warps_n=4, warps_k=2, unroll=2, blocks=2, cluster=8),
    "wide": Cut(chunk=256, warps_n=4, warps_k=1, unroll=2, blocks=4, cluster=8),
    "attended": Cut(chunk=256, warps_n=4, warps_k=2, unroll=1, blocks=3),
    "gated": Cut(chunk=512, warps_n=8, warps_k=2, unroll=2, blocks=1),
}
_CUTS = {FP8: _OF_8_BITS, INT8: _OF_8_BITS, INT4: _OF_4_BITS}
_GATE_AND_UP = 2
_MANY_COLUMNS = 16384


@dataclass(frozen=True, kw_only=True, eq=False)
class Projections:
    """Up to three projections of one input, beside each other.

    Attributes:
        weight: Channel-major floats or codes, (K, …), contiguous; K a multiple of `ALIGNMENT`.
        widths: Columns of each, which sum to N; see `cuda_strips.can_load`.
        thresholds: One for each, (3,), float32, on the device; below zero to drop nothing.
        input: What the input is made from: the residual stream through an RMSNorm, what the splits
            of attention gave, or sums of gate and up.
        is_dense: Nothing is dropped whatever the input is.
        bias: (N,), contiguous, or `None`.
        gain: Gain of the RMSNorm, (K,), float32, for "hidden".
        epsilon: Of that norm.
        multiplier: Of the result.
        grid: What codes stand for; `None` for floats.
    """

    weight: Tensor
    widths: Sequence[int]
    thresholds: Tensor
    input: Input
    is_dense: bool
    bias: Tensor | None = None
    gain: Tensor | None = None
    epsilon: float = 0.0
    multiplier: float = 1.0
    grid: Grid | None = None


class StepMemory:
    """Sums of a decode step, shared by all layers.

    Attributes:
        hidden: Residual stream, (hidden_size,), int64, in units of `UNIT`.
        qkv: Sums of q, k and v, (size,), as `hidden`.
        gate_up: Sums of gate and up, (2, 2 · intermediate_size), as `qkv`: layers take turns, each
            clearing those of the next.
        parts: What the splits of the context gave, (1, heads, splits, head_dim + 2), float32.
        overflow: 1 once a sum did not fit or was NaN, (1,), int32.
        normed: The residual stream after the final norm, (1, hidden_size).
    """

    def __init__(
        self,
        hidden_size: int,
        qkv_size: int,
        intermediate_size: int,
        parts: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def sums(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int64, device=device)

        self.hidden = sums(hidden_size)
        self.qkv = sums(qkv_size)
        self.gate_up = sums(2, 2 * intermediate_size)
        heads, splits, head_dim = parts
        self.parts = torch.zeros(1, heads, splits, head_dim + 2, device=device)
        self.overflow = torch.zeros(1, dtype=torch.int32, device=device)
        self.normed = torch.zeros(1, hidden_size, dtype=dtype, device=device)


def project(
    projections: Projections,
    source: Tensor,
    sums: Tensor,
    clear: Tensor | None,
    memory: StepMemory,
    *,
    dependent: bool,
) -> None:
    """Add the product of the kept channels of an input to fixed-point sums.

    Args:
        projections: What is computed.
        source: What its input is made from.
        sums: Added to, (N,), int64.
        clear: Fixed-point sums to zero for a later launch.
        memory: Where the overflow flag and the shape of attention are.
        dependent: The launch may begin before the one in front has ended.
    """
    weight = projections.weight
    clusters = has_clusters(weight.device)
    cut = cut_for(projections, clusters=clusters)
    definitions = definitions_of(projections, cut, memory, clusters=clusters)
    launch(
        function(SOURCE, _name_of(projections), definitions, sums.device.index),
        (cut.tiles(projections.widths, weight.dtype), math.ceil(len(weight) / cut.chunk)),
        cut.threads,
        [
            source,
            projections.gain,
            projections.thresholds,
            weight,
            *grid_tensors(projections.grid),
            projections.bias,
            sums,
            clear,
            memory.overflow,
            (0 if clear is None else clear.numel(), INT),
            (projections.epsilon, FLOAT),
            (projections.multiplier, FLOAT),
        ],
        dependent=dependent,
    )


def cut_for(projections: Projections, *, clusters: bool) -> Cut:
    """Return how a product is cut.

    Args:
        projections: What is computed.
        clusters: Whether the device has clusters of blocks.
    """
    weight, use = projections.weight, _use_of(projections)
    cut = _CUTS.get(weight.dtype, _FLOATS)[use]
    if projections.grid is None:
        least_channels, long = _LONG_FLOATS[use]
        cut = long if len(weight) >= least_channels else cut
    # A cluster has to divide the tiles evenly.
    tiles = cut.tiles(projections.widths, weight.dtype)
    return replace(cut, cluster=math.gcd(tiles, cut.cluster) if clusters else 1)


def definitions_of(
    projections: Projections, cut: Cut, memory: StepMemory, *, clusters: bool
) -> Definitions:
    """Return what the kernel `project` is compiled with.

    Args:
        projections: What is computed.
        cut: How it is cut.
        memory: Where the dtype of activations and the shape of attention are.
        clusters: Whether the device is of compute capability 9.0 or later.
    """
    widths, columns = projections.widths, sum(projections.widths)
    starts = [sum(widths[:part]) for part in range(1, len(widths))]
    start_1, start_2 = [*starts, columns, columns][:2]
    splits, row = memory.parts.shape[2:]
    given: dict[str, int | str] = {
        "NAME": _name_of(projections),
        "SOURCE": _INPUTS.index(projections.input),
        "START_1": start_1,
        "START_2": start_2,
        "HEAD_DIM": row - 2,
        "SPLITS": splits,
        "HAS_BIAS": int(projections.bias is not None),
        "PREFETCH": _PREFETCH if projections.is_dense and clusters else 0,
    }
    strips = strip_definitions(
        projections.weight, projections.grid, columns, memory.normed.dtype, cut
    )
    return (*strips, *sorted(given.items()))


def grid_tensors(grid: Grid | None) -> tuple[Tensor | None, Tensor | None]:
    """Return scales and zeros as a kernel takes them."""
    return (None, None) if grid is None else (grid.scales, grid.zeros)


def _name_of(projections: Projections) -> str:
    """Return the name that a profile shows."""
    if projections.input == "hidden":
        return "project_gate_up" if len(projections.widths) == _GATE_AND_UP else "project_qkv"
    return "project_o" if projections.input == "attention" else "project_down"


def _use_of(projections: Projections) -> str:
    if projections.input == "attention":
        return "attended"
    if projections.input != "hidden":
        return "gated"
    return "wide" if sum(projections.widths) >= _MANY_COLUMNS else "narrow"
