"""Launches q, k, v, attention and o of a fused decode step as one kernel; see cuda_attention.cu."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from teal.kernels.cuda_compile import FLOAT, INT, Definitions, function, launch
from teal.kernels.cuda_step import PREFETCH, Projections, StepMemory, grid_tensors
from teal.kernels.cuda_strips import WARP, Cut, columns_per_load, strip_definitions
from teal.kernels.operands import Grid

SOURCE = "cuda_attention.cu"

_CUT = Cut(chunk=WARP, warps_n=1, warps_k=8, unroll=8, blocks=1)
# Positions that a thread asks for ahead.
_AHEAD = 4
# Blocks that a GPU holds at once, and that may be a cluster.
_BLOCKS = 128
_LARGEST_CLUSTER = 16
_HEAD_DIMS = (32, 64, 128, 256)
# Columns of the stream are covered in this many passes at most.
_MOST_PASSES = 8
# Of a block on every GPU with clusters, less what the kernel declares itself.
_MOST_SHARED = 225 * 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class Attention:
    """What the attention of a layer is given beside the residual stream and the cache.

    Attributes:
        qkv: Projections of q, k and v.
        o: Output projection.
        head_dim: Channels of a head.
        scale: Multiplies scores.
        window: Newest positions that are attended to; 0 for all.
        softcap: Scores end smoothly here; 0 for no cap.
        q_gain: Gain of an RMSNorm of each query head, (head_dim,), float32, or `None`.
        k_gain: The same for keys.
        epsilon: Of these norms.
    """

    qkv: Projections
    o: Projections
    head_dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    q_gain: Tensor | None = None
    k_gain: Tensor | None = None
    epsilon: float = 0.0

    @property
    def kv_heads(self) -> int:
        """Key heads, each with a cluster of its own."""
        return self.qkv.widths[1] // self.head_dim

    @property
    def queries(self) -> int:
        """Query heads that share a key head."""
        return self.qkv.widths[0] // self.qkv.widths[1]

    @property
    def cluster(self) -> int:
        """Blocks of a cluster, a power of two."""
        most = min(_LARGEST_CLUSTER, max(1, _BLOCKS // self.kv_heads))
        return 1 << (most.bit_length() - 1)

    @property
    def own_channels(self) -> int:
        """Attended channels of a block."""
        return self.queries * self.head_dim // self.cluster

    @property
    def cut(self) -> Cut:
        """How the product of q, k and v is cut: each block has a share of the hidden channels."""
        weight, grid = self.qkv.weight, self.qkv.grid
        unit = WARP if grid is None or len(grid.scales) == 1 else grid.group_size
        chunk = math.ceil(len(weight) / (self.cluster * WARP)) * WARP
        if chunk % unit and unit % chunk:
            chunk = math.ceil(len(weight) / (self.cluster * unit)) * unit
        return replace(_CUT, chunk=chunk, cluster=self.cluster)


def can_attend(attention: Attention) -> bool:
    """Tell whether one kernel can compute it all; every product alone is known to be possible.

    Args:
        attention: What is computed, by heads that are turned whole.
    """
    qkv, o = attention.qkv, attention.o
    if attention.head_dim not in _HEAD_DIMS or qkv.widths[0] % qkv.widths[1]:
        return False
    threads, per_load = _CUT.threads, columns_per_load(qkv.weight.dtype)
    own, unit = attention.own_channels, _o_group(attention)
    return (
        len({_kind(projections) for projections in (qkv, o)}) == 1
        and attention.queries * attention.head_dim // per_load <= threads
        and _passes(len(qkv.weight) // per_load) <= _MOST_PASSES
        and (own % unit == 0 or unit % own == 0)
        and sum(_shared_bytes(attention)) <= _MOST_SHARED
    )


def attend_and_project(
    attention: Attention,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    cosines: Tensor,
    sines: Tensor,
    memory: StepMemory,
    *,
    dependent: bool,
) -> None:
    """Append a token to the cache, and add its attention, through o, to the residual stream.

    Cache and position are read before the launch in front has ended: an earlier one wrote them.

    Args:
        attention: What is computed.
        keys: Cache, (1, kv_heads, capacity, head_dim), contiguous; gets the new keys.
        values: As `keys`.
        positions: Index of the new token, (1,), int64.
        cosines: (≥ capacity, head_dim / 2), float32, contiguous.
        sines: As `cosines`.
        memory: Where the stream is.
        dependent: The launch may begin before the one in front has ended.
    """
    a, qkv, o = attention, attention.qkv, attention.o
    kernel = function(
        SOURCE, "attend_and_project", definitions_of(a, memory), memory.hidden.device.index
    )
    launch(
        kernel,
        (a.cluster, a.kv_heads),
        a.cut.threads,
        [
            *memory.advance(),
            qkv.gain,
            qkv.thresholds,
            o.thresholds,
            qkv.weight,
            *grid_tensors(qkv.grid),
            qkv.bias,
            o.weight,
            *grid_tensors(o.grid),
            o.bias,
            keys,
            values,
            positions,
            cosines,
            sines,
            a.q_gain,
            a.k_gain,
            memory.overflow,
            (keys.shape[2], INT),
            (a.window, INT),
            (a.scale, FLOAT),
            (a.softcap, FLOAT),
            (qkv.epsilon, FLOAT),
            (a.epsilon, FLOAT),
            (o.multiplier, FLOAT),
        ],
        dependent=dependent,
    )


def definitions_of(attention: Attention, memory: StepMemory) -> Definitions:
    """Return what the kernel is compiled with.

    Args:
        attention: What is computed.
        memory: Where the dtype of activations is.
    """
    qkv = attention.qkv
    given = {
        "HEAD_DIM": attention.head_dim,
        "QUERIES": attention.queries,
        "AHEAD": _AHEAD,
        "O_GROUP": _o_group(attention),
        "PREFETCH_QKV": PREFETCH if qkv.is_dense else 0,
        "PREFETCH_O": PREFETCH if attention.o.is_dense else 0,
        "MOST_SHARED": sum(_shared_bytes(attention)),
    }
    columns, dtype = sum(qkv.widths), memory.normed.dtype
    strips = strip_definitions(qkv.weight, qkv.grid, columns, dtype, attention.cut)
    return (*strips, *sorted(given.items()))


def _kind(projections: Projections) -> tuple[object, ...]:
    grid = projections.grid
    return projections.weight.dtype, grid and (grid.scales.dtype, grid.zeros is None)


def _o_group(attention: Attention) -> int:
    """Return the channels of a group; where there is one for all, as many as a block owns."""
    grid, own = attention.o.grid, attention.own_channels
    if grid is None or len(grid.scales) == 1:
        return math.ceil(len(attention.o.weight) / own) * own
    return grid.group_size


def _passes(loads: int) -> int:
    """Return in how many equal passes a block covers the columns of the stream."""
    threads = _CUT.threads
    return next(n for n in range(1, loads + 1) if loads % n == 0 and loads // n <= threads)


def _shared_bytes(attention: Attention) -> Iterator[int]:
    """Yield at least what each part of the kernel's shared memory takes."""
    cut, own, hidden_size = attention.cut, attention.own_channels, len(attention.qkv.weight)
    per_load = columns_per_load(attention.qkv.weight.dtype)
    q_columns = attention.queries * attention.head_dim
    columns = q_columns + 2 * attention.head_dim
    # Lists of kept channels.
    yield 9 * (3 * cut.chunk + own) + 256
    # Sums of threads, of q, k and v, or of the passes of o.
    passes = _passes(hidden_size // per_load)
    yield max(3, passes) * cut.threads * (per_load + 4) * 4
    if attention.qkv.grid is not None:
        yield _table_bytes(attention.qkv.grid, cut.chunk, columns)
        yield _table_bytes(attention.o.grid, own, hidden_size)
    # Bias, sums for the exchange, heads, rotary embedding, gains, the new row, the blocks' shares.
    yield columns * (2 + 4 + 4) + attention.head_dim * 16 + q_columns * 4 + own * 4
    # Slots of the cache, or the warps' sums of values.
    warps = cut.threads // WARP
    yield max(
        2 * 16 * _AHEAD * cut.threads, 4 * warps * min(4, attention.queries) * attention.head_dim
    )
    yield 8 * cut.cluster * attention.queries + 64 * warps + 4 * attention.queries + 512


def _table_bytes(grid: Grid | None, channels: int, columns: int) -> int:
    assert grid is not None
    groups = 1 if len(grid.scales) == 1 else max(1, channels // grid.group_size)
    return groups * columns * (grid.scales.element_size() + (grid.zeros is not None))
