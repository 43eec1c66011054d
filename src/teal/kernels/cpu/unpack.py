"""Codes of quantized weights as floats: int8, fp8 and int4 in CPU kernels."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from teal.kernels.cpu.numerics import Intrinsic

# The factor that `code_value` leaves out of fp8 codes: half precision has another exponent bias.
FP8_FACTOR = 256.0
# The factor that `high_nibble` leaves out.
HIGH_FACTOR = 1 / 16
# Added to every nibble: the lowest bits of a float32 of this size count whole numbers.
NIBBLE_BASE = float(1 << 23)

_NIBBLE_BASE_BITS = 0x4B000000


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
