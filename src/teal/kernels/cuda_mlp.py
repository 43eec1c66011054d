"""Launches the MLP of a fused decode step of one stream as one kernel; see cuda_mlp.cu."""

import math
from dataclasses import replace

from teal.kernels.cuda_compile import FLOAT, Definitions, function, launch
from teal.kernels.cuda_step import ALIGNMENT, PREFETCH, Projections, StepMemory, grid_tensors
from teal.kernels.cuda_strips import WARP, Cut, columns_per_load, strip_definitions
from teal.kernels.operands import Grid

SOURCE = "cuda_mlp.cu"

_CUT = Cut(chunk=WARP, warps_n=1, warps_k=8, unroll=8, blocks=1, cluster=8)
# Blocks to spread the intermediate channels over.
_BLOCKS = 128


def can_fuse(gate_up: Projections, down: Projections) -> bool:
    """Tell whether one kernel can compute both; both alone are known to be possible.

    Args:
        gate_up: Gate and up.
        down: Down.
    """
    kinds = {
        (p.weight.dtype, p.grid and (p.grid.scales.dtype, p.grid.zeros is None))
        for p in (gate_up, down)
    }
    slice_loads = own_channels(down) * _CUT.cluster // columns_per_load(down.weight.dtype)
    return len(kinds) == 1 and slice_loads <= _CUT.threads


def own_channels(down: Projections) -> int:
    """Return how many intermediate channels a block owns: whole groups of their scales."""
    unit = max(ALIGNMENT, _unit(down.grid))
    return math.ceil(len(down.weight) / (_BLOCKS * unit)) * unit


def mlp(gate_up: Projections, down: Projections, memory: StepMemory, *, dependent: bool) -> None:
    """Add the MLP of the residual stream to the stream.

    Args:
        gate_up: Gate and up.
        down: Down.
        memory: Where the stream is.
        dependent: The launch may begin before the one in front has ended.
    """
    own = own_channels(down)
    launch(
        function(SOURCE, "mlp", definitions_of(gate_up, down, memory), memory.hidden.device.index),
        (_CUT.cluster, math.ceil(len(down.weight) / (own * _CUT.cluster))),
        _CUT.threads,
        [
            *memory.advance(),
            gate_up.gain,
            gate_up.thresholds,
            down.thresholds,
            gate_up.weight,
            *grid_tensors(gate_up.grid),
            gate_up.bias,
            down.weight,
            *grid_tensors(down.grid),
            down.bias,
            memory.overflow,
            (gate_up.epsilon, FLOAT),
            (down.multiplier, FLOAT),
        ],
        dependent=dependent,
    )


def definitions_of(gate_up: Projections, down: Projections, memory: StepMemory) -> Definitions:
    """Return what the kernel is compiled with.

    Args:
        gate_up: Gate and up.
        down: Down.
        memory: Where the dtype of activations is.
    """
    own, intermediate = own_channels(down), len(down.weight)
    unit = max(WARP, _unit(gate_up.grid))
    cut = replace(_CUT, chunk=math.ceil(len(gate_up.weight) / (_CUT.cluster * unit)) * unit)
    given = {
        "INTERMEDIATE": intermediate,
        "OWN": own,
        "IS_SILU": int(down.input == "silu"),
        "PREFETCH_GATE_UP": PREFETCH if gate_up.is_dense else 0,
        "PREFETCH_DOWN": PREFETCH if down.is_dense else 0,
        "DOWN_GROUP": _group(down.grid, intermediate, own),
    }
    strips = strip_definitions(
        gate_up.weight, gate_up.grid, 2 * intermediate, memory.normed.dtype, cut
    )
    return (*strips, *sorted(given.items()))


def _unit(grid: Grid | None) -> int:
    """Return how many channels share scales and must stay together; 1 where all of them do."""
    return 1 if grid is None or len(grid.scales) == 1 else grid.group_size


def _group(grid: Grid | None, channels: int, own: int) -> int:
    """Return the channels of a group; where there is one for all, whole multiples of a block's."""
    return math.ceil(channels / own) * own if _unit(grid) == 1 else _unit(grid)
