"""CPU kernel of the products: weight rows of kept channels are read once, the others never.

Legend: `T` rows, `K` in_features, `N` out_features. docs/kernels.md explains the scheme.
"""

import math
from typing import Any

import numba
import numpy as np

from teal.kernels.cpu.kept_channels import Lists, make_lists
from teal.kernels.cpu.numerics import Array, array, gated, narrow, widen
from teal.kernels.cpu.simd import LINE_BYTES, add_line, ask_lines
from teal.kernels.cpu.threads import compiled

# Strips read side by side: more streams keep more of the memory busy, and their 8 factors still
# fit the registers of AVX2.
GROUP = 8
# Parts of short weight rows for each thread would keep the memory waiting between them: threads
# share the channels then, in as many shares whatever their number. To add up few shares of longer
# weight rows takes no longer than many of short ones.
SHORT_STRIP_BYTES, SHARES_OF_SHORT = 8192, 8
LONG_STRIP_BYTES, SHARES = 32768, 2

# How the sums of two parts become one result.
BESIDE, SILU, GELU = 0, 1, 2


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

    Tensors come as addresses, 0 for absent ones: numpy arrays would cost more to make than the
    whole launch.

    Args:
        element: Any uint16 where the tensors are bfloat16, int16 for float16, float32 for float32.
        inputs: x (T, K) contiguous; norm weight of an RMSNorm (K,); score_scale (lists, K) and
            shift (K,), both float32.
        weights: The weight (K, N) and the distance between its weight rows, in elements.
        outputs: bias (N,), residual and result, contiguous.
        sizes: T, K, N.
        parts: How many lists of kept channels there are, and the columns that use each. The last
            list serves all parts that follow.
        thresholds: Cut-off per list in score units, rounded to float32.
        form: `BESIDE` for parts beside each other; `SILU` or `GELU` for gate and up.
        eps: Of the norm.
        threads: How many slabs of columns there are, one for each of numba's threads.
    """
    _, in_features, out_features = sizes
    weight = array(element, weights[0], max(0, in_features - 1) * weights[1] + out_features)
    lists = make_lists(element, inputs, sizes, parts[0], thresholds, eps)
    shares = _shares_of(out_features * weight.itemsize)
    partial = np.empty((shares, sizes[0], out_features), np.float32)

    def run(thread: int) -> None:
        place = (thread, threads)
        _work(element, weight, weights[1], outputs, sizes, parts, form, lists, partial, place)

    # The body of a parallel function is slow to compile, so it is small; and an index has one type
    # in both loops, so that what they call is compiled once.
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
def _shares_of(strip_bytes: int) -> int:
    """Return in how many shares threads take the channels; none if they take columns instead."""
    if strip_bytes < SHORT_STRIP_BYTES:
        return SHARES_OF_SHORT
    return SHARES if strip_bytes < LONG_STRIP_BYTES else 0


@compiled()
def _work(
    element: np.generic,
    weight: Array,
    stride: int,
    outputs: tuple[int, int, int],
    sizes: tuple[int, int, int],
    parts: tuple[int, int, int, int],
    form: int,
    lists: Lists,
    partial: Array,
    place: tuple[int, int],
) -> None:
    """Compute what one thread has to: `place` is its number and how many there are."""
    thread, threads = place
    if len(partial) == 0:
        _slab(element, weight, stride, outputs, sizes, parts, form, lists, thread, threads)
        return
    # More threads than shares divide the columns too.
    shares = len(partial)
    slabs = 1 if threads <= shares else threads // math.gcd(threads, shares)
    tasks = shares * slabs
    # One behind the other: a share asks for the first weight rows of the next.
    for task in range(tasks * thread // threads, tasks * (thread + 1) // threads):
        _share(partial, weight, stride, parts, lists, task // slabs, (task % slabs, slabs))


@compiled()
def _share(
    partial: Array,
    weight: Array,
    stride: int,
    parts: tuple[int, int, int, int],
    lists: Lists,
    share: int,
    place: tuple[int, int],
) -> None:
    """Write the product with a share of the kept channels, for the columns of one slab."""
    kept = lists[2]
    shares, rows, out_features = partial.shape
    slab, slabs = place
    begin, end = out_features * slab // slabs, out_features * (slab + 1) // slabs
    part_begin = 0
    for i in range(parts[0]):
        part_end = part_begin + parts[1 + i]
        first, last = max(begin, part_begin), min(end, part_end)
        if last > first:
            groups = kept[i] // GROUP
            low = groups * share // shares * GROUP
            high = kept[i] if share == shares - 1 else groups * (share + 1) // shares * GROUP
            sums = np.zeros((rows, last - first), np.float32)
            _add_strips(sums, weight, stride, first, _entries(lists, i), low, high)
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
    """Add up the shares in their order, and the bias, and write the result."""
    sums = partial[0]
    for share in range(1, len(partial)):
        for row in range(len(sums)):
            total, addends = sums[row], partial[share, row]
            for c in range(out_features):
                total[c] += addends[c]
    _add_bias(element, sums, outputs[0], out_features, 0)
    if form == BESIDE:
        write(element, sums, outputs, 0, out_features)
        return
    half = out_features // 2
    gates, ups = sums[:, :half].copy(), sums[:, half:].copy()
    gate(gates, ups, form == GELU)
    write(element, gates, outputs, 0, half)


@compiled()
def _slab(
    element: np.generic,
    weight: Array,
    stride: int,
    outputs: tuple[int, int, int],
    sizes: tuple[int, int, int],
    parts: tuple[int, int, int, int],
    form: int,
    lists: Lists,
    thread: int,
    threads: int,
) -> None:
    """Compute the columns of one thread."""
    rows, _, out_features = sizes
    if form == BESIDE:
        begin = border(parts, lists[2], _per_line(weight), thread, threads)
        end = border(parts, lists[2], _per_line(weight), thread + 1, threads)
        part_begin = 0
        for i in range(parts[0]):
            part_end = part_begin + parts[1 + i]
            first, last = max(begin, part_begin), min(end, part_end)
            if last > first:
                sums = np.zeros((rows, last - first), np.float32)
                _add_list(element, sums, weight, stride, outputs[0], out_features, first, lists, i)
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
            column, own_list = i * half + first, min(i, parts[0] - 1)
            _add_list(
                element, both[i], weight, stride, outputs[0], out_features, column, lists, own_list
            )
        gate(both[0], both[1], form == GELU)
        write(element, both[0], outputs, first, half)


@compiled()
def _add_list(
    element: np.generic,
    sums: Array,
    weight: Array,
    stride: int,
    bias: int,
    out_features: int,
    first: int,
    lists: Lists,
    i: int,
) -> None:
    """Add the product with the channels of one list, and the bias, to sums, (T, width)."""
    _add_strips(sums, weight, stride, first, _entries(lists, i), 0, lists[2][i])
    _add_bias(element, sums, bias, out_features, first)


@compiled()
def _entries(lists: Lists, i: int) -> tuple[Array, Array]:
    """Return the kept channels of one list, and their values."""
    channels, values, kept = lists
    return channels[i, : kept[i]], values[i, : kept[i]]


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
    parts: tuple[int, int, int, int], kept: Array, line: int, thread: int, threads: int
) -> int:
    """Return the column where the share of a thread begins: equal bytes to read for each."""
    total = 0
    for i in range(parts[0]):
        total += parts[1 + i] * (kept[i] + 1)
    left = total * thread // threads
    column = 0
    for i in range(parts[0]):
        cost = parts[1 + i] * (kept[i] + 1)
        if left < cost:
            whole_lines: int = left // (kept[i] + 1) // line * line
            return column + whole_lines
        left -= cost
        column += parts[1 + i]
    return column


@compiled(fuse=True)
def _add_strips(
    sums: Array,
    weight: Array,
    stride: int,
    first: int,
    entries: tuple[Array, Array],
    low: int,
    high: int,
) -> None:
    """Add `Σ_i values[i] · W[channels[i], first : first + width]` to `sums`, (T, width).

    `entries` are channels and values, of which those from `low` to `high` count. While weight rows
    are added, those of the next entries are asked for, line by line: only the list tells where they
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
            ask_lines(weight, following, column)
            for row in range(len(sums)):
                add_line(sums[row], column, weight, starts, _factors(values, i, row))
        for row in range(len(sums)):
            for column in range(lines, width):
                sums[row, column] += _add_up(values[i : i + GROUP, row], weight, starts, column)
    for i in range(grouped, high):
        strip = _strip(weight, channels[i] * stride + first, width)
        for row in range(len(sums)):
            total = sums[row]
            value = values[i, row]
            for c in range(width):
                total[c] += value * widen(strip[c])


@compiled(fuse=True)
def _add_up(values: Array, weight: Array, starts: tuple[int, ...], column: int) -> np.float32:
    """Return `Σ_k values[k] · weight[starts[k] + column]`, as `add_line` does."""
    total = np.float32(0)
    for k in range(GROUP):
        total += values[k] * widen(weight[starts[k] + column])
    return total


@compiled()
def _starts(channels: Array, i: int, stride: int, first: int) -> tuple[int, ...]:
    """Return where the weight rows of GROUP channels begin; behind the last one it is again."""
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
    """Write `activation(gate) · up` over the gates."""
    for row in range(len(gates)):
        gate, up = gates[row], ups[row]
        for c in range(len(gate)):
            gate[c] = gated(gate[c], up[c], gelu)


@compiled()
def write(
    element: np.generic, sums: Array, outputs: tuple[int, int, int], first: int, columns: int
) -> None:
    """Add the residual to a slab of sums, (T, width), and write it rounded."""
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
def _strip(weight: Array, start: int, width: int) -> Array:
    return weight[start : start + width]


@compiled()
def _per_line(weight: Array) -> int:
    return LINE_BYTES // weight.itemsize
