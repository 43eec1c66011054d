"""Launches the products of a fused decode step of one stream; see decode_step.cu."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from teal.kernels.cuda.nvrtc import (
    FLOAT,
    INT,
    Definitions,
    Kernel,
    function_of_step,
    has_clusters,
    launch,
)
from teal.kernels.cuda.tile_config import (
    FRACTION_BITS,
    WARP,
    TileConfig,
    bits_of,
    weight_definitions,
)
from teal.kernels.cuda.tuned_configs import Task, tuned_config
from teal.kernels.operands import QuantParams
from teal.kernels.reference.quantized import INT4

SOURCE = "decode_step.cu"
UNIT = 2.0**-FRACTION_BITS

# Hidden states are read in pairs, activations of heads in eights.
ALIGNMENT = 8

# What the input of a product is made from.
Input = Literal["hidden", "attention", "silu", "gelu_pytorch_tanh"]
_INPUTS: tuple[Input, ...] = ("hidden", "attention", "silu", "gelu_pytorch_tanh")

_GATE_AND_UP = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Projections:
    """Up to three projections of one input, beside each other.

    Attributes:
        weight: Channel-major floats or codes, (K, …), contiguous; K a multiple of `ALIGNMENT`.
        output_sizes: Columns of each, which sum to N; see `tile_config.can_load`.
        thresholds: One for each, (3,), float32, on the device; below zero to drop nothing.
        input: What the input is made from: the residual stream through an RMSNorm, what the splits
            of attention gave, or sums of gate and up.
        is_dense: Nothing is dropped whatever the input is.
        bias: (N,), contiguous, or `None`.
        norm_weight: Gain of the RMSNorm, (K,), float32, for "hidden".
        eps: Of that norm.
        multiplier: Of the result.
        quant: What codes stand for; `None` for floats.
        config: How to config the product; by default what was measured to be fast for its size.
    """

    weight: Tensor
    output_sizes: Sequence[int]
    thresholds: Tensor
    input: Input
    is_dense: bool
    bias: Tensor | None = None
    norm_weight: Tensor | None = None
    eps: float = 0.0
    multiplier: float = 1.0
    quant: QuantParams | None = None
    config: TileConfig | None = None


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
    config = config_for(projections, clusters=has_clusters(weight.device))
    launch(
        kernel_of(projections, config, memory),
        (config.tiles(projections.output_sizes), _chunks(len(weight), config)),
        config.threads,
        [
            source,
            projections.norm_weight,
            projections.thresholds,
            weight,
            *quant_tensors(projections.quant),
            projections.bias,
            sums,
            clear,
            memory.overflow,
            (0 if clear is None else clear.numel(), INT),
            (projections.eps, FLOAT),
            (projections.multiplier, FLOAT),
        ],
        dependent=dependent,
    )


def kernel_of(projections: Projections, config: TileConfig, memory: StepMemory) -> Kernel:
    """Return the kernel that `project` launches, compiled at the first call.

    Args:
        projections: What is computed.
        config: From `config_for`.
        memory: As `definitions_of`.
    """
    definitions, device = (
        definitions_of(projections, config, memory),
        projections.weight.device.index,
    )
    return function_of_step(SOURCE, _name_of(projections), definitions, device)


def config_for(projections: Projections, *, clusters: bool) -> TileConfig:
    """Return how a product is config.

    Args:
        projections: What is computed.
        clusters: Whether the device has clusters of blocks.
    """
    quant, in_features = projections.quant, len(projections.weight)
    config = projections.config or tuned_config(task_of(projections))
    if quant is not None and projections.weight.dtype == INT4:
        config = _of_groups(config, quant)
    # A thread has columns of one projection.
    config = replace(config, per_lane=math.gcd(config.per_lane, *projections.output_sizes))
    return replace(config, cluster=_cluster(in_features, config) if clusters else 1)


def task_of(projections: Projections) -> Task:
    """Return what the config of a product depends on."""
    is_plain = projections.input in ("hidden", "attention")
    return Task(
        kernel="step",
        form=projections.input if is_plain else "gated",
        bits=bits_of(projections.weight.dtype),
        is_dense=projections.is_dense,
        in_features=len(projections.weight),
        out_features=sum(projections.output_sizes),
    )


def definitions_of(projections: Projections, config: TileConfig, memory: StepMemory) -> Definitions:
    """Return what the kernel `project` is compiled with.

    Args:
        projections: What is computed.
        config: How it is config.
        memory: Where the dtype of activations and the shape of attention are.
    """
    output_sizes, columns = projections.output_sizes, sum(projections.output_sizes)
    starts = [sum(output_sizes[:part]) for part in range(1, len(output_sizes))]
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
    }
    weight_rows = weight_definitions(
        projections.weight, projections.quant, columns, memory.normed.dtype, config
    )
    return (*weight_rows, *sorted(given.items()))


def quant_tensors(quant: QuantParams | None) -> tuple[Tensor | None, Tensor | None]:
    """Return scales and zeros as a kernel takes them."""
    return (None, None) if quant is None else (quant.scales, quant.zeros)


def _name_of(projections: Projections) -> str:
    """Return the name that a profile shows."""
    if projections.input == "hidden":
        return "project_gate_up" if len(projections.output_sizes) == _GATE_AND_UP else "project_qkv"
    return "project_o" if projections.input == "attention" else "project_down"


def _of_groups(config: TileConfig, quant: QuantParams) -> TileConfig:
    """Return about the same config, chunks of whole groups or of parts that warps share evenly."""
    shared, size = WARP * config.warps_k, quant.group_size
    part = max(1, config.chunk // shared) * shared
    if len(quant.scales) == 1 or (config.chunk < size and size % part == 0):
        return replace(config, chunk=part)
    config = replace(config, chunk=max(1, config.chunk // size) * size)
    # Of several turns, each has sums beside those of all: they take registers.
    return config if config.turns(size) == 1 else replace(config, blocks=1)


def _cluster(in_features: int, config: TileConfig) -> int:
    """Return how many chunks work together, such that few are added that have no channels."""
    chunks = math.ceil(in_features / config.chunk)
    sizes = range(min(chunks, config.cluster // 2 + 1), config.cluster + 1)
    return min(sizes, key=lambda size: (-chunks % size, -size))


def _chunks(in_features: int, config: TileConfig) -> int:
    """Return how many there are; the last ones may have no channels."""
    return math.ceil(in_features / (config.chunk * config.cluster)) * config.cluster
