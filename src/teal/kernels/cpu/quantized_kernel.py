"""CPU kernel of products with quantized weights: it reads the codes of kept channels only.

Legend: `T` rows, `K` in_features, `N` out_features. The scheme is that of `gemv_kernel`; the sum of
a group of channels is scaled once.
"""

from typing import Any

import numba
import numpy as np

from teal.kernels.cpu.compile_cache import compiled
from teal.kernels.cpu.gemv_kernel import GELU, LINEAR, border, gate, write
from teal.kernels.cpu.kept_channels import KeptChannels, compact_inputs
from teal.kernels.cpu.numerics import Array, array, widen
from teal.kernels.cpu.quantized_inner import add_byte_rows, add_nibble_rows
from teal.kernels.cpu.simd import FP8_FACTOR, HIGH_FACTOR, LINE_BYTES, NIBBLE_BASE

# How codes are read.
INT8_CODES, FP8_CODES, INT4_CODES = 0, 1, 2

# The kept channels of a mask are divided into so many chunks, whatever the number of threads; two
# threads take one each. Each thread then reads longer pieces of fewer weight rows, from fewer pages
# of memory, than if all threads divided the columns.
_CHUNKS = 2
# Columns summed at once: their sums stay in the first-level cache.
TILE = 4096

_INT4_MIDDLE = 8
_HIGH_FACTOR, _FP8_FACTOR = np.float32(HIGH_FACTOR), np.float32(FP8_FACTOR)
_BASE, _ONE = np.float32(NIBBLE_BASE), np.float32(1)

# Addresses of codes, scales (groups, N) and zeros (groups, N), uint8, 0 for none; bytes per weight
# row of codes; how codes are read; channels per group; zero of the type of the scales.
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

    Sums are float32. The arguments are those of `gemv_kernel.product`, which explains them.

    Args:
        element: Zero of the type that stands for the dtype of the tensors.
        inputs: Addresses of x, norm weight, score_scale and shift.
        weight: The quantized weight.
        outputs: Addresses of bias, residual and result.
        sizes: T, K, N.
        parts: The number of masks, and the columns of each.
        thresholds: Cut-off of each mask.
        form: `LINEAR`, `SILU` or `GELU`.
        eps: Added to the mean square in the norm.
        threads: How many of numba's threads share the work.
    """
    rows, _, out_features = sizes
    kept = compact_inputs(element, inputs, sizes, parts[0], thresholds, eps)
    sums = np.empty((_CHUNKS, rows, out_features), np.float32)
    # A small body and one type of index, as in gemv_kernel.
    if threads == 1:
        for thread in range(threads):
            _share(sums, weight, sizes, parts, kept, thread, threads)
    else:
        for thread in numba.prange(threads):
            index: int = np.int64(thread)  # type: ignore[assignment]
            _share(sums, weight, sizes, parts, kept, index, threads)
    _finish(element, sums, outputs, form)


@compiled()
def _share(
    sums: Array,
    weight: Weight,
    sizes: tuple[int, int, int],
    parts: tuple[int, int, int, int],
    kept: KeptChannels,
    thread: int,
    threads: int,
) -> None:
    """Do the work of one thread: chunks of kept channels, each for a block of columns."""
    line = 2 * LINE_BYTES if weight[4] == INT4_CODES else LINE_BYTES
    blocks = max(1, threads // _CHUNKS)
    for task in range(thread, blocks * _CHUNKS, threads):
        chunk, block = task % _CHUNKS, task // _CHUNKS
        begin = border(parts, kept[2], line, block, blocks)
        end = border(parts, kept[2], line, block + 1, blocks)
        part_begin = 0
        for i in range(parts[0]):
            part_end = part_begin + parts[1 + i]
            first, last = max(begin, part_begin), min(end, part_end)
            for tile in range(first, last, TILE):
                _add_chunk(sums[chunk], min(TILE, last - tile), weight, sizes, tile, kept, i, chunk)
            part_begin = part_end


@compiled()
def _add_chunk(
    sums: Array,
    width: int,
    weight: Weight,
    sizes: tuple[int, int, int],
    first: int,
    kept: KeptChannels,
    mask: int,
    chunk: int,
) -> None:
    """Write the product with one chunk of a mask's kept channels to columns of `sums`, (T, N)."""
    rows, in_features, out_features = sizes
    groups = (in_features + weight[5] - 1) // max(1, weight[5])
    scales = array(weight[6], weight[1], groups * out_features)
    count = kept[2][mask]
    begin, end = count * chunk // _CHUNKS, count * (chunk + 1) // _CHUNKS
    channels, values = kept[0][mask, begin:end], kept[1][mask, begin:end]
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
    """Add up the chunks, (_CHUNKS, T, N), in order, add the bias, and write the result."""
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
    if form == LINEAR:
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
    """Add the product with int8 or fp8 codes to `sums`, (T, width), group by group."""
    width = sums.shape[1]
    partial = np.empty_like(sums)
    begin = 0
    while begin < len(channels):
        group = channels[begin] // weight[5]
        end = _group_end(channels, begin, (group + 1) * weight[5])
        partial[:] = 0
        add_byte_rows(partial, codes, weight[3], first, channels, values, begin, end)
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
    """Add the product with int4 codes to `sums`, (T, width); `first` may be an upper nibble."""
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
        add_nibble_rows(partial, codes, weight[3], first_byte, channels, values, begin, end, zeros)
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
    """Write the zeros of a group in the form of `low_nibble` and `high_nibble`, (2, bytes)."""
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
    """Scale the sums of lower and upper nibbles, (2, T, bytes), and add them to their columns."""
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
