"""Numbers in CPU kernels: tensors by address, 16-bit floats, the exponential, prefetching."""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from teal.kernels.cpu.compile_cache import compiled

Array = NDArray[Any]

# numba has neither bfloat16 nor float16. The type of these zeros tells a kernel how to read bits.
ELEMENTS = {
    torch.bfloat16: np.uint16(0),
    torch.float16: np.int16(0),
    torch.float32: np.float32(0),
}

# What numba expects an intrinsic to return: its signature, and the function that emits its code.
Intrinsic = tuple[types.Type, Callable[..., ir.Value]]

_ONE = np.float32(1)
_LOG2_E = np.float32(1.44269504088896341)
# ln(2) in two parts; the first is so short that its products with `power` are exact.
_LN_2_HIGH = np.float32(0.693359375)
_LN_2_LOW = np.float32(-2.12194440e-4)
_LARGEST, _SMALLEST = np.float32(88.0), np.float32(-87.0)
_INF, _ZERO, _HALF = np.float32(np.inf), np.float32(0), np.float32(0.5)
# Minimax polynomial of exp on ± ln(2) / 2 as in the Cephes library: error below 2 ulp.
_C0, _C1, _C2 = (
    np.float32(1.9875691500e-4),
    np.float32(1.3981999507e-3),
    np.float32(8.3334519073e-3),
)
_C3, _C4, _C5 = (
    np.float32(4.1665795894e-2),
    np.float32(1.6666665459e-1),
    np.float32(5.0000001201e-1),
)
# gelu(x) = x · sigmoid(2 · sqrt(2 / pi) · (x + 0.044715 · x^3))
_GELU_LINEAR, _GELU_CUBIC = np.float32(1.5957691216), np.float32(0.044715)


@compiled(fuse=True)
def exponential(x: np.float32) -> np.float32:
    """Return e^x to about 2 ulp, in a form that the compiler vectorizes.

    The result is 0 below -87, inf above 88, and NaN for NaN.
    """
    inside = min(max(x if x == x else _ZERO, _SMALLEST), _LARGEST)
    power = np.floor(inside * _LOG2_E + _HALF)
    r = inside - power * _LN_2_HIGH - power * _LN_2_LOW
    y = ((((_C0 * r + _C1) * r + _C2) * r + _C3) * r + _C4) * r + _C5
    result = (y * r * r + r + _ONE) * _power_of_two(power)
    result = _ZERO if x < _SMALLEST else result
    result = _INF if x > _LARGEST else result
    return result if x == x else x


@compiled(fuse=True)
def gated(gate: np.float32, up: np.float32, gelu: bool) -> np.float32:
    """Return `activation(gate) · up`, with gelu_pytorch_tanh if `gelu`, else silu."""
    slope = gate
    if gelu:
        slope = _GELU_LINEAR * (gate + _GELU_CUBIC * gate * gate * gate)
    return gate / (_ONE + exponential(-slope)) * up


@compiled(reorder=True)
def mean_square(x: Array) -> np.float32:
    """Return the mean of the squares of 16-bit or float32 numbers, summed in float32."""
    total = _ZERO
    for i in range(len(x)):
        value = widen(x[i])
        total += value * value
    return total / np.float32(len(x))


@compiled()
def norm_into(result: Array, x: Array, norm_weight: Array, eps: np.float32) -> None:
    """Write the RMSNorm of `x` to `result`, rounded twice as in `reference.rms_norm`."""
    factor = _ONE / np.sqrt(mean_square(x) + eps)
    for i in range(len(x)):
        normed = widen(narrow(x[i], widen(x[i]) * factor))
        result[i] = narrow(x[i], widen(norm_weight[i]) * normed)


@compiled()
def array(element: np.generic, address: int, size: int) -> Array:
    """Return the memory at `address` as an array of the type of `element`, (size,)."""
    result: Array = numba.carray(_pointer(element, address), (size,))
    return result


@intrinsic
def _pointer(context: object, element: types.Type, address: types.Type) -> Intrinsic:
    """Return `address` as a pointer to the type of `element`."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.inttoptr(args[1], context.get_value_type(signature.return_type))

    return types.CPointer(element)(element, address), emit


@intrinsic
def widen(context: object, value: types.Type) -> Intrinsic:
    """Return `value`, the bits of a bfloat16 or float16, or a float32, as a float32; exact."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return widened(builder, value, args[0])

    return types.float32(value), emit


def widened(
    builder: ir.IRBuilder, element: types.Type, bits: ir.Value, size: int | None = None
) -> ir.Value:
    """Emit the conversion of `widen`, for a number or a vector.

    Args:
        builder: Receives the instructions.
        element: numba's type of one number.
        bits: The number, or a vector of numbers.
        size: Length of the vector; `None` for a single number.

    Returns:
        float32, in the shape of `bits`.
    """

    def scalar_or_vector(number: ir.Type) -> ir.Type:
        return number if size is None else ir.VectorType(number, size)

    if element == types.float32:
        return bits
    single, word = scalar_or_vector(ir.FloatType()), scalar_or_vector(ir.IntType(32))
    if element == types.int16:
        return builder.fpext(builder.bitcast(bits, scalar_or_vector(ir.HalfType())), single)
    sixteen = ir.Constant(word, 16 if size is None else [16] * size)
    return builder.bitcast(builder.shl(builder.zext(bits, word), sixteen), single)


@intrinsic
def narrow(context: object, element: types.Type, value: types.Type) -> Intrinsic:
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
        # The carry of rounding would turn some NaNs into zero.
        is_nan = builder.fcmp_unordered("uno", args[1], args[1])
        return builder.trunc(builder.select(is_nan, word(0x7FC0), rounded), ir.IntType(16))

    return element(element, types.float32), emit


@intrinsic
def prefetch(context: object, array: types.Type, index: types.Type) -> Intrinsic:
    """Prefetch the cache line of `array[index]`, which may lie past the end."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        data = context.make_array(array)(context, builder, args[0]).data
        emit_prefetch(builder, builder.gep(data, [args[1]]))
        return context.get_dummy_value()

    return types.void(array, index), emit


def emit_prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Emit a prefetch of the cache line at a pointer."""
    pointer, word = cgutils.voidptr_t, ir.IntType(32)
    form = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], form)
    # A read of data, into the second-level cache.
    builder.call(prefetch, [builder.bitcast(address, pointer), word(0), word(2), word(1)])


@intrinsic
def _power_of_two(context: object, power: types.Type) -> Intrinsic:
    """Return 2^power for an integral float32 between -126 and 127."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        word = ir.IntType(32)
        exponent = builder.add(builder.fptosi(args[0], word), word(127))
        return builder.bitcast(builder.shl(exponent, word(23)), ir.FloatType())

    return types.float32(power), emit
