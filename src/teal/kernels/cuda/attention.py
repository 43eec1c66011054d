"""Launches the attention of a fused decode step; see attention.cu."""

from dataclasses import dataclass

from torch import Tensor

from teal.kernels.cuda.decode_step import StepMemory
from teal.kernels.cuda.kernel_config import AttentionConfig, Dtype
from teal.kernels.cuda.nvrtc import FLOAT, INT, function_of_step, launch
from teal.kernels.cuda.tile_config import WARP

SOURCE = "attention.cu"

# Warps of a block, each with 16 positions at a time; fewer if the query heads have more channels
# than this, because they take more shared memory.
_WARPS, _FEWER_WARPS = 8, 4
_MOST_SHARED_CHANNELS = 1024
_FEWEST_SPLITS, _MOST_SPLITS = 4, 32
_POSITIONS_PER_SPLIT = 256
# Limits of the registers.
_HEAD_DIM_UNIT, _LARGEST_HEAD_DIM = 16, 256
_MOST_QUERIES, _MOST_QUERY_CHANNELS = 16, 2048


@dataclass(frozen=True, kw_only=True, eq=False)
class Attention:
    """Attention of a layer, apart from the new token and the cache.

    Attributes:
        scale: Factor of the scores.
        window: Newest positions that are attended to; 0 for all.
        softcap: Where positive, a score becomes `softcap · tanh(score / softcap)`.
        q_norm_weight: Weight of an RMSNorm of each query head, (head_dim,), float32; `None` for no
            norms.
        k_norm_weight: Weight of an RMSNorm of each key head, (head_dim,), float32.
        eps: Added to the mean square in these norms.
    """

    scale: float
    window: int = 0
    softcap: float = 0.0
    q_norm_weight: Tensor | None = None
    k_norm_weight: Tensor | None = None
    eps: float = 0.0


def can_attend(heads: int, kv_heads: int, head_dim: int, cosines: Tensor) -> bool:
    """Tell whether the kernel computes attention with such heads; RoPE has to cover them whole.

    Args:
        heads: Number of query heads.
        kv_heads: Number of key heads.
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
    """Return the number of splits of a context of up to `capacity` tokens, a power of two."""
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

    Cache and position are read before the previous launch has ended: an earlier launch has to have
    written them. Products of queries and keys, and weighted values, are summed in float32; softmax
    weights are split into a high and a low part that are both multiplied.

    Args:
        attention: What is computed.
        keys: Cache, (1, kv_heads, capacity, head_dim), contiguous; receives the new keys.
        values: Cache, (1, kv_heads, capacity, head_dim), contiguous; receives the new values.
        positions: Index of the new token, (1,), int64.
        cosines: RoPE, (≥ capacity, head_dim / 2), float32, contiguous.
        sines: RoPE, (≥ capacity, head_dim / 2), float32, contiguous.
        memory: Its `qkv` is read and its `parts` are written: sums of weighted values, the largest
            score, the sum of weights.
        dependent: The launch may begin before the previous one has ended.
    """
    a, (_, kv_heads, capacity, _) = attention, keys.shape
    config = attention_config(a, keys, memory)
    launch(
        function_of_step(SOURCE, "attend", config, keys.device.index),
        (kv_heads, memory.parts.shape[2]),
        config.warps * WARP,
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


def attention_config(attention: Attention, keys: Tensor, memory: StepMemory) -> AttentionConfig:
    """Return what the kernel is compiled for.

    Args:
        attention: What is computed.
        keys: Cache, (1, kv_heads, capacity, head_dim); only shape and dtype are read.
        memory: Says how many query heads and splits there are.
    """
    _, kv_heads, _, head_dim = keys.shape
    heads, splits = memory.parts.shape[1:3]
    return AttentionConfig(
        dtype=Dtype(keys.dtype),
        head_dim=head_dim,
        queries=heads // kv_heads,
        splits=splits,
        warps=_warps(heads // kv_heads, head_dim),
        has_norm_weights=attention.q_norm_weight is not None,
        has_softcap=attention.softcap > 0.0,
    )


def _warps(queries: int, head_dim: int) -> int:
    """Return the number of warps of a block, whose sums have to fit into shared memory."""
    return _WARPS if queries * head_dim <= _MOST_SHARED_CHANNELS else _FEWER_WARPS
