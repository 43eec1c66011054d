"""Inner loops of quantized products on the CPU: weight rows of codes, added up eight at a time.

Legend: `T` rows. Sums are float32; scales are left to the caller.
"""

import numpy as np

from teal.kernels.cpu.compile_cache import compiled
from teal.kernels.cpu.gemv_kernel import GROUP
from teal.kernels.cpu.numerics import Array, prefetch
from teal.kernels.cpu.simd import LINE_BYTES, code_value, high_nibble, low_nibble

# Lines prefetched of each of the next weight rows: rows of codes are too short for the hardware's
# prefetcher.
_LINES_AHEAD = 8

_ZERO = np.float32(0)


@compiled(fuse=True)
def add_byte_rows(
    sums: Array,
    codes: Array,
    stride: int,
    first: int,
    channels: Array,
    values: Array,
    begin: int,
    end: int,
) -> None:
    """Add `Σ_i values[i] · codes[channels[i], first : first + width]` to `sums`, (T, width).

    Args:
        sums: Receives the sums.
        codes: int8, or fp8 as uint8, (K · stride,).
        stride: Codes per weight row.
        first: First column.
        channels: Kept channels.
        values: Their activations, (channels, T), float32.
        begin: First entry of `channels` to add.
        end: Entry after the last one to add.
    """
    rows, width = sums.shape
    for i in range(begin, end, GROUP):
        _prefetch_rows(codes, stride, first, channels, i + GROUP)
        w0 = _weight_row(codes, stride, first, width, channels, i, end)
        w1 = _weight_row(codes, stride, first, width, channels, i + 1, end)
        w2 = _weight_row(codes, stride, first, width, channels, i + 2, end)
        w3 = _weight_row(codes, stride, first, width, channels, i + 3, end)
        w4 = _weight_row(codes, stride, first, width, channels, i + 4, end)
        w5 = _weight_row(codes, stride, first, width, channels, i + 5, end)
        w6 = _weight_row(codes, stride, first, width, channels, i + 6, end)
        w7 = _weight_row(codes, stride, first, width, channels, i + 7, end)
        for row in range(rows):
            total = sums[row]
            v0, v1 = _value(values, i, row, end), _value(values, i + 1, row, end)
            v2, v3 = _value(values, i + 2, row, end), _value(values, i + 3, row, end)
            v4, v5 = _value(values, i + 4, row, end), _value(values, i + 5, row, end)
            v6, v7 = _value(values, i + 6, row, end), _value(values, i + 7, row, end)
            for c in range(width):
                total[c] += (
                    v0 * code_value(w0[c])
                    + v1 * code_value(w1[c])
                    + v2 * code_value(w2[c])
                    + v3 * code_value(w3[c])
                    + v4 * code_value(w4[c])
                    + v5 * code_value(w5[c])
                    + v6 * code_value(w6[c])
                    + v7 * code_value(w7[c])
                )


@compiled(fuse=True)
def add_nibble_rows(
    sums: Array,
    codes: Array,
    stride: int,
    first: int,
    channels: Array,
    values: Array,
    begin: int,
    end: int,
    zeros: Array,
) -> None:
    """Add `Σ_i values[i] · (code - zero)` of the lower and the upper nibbles to `sums`.

    The difference of two floats with the same base is exact, as if it were of integers.

    Args:
        sums: Receives the sums, (2, T, bytes): lower nibbles, then 16 times the upper ones.
        codes: Pairs of int4 codes as uint8, (K · stride,).
        stride: Bytes per weight row.
        first: First byte of a weight row.
        channels: Kept channels.
        values: Their activations, (channels, T), float32.
        begin: First entry of `channels` to add.
        end: Entry after the last one to add.
        zeros: Codes of zero, as `quantized_kernel.read_zeros` writes them, (2, bytes).
    """
    _, rows, width = sums.shape
    z0, z1 = zeros[0], zeros[1]
    for i in range(begin, end, GROUP):
        _prefetch_rows(codes, stride, first, channels, i + GROUP)
        w0 = _weight_row(codes, stride, first, width, channels, i, end)
        w1 = _weight_row(codes, stride, first, width, channels, i + 1, end)
        w2 = _weight_row(codes, stride, first, width, channels, i + 2, end)
        w3 = _weight_row(codes, stride, first, width, channels, i + 3, end)
        w4 = _weight_row(codes, stride, first, width, channels, i + 4, end)
        w5 = _weight_row(codes, stride, first, width, channels, i + 5, end)
        w6 = _weight_row(codes, stride, first, width, channels, i + 6, end)
        w7 = _weight_row(codes, stride, first, width, channels, i + 7, end)
        for row in range(rows):
            low, high = sums[0, row], sums[1, row]
            v0, v1 = _value(values, i, row, end), _value(values, i + 1, row, end)
            v2, v3 = _value(values, i + 2, row, end), _value(values, i + 3, row, end)
            v4, v5 = _value(values, i + 4, row, end), _value(values, i + 5, row, end)
            v6, v7 = _value(values, i + 6, row, end), _value(values, i + 7, row, end)
            for c in range(width):
                zero = z0[c]
                low[c] += (
                    v0 * (low_nibble(w0[c]) - zero)
                    + v1 * (low_nibble(w1[c]) - zero)
                    + v2 * (low_nibble(w2[c]) - zero)
                    + v3 * (low_nibble(w3[c]) - zero)
                    + v4 * (low_nibble(w4[c]) - zero)
                    + v5 * (low_nibble(w5[c]) - zero)
                    + v6 * (low_nibble(w6[c]) - zero)
                    + v7 * (low_nibble(w7[c]) - zero)
                )
            for c in range(width):
                zero = z1[c]
                high[c] += (
                    v0 * (high_nibble(w0[c]) - zero)
                    + v1 * (high_nibble(w1[c]) - zero)
                    + v2 * (high_nibble(w2[c]) - zero)
                    + v3 * (high_nibble(w3[c]) - zero)
                    + v4 * (high_nibble(w4[c]) - zero)
                    + v5 * (high_nibble(w5[c]) - zero)
                    + v6 * (high_nibble(w6[c]) - zero)
                    + v7 * (high_nibble(w7[c]) - zero)
                )


@compiled()
def _weight_row(
    codes: Array, stride: int, first: int, width: int, channels: Array, i: int, end: int
) -> Array:
    """Return a weight row of codes; from `end` on the last one, which `_value` multiplies by 0."""
    start = channels[min(i, end - 1)] * stride + first
    return codes[start : start + width]


@compiled()
def _value(values: Array, i: int, row: int, end: int) -> np.float32:
    value: np.float32 = values[min(i, end - 1), row] if i < end else _ZERO
    return value


@compiled()
def _prefetch_rows(codes: Array, stride: int, first: int, channels: Array, begin: int) -> None:
    """Prefetch the first lines of the next weight rows, also beyond the group of a scale."""
    for j in range(begin, min(begin + GROUP, len(channels))):
        for line in range(_LINES_AHEAD):
            prefetch(codes, channels[j] * stride + first + line * LINE_BYTES)
