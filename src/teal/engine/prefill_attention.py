"""Attention of many tokens of one sequence at once, for prefill."""

import torch
import torch.nn.functional as F
from torch import Tensor

from teal.kernels.reference.attention import covered, placed


def attend_many(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    cosines: Tensor,
    sines: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Append tokens to one sequence of the cache, in place, and attend causally from each of them.

    Equal to `kernels.ops.attend` token by token, up to rounding.

    Args:
        qkv: Queries, keys and values side by side, (tokens, (heads + 2 · kv_heads) · head_dim).
        keys: Cached keys of the sequence up to its newest token, (kv_heads, length, head_dim), in
            the dtype of `qkv`. The last `tokens` entries are written.
        values: Cached values, shaped like `keys`.
        positions: Index of each new token, (tokens,), int64: length - tokens, …, length - 1.
        cosines: Rotary embedding, (≥ length, rotary_dim / 2), float32.
        sines: Shaped like `cosines`.
        scale: Factor of the scores.
        window: Number of tokens that attention covers, the new one included; 0 for all.
        softcap: If positive, a score becomes `softcap · tanh(score / softcap)`.
        q_norm_weight: Weight of an RMSNorm of each query head before RoPE, (head_dim,).
        k_norm_weight: Weight of an RMSNorm of each key head before RoPE, (head_dim,).
        eps: Added to the mean square in these norms.

    Returns:
        (tokens, heads · head_dim), in the dtype of `qkv`.
    """
    tokens, (kv_heads, length, head_dim) = len(qkv), keys.shape
    heads = qkv.view(tokens, -1, head_dim).transpose(0, 1)
    q, k, v = heads.tensor_split([-2 * kv_heads, -kv_heads])
    cosine, sine = cosines[positions], sines[positions]
    q = placed(q, q_norm_weight, eps, cosine, sine)
    k = placed(k, k_norm_weight, eps, cosine, sine)
    keys[:, length - tokens :] = k
    values[:, length - tokens :] = v

    if softcap > 0:
        attended = _capped(q, keys, values, covered(positions, length, window), scale, softcap)
    else:
        # Without a mask torch uses its fastest kernels.
        causal = length == tokens and (window == 0 or length <= window)
        attended = F.scaled_dot_product_attention(
            q[None],
            keys[None],
            values[None],
            attn_mask=None if causal else covered(positions, length, window),
            is_causal=causal,
            scale=scale,
            enable_gqa=True,
        )[0]
    return attended.transpose(0, 1).reshape(tokens, -1)


def _capped(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, softcap: float
) -> Tensor:
    """Attend with soft-capped scores, which torch's attention lacks."""
    grouped = q.reshape(len(keys), -1, *q.shape[1:])
    scores = (grouped @ keys[:, None].mT).float() * scale
    scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights.to(values.dtype) @ values[:, None]).view_as(q)
