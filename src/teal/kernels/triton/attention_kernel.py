"""Triton kernels of decode attention: norms per head, RoPE, append to the cache, attention.

The context is split over programs, and the splits are combined in a fixed order, so the result
does not depend on which program finishes first. The fused decode step has its own attention
(cuda/csrc/attention.cu).

Legend: `D` head_dim. Heads are handled in two halves, for RoPE pairs channels i and i + D / 2.
"""

import triton
import triton.language as tl


@triton.jit
def _read_heads(qkv_ptr, column, inside):
    """Return entries of q, k or v as float32."""
    return tl.load(qkv_ptr + column, mask=inside, other=0).to(tl.float32)


@triton.jit
def _norm_halves(low, high, norm_weight_ptr, eps, dtype: tl.constexpr, HALF: tl.constexpr):
    """Apply an RMSNorm to heads that come in two halves, (heads, HALF) each."""
    squares = tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)
    factor = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
    half = tl.arange(0, HALF)
    weight_low = tl.load(norm_weight_ptr + half).to(tl.float32)[None, :]
    weight_high = tl.load(norm_weight_ptr + HALF + half).to(tl.float32)[None, :]
    low = ((low * factor).to(dtype).to(tl.float32) * weight_low).to(dtype).to(tl.float32)
    high = ((high * factor).to(dtype).to(tl.float32) * weight_high).to(dtype).to(tl.float32)
    return low, high


@triton.jit
def _rotate(low, high, cosine, sine, dtype: tl.constexpr):
    """Rotate pairs (i, i + HALF) and round to `dtype`."""
    return (low * cosine - high * sine).to(dtype), (high * cosine + low * sine).to(dtype)


@triton.jit
def _tanh(z):
    """Return tanh(z), near zero by its series: a sigmoid would lose digits there."""
    square = z * z
    rest = square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * 62 / 2835)))
    return tl.where(square < 1 / 16, z - z * rest, 2.0 * tl.sigmoid(2.0 * z) - 1.0)


