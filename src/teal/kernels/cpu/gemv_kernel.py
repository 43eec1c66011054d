"""CPU kernel of products with float weights: it reads the weight rows of kept channels only.

Legend: `T` rows, `K` in_features, `N` out_features. docs/kernels.md explains the scheme.
"""

import math
from typing import Any

import numba
import numpy as np

from teal.kernels.cpu.compile_cache import compiled
from teal.kernels.cpu.kept_channels import KeptChannels, compact_inputs
from teal.kernels.cpu.numerics import Array, array, gated, narrow, widen
from teal.kernels.cpu.simd import LINE_BYTES, add_line, prefetch_lines

# Weight rows read at once: more streams keep more of the memory busy, and 8 factors still fit the
# registers of AVX2.
GROUP = 8
# If threads divided short weight rows among them, memory would idle between the pieces. They divide
# the channels instead, into a number of shares that does not depend on the number of threads, so
# that the result does not either. The shares are added up afterwards: the longer the weight rows,
# the fewer shares are affordable.
SHORT_ROW_BYTES, SHARES_OF_SHORT_ROWS = 8192, 8
LONG_ROW_BYTES, SHARES = 32768, 2

# The form of a product: parts side by side, or gate and up with an activation.
LINEAR, SILU, GELU = 0, 1, 2


@compiled(parallel=True)
def product(
    element: np.generic,
    inputs: tuple[int, int, int, int],
    weights: tuple[int, int],
    outputs: tuple[int, int, int],
    sizes: tuple[int, int, int],
    parts: tuple[int, int, int, int],
    thresholds: tuple[float, float, float],
    form: int,
    eps: float,
    threads: int,
) -> None:
    """Write `Σ_{j kept} (x_j - shift_j) · W[j, :] + bias + residual`, summed in float32.

    Tensors are passed as addresses, 0 if absent: making numpy arrays would take longer than the
    rest of the launch.

    Args:
        element: Zero of a type that stands for the dtype of the tensors: uint16 for bfloat16, int16
            for float16, float32 for float32.
        inputs: Addresses of x (T, K), contiguous; the weight of an RMSNorm (K,); score_scale
            (masks, K) and shift (K,), both float32.
        weights: Address of the weight (K, N), and its stride from row to row in elements.
        outputs: Addresses of bias (N,), residual and result, contiguous.
        sizes: T, K, N.
        parts: The number of masks, and the columns of each mask. With gate and up, a single mask
            serves both.
        thresholds: Cut-off of each mask in score units, rounded to float32.
        form: `LINEAR` for parts side by side; `SILU` or `GELU` for gate and up.
        eps: Added to the mean square in the norm.
        threads: How many of numba's threads share the work.
    """
    _, in_features, out_features = sizes
    weight = array(element, weights[0], max(0, in_features - 1) * weights[1] + out_features)
    kept = compact_inputs(element, inputs, sizes, parts[0], thresholds, eps)
    shares = _shares_of(out_features * weight.itemsize)
    partial = np.empty((shares, sizes[0], out_features), np.float32)

    def run(thread: int) -> None:
        place = (thread, threads)
        _work(element, weight, weights[1], outputs, sizes, parts, form, kept, partial, place)

    # A parallel function is slow to compile, so its body is small. The index has the same type in
    # both loops, so that what they call is compiled once.
    if threads == 1:
        for thread in range(threads):
            run(thread)
    else:
        for thread in numba.prange(threads):
            index: int = np.int64(thread)  # type: ignore[assignment]
            run(index)
    if shares:
        _finish_shares(element, partial, outputs, out_features, form)


@compiled()
def _shares_of(row_bytes: int) -> int:
    """Return into how many shares the channels are divided; 0 if threads divide the columns."""
    if row_bytes < SHORT_ROW_BYTES:
        return SHARES_OF_SHORT_ROWS
    return SHARES if row_bytes < LONG_ROW_BYTES else 0


