"""Launches decode attention on the GPU; see triton/attention_kernel.py."""

from typing import Any

import torch
import triton
from torch import Tensor

from teal.kernels.triton.attention_kernel import attend_kernel, combine_kernel

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_BLOCK_T = 64
_WARPS = 4
# The smallest matrix that tensor cores multiply.
_LEAST_QUERIES = 16


def fits(head_dim: int, cosines: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether the kernel computes attention of such heads: powers of two, turned whole."""
    is_power = head_dim >= 2 * _LEAST_QUERIES and head_dim & (head_dim - 1) == 0
    return is_power and cosines.shape[1] == head_dim // 2 and dtype in DTYPES


def splits_for(capacity: int) -> int:
    """Return how many programs share a context of up to `capacity` tokens, a power of two."""
    return min(32, max(8, int(triton.next_power_of_2(capacity // 256))))


def attend_parts(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    cosines: Tensor,
    sines: Tensor,
    parts: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Append the new tokens to the cache and attend, split by split; see `ops.attend`.

    Args:
        qkv: (T, (heads + 2 · kv_heads) · head_dim), contiguous.
        keys: (T, kv_heads, capacity, head_dim), contiguous; gets the new keys.
        values: As `keys`.
        positions: Index of the new tokens, (T,), int64.
        cosines: (≥ capacity, head_dim / 2), float32, contiguous.
        sines: As `cosines`.
        parts: Filled, (T, heads, splits, head_dim + 2), float32: sums of weighted values, the
            largest score, the sum of weights.
        scale: Multiplies scores.
        window: Newest positions that are attended to; 0 for all.
        softcap: Scores end smoothly here; 0 for no cap.
        q_norm_weight: Gain of an RMSNorm of each query head, (head_dim,).
        k_norm_weight: The same for keys.
        eps: Of these norms.
    """
    streams, kv_heads, capacity, head_dim = keys.shape
    heads, splits = parts.shape[1:3]
    attend_kernel[(kv_heads, splits, streams)](
        qkv,
        keys,
        values,
        positions,
        cosines,
        sines,
        keys if q_norm_weight is None else q_norm_weight,
        keys if k_norm_weight is None else k_norm_weight,
        parts,
        eps,
        scale,
        softcap,
        capacity,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        QUERIES=max(_LEAST_QUERIES, triton.next_power_of_2(heads // kv_heads)),
        WINDOW=window,
        HAS_GAIN=q_norm_weight is not None,
        HAS_SOFTCAP=softcap > 0.0,
        BLOCK_T=_BLOCK_T,
        num_warps=_WARPS,
        num_stages=2,
    )


def attend(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    cosines: Tensor,
    sines: Tensor,
    **options: Any,
) -> Tensor:
    """Append the new tokens to the cache and attend; see `ops.attend`.

    Args:
        qkv: As `attend_parts`.
        keys: As `attend_parts`.
        values: As `attend_parts`.
        positions: As `attend_parts`.
        cosines: As `attend_parts`.
        sines: As `attend_parts`.
        **options: Those of `attend_parts`.

    Returns:
        (T, heads · head_dim), in the dtype of `qkv`.
    """
    streams, kv_heads, capacity, head_dim = keys.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    splits = splits_for(capacity)
    parts = torch.empty(streams, heads, splits, head_dim + 2, device=qkv.device)
    attend_parts(qkv, keys, values, positions, cosines, sines, parts, **options)
    attended = qkv.new_empty(streams, heads * head_dim)
    combine_kernel[(streams * heads,)](parts, attended, D=head_dim, SPLITS=splits)
    return attended
