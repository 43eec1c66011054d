"""The definition of decode attention, in plain PyTorch; also the fallback."""

import torch
from torch import Tensor

from teal.kernels.reference.matmul import rms_norm


def attend(
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
    """Append one token per sequence to its cache, in place, and attend from it to the cache.

    Queries and keys are rounded to the dtype of `qkv` after the norm and after RoPE; scores,
    softmax and the sum of values are float32. Cache entries behind a position are not read.

    Args:
        qkv: Queries, keys and values of T sequences beside each other,
            (T, (heads + 2 · kv_heads) · head_dim).
        keys: Cache, (T, kv_heads, capacity, head_dim), in the dtype of `qkv`. Row t gets its new
            key at `positions[t]`.
        values: Cache of the values, in the shape of `keys`.
        positions: Index of the new token of each sequence, (T,), int64; attention ends there.
        cosines: RoPE, (≥ capacity, rotary_dim / 2), float32. The first rotary_dim entries of a
            head are rotated in pairs (i, i + rotary_dim / 2).
        sines: RoPE, in the shape of `cosines`.
        scale: Factor of the scores.
        window: How many tokens attention covers at most, the new one included; 0 for all.
        softcap: Where positive, a score becomes `softcap · tanh(score / softcap)`.
        q_norm_weight: Weight of an RMSNorm per head before RoPE, (head_dim,).
        k_norm_weight: Weight of such a norm for keys, (head_dim,).
        eps: Added to the mean square in these norms.

    Returns:
        (T, heads · head_dim), in the dtype of `qkv`.
    """
    rows, kv_heads, capacity, head_dim = keys.shape
    q, k, v = qkv.view(rows, -1, head_dim).tensor_split([-2 * kv_heads, -kv_heads], dim=1)
    cosine, sine = cosines[positions, None], sines[positions, None]
    q = placed(q, q_norm_weight, eps, cosine, sine)
    k = placed(k, k_norm_weight, eps, cosine, sine)
    row = torch.arange(rows, device=qkv.device)
    keys[row, :, positions] = k
    values[row, :, positions] = v

    scores = q.view(rows, kv_heads, -1, head_dim).float() @ keys.float().mT * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = ~covered(positions, capacity, window)
    weights = scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(-1)
    past = values.float().masked_fill(hidden[:, None, :, None], 0.0)
    return (weights @ past).to(qkv.dtype).view(rows, -1)


def placed(
    heads: Tensor, norm_weight: Tensor | None, eps: float, cosine: Tensor, sine: Tensor
) -> Tensor:
    """Apply the norm, if there is one, and RoPE to heads.

    Args:
        heads: Queries or keys, (..., head_dim).
        norm_weight: Weight of an RMSNorm per head, (head_dim,).
        eps: Added to the mean square in that norm.
        cosine: RoPE, (..., rotary_dim / 2), float32.
        sine: RoPE, in the shape of `cosine`.

    Returns:
        (..., head_dim), in the dtype of `heads`.
    """
    return rotate(heads if norm_weight is None else rms_norm(heads, norm_weight, eps), cosine, sine)


def covered(positions: Tensor, length: int, window: int) -> Tensor:
    """Return which of `length` tokens attention from each position covers.

    Args:
        positions: Positions of the queries, (T,), int64.
        length: Tokens in the cache.
        window: How many of the newest tokens attention covers at most; 0 for all.

    Returns:
        (T, length), bool.
    """
    age = positions[:, None] - torch.arange(length, device=positions.device)
    return (age >= 0) & (age < window) if window > 0 else age >= 0


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Apply RoPE to the first entries of each head, in float32.

    Args:
        heads: Queries or keys, (..., head_dim).
        cosine: RoPE, (..., rotary_dim / 2), float32.
        sine: RoPE, in the shape of `cosine`.

    Returns:
        (..., head_dim), in the dtype of `heads`.
    """
    half = cosine.shape[-1]
    low, high = heads[..., :half].float(), heads[..., half : 2 * half].float()
    rotated = torch.cat([low * cosine - high * sine, high * cosine + low * sine], dim=-1)
    return torch.cat([rotated.to(heads.dtype), heads[..., 2 * half :]], dim=-1)
