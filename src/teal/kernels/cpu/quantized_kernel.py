"""CPU kernel of the products with quantized weights: codes of kept channels are read once.

Legend: `T` rows, `K` in_features, `N` out_features. As in cpu_compiled; the sum of a group of
channels is scaled once.
"""

from typing import Any

import numba
import numpy as np

from teal.kernels.cpu.gemv_kernel import BESIDE, GELU, border, gate, write
from teal.kernels.cpu.kept_channels import Lists, make_lists
from teal.kernels.cpu.numerics import Array, array, widen
from teal.kernels.cpu.quantized_inner import add_nibbles, add_strips
from teal.kernels.cpu.simd import LINE_BYTES
from teal.kernels.cpu.threads import compiled
from teal.kernels.cpu.unpack import FP8_FACTOR, HIGH_FACTOR, NIBBLE_BASE

# How codes are read.
INT8_CODES, FP8_CODES, INT4_CODES = 0, 1, 2

# The channels of a list are summed in so many runs, one after the other or by threads of their own:
# a thread reads longer weight rows from fewer pages than if all threads shared every strip.
_CHUNKS = 2
# Columns that are summed at once: their sums stay in the first-level cache.
TILE = 4096


_INT4_MIDDLE = 8
_HIGH_FACTOR, _FP8_FACTOR = np.float32(HIGH_FACTOR), np.float32(FP8_FACTOR)
_BASE, _ONE = np.float32(NIBBLE_BASE), np.float32(1)

# Addresses of codes, scales (groups, N) and zeros (groups, N) uint8, 0 for none; the bytes between
# weight rows of codes; how codes are read; channels per group; any score_scale, for its type.
Weight = tuple[int, int, int, int, int, int, Any]


@compiled(parallel=True)
def product(
    element: np.generic,
    inputs: tuple[int, int, int, int],
    weight: Weight,
    outputs: tuple[int, int, int],
    sizes: tuple[int, int, int],
    parts: tuple[int, int, int, int],
    thresholds: tuple[float, float, float],
    form: int,
    eps: float,
    threads: int,
) -> None:
    """Write `Σ_groups scale · Σ_{j kept} (x_j - shift_j) · (code_j - zero)` + bias + residual.

    Sums are float32.

    Args:
        element: As in `cpu_compiled.product`, which explains what is not named here.
        inputs: x, norm weight, score_scale and shift.
        weight: The quantized weight.
        outputs: bias, residual and result.
        sizes: T, K, N.
        parts: Lists and the columns that use each.
        thresholds: Cut-off per list.
        form: `BESIDE`, `SILU` or `GELU`.
        eps: Of the norm.
        threads: Shares of the work.
    """
    rows, _, out_features = sizes
    lists = make_lists(element, inputs, sizes, parts[0], thresholds, eps)
    sums = np.empty((_CHUNKS, rows, out_features), np.float32)
    # As in cpu_compiled: a small body, and one type of index.
    if threads == 1:
        for thread in range(threads):
            _share(sums, weight, sizes, parts, lists, thread, threads)
    else:
        for thread in numba.prange(threads):
            index: int = np.int64(thread)  # type: ignore[assignment]
            _share(sums, weight, sizes, parts, lists, index, threads)
    _finish(element, sums, outputs, form)


