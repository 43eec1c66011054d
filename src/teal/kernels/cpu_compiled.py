"""CPU kernel of the sparse product: strips of kept channels are read once, the others never.

Legend: `T` rows, `K` in_features, `N` out_features. docs/kernels.md explains the scheme. Whatever
is compiled stands in this one file, because numba's cache on disk sees a change only in the file
of the function that it compiles.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from teal.kernels.cpu_threads import compiled

Array = NDArray[Any]
# What numba asks of an intrinsic: its signature, and what emits its instructions.
Intrinsic = tuple[types.Type, Callable[..., ir.Value]]

# Strips read side by side: more streams keep more of the memory busy, and their 8 factors still
# fit the registers of AVX2.
GROUP = 8
LINE_BYTES = 64
# Only the list knows where the next strips begin: the hardware follows once it saw a few lines.
PREFETCHED_LINES = 4


@compiled(parallel=True)
def product(
    element: np.generic,
    inputs: tuple[int, int, int],
    weights: tuple[int, int],
    outputs: tuple[int, int, int],
    sizes: tuple[int, int, int],
    threshold: float,
    threads: int,
) -> None:
    """Write `Σ_{j kept} (x_j - shift_j) · W[j, :] + bias + residual`, summed in float32.

    Tensors come as addresses, 0 for absent ones: numpy arrays would cost more to make than the
    whole launch.

    Args:
        element: Any uint16 where the tensors are bfloat16, int16 for float16, float32 for float32.
        inputs: x (T, K) contiguous, scale (K,) and shift (K,), both float32.
        weights: The weight (K, N) and the distance between its strips, in elements.
        outputs: bias (N,), residual (T, N) and the result (T, N), contiguous.
        sizes: T, K, N.
        threshold: Cut-off in score units, rounded to float32.
        threads: How many slabs of columns there are, one for each of numba's threads.
    """
    rows, in_features, out_features = sizes
    x = _array(element, inputs[0], rows * in_features).reshape(rows, in_features)
    weight = _array(element, weights[0], max(0, in_features - 1) * weights[1] + out_features)
    channels = np.empty(in_features, np.int64)
    values = np.empty((in_features, rows), np.float32)
    kept = list_kept(x, inputs[1], inputs[2], np.float32(threshold), channels, values)
    lines = (out_features + _per_line(weight) - 1) // _per_line(weight)
    slab = (lines + threads - 1) // threads * _per_line(weight)
    for thread in numba.prange(threads):
        first = thread * slab
        width = min(slab, out_features - first)
        if width > 0:
            sums = np.zeros((rows, width), np.float32)
            _add_strips(sums, weight, weights[1], first, channels[:kept], values[:kept])
            _finish(element, sums, outputs, first, out_features)


@compiled()
def list_kept(
    x: Array, scale_address: int, shift_address: int, threshold: np.float32, *lists: Array
) -> int:
    """List the channels that any row keeps, with 0 for the rows that drop them.

    Args:
        x: Activations, (T, K).
        scale_address: Where scale (K,) begins, float32; 0 for none.
        shift_address: Where shift (K,) begins, float32; 0 for none.
        threshold: Cut-off in score units.
        *lists: Room for channels (K,) int64, and for their activations (K, T) float32.

    Returns:
        How many channels are kept; the lists mean nothing from there on.
    """
    channels, values = lists
    rows, in_features = x.shape
    scale = _array(np.float32(0), scale_address, in_features * (scale_address != 0))
    shift = _array(np.float32(0), shift_address, in_features * (shift_address != 0))
    kept = 0
    # Entries are written before it is decided whether they stay: there is no branch to mispredict.
    if rows == 1:
        for channel in range(in_features):
            value, score = _score(x[0, channel], channel, scale, shift)
            channels[kept] = channel
            values[kept, 0] = value
            kept += not (score <= threshold)
        return kept
    for channel in range(in_features):
        channels[kept] = channel
        keep_any = False
        for row in range(rows):
            value, score = _score(x[row, channel], channel, scale, shift)
            keep = not (score <= threshold)
            values[kept, row] = value if keep else np.float32(0)
            keep_any |= keep
        kept += keep_any
    return kept


@compiled()
def _score(
    bits: np.generic, channel: int, scale: Array, shift: Array
) -> tuple[np.float32, np.float32]:
    """Return an activation less its shift, and its score. Compared as not ≤, NaN is kept."""
    value = _widen(bits)
    score = value
    if len(shift) > 0:
        score = value - shift[channel]
        value = _widen(_narrow(bits, score))
    score = abs(score)
    if len(scale) > 0:
        score = score * scale[channel]
    return value, score


@compiled(fuse=True)
def _add_strips(
    sums: Array, weight: Array, stride: int, first: int, channels: Array, values: Array
) -> None:
    """Add `Σ_i values[i] · W[channels[i], first : first + width]` to `sums`, (T, width)."""
    rows, width = sums.shape
    grouped = len(channels) // GROUP * GROUP
    for i in range(0, grouped, GROUP):
        for j in range(i + GROUP, min(i + 2 * GROUP, grouped)):
            for line in range(PREFETCHED_LINES):
                _prefetch(weight, channels[j] * stride + first + line * _per_line(weight))
        w0 = _strip(weight, channels[i] * stride + first, width)
        w1 = _strip(weight, channels[i + 1] * stride + first, width)
        w2 = _strip(weight, channels[i + 2] * stride + first, width)
        w3 = _strip(weight, channels[i + 3] * stride + first, width)
        w4 = _strip(weight, channels[i + 4] * stride + first, width)
        w5 = _strip(weight, channels[i + 5] * stride + first, width)
        w6 = _strip(weight, channels[i + 6] * stride + first, width)
        w7 = _strip(weight, channels[i + 7] * stride + first, width)
        for row in range(rows):
            total = sums[row]
            v0, v1, v2, v3 = _four(values, i, row)
            v4, v5, v6, v7 = _four(values, i + 4, row)
            for c in range(width):
                total[c] += (
                    v0 * _widen(w0[c])
                    + v1 * _widen(w1[c])
                    + v2 * _widen(w2[c])
                    + v3 * _widen(w3[c])
                    + v4 * _widen(w4[c])
                    + v5 * _widen(w5[c])
                    + v6 * _widen(w6[c])
                    + v7 * _widen(w7[c])
                )
    for i in range(grouped, len(channels)):
        strip = _strip(weight, channels[i] * stride + first, width)
        for row in range(rows):
            total = sums[row]
            value = values[i, row]
            for c in range(width):
                total[c] += value * _widen(strip[c])


@compiled()
def _finish(
    element: np.generic, sums: Array, outputs: tuple[int, int, int], first: int, out_features: int
) -> None:
    """Add bias and residual to a slab of sums, (T, width), and write it rounded."""
    rows, width = sums.shape
    bias = _array(element, outputs[0], out_features)
    residual = _array(element, outputs[1], rows * out_features)
    result = _array(element, outputs[2], rows * out_features)
    for row in range(rows):
        total = sums[row]
        start = row * out_features + first
        if outputs[0] != 0:
            for c in range(width):
                total[c] += _widen(bias[first + c])
        if outputs[1] != 0:
            for c in range(width):
                total[c] += _widen(residual[start + c])
        for c in range(width):
            result[start + c] = _narrow(element, total[c])


@compiled()
def _strip(weight: Array, start: int, width: int) -> Array:
    return weight[start : start + width]


@compiled()
def _four(values: Array, i: int, row: int) -> tuple[Any, Any, Any, Any]:
    return values[i, row], values[i + 1, row], values[i + 2, row], values[i + 3, row]


@compiled()
def _per_line(weight: Array) -> int:
    return LINE_BYTES // weight.itemsize


@compiled()
def _array(element: np.generic, address: int, size: int) -> Array:
    array: Array = numba.carray(_pointer(element, address), (size,))
    return array


@intrinsic
def _pointer(context: object, element: types.Type, address: types.Type) -> Intrinsic:
    """Return `address` as a pointer to the type of `element`."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.inttoptr(args[1], context.get_value_type(signature.return_type))

    return types.CPointer(element)(element, address), emit