@triton.jit
def attend_kernel(
    qkv_ptr,
    keys_ptr,
    values_ptr,
    position_ptr,
    cosine_ptr,
    sine_ptr,
    q_norm_weight_ptr,
    k_norm_weight_ptr,
    part_ptr,
    eps,
    scale,
    softcap,
    capacity,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    QUERIES: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Attend from the query heads of one key head of one sequence to one split of its context.

    Writes D + 2 entries for every query head and split: D sums of weighted values, the largest
    score and the sum of weights.
    """
    D: tl.constexpr = 2 * HALF
    SHARED: tl.constexpr = HEADS // KV_HEADS
    dtype: tl.constexpr = keys_ptr.dtype.element_ty
    kv = tl.program_id(0)
    split = tl.program_id(1)
    sequence = tl.program_id(2)
    splits = tl.num_programs(1)
    half = tl.arange(0, HALF)
    whole = tl.arange(0, D)
    query = tl.arange(0, QUERIES)
    real = query < SHARED
    qkv_ptr += sequence * (HEADS + 2 * KV_HEADS) * D
    keys_ptr += (sequence * KV_HEADS + kv).to(tl.int64) * capacity * D
    values_ptr += (sequence * KV_HEADS + kv).to(tl.int64) * capacity * D

    position = tl.load(position_ptr + sequence)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(0, position + 1 - WINDOW).to(tl.int32)
    end = (position + 1).to(tl.int32)
    share = tl.cdiv(tl.cdiv(end - begin, BLOCK_T), splits) * BLOCK_T
    first = begin + split * share
    last = tl.minimum(first + share, end)
    cosine = tl.load(cosine_ptr + position * HALF + half)[None, :]
    sine = tl.load(sine_ptr + position * HALF + half)[None, :]
    q_column = (kv * SHARED + query)[:, None] * D + half[None, :]
    q_low = _read_heads(qkv_ptr, q_column, real[:, None])
    q_high = _read_heads(qkv_ptr, q_column + HALF, real[:, None])
    k_column = (HEADS + kv) * D + half[None, :]
    k_low = _read_heads(qkv_ptr, k_column, half[None, :] < HALF)
    k_high = _read_heads(qkv_ptr, k_column + HALF, half[None, :] < HALF)
    if HAS_NORM:
        q_low, q_high = _norm_halves(q_low, q_high, q_norm_weight_ptr, eps, dtype, HALF)
        k_low, k_high = _norm_halves(k_low, k_high, k_norm_weight_ptr, eps, dtype, HALF)
    q_low, q_high = _rotate(q_low, q_high, cosine, sine, dtype)
    k_low, k_high = _rotate(k_low, k_high, cosine, sine, dtype)
    if (first <= position) & (position < last):
        here = position * D + half[None, :]
        tl.store(keys_ptr + here, k_low)
        tl.store(keys_ptr + here + HALF, k_high)
        v_column = (HEADS + KV_HEADS + kv) * D + whole
        v = _read_heads(qkv_ptr, v_column, whole < D)
        tl.store(values_ptr + position * D + whole, v.to(dtype))
    tl.debug_barrier()

    largest = tl.full([QUERIES], -float("inf"), tl.float32)
    weights = tl.zeros([QUERIES], tl.float32)
    total = tl.zeros([QUERIES, D], tl.float32)
    for start in range(first, last, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        live = token < last
        row = token.to(tl.int64) * D
        key = keys_ptr + row[None, :] + half[:, None]
        score = tl.dot(q_low, tl.load(key, mask=live[None, :], other=0.0), input_precision="ieee")
        keys_high = tl.load(key + HALF, mask=live[None, :], other=0.0)
        score = tl.dot(q_high, keys_high, score, input_precision="ieee") * scale
        if HAS_SOFTCAP:
            score = softcap * _tanh(score / softcap)
        score = tl.where(live[None, :], score, -float("inf"))
        larger = tl.maximum(largest, tl.max(score, axis=1))
        rescale = tl.exp(largest - larger)
        weight = tl.exp(score - larger[:, None])
        weights = weights * rescale + tl.sum(weight, axis=1)
        values = tl.load(values_ptr + row[:, None] + whole[None, :], mask=live[:, None], other=0.0)
        total *= rescale[:, None]
        rounded = weight.to(dtype)
        total = tl.dot(rounded, values, total, input_precision="ieee")
        if dtype != tl.float32:
            # The weights are multiplied in a high and a low part, for near-float32 accuracy.
            rest = (weight - rounded.to(tl.float32)).to(dtype)
            total = tl.dot(rest, values, total)
        largest = larger
    head = sequence * HEADS + kv * SHARED + query
    part = part_ptr + (head * splits + split) * (D + 2)
    # An empty split weighs nothing; its largest score must not turn the others into NaN.
    tl.store(part + D, tl.where(last > first, largest, -1e30), mask=real)
    tl.store(part + D + 1, weights, mask=real)
    tl.store(part[:, None] + whole[None, :], total, mask=real[:, None])


@triton.jit
def combine_kernel(part_ptr, out_ptr, D: tl.constexpr, SPLITS: tl.constexpr):
    """Combine the splits of one head, in their order."""
    head = tl.program_id(0)
    whole = tl.arange(0, D)
    part = part_ptr + (head * SPLITS + tl.arange(0, SPLITS)) * (D + 2)
    largest = tl.load(part + D)
    factor = tl.exp(largest - tl.max(largest, axis=0))
    weight = tl.sum(factor * tl.load(part + D + 1), axis=0)
    total = tl.sum(factor[:, None] * tl.load(part[:, None] + whole[None, :]), axis=0)
    tl.store(out_ptr + head * D + whole, (total / weight).to(out_ptr.dtype.element_ty))
