"""What codes of quantized weights stand for, read by CPU kernels one code or nibble at a time."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from teal.kernels.cpu.numerics import Intrinsic

# What `code_value` of fp8 has to be multiplied with: half precision has another exponent bias.
FP8_FACTOR = 256.0
# What `high_nibble` has to be multiplied with.
HIGH_FACTOR = 1 / 16
# What the functions on nibbles add: in a float32 of this size the lowest bits are whole numbers.
NIBBLE_BASE = float(1 << 23)

_NIBBLE_BASE_BITS = 0x4B000000


@intrinsic
def code_value(context: object, code: types.Type) -> Intrinsic:
    """Return an int8 code as a float32; of a uint8, which is fp8 e4m3, a 256th of its value.

    The two codes of fp8 that are no number become 1.875.
    """

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        if code == types.int8:
            return builder.sitofp(args[0], ir.FloatType())
        # The same sign, exponent and mantissa as a half precision number, subnormal ones too.
        word = ir.IntType(16)
        bits = builder.shl(builder.sext(args[0], word), word(7))
        half = builder.bitcast(builder.and_(bits, word(0xBFFF)), ir.HalfType())
        return builder.fpext(half, ir.FloatType())

    return types.float32(code), emit


@intrinsic
def low_nibble(context: object, code: types.Type) -> Intrinsic:
    """Return `NIBBLE_BASE` plus the lower nibble of a uint8, a float32."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _masked(builder, args[0], 0x0F)

    return types.float32(code), emit


@intrinsic
def high_nibble(context: object, code: types.Type) -> Intrinsic:
    """Return `NIBBLE_BASE` plus 16 times the upper nibble of a uint8, a float32."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _masked(builder, args[0], 0xF0)

    return types.float32(code), emit


def _masked(builder: ir.IRBuilder, code: ir.Value, mask: int) -> ir.Value:
    word = ir.IntType(32)
    bits = builder.and_(builder.zext(code, word), word(mask))
    return builder.bitcast(builder.or_(bits, word(_NIBBLE_BASE_BITS)), ir.FloatType())
