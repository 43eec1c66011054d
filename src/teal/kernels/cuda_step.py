"""Launches the kernels of a fused decode step of one stream; see cuda_step.cu."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from teal.kernels.cuda_compile import FLOAT, INT, Definitions, function, launch

SOURCE = "cuda_step.cu"
DTYPES = (torch.bfloat16, torch.float16)
FRACTION_BITS = 40
UNIT = 2.0**-FRACTION_BITS

# Sizes are multiples of what one thread loads.
ALIGNMENT = 8

# What the input of a product is made from.
Input = Literal["hidden", "attention", "silu", "gelu_pytorch_tanh"]
_INPUTS: tuple[Input, ...] = ("hidden", "attention", "silu", "gelu_pytorch_tanh")

_WARP_COLUMNS = 256
_NORM_THREADS = 1024
_EMBED_THREADS = 256
# Dense products begin with this many channels of a chunk before their input is known.
_PREFETCH = 16


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a product is cut into blocks.

    Attributes:
        chunk: Channels of a block, a multiple of 32.
        warps_n: Warps beside each other, 256 columns each.
        warps_k: Warps that share the channels of the block.
        unroll: Strips that a thread has under way.
        blocks: Blocks that fit into one multiprocessor, for the compiler.
        cluster: Blocks that share the reading of the hidden states at most.
    """

    chunk: int
    warps_n: int
    warps_k: int
    unroll: int
    blocks: int
    cluster: int = 1

    @property
    def columns(self) -> int:
        """Columns of a block."""
        return _WARP_COLUMNS * self.warps_n


# The fastest for Llama-3-8B at 50 % on an H200, where neighbours are within 2 %.
_NARROW = Cut(chunk=256, warps_n=1, warps_k=4, unroll=4, blocks=3, cluster=8)
_WIDE = Cut(chunk=512, warps_n=2, warps_k=4, unroll=4, blocks=4, cluster=8)
_ATTENDED = Cut(chunk=128, warps_n=1, warps_k=8, unroll=4, blocks=4)
_GATED = Cut(chunk=128, warps_n=1, warps_k=4, unroll=8, blocks=2)
_MANY_COLUMNS = 16384
_LONG_ATTENDED = 8192
_LONG_GATED = 28672


