"""Launches the attention of a fused decode step of one stream; see attention.cu."""

from dataclasses import dataclass

import torch
from torch import Tensor

from teal.kernels.cuda.decode_step import StepMemory
from teal.kernels.cuda.nvrtc import FLOAT, INT, Definitions, function_of_step, launch
from teal.kernels.cuda.tile_config import FRACTION_BITS, WARP

SOURCE = "attention.cu"

# Warps of a block, each with 16 positions at a time; fewer where heads take more shared memory.
_WARPS, _FEWER_WARPS = 8, 4
_MOST_SHARED_CHANNELS = 1024
_FEWEST_SPLITS, _MOST_SPLITS = 4, 32
_POSITIONS_PER_SPLIT = 256
# What fits into registers.
_HEAD_DIM_UNIT, _LARGEST_HEAD_DIM = 16, 256
_MOST_QUERIES, _MOST_QUERY_CHANNELS = 16, 2048


@dataclass(frozen=True, kw_only=True, eq=False)
class Attention:
    """What the attention of a layer is given beside the new token and the cache.

    Attributes:
        scale: Multiplies scores.
        window: Newest positions that are attended to; 0 for all.
        softcap: Scores end smoothly here; 0 for no cap.
        q_norm_weight: Gain of an RMSNorm of each query head, (head_dim,), float32; `None` for no
            norms.
        k_norm_weight: The same for keys.
        eps: Of these norms.
    """

    scale: float
    window: int = 0
    softcap: float = 0.0
    q_norm_weight: Tensor | None = None
    k_norm_weight: Tensor | None = None
    eps: float = 0.0


def can_attend(heads: int, kv_heads: int, head_dim: int, cosines: Tensor) -> bool:
    """Tell whether the kernel computes attention of such heads, which have to be turned whole.

    Args:
        heads: Query heads.
        kv_heads: Key heads.
        head_dim: Channels of a head.
        cosines: (positions, rotary_dim / 2).
    """
    queries = heads // kv_heads
    return (
        cosines.shape[1] == head_dim // 2
        and head_dim % _HEAD_DIM_UNIT == 0
        and head_dim <= _LARGEST_HEAD_DIM
        and queries <= _MOST_QUERIES
        and queries * head_dim <= _MOST_QUERY_CHANNELS
    )


def splits_for(capacity: int) -> int:
    """Return how many blocks share a context of up to `capacity` tokens, a power of two."""
    power = 1 << (capacity // _POSITIONS_PER_SPLIT - 1).bit_length()
    return min(_MOST_SPLITS, max(_FEWEST_SPLITS, power))


def attend(
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
    """Append a token to the cache and attend from it, split by split.

    Cache and position are read before the launch in front has ended: an earlier one wrote them.
    Products of queries and keys, and weighted values, are summed in float32; weights are rounded
    to twice the digits of the activations.

    Args:
        attention: What is computed.
        keys: Cache, (1, kv_heads, capacity, head_dim), contiguous; gets the new keys.
        values: As `keys`.
        positions: Index of the new token, (1,), int64.
        cosines: (≥ capacity, head_dim / 2), float32, contiguous.
        sines: As `cosines`.
        memory: Its `qkv` is read, its `parts` are filled: sums of weighted values, the largest
            score, the sum of weights.
        dependent: The launch may begin before the one in front has ended.
    """
    a, (_, kv_heads, capacity, _) = attention, keys.shape
    definitions = definitions_of(a, keys, memory)
    launch(
        function_of_step(SOURCE, "attend", definitions, keys.device.index),
        (kv_heads, memory.parts.shape[2]),
        _warps(memory.parts.shape[1] // kv_heads, keys.shape[3]) * WARP,
        [
            memory.qkv,
            keys,
            values,
            positions,
            cosines,
            sines,
            a.q_norm_weight,
            a.k_norm_weight,
            memory.parts,
            (capacity, INT),
            (a.window, INT),
            (a.scale, FLOAT),
            (a.softcap, FLOAT),
            (a.eps, FLOAT),
        ],
        dependent=dependent,
    )


def definitions_of(attention: Attention, keys: Tensor, memory: StepMemory) -> Definitions:
    """Return what the kernel is compiled with.

    Args:
        attention: What is computed.
        keys: Cache, (1, kv_heads, capacity, head_dim).
        memory: Where the numbers of query heads and splits are.
    """
    _, kv_heads, _, head_dim = keys.shape
    heads, splits = memory.parts.shape[1:3]
    return (
        ("BFLOAT16", int(keys.dtype == torch.bfloat16)),
        ("FRACTION_BITS", FRACTION_BITS),
        ("HAS_NORM_WEIGHTS", int(attention.q_norm_weight is not None)),
        ("HAS_SOFTCAP", int(attention.softcap > 0.0)),
        ("HEAD_DIM", head_dim),
        ("QUERIES", heads // kv_heads),
        ("SPLITS", splits),
        ("WARPS", _warps(heads // kv_heads, head_dim)),
    )


def _warps(queries: int, head_dim: int) -> int:
    """Return the warps of a block, whose sums have to fit into its memory."""
    return _WARPS if queries * head_dim <= _MOST_SHARED_CHANNELS else _FEWER_WARPS