@compiled()
def _share(
    sums: Array,
    weight: Weight,
    sizes: tuple[int, int, int],
    parts: tuple[int, int, int, int],
    lists: Lists,
    thread: int,
    threads: int,
) -> None:
    """Compute what one thread has: chunks of the lists, each for a slab of columns."""
    line = 2 * LINE_BYTES if weight[4] == INT4_CODES else LINE_BYTES
    slabs = max(1, threads // _CHUNKS)
    for task in range(thread, slabs * _CHUNKS, threads):
        chunk, slab = task % _CHUNKS, task // _CHUNKS
        begin = border(parts, lists[2], line, slab, slabs)
        end = border(parts, lists[2], line, slab + 1, slabs)
        part_begin = 0
        for i in range(parts[0]):
            part_end = part_begin + parts[1 + i]
            first, last = max(begin, part_begin), min(end, part_end)
            for tile in range(first, last, TILE):
                _add_chunk(
                    sums[chunk], min(TILE, last - tile), weight, sizes, tile, lists, i, chunk
                )
            part_begin = part_end


@compiled()
def _add_chunk(
    sums: Array,
    width: int,
    weight: Weight,
    sizes: tuple[int, int, int],
    first: int,
    lists: Lists,
    i: int,
    chunk: int,
) -> None:
    """Write the product with the channels in a chunk of one list to columns of sums, (T, N)."""
    rows, in_features, out_features = sizes
    groups = (in_features + weight[5] - 1) // max(1, weight[5])
    scales = array(weight[6], weight[1], groups * out_features)
    kept = lists[2][i]
    begin, end = kept * chunk // _CHUNKS, kept * (chunk + 1) // _CHUNKS
    channels, values = lists[0][i, begin:end], lists[1][i, begin:end]
    tile = np.zeros((rows, width), np.float32)
    if weight[4] == INT4_CODES:
        _add_int4(tile, weight, scales, sizes, first, channels, values)
    elif weight[4] == INT8_CODES:
        codes = array(np.int8(0), weight[0], in_features * weight[3])
        _add_bytes(tile, codes, weight, scales, sizes, first, channels, values, _ONE)
    else:
        octets = array(np.uint8(0), weight[0], in_features * weight[3])
        _add_bytes(tile, octets, weight, scales, sizes, first, channels, values, _FP8_FACTOR)
    for row in range(rows):
        total, part = sums[row], tile[row]
        for c in range(width):
            total[first + c] = part[c]


@compiled()
def _finish(element: np.generic, sums: Array, outputs: tuple[int, int, int], form: int) -> None:
    """Add the chunks, (_CHUNKS, T, N), in order, and the bias; write the result."""
    _, rows, out_features = sums.shape
    for row in range(rows):
        total = sums[0, row]
        for chunk in range(1, _CHUNKS):
            part = sums[chunk, row]
            for c in range(out_features):
                total[c] += part[c]
        if outputs[0] != 0:
            bias = array(element, outputs[0], out_features)
            for c in range(out_features):
                total[c] += widen(bias[c])
    if form == BESIDE:
        write(element, sums[0], outputs, 0, out_features)
        return
    half = out_features // 2
    both = np.empty((2, rows, half), np.float32)
    for row in range(rows):
        gates, ups = sums[0, row, :half], sums[0, row, half:]
        both[0, row], both[1, row] = gates, ups
    gate(both[0], both[1], form == GELU)
    write(element, both[0], outputs, 0, half)


@compiled()
def _add_bytes(
    sums: Array,
    codes: Array,
    weight: Weight,
    scales: Array,
    sizes: tuple[int, int, int],
    first: int,
    channels: Array,
    values: Array,
    factor: np.float32,
) -> None:
    """Add groups of int8 or fp8 codes to `sums`, (T, width)."""
    width = sums.shape[1]
    partial = np.empty_like(sums)
    begin = 0
    while begin < len(channels):
        group = channels[begin] // weight[5]
        end = _group_end(channels, begin, (group + 1) * weight[5])
        partial[:] = 0
        add_strips(partial, codes, weight[3], first, channels, values, begin, end)
        start = group * sizes[2] + first
        _add_scaled(sums, partial, scales[start : start + width], factor)
        begin = end


@compiled()
def _add_int4(
    sums: Array,
    weight: Weight,
    scales: Array,
    sizes: tuple[int, int, int],
    first: int,
    channels: Array,
    values: Array,
) -> None:
    """Add groups of int4 codes to `sums`, (T, width), whose first column may be in mid-byte."""
    rows, width = sums.shape
    _, in_features, out_features = sizes
    codes = array(np.uint8(0), weight[0], in_features * weight[3])
    first_byte = first // 2
    size = (first + width + 1) // 2 - first_byte
    partial = np.empty((2, rows, size), np.float32)
    zeros = np.empty((2, size), np.float32)
    zeros[0], zeros[1] = _BASE + _INT4_MIDDLE, _BASE + 16 * _INT4_MIDDLE
    begin = 0
    while begin < len(channels):
        group = channels[begin] // weight[5]
        end = _group_end(channels, begin, (group + 1) * weight[5])
        if weight[2] != 0:
            own = array(np.uint8(0), weight[2] + group * out_features, out_features)
            read_zeros(zeros, own, first_byte)
        partial[:] = 0
        add_nibbles(partial, codes, weight[3], first_byte, channels, values, begin, end, zeros)
        start = group * out_features + first
        _add_interleaved(sums, partial, scales[start : start + width], first % 2)
        begin = end


@compiled()
def _group_end(channels: Array, begin: int, limit: int) -> int:
    end = begin
    while end < len(channels) and channels[end] < limit:
        end += 1
    return end


@compiled()
def read_zeros(zeros: Array, own: Array, first_byte: int) -> None:
    """Write what the nibbles of a group's zeros become when they are read as codes are."""
    low, high = zeros[0], zeros[1]
    pairs = own[2 * first_byte :]
    for b in range(len(low)):
        low[b] = _BASE + np.float32(pairs[2 * b])
        right = min(2 * b + 1, len(pairs) - 1)
        high[b] = _BASE + 16 * np.float32(pairs[right])


@compiled(fuse=True)
def _add_scaled(sums: Array, partial: Array, scales: Array, factor: np.float32) -> None:
    for row in range(len(sums)):
        total, part = sums[row], partial[row]
        for c in range(len(total)):
            total[c] += part[c] * (factor * widen(scales[c]))


@compiled(fuse=True)
def _add_interleaved(sums: Array, partial: Array, scales: Array, odd: int) -> None:
    """Scale lower and upper nibbles, (2, T, bytes), and add them column by column."""
    width = sums.shape[1]
    pairs = (width - odd) // 2
    for row in range(len(sums)):
        total, low, high = sums[row], partial[0, row], partial[1, row]
        if odd:
            total[0] += high[0] * (_HIGH_FACTOR * widen(scales[0]))
        even, lower, upper = total[odd:], low[odd:], high[odd:]
        own = scales[odd:]
        for b in range(pairs):
            even[2 * b] += lower[b] * widen(own[2 * b])
            even[2 * b + 1] += upper[b] * (_HIGH_FACTOR * widen(own[2 * b + 1]))
        if odd + 2 * pairs < width:
            total[width - 1] += lower[pairs] * widen(scales[width - 1])
