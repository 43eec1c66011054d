"""Launches the Triton kernels of decode attention."""

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


class TritonAttention:
    """Computes `ops.attend` on GPUs of any maker that Triton compiles for."""

    name = "triton"

    def can_run(
        self, qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, cosines: Tensor, *_: Any
    ) -> str | None:
        """Say why the kernel cannot compute attention of such heads; `None` if it can."""
        head_dim = keys.shape[-1]
        if head_dim < 2 * _LEAST_QUERIES or head_dim & (head_dim - 1):
            return "head_dim is not a power of two of at least 32"
        if cosines.shape[1] != head_dim // 2:
            return "RoPE rotates a part of each head only"
        if qkv.dtype not in DTYPES:
            return "qkv is not bfloat16, float16 or float32"
        return None

    def run(self, qkv: Tensor, *tensors: Tensor, **options: Any) -> Tensor:
        """Attend on the device of `qkv`; see `attend`."""
        with torch.cuda.device(qkv.device):
            return attend(qkv, *tensors, **options)


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
    """Append the new tokens to the cache and attend, leaving the splits apart; see `ops.attend`.

    Args:
        qkv: Queries, keys and values beside each other, (T, (heads + 2 · kv_heads) · head_dim),
            contiguous.
        keys: Cache, (T, kv_heads, capacity, head_dim), contiguous; gets the new keys.
        values: Cache of the values, in the shape of `keys`.
        positions: Index of the new token of each sequence, (T,), int64.
        cosines: RoPE, (≥ capacity, head_dim / 2), float32, contiguous.
        sines: RoPE, in the shape of `cosines`.
        parts: Result, (T, heads, splits, head_dim + 2), float32: sums of weighted values, the
            largest score, the sum of weights.
        scale: Factor of the scores.
        window: Number of newest tokens that attention covers; 0 for all.
        softcap: Where positive, a score becomes `softcap · tanh(score / softcap)`.
        q_norm_weight: Weight of an RMSNorm of each query head, (head_dim,).
        k_norm_weight: Weight of an RMSNorm of each key head, (head_dim,).
        eps: Added to the mean square in these norms.
    """
    sequences, kv_heads, capacity, head_dim = keys.shape
    heads, splits = parts.shape[1:3]
    attend_kernel[(kv_heads, splits, sequences)](
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
        HAS_NORM=q_norm_weight is not None,
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

    The arguments are those of `attend_parts`, without `parts`.

    Returns:
        (T, heads · head_dim), in the dtype of `qkv`.
    """
    sequences, kv_heads, capacity, head_dim = keys.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    splits = splits_for(capacity)
    parts = torch.empty(sequences, heads, splits, head_dim + 2, device=qkv.device)
    attend_parts(qkv, keys, values, positions, cosines, sines, parts, **options)
    attended = qkv.new_empty(sequences, heads * head_dim)
    combine_kernel[(sequences * heads,)](parts, attended, D=head_dim, SPLITS=splits)
    return attended
