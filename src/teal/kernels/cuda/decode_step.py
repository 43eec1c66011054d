"""Launches the products of a fused decode step; see decode_step.cu."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from teal.kernels.cuda.kernel_config import FRACTION_BITS, Input, StepConfig
from teal.kernels.cuda.nvrtc import FLOAT, INT, Kernel, function_of_step, has_clusters, launch
from teal.kernels.cuda.tile_config import WARP, TileConfig, bits_of, product_config
from teal.kernels.cuda.tuned_configs import Task, tuned_config
from teal.kernels.operands import QuantParams
from teal.kernels.reference.quantized import INT4
from teal.kernels.tuning import device_name

SOURCE = "decode_step.cu"
UNIT = 2.0**-FRACTION_BITS

# Hidden states are read in pairs, activations of heads in eights.
ALIGNMENT = 8

# What the input of a product is made from.
InputName = Literal["hidden", "attention", "silu", "gelu_pytorch_tanh"]

_GATE_AND_UP = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Projections:
    """Up to three projections of one input, side by side in one weight.

    Attributes:
        weight: Channel-major floats or codes, (K, …), contiguous; K a multiple of `ALIGNMENT`.
        output_sizes: Columns of each projection, summing to N; see `tile_config.can_load`.
        thresholds: One per projection, padded to (3,), float32, on the device; negative to drop
            nothing.
        input: What the input is made from: "hidden" is the residual stream through an RMSNorm,
            "attention" the splits of attention; an activation's name stands for
            activation(gate) · up.
        is_dense: Whether all thresholds are negative.
        bias: (N,), contiguous, or `None`.
        norm_weight: Weight of the RMSNorm, (K,), float32, for "hidden".
        eps: Added to the mean square in that norm.
        multiplier: Factor of the result.
        quant: What decodes the weight; `None` for floats.
        config: How to divide the product into blocks; by default as the tuning table says.
        tuning: Folder of tuning tables, "" for those of the package.
    """

    weight: Tensor
    output_sizes: Sequence[int]
    thresholds: Tensor
    input: InputName
    is_dense: bool
    bias: Tensor | None = None
    norm_weight: Tensor | None = None
    eps: float = 0.0
    multiplier: float = 1.0
    quant: QuantParams | None = None
    config: TileConfig | None = None
    tuning: str = ""


class StepMemory:
    """Intermediate results of a decode step, shared by all layers.

    Attributes:
        hidden: Residual stream, (hidden_size,), int64, in units of `UNIT`.
        qkv: Sums of q, k and v, (size,), int64, in units of `UNIT`.
        gate_up: Sums of gate and up, (2, 2 · intermediate_size), int64, in units of `UNIT`; layers
            alternate, each clearing the sums of the next.
        parts: Results of the splits of the context, (1, heads, splits, head_dim + 2), float32.
        overflow: 1 once a sum did not fit or was NaN, (1,), int32.
        normed: Residual stream after the final norm, (1, hidden_size).
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
        sums: Sums to add to, (N,), int64.
        clear: Fixed-point sums to zero for a later launch.
        memory: Holds the overflow flag, and says how many heads and splits there are.
        dependent: The launch may begin before the previous one has ended.
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
        memory: Says how many heads and splits there are.
    """
    compiled_for = step_config(projections, config, memory)
    device = projections.weight.device.index
    return function_of_step(SOURCE, compiled_for.kernel, compiled_for, device)


def config_for(projections: Projections, *, clusters: bool) -> TileConfig:
    """Return how a product is divided into blocks.

    Args:
        projections: What is computed.
        clusters: Whether the device has clusters of blocks.
    """
    p = projections
    group_size = 0
    if p.quant is not None and p.weight.dtype == INT4:
        group_size = len(p.weight) if len(p.quant.scales) == 1 else p.quant.group_size
    table = p.tuning, device_name(p.weight.device)
    return _fitted(p.config, task_of(p), tuple(p.output_sizes), group_size, table, clusters)


def task_of(projections: Projections) -> Task:
    """Return the key of a product in the tuning table."""
    is_plain = projections.input in ("hidden", "attention")
    return Task(
        kernel="step",
        form=projections.input if is_plain else "gated",
        bits=bits_of(projections.weight.dtype),
        is_dense=projections.is_dense,
        in_features=len(projections.weight),
        out_features=sum(projections.output_sizes),
    )


def step_config(projections: Projections, config: TileConfig, memory: StepMemory) -> StepConfig:
    """Return what the kernel that `project` launches is compiled for.

    Args:
        projections: What is computed.
        config: How it is divided into blocks.
        memory: Says which dtype activations have, and how many heads and splits there are.
    """
    p, (splits, row) = projections, memory.parts.shape[2:]
    return StepConfig(
        kernel=_name_of(p),
        product=product_config(p.weight, p.quant, p.output_sizes, memory.normed.dtype, config),
        input=Input(p.input),
        head_dim=row - 2,
        splits=splits,
        has_bias=p.bias is not None,
    )


def quant_tensors(quant: QuantParams | None) -> tuple[Tensor | None, Tensor | None]:
    """Return scales and zeros as arguments of a kernel."""
    return (None, None) if quant is None else (quant.scales, quant.zeros)


def _name_of(projections: Projections) -> str:
    """Return the name of the kernel that a profile shows."""
    if projections.input == "hidden":
        return "project_gate_up" if len(projections.output_sizes) == _GATE_AND_UP else "project_qkv"
    return "project_o" if projections.input == "attention" else "project_down"


# Eager decoding asks before every launch.
@functools.cache
def _fitted(
    config: TileConfig | None,
    task: Task,
    output_sizes: tuple[int, ...],
    group_size: int,
    table: tuple[str, str],
    clusters: bool,
) -> TileConfig:
    """Return `config`, or that of the table, fitted to a product.

    Args:
        config: How to divide the product into blocks; `None` to look it up.
        task: Key of the product in the tuning table.
        output_sizes: Columns of each projection.
        group_size: Channels that share a scale, for int4; else 0.
        table: Folder of tuning tables, and name of the device.
        clusters: Whether the device has clusters of blocks.
    """
    config = config or tuned_config(task, *table)
    if group_size:
        config = _with_whole_groups(config, group_size, task.in_features)
    # A thread has columns of only one projection.
    config = replace(config, per_lane=math.gcd(config.per_lane, *output_sizes))
    return replace(config, cluster=_cluster(task.in_features, config) if clusters else 1)


def _with_whole_groups(config: TileConfig, size: int, in_features: int) -> TileConfig:
    """Return a similar config whose chunks are whole groups, or parts that warps share evenly."""
    shared = WARP * config.warps_k
    part = max(1, config.chunk // shared) * shared
    if size >= in_features or (config.chunk < size and size % part == 0):
        return replace(config, chunk=part)
    config = replace(config, chunk=max(1, config.chunk // size) * size)
    # With several segments per warp, each has sums of its own, which take registers.
    return config if config.segments_per_warp(size) == 1 else replace(config, blocks=1)


def _cluster(in_features: int, config: TileConfig) -> int:
    """Return the size of clusters that leaves the fewest chunks without channels."""
    chunks = math.ceil(in_features / config.chunk)
    sizes = range(min(chunks, config.cluster // 2 + 1), config.cluster + 1)
    return min(sizes, key=lambda size: (-chunks % size, -size))


def _chunks(in_features: int, config: TileConfig) -> int:
    """Return the number of chunks; the last ones may have no channels."""
    return math.ceil(in_features / (config.chunk * config.cluster)) * config.cluster