@compiled()
def _work(
    element: np.generic,
    weight: Array,
    stride: int,
    outputs: tuple[int, int, int],
    sizes: tuple[int, int, int],
    parts: tuple[int, int, int, int],
    form: int,
    kept: KeptChannels,
    partial: Array,
    place: tuple[int, int],
) -> None:
    """Do the work of one thread; `place` is its index and the number of threads."""
    thread, threads = place
    if len(partial) == 0:
        _columns_of_thread(
            element, weight, stride, outputs, sizes, parts, form, kept, thread, threads
        )
        return
    # If there are more threads than shares, they divide the columns too.
    shares = len(partial)
    blocks = 1 if threads <= shares else threads // math.gcd(threads, shares)
    tasks = shares * blocks
    # A thread takes adjacent shares: each prefetches the first weight rows of the next.
    for task in range(tasks * thread // threads, tasks * (thread + 1) // threads):
        _share(partial, weight, stride, parts, kept, task // blocks, (task % blocks, blocks))


@compiled()
def _share(
    partial: Array,
    weight: Array,
    stride: int,
    parts: tuple[int, int, int, int],
    kept: KeptChannels,
    share: int,
    place: tuple[int, int],
) -> None:
    """Write the product with one share of the kept channels for one block of columns."""
    counts = kept[2]
    shares, rows, out_features = partial.shape
    block, blocks = place
    begin, end = out_features * block // blocks, out_features * (block + 1) // blocks
    part_begin = 0
    for i in range(parts[0]):
        part_end = part_begin + parts[1 + i]
        first, last = max(begin, part_begin), min(end, part_end)
        if last > first:
            groups = counts[i] // GROUP
            low = groups * share // shares * GROUP
            high = counts[i] if share == shares - 1 else groups * (share + 1) // shares * GROUP
            sums = np.zeros((rows, last - first), np.float32)
            _add_weight_rows(sums, weight, stride, first, _entries(kept, i), low, high)
            partial[share, :, first:last] = sums
        part_begin = part_end


@compiled()
def _finish_shares(
    element: np.generic,
    partial: Array,
    outputs: tuple[int, int, int],
    out_features: int,
    form: int,
) -> None:
    """Add up the shares in order, add the bias, and write the result."""
    sums = partial[0]
    for share in range(1, len(partial)):
        for row in range(len(sums)):
            total, addends = sums[row], partial[share, row]
            for c in range(out_features):
                total[c] += addends[c]
    _add_bias(element, sums, outputs[0], out_features, 0)
    if form == LINEAR:
        write(element, sums, outputs, 0, out_features)
        return
    half = out_features // 2
    gates, ups = sums[:, :half].copy(), sums[:, half:].copy()
    gate(gates, ups, form == GELU)
    write(element, gates, outputs, 0, half)


@compiled()
def _columns_of_thread(
    element: np.generic,
    weight: Array,
    stride: int,
    outputs: tuple[int, int, int],
    sizes: tuple[int, int, int],
    parts: tuple[int, int, int, int],
    form: int,
    kept: KeptChannels,
    thread: int,
    threads: int,
) -> None:
    """Compute the columns of one thread, with all kept channels."""
    rows, _, out_features = sizes
    if form == LINEAR:
        begin = border(parts, kept[2], _per_line(weight), thread, threads)
        end = border(parts, kept[2], _per_line(weight), thread + 1, threads)
        part_begin = 0
        for i in range(parts[0]):
            part_end = part_begin + parts[1 + i]
            first, last = max(begin, part_begin), min(end, part_end)
            if last > first:
                sums = np.zeros((rows, last - first), np.float32)
                _add_part(element, sums, weight, stride, outputs[0], out_features, first, kept, i)
                write(element, sums, outputs, first, out_features)
            part_begin = part_end
        return
    half = out_features // 2
    share = (half + _per_line(weight) * threads - 1) // (_per_line(weight) * threads)
    first = thread * share * _per_line(weight)
    width = min(share * _per_line(weight), half - first)
    if width > 0:
        both = np.zeros((2, rows, width), np.float32)
        for i in range(2):
            column, mask = i * half + first, min(i, parts[0] - 1)
            _add_part(
                element, both[i], weight, stride, outputs[0], out_features, column, kept, mask
            )
        gate(both[0], both[1], form == GELU)
        write(element, both[0], outputs, first, half)


@compiled()
def _add_part(
    element: np.generic,
    sums: Array,
    weight: Array,
    stride: int,
    bias: int,
    out_features: int,
    first: int,
    kept: KeptChannels,
    mask: int,
) -> None:
    """Add the product with the channels that a mask keeps, and the bias, to `sums`, (T, width)."""
    _add_weight_rows(sums, weight, stride, first, _entries(kept, mask), 0, kept[2][mask])
    _add_bias(element, sums, bias, out_features, first)


@compiled()
def _entries(kept: KeptChannels, mask: int) -> tuple[Array, Array]:
    """Return the channels that a mask keeps, and their activations."""
    channels, values, counts = kept
    return channels[mask, : counts[mask]], values[mask, : counts[mask]]


@compiled()
def _add_bias(element: np.generic, sums: Array, bias: int, out_features: int, first: int) -> None:
    if bias != 0:
        addends = array(element, bias, out_features)
        for row in range(len(sums)):
            total = sums[row]
            for c in range(len(total)):
                total[c] += widen(addends[first + c])


@compiled()
def border(
    parts: tuple[int, int, int, int], counts: Array, line: int, thread: int, threads: int
) -> int:
    """Return the first column of a thread, such that each reads about as many bytes.

    Args:
        parts: The number of masks, and the columns of each.
        counts: Kept channels of each mask, (masks,).
        line: Columns per cache line, at whose multiples a part is divided.
        thread: Index of the thread; `threads` gives the end of the last one.
        threads: Number of threads.
    """
    total = 0
    for i in range(parts[0]):
        total += parts[1 + i] * (counts[i] + 1)
    left = total * thread // threads
    column = 0
    for i in range(parts[0]):
        cost = parts[1 + i] * (counts[i] + 1)
        if left < cost:
            whole_lines: int = left // (counts[i] + 1) // line * line
            return column + whole_lines
        left -= cost
        column += parts[1 + i]
    return column


@compiled(fuse=True)
def _add_weight_rows(
    sums: Array,
    weight: Array,
    stride: int,
    first: int,
    entries: tuple[Array, Array],
    low: int,
    high: int,
) -> None:
    """Add `Σ_i values[i] · W[channels[i], first : first + width]` to `sums`, (T, width).

    `entries` are channels and values, of which those from `low` to `high` are added. Meanwhile the
    weight rows of the next entries are prefetched line by line: the hardware cannot know where they
    are.
    """
    channels, values = entries
    width, line = sums.shape[1], _per_line(weight)
    lines = width // line * line
    grouped = low + (high - low) // GROUP * GROUP
    for i in range(low, grouped, GROUP):
        starts = _starts(channels, i, stride, first)
        following = _starts(channels, i + GROUP, stride, first)
        for column in range(0, lines, line):
            prefetch_lines(weight, following, column)
            for row in range(len(sums)):
                add_line(sums[row], column, weight, starts, _factors(values, i, row))
        for row in range(len(sums)):
            for column in range(lines, width):
                sums[row, column] += _add_up(values[i : i + GROUP, row], weight, starts, column)
    for i in range(grouped, high):
        weight_row = _piece(weight, channels[i] * stride + first, width)
        for row in range(len(sums)):
            total = sums[row]
            value = values[i, row]
            for c in range(width):
                total[c] += value * widen(weight_row[c])


@compiled(fuse=True)
def _add_up(values: Array, weight: Array, starts: tuple[int, ...], column: int) -> np.float32:
    """Return `Σ_k values[k] · weight[starts[k] + column]`, as `add_line` does."""
    total = np.float32(0)
    for k in range(GROUP):
        total += values[k] * widen(weight[starts[k] + column])
    return total


@compiled()
def _starts(channels: Array, i: int, stride: int, first: int) -> tuple[int, ...]:
    """Return where the weight rows of GROUP channels begin, repeating the last channel."""
    last = len(channels) - 1
    return (
        channels[min(i, last)] * stride + first,
        channels[min(i + 1, last)] * stride + first,
        channels[min(i + 2, last)] * stride + first,
        channels[min(i + 3, last)] * stride + first,
        channels[min(i + 4, last)] * stride + first,
        channels[min(i + 5, last)] * stride + first,
        channels[min(i + 6, last)] * stride + first,
        channels[min(i + 7, last)] * stride + first,
    )


@compiled()
def _factors(values: Array, i: int, row: int) -> tuple[Any, ...]:
    return (
        values[i, row],
        values[i + 1, row],
        values[i + 2, row],
        values[i + 3, row],
        values[i + 4, row],
        values[i + 5, row],
        values[i + 6, row],
        values[i + 7, row],
    )


@compiled()
def gate(gates: Array, ups: Array, gelu: bool) -> None:
    """Replace the gates by `activation(gate) · up`, both (T, width)."""
    for row in range(len(gates)):
        gate, up = gates[row], ups[row]
        for c in range(len(gate)):
            gate[c] = gated(gate[c], up[c], gelu)


@compiled()
def write(
    element: np.generic, sums: Array, outputs: tuple[int, int, int], first: int, columns: int
) -> None:
    """Add the residual to the columns from `first` of sums, (T, width); write them rounded."""
    rows, width = sums.shape
    residual = array(element, outputs[1], rows * columns)
    result = array(element, outputs[2], rows * columns)
    for row in range(rows):
        total = sums[row]
        start = row * columns + first
        if outputs[1] != 0:
            for c in range(width):
                total[c] += widen(residual[start + c])
        for c in range(width):
            result[start + c] = narrow(element, total[c])


@compiled()
def _piece(weight: Array, start: int, width: int) -> Array:
    return weight[start : start + width]


@compiled()
def _per_line(weight: Array) -> int:
    return LINE_BYTES // weight.itemsize
