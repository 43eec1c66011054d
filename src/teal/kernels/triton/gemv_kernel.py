"""Triton kernel of the sparse product: every program reads only the weight rows that are kept.

Legend: `T` rows, `K` in_features, `N` columns of the weight. A group of threads reads one weight
row at a time.
docs/kernels.md explains the scheme with a drawing.
"""

import triton
import triton.language as tl


@triton.jit
def _inverse_rms(x_ptr, K, eps, BLOCK: tl.constexpr):
    """Return 1 / rms of one row, a scalar, summed in float32."""
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, K, BLOCK):
        channel = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + channel, mask=channel < K, other=0.0).to(tl.float32)
        squares += x * x
    return tl.rsqrt(tl.sum(squares) / K + eps)


@triton.jit
def _read(
    x_ptr,
    norm_weight_ptr,
    score_scale_ptr,
    shift_ptr,
    inverse_rms,
    channel,
    inside,
    HAS_NORM: tl.constexpr,
    HAS_SCORE_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    """Return the centred activations of one row, 0 where not `inside`, and their scores."""
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + channel, mask=inside, other=0.0, eviction_policy="evict_last")
    x = x.to(tl.float32)
    if HAS_NORM:
        norm_weight = tl.load(norm_weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        # Rounded twice, as Hugging Face's LlamaRMSNorm does.
        x = ((x * inverse_rms).to(dtype).to(tl.float32) * norm_weight).to(dtype).to(tl.float32)
    centred = x
    if HAS_SHIFT:
        x -= tl.load(shift_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        centred = x.to(dtype).to(tl.float32)
    score = tl.abs(x)
    if HAS_SCORE_SCALE:
        score *= tl.load(score_scale_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    return centred, score


@triton.jit
def _compact_kept(
    kept_ptr,
    x_ptr,
    norm_weight_ptr,
    score_scale_ptr,
    shift_ptr,
    inverse_rms,
    threshold,
    threshold_up,
    first,
    K,
    PAIR: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_SCORE_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write the channels that any row keeps, in order, to `kept_ptr` and return their number.

    With PAIR also those that `threshold_up` keeps, BLOCK_K entries further; both counts share one
    word, the second in the upper half, so that one scan serves both.
    """
    channel = first + tl.arange(0, BLOCK_K)
    inside = channel < K
    keep = channel < 0
    keep_up = keep
    for r in tl.static_range(ROWS):
        _x, score = _read(
            x_ptr + r * K, norm_weight_ptr, score_scale_ptr, shift_ptr, inverse_rms[r], channel,
            inside, HAS_NORM, HAS_SCORE_SCALE, HAS_SHIFT,
        )  # fmt: skip
        # Dropped when ≤, so that NaN is kept.
        keep |= inside & ((score <= threshold) == 0)
        if PAIR:
            if HAS_SCORE_SCALE:
                _x, score = _read(
                    x_ptr + r * K, norm_weight_ptr, score_scale_ptr + K, shift_ptr, inverse_rms[r],
                    channel, inside, HAS_NORM, HAS_SCORE_SCALE, HAS_SHIFT,
                )  # fmt: skip
            keep_up |= inside & ((score <= threshold_up) == 0)
    kept = keep.to(tl.int32)
    if PAIR:
        kept += keep_up.to(tl.int32) * 65536
    place = tl.cumsum(kept, axis=0) - kept
    tl.store(kept_ptr + (place & 65535), channel, mask=keep)
    if PAIR:
        tl.store(kept_ptr + BLOCK_K + (place >> 16), channel, mask=keep_up)
    return tl.sum(kept)


@triton.jit
def _next_channels(kept_ptr, entry, count, GROUPS: tl.constexpr, UNROLL: tl.constexpr):
    """Load UNROLL kept channels for every group of threads, the first at `entry`."""
    channels = ()
    for u in tl.static_range(UNROLL):
        here = entry + u * GROUPS
        channels = channels + (tl.load(kept_ptr + here, mask=here < count, other=0),)
    return channels


@triton.jit
def _load_weight_rows(
    channels,
    entry,
    count,
    column,
    inside_column,
    x_ptr,
    weight_ptr,
    norm_weight_ptr,
    score_scale_ptr,
    shift_ptr,
    inverse_rms,
    threshold,
    K,
    N,
    EVEN: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_SCORE_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Load weight rows and activations of UNROLL kept channels for every group of threads."""
    weight_rows = ()
    values = ()
    for u in tl.static_range(UNROLL):
        channel = channels[u]
        live = entry + u * GROUPS < count
        mask = live[:, None]
        if not EVEN:
            mask &= inside_column[None, :]
        weight_row = tl.load(
            weight_ptr + channel.to(tl.int64)[:, None] * N + column[None, :],
            mask=mask,
            other=0.0,
            eviction_policy="evict_first",
        )
        weight_rows = weight_rows + (weight_row,)
        for r in tl.static_range(ROWS):
            x, score = _read(
                x_ptr + r * K, norm_weight_ptr, score_scale_ptr, shift_ptr, inverse_rms[r], channel,
                live, HAS_NORM, HAS_SCORE_SCALE, HAS_SHIFT,
            )  # fmt: skip
            # A single row keeps all these channels; of several rows, each has a mask of its own.
            if ROWS > 1:
                x = tl.where(score <= threshold, 0.0, x)
            values = values + (x,)
    return weight_rows, values


@triton.jit
def _add_weight_rows(sums, weight_rows, values, ROWS: tl.constexpr, UNROLL: tl.constexpr):
    """Add what was loaded, in a function of its own so that all loads come first."""
    for u in tl.static_range(UNROLL):
        added = ()
        for r in tl.static_range(ROWS):
            product = values[u * ROWS + r][:, None] * weight_rows[u].to(tl.float32)
            added = added + (sums[r] + product,)
        sums = added
    return sums


@triton.jit
def _gate(value, ACTIVATION: tl.constexpr):
    """Apply SiLU, or GELU in its tanh form, in float32."""
    if ACTIVATION == "silu":
        return value * tl.sigmoid(value)
    # (1 + tanh(z)) / 2 = sigmoid(2 z)
    return value * tl.sigmoid(1.5957691216057308 * value * (1.0 + 0.044715 * value * value))


@triton.jit
def _reduce(sums, ROWS: tl.constexpr):
    total = ()
    for r in tl.static_range(ROWS):
        total = total + (tl.sum(sums[r], axis=0),)
    return total


@triton.jit
def _sum_chunks(partial_ptrs, SIZE: tl.constexpr, CHUNKS: tl.constexpr):
    """Add the partial sums of all chunks in one fixed order; CHUNKS is a power of two."""
    # More rows at once would not fit into registers.
    ROUND: tl.constexpr = min(CHUNKS, 16)
    sums = tl.zeros([ROUND, partial_ptrs.shape[0]], tl.float32)
    for first in tl.static_range(0, CHUNKS, ROUND):
        chunk = first + tl.arange(0, ROUND)[:, None]
        # From the L2 cache: other programs wrote them during this launch.
        sums += tl.load(
            partial_ptrs[None, :] + chunk * SIZE,
            mask=chunk < tl.num_programs(1),
            other=0.0,
            cache_modifier=".cg",
        )
    return tl.sum(sums, axis=0)


@triton.jit
def sparse_gemv_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    norm_weight_ptr,
    score_scale_ptr,
    shift_ptr,
    bias_ptr,
    residual_ptr,
    kept_ptr,
    partial_ptr,
    arrived_ptr,
    threshold_0,
    threshold_1,
    threshold_2,
    start_1,
    start_2,
    eps,
    K,
    N,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_SCORE_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
    CHUNKS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Compute BLOCK_N columns of the product, of one part or (with ACTIVATION) of gate and up."""
    PAIR: tl.constexpr = ACTIVATION is not None
    tile = tl.program_id(0)
    chunk = tl.program_id(1)
    part = 0
    threshold = threshold_0
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    width = start_1 if PAIR else N
    end = width
    if PARTS > 1:
        tiles_1 = tl.cdiv(start_1, BLOCK_N)
        tiles_2 = tiles_1 + tl.cdiv(start_2 - start_1, BLOCK_N)
        in_1 = tile >= tiles_1
        in_2 = tile >= tiles_2
        part = in_1.to(tl.int32) + in_2.to(tl.int32)
        threshold = tl.where(in_2, threshold_2, tl.where(in_1, threshold_1, threshold_0))
        end = tl.where(in_2, N, tl.where(in_1, start_2, start_1))
        first_tile = tl.where(in_2, tiles_2, tl.where(in_1, tiles_1, 0))
        column += tl.where(in_2, start_2, tl.where(in_1, start_1, 0)) - first_tile * BLOCK_N
    inside_column = column < end
    score_scale_ptr += part * K

    group = tl.arange(0, GROUPS)
    sums = ()
    sums_up = ()
    for _r in tl.static_range(ROWS):
        sums = sums + (tl.zeros([GROUPS, BLOCK_N], tl.float32),)
        sums_up = sums_up + (tl.zeros([GROUPS, BLOCK_N], tl.float32),)

    inverse_rms = ()
    for r in tl.static_range(ROWS):
        if HAS_NORM:
            inverse_rms = inverse_rms + (_inverse_rms(x_ptr + r * K, K, eps, 1024),)
        else:
            inverse_rms = inverse_rms + (1.0,)

    program = tile * tl.num_programs(1) + chunk
    kept_ptr += program.to(tl.int64) * (BLOCK_K * (2 if PAIR else 1))
    count = _compact_kept(
        kept_ptr, x_ptr, norm_weight_ptr, score_scale_ptr, shift_ptr, inverse_rms, threshold,
        threshold_1, chunk * BLOCK_K, K, PAIR, HAS_NORM, HAS_SCORE_SCALE, HAS_SHIFT, ROWS, BLOCK_K,
    )  # fmt: skip
    count_up = count >> 16
    count = count & 65535
    longest = tl.maximum(count, count_up)
    tl.debug_barrier()
    # The channels of the next round are loaded while the weight rows of this one are under way.
    STEP: tl.constexpr = GROUPS * UNROLL
    channels = _next_channels(kept_ptr, group, count, GROUPS, UNROLL)
    if PAIR:
        channels_up = _next_channels(kept_ptr + BLOCK_K, group, count_up, GROUPS, UNROLL)
    for first in range(0, longest, STEP):
        entry = first + group
        weight_rows, values = _load_weight_rows(
            channels, entry, count, column, inside_column, x_ptr, weight_ptr, norm_weight_ptr,
            score_scale_ptr, shift_ptr, inverse_rms, threshold, K, N,
            EVEN, HAS_NORM, HAS_SCORE_SCALE, HAS_SHIFT, ROWS, GROUPS, UNROLL,
        )  # fmt: skip
        channels = _next_channels(kept_ptr, entry + STEP, count, GROUPS, UNROLL)
        if PAIR:
            weight_rows_up, values_up = _load_weight_rows(
                channels_up, entry, count_up, column + start_1, inside_column, x_ptr, weight_ptr,
                norm_weight_ptr, score_scale_ptr + K, shift_ptr, inverse_rms, threshold_1, K, N,
                EVEN, HAS_NORM, HAS_SCORE_SCALE, HAS_SHIFT, ROWS, GROUPS, UNROLL,
            )  # fmt: skip
            channels_up = _next_channels(kept_ptr + BLOCK_K, entry + STEP, count_up, GROUPS, UNROLL)
        sums = _add_weight_rows(sums, weight_rows, values, ROWS, UNROLL)
        if PAIR:
            sums_up = _add_weight_rows(sums_up, weight_rows_up, values_up, ROWS, UNROLL)

    total = _reduce(sums, ROWS)
    total_up = total
    if PAIR:
        total_up = _reduce(sums_up, ROWS)
    is_last = True
    SIZE: tl.constexpr = ROWS * BLOCK_N * (2 if PAIR else 1)
    here = partial_ptr + tile * tl.num_programs(1) * SIZE + tl.arange(0, BLOCK_N)
    if CHUNKS > 1:
        for r in tl.static_range(ROWS):
            tl.store(here + chunk * SIZE + r * BLOCK_N, total[r])
            if PAIR:
                tl.store(here + chunk * SIZE + (ROWS + r) * BLOCK_N, total_up[r])
        tl.debug_barrier()
        arrived = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel")
        is_last = arrived == tl.num_programs(1) - 1
    if is_last:
        for r in tl.static_range(ROWS):
            y = total[r]
            up = total_up[r]
            if CHUNKS > 1:
                y = _sum_chunks(here + r * BLOCK_N, SIZE, CHUNKS)
                if PAIR:
                    up = _sum_chunks(here + (ROWS + r) * BLOCK_N, SIZE, CHUNKS)
            if HAS_BIAS:
                y += tl.load(bias_ptr + column, mask=inside_column, other=0.0).to(tl.float32)
            if PAIR:
                if HAS_BIAS:
                    bias_up = tl.load(bias_ptr + start_1 + column, mask=inside_column, other=0.0)
                    up += bias_up.to(tl.float32)
                y = _gate(y, ACTIVATION) * up
            if HAS_RESIDUAL:
                residual = tl.load(residual_ptr + r * width + column, mask=inside_column, other=0.0)
                y += residual.to(tl.float32)
            tl.store(
                out_ptr + r * width + column, y.to(out_ptr.dtype.element_ty), mask=inside_column
            )
        if CHUNKS > 1:
            tl.store(arrived_ptr + tile, 0)
