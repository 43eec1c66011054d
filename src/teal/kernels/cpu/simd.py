"""Instructions emitted by hand: cache lines as SIMD vectors, and codes as floats.

The compiler vectorizes plain loops too, but no loop that prefetches.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from teal.kernels.cpu.numerics import Intrinsic, emit_prefetch, widened

LINE_BYTES = 64

# The factor that `code_value` leaves out of fp8 codes: half precision has another exponent bias.
FP8_FACTOR = 256.0
# The factor that `high_nibble` leaves out.
HIGH_FACTOR = 1 / 16
# Added to every nibble: the lowest bits of a float32 of this size count whole numbers.
NIBBLE_BASE = float(1 << 23)

_NIBBLE_BASE_BITS = 0x4B000000


@intrinsic
def prefetch_lines(
    context: object, weight: types.Type, starts: types.Type, column: types.Type
) -> Intrinsic:
    """Prefetch the line of `weight[start + column]` for each start, also past the end."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        data = context.make_array(weight)(context, builder, args[0]).data
        for start in cgutils.unpack_tuple(builder, args[1]):
            emit_prefetch(builder, builder.gep(data, [builder.add(start, args[2])]))
        return context.get_dummy_value()

    return types.void(weight, starts, column), emit


@intrinsic
def add_line(
    context: object,
    sums: types.Type,
    column: types.Type,
    weight: types.Type,
    starts: types.Type,
    factors: types.Type,
) -> Intrinsic:
    """Add `Σ_k factors[k] · weight[starts[k] + column + i]` to `sums[column + i]` for a line of i.

    In float32: the products are added up in order, then their total is added to the sum.
    """

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        size = LINE_BYTES * 8 // weight.dtype.bitwidth
        target = context.make_array(sums)(context, builder, args[0]).data
        data = context.make_array(weight)(context, builder, args[2]).data
        bits_type = ir.VectorType(context.get_value_type(weight.dtype), size)
        sums_type = ir.VectorType(ir.FloatType(), size)
        flags = ("contract",)
        total = None
        for start, factor in zip(
            cgutils.unpack_tuple(builder, args[3]),
            cgutils.unpack_tuple(builder, args[4]),
            strict=True,
        ):
            place = builder.gep(data, [builder.add(start, args[1])])
            # Only aligned to single numbers: weight rows may begin anywhere.
            bits = builder.load(builder.bitcast(place, bits_type.as_pointer()))
            bits.align = weight.dtype.bitwidth // 8
            numbers = widened(builder, weight.dtype, bits, size)
            product = builder.fmul(numbers, _repeated(builder, factor, sums_type), flags=flags)
            total = product if total is None else builder.fadd(total, product, flags=flags)
        place = builder.bitcast(builder.gep(target, [args[1]]), sums_type.as_pointer())
        before = builder.load(place)
        stored = builder.store(builder.fadd(before, total, flags=flags), place)
        before.align = stored.align = sums.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(sums, column, weight, starts, factors), emit


def _repeated(builder: ir.IRBuilder, value: ir.Value, vector: ir.VectorType) -> ir.Value:
    nothing = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.IntType(32)(0))
    everywhere = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), None)
    return builder.shuffle_vector(first, nothing, everywhere)


@intrinsic
def code_value(context: object, code: types.Type) -> Intrinsic:
    """Return an int8 code as a float32, or 1/256 of an fp8 e4m3 code, given as uint8.

    The two NaN codes of fp8 become ±1.875.
    """

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        if code == types.int8:
            return builder.sitofp(args[0], ir.FloatType())
        # Sign, exponent and mantissa become those of a half precision number, subnormal or not.
        word = ir.IntType(16)
        bits = builder.shl(builder.sext(args[0], word), word(7))
        half = builder.bitcast(builder.and_(bits, word(0xBFFF)), ir.HalfType())
        return builder.fpext(half, ir.FloatType())

    return types.float32(code), emit


@intrinsic
def low_nibble(context: object, code: types.Type) -> Intrinsic:
    """Return `NIBBLE_BASE` plus the lower nibble of a uint8, in float32."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _masked(builder, args[0], 0x0F)

    return types.float32(code), emit


@intrinsic
def high_nibble(context: object, code: types.Type) -> Intrinsic:
    """Return `NIBBLE_BASE` plus 16 times the upper nibble of a uint8, in float32."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _masked(builder, args[0], 0xF0)

    return types.float32(code), emit


def _masked(builder: ir.IRBuilder, code: ir.Value, mask: int) -> ir.Value:
    word = ir.IntType(32)
    bits = builder.and_(builder.zext(code, word), word(mask))
    return builder.bitcast(builder.or_(bits, word(_NIBBLE_BASE_BITS)), ir.FloatType())
