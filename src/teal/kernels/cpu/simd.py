"""Cache lines of weight rows, as vectors of the machine.

The compiler makes vectors of plain loops too, but of none that asks for what comes next. As with
cpu_numbers, numba's cache on disk does not see a change here.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from teal.kernels.cpu.numerics import Intrinsic, ask_for, widened

LINE_BYTES = 64


@intrinsic
def ask_lines(
    context: object, weight: types.Type, starts: types.Type, column: types.Type
) -> Intrinsic:
    """Ask for the line of `weight[start + column]` for each start; harmless behind the end."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        data = context.make_array(weight)(context, builder, args[0]).data
        for start in cgutils.unpack_tuple(builder, args[1]):
            ask_for(builder, builder.gep(data, [builder.add(start, args[2])]))
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
    """Add `Σ_k factors[k] · weight[starts[k] + column + i]` to `sums[column + i]`, for a line of i.

    The products are added in order before the sum is.
    """

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        size = LINE_BYTES * 8 // weight.dtype.bitwidth
        target = context.make_array(sums)(context, builder, args[0]).data
        data = context.make_array(weight)(context, builder, args[2]).data
        of_weight = ir.VectorType(context.get_value_type(weight.dtype), size)
        of_sums = ir.VectorType(ir.FloatType(), size)
        flags = ("contract",)
        total = None
        for start, factor in zip(
            cgutils.unpack_tuple(builder, args[3]),
            cgutils.unpack_tuple(builder, args[4]),
            strict=True,
        ):
            place = builder.gep(data, [builder.add(start, args[1])])
            # Aligned as single numbers are: weight rows may begin anywhere.
            bits = builder.load(builder.bitcast(place, of_weight.as_pointer()))
            bits.align = weight.dtype.bitwidth // 8
            numbers = widened(builder, weight.dtype, bits, size)
            product = builder.fmul(numbers, _repeated(builder, factor, of_sums), flags=flags)
            total = product if total is None else builder.fadd(total, product, flags=flags)
        place = builder.bitcast(builder.gep(target, [args[1]]), of_sums.as_pointer())
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