@intrinsic
def _widen(context: object, value: types.Type) -> Intrinsic:
    """Return `value`, the bits of a bfloat16 or float16 or a float32, as a float32, exactly."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        if value == types.float32:
            return args[0]
        if value == types.int16:
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())
        bits = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(bits, ir.IntType(32)(16)), ir.FloatType())

    return types.float32(value), emit


@intrinsic
def _narrow(context: object, element: types.Type, value: types.Type) -> Intrinsic:
    """Round a float32 to the type of `element`, to nearest even, and return its bits."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        if element == types.float32:
            return args[1]
        if element == types.int16:
            return builder.bitcast(builder.fptrunc(args[1], ir.HalfType()), ir.IntType(16))
        word = ir.IntType(32)
        bits = builder.bitcast(args[1], word)
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, word(0x7FFF))), word(16))
        # The carry of rounding would turn some NaN into zero.
        is_nan = builder.fcmp_unordered("uno", args[1], args[1])
        return builder.trunc(builder.select(is_nan, word(0x7FC0), rounded), ir.IntType(16))

    return element(element, types.float32), emit


@intrinsic
def _prefetch(context: object, array: types.Type, index: types.Type) -> Intrinsic:
    """Ask for the cache line of `array[index]`; harmless behind the end."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        pointer, word = cgutils.voidptr_t, ir.IntType(32)
        form = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
        data = context.make_array(array)(context, builder, args[0]).data
        address = builder.bitcast(builder.gep(data, [args[1]]), pointer)
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], form)
        # For reading, into the second-level cache, as data.
        builder.call(prefetch, [address, word(0), word(2), word(1)])
        return context.get_dummy_value()

    return types.void(array, index), emit