@dataclass(frozen=True, kw_only=True, eq=False)
class Projections:
    """Up to three projections of one input, beside each other.

    Attributes:
        weight: Channel-major, (K, N), contiguous; K and all widths multiples of `ALIGNMENT`.
        widths: Columns of each.
        thresholds: One for each, (3,), float32, on the device; below zero to drop nothing.
        input: What the input is made from: the residual stream through an RMSNorm, what the splits
            of attention gave, or sums of gate and up.
        is_dense: Nothing is dropped whatever the input is.
        bias: (N,), contiguous, or `None`.
        gain: Gain of the RMSNorm, (K,), float32, for "hidden".
        epsilon: Of that norm.
        multiplier: Of the result.
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


class StepMemory:
    """Sums of a decode step, shared by all layers.

    Attributes:
        hidden: Residual stream, (hidden_size,), int64, in units of `UNIT`.
        qkv: Sums of q, k and v, as `hidden`.
        gate_up: Sums of gate and up, as `hidden`.
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
        def sums(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int64, device=device)

        self.hidden = sums(hidden_size)
        self.qkv = sums(qkv_size)
        self.gate_up = sums(2 * intermediate_size)
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
    cut = cut_for(projections, clusters=dependent)
    in_features = projections.weight.shape[0]
    tiles = sum(math.ceil(width / cut.columns) for width in projections.widths)
    definitions = definitions_of(projections, cut, memory.parts.shape[2:], dependent)
    launch(
        function(SOURCE, "project", definitions, sums.device.index),
        (tiles, math.ceil(in_features / cut.chunk)),
        32 * cut.warps_n * cut.warps_k,
        [
            source,
            projections.gain,
            projections.thresholds,
            projections.weight,
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


def embed(
    token: Tensor, embedding: Tensor, memory: StepMemory, multiplier: float, *, dependent: bool
) -> None:
    """Start a step: no overflow, and the embedding of a token, (1,), int64, as hidden states."""
    size = embedding.shape[1]
    launch(
        function(SOURCE, "embed", _plain_definitions(embedding.dtype), token.device.index),
        (math.ceil(size / _EMBED_THREADS), 1),
        _EMBED_THREADS,
        [token, embedding, memory.hidden, memory.overflow, (multiplier, FLOAT), (size, INT)],
        dependent=dependent,
    )


def final_norm(gain: Tensor, epsilon: float, memory: StepMemory, *, dependent: bool) -> None:
    """Write the normed residual stream to `memory.normed`, NaN everywhere after an overflow."""
    definitions = _plain_definitions(memory.normed.dtype)
    launch(
        function(SOURCE, "final_norm", definitions, gain.device.index),
        (1, 1),
        _NORM_THREADS,
        [
            memory.hidden,
            gain,
            memory.overflow,
            memory.normed,
            (epsilon, FLOAT),
            (gain.numel(), INT),
        ],
        dependent=dependent,
    )


def cut_for(projections: Projections, *, clusters: bool) -> Cut:
    """Return how a product is cut.

    Args:
        projections: What is computed.
        clusters: Whether the device has clusters of blocks.
    """
    in_features, columns = projections.weight.shape
    if projections.input == "attention":
        return _lengthened(_ATTENDED, in_features >= _LONG_ATTENDED)
    if projections.input != "hidden":
        return _lengthened(_GATED, in_features >= _LONG_GATED)
    cut = _WIDE if columns >= _MANY_COLUMNS else _NARROW
    tiles = sum(math.ceil(width / cut.columns) for width in projections.widths)
    # A cluster has to divide the tiles evenly.
    return replace(cut, cluster=math.gcd(tiles, cut.cluster) if clusters else 1)


def definitions_of(
    projections: Projections, cut: Cut, splits_and_row: Sequence[int], clusters: bool
) -> Definitions:
    """Return what the kernel `project` is compiled with.

    Args:
        projections: What is computed.
        cut: How it is cut.
        splits_and_row: Splits of the context and entries of each, head_dim + 2.
        clusters: Whether the device is of compute capability 9.0 or later.
    """
    in_features, columns = projections.weight.shape
    widths = projections.widths
    starts = [sum(widths[:part]) for part in range(1, len(widths))]
    splits, row = splits_and_row
    start_1, start_2 = [*starts, columns, columns][:2]
    given = {
        "SOURCE": _INPUTS.index(projections.input),
        "K": in_features,
        "N": columns,
        "START_1": start_1,
        "START_2": start_2,
        "HEAD_DIM": row - 2,
        "SPLITS": splits,
        "HAS_BIAS": int(projections.bias is not None),
        "PREFETCH": _PREFETCH if projections.is_dense and clusters else 0,
    }
    return _definitions(projections.weight.dtype, cut, given)


def _lengthened(cut: Cut, is_long: bool) -> Cut:
    return replace(cut, chunk=2 * cut.chunk) if is_long else cut


def _plain_definitions(dtype: torch.dtype) -> Definitions:
    """Return the definitions of the kernels that no sizes are compiled into."""
    sizes = dict.fromkeys(("K", "N", "START_1", "START_2", "HEAD_DIM", "SPLITS"), ALIGNMENT)
    given = {**sizes, "SOURCE": 0, "HAS_BIAS": 0, "PREFETCH": 0}
    return _definitions(dtype, _ATTENDED, given)


def _definitions(dtype: torch.dtype, cut: Cut, given: dict[str, int]) -> Definitions:
    both = {
        **given,
        "BFLOAT16": int(dtype == torch.bfloat16),
        "FRACTION_BITS": FRACTION_BITS,
        "CHUNK": cut.chunk,
        "WARPS_N": cut.warps_n,
        "WARPS_K": cut.warps_k,
        "UNROLL": cut.unroll,
        "BLOCKS": cut.blocks,
        "CLUSTER": cut.cluster,
    }
    return tuple(sorted(both.items()))
