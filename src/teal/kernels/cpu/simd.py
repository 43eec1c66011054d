"""Cache lines of weight rows as SIMD vectors, emitted by hand.

The compiler vectorizes plain loops too, but no loop that prefetches.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from teal.kernels.cpu.numerics import Intrinsic, emit_prefetch, widened

LINE_BYTES = 64


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
