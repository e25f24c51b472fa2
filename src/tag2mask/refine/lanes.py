"""A few float32 numbers side by side in one SIMD register, as a type of numba's.

Numba leaves it to LLVM to find what can run in parallel, and in a pass over a lattice it finds nothing. Here it is
said: a `Lanes` value holds `len(like)` numbers, where `like` is any tuple of that length (numba knows the lengths of
tuples when it compiles), and every function below works on all of them at once. Inside compiled functions only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

# 2^f for |f| <= 1/2, highest power first: the polynomial of the least relative error, 1.5e-7 or one step of float32.
POWER_OF_TWO = (0.00132764718, 0.00967554133, 0.0555071327, 0.240221197, 0.693146967, 1.00000007)
ROUND = 1.5 * 2**23  # added to a small number it leaves the nearest integer in the last bits of the sum
I32, F32 = ir.IntType(32), ir.FloatType()
Code = Callable[[Any, Any, Any, Any], Any]  # what an intrinsic returns: writes LLVM code


class Lanes(types.Type):
    """The type of a value of `count` float32 numbers."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.vector = ir.VectorType(F32, count)
        super().__init__(name=f"Lanes({count})")


@register_model(Lanes)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Lanes) -> None:
        super().__init__(manager, kind, kind.vector)


@intrinsic
def load(typing: Any, array: Any, offset: Any, like: Any) -> tuple[Any, Code]:
    """The lanes that start at array[offset] of a flat float32 array."""
    kind = Lanes(len(like))

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.load(_place(context, builder, array, given[0], given[1], kind.vector), align=4)

    return kind(array, types.intp, like), code


@intrinsic
def store(typing: Any, array: Any, offset: Any, lanes: Any) -> tuple[Any, Code]:
    """Write lanes to array[offset], array[offset + 1], ... of a flat float32 array."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        builder.store(given[2], _place(context, builder, array, given[0], given[1], lanes.vector), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes), code


@intrinsic
def spread(typing: Any, number: Any, like: Any) -> tuple[Any, Code]:
    """The same number in every lane."""
    kind = Lanes(len(like))

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        first = builder.insert_element(ir.Constant(kind.vector, ir.Undefined), given[0], I32(0))
        return _shuffled(builder, first, [0] * kind.count)

    return kind(types.float32, like), code


@intrinsic
def add(typing: Any, one: Any, two: Any) -> tuple[Any, Code]:
    """one + two."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.fadd(*given)

    return one(one, two), code


@intrinsic
def subtract(typing: Any, one: Any, two: Any) -> tuple[Any, Code]:
    """one - two."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.fsub(*given)

    return one(one, two), code


@intrinsic
def divide(typing: Any, one: Any, two: Any) -> tuple[Any, Code]:
    """one / two."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.fdiv(*given)

    return one(one, two), code


@intrinsic
def multiply_add(typing: Any, one: Any, two: Any, three: Any) -> tuple[Any, Code]:
    """one * two + three, rounded once where the processor can."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return _multiply_add(builder, *given)

    return one(one, two, three), code


@intrinsic
def larger(typing: Any, one: Any, two: Any) -> tuple[Any, Code]:
    """The larger of one and two, lane by lane."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return _larger(builder, *given)

    return one(one, two), code


@intrinsic
def group_largest(typing: Any, lanes: Any, group: Any) -> tuple[Any, Code]:
    """In every lane the largest of its group of len(group) lanes, a power of two."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return _over_groups(builder, given[0], len(group), _larger)

    return lanes(lanes, group), code


@intrinsic
def group_sum(typing: Any, lanes: Any, group: Any) -> tuple[Any, Code]:
    """In every lane the sum of its group of len(group) lanes, a power of two."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return _over_groups(builder, given[0], len(group), lambda builder, one, two: builder.fadd(one, two))

    return lanes(lanes, group), code


@intrinsic
def power_of_two(typing: Any, lanes: Any) -> tuple[Any, Code]:
    """2^x of numbers that are not above 0; below -126 it stays at 2^-126, about 1e-38."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        magic = _alike(lanes.vector, ROUND)
        x = _larger(builder, given[0], _alike(lanes.vector, -126.0))
        shifted = builder.fadd(x, magic)
        rest = builder.fsub(x, builder.fsub(shifted, magic))
        value = _alike(lanes.vector, POWER_OF_TWO[0])
        for coefficient in POWER_OF_TWO[1:]:
            value = _multiply_add(builder, value, rest, _alike(lanes.vector, coefficient))
        integers = ir.VectorType(I32, lanes.count)
        exponent = builder.shl(builder.bitcast(shifted, integers), _alike(integers, 23))
        return builder.bitcast(builder.add(builder.bitcast(value, integers), exponent), lanes.vector)

    return lanes(lanes), code


def _place(context: Any, builder: Any, kind: Any, array: Any, offset: Any, vector: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), vector.as_pointer())


def _alike(vector: Any, value: float) -> Any:
    return ir.Constant(vector, [ir.Constant(vector.element, value)] * vector.count)


def _larger(builder: Any, one: Any, two: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", one, two), one, two)


def _multiply_add(builder: Any, one: Any, two: Any, three: Any) -> Any:
    kind = ir.FunctionType(one.type, [one.type] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{one.type.count}f32")
    return builder.call(function, [one, two, three])


def _shuffled(builder: Any, x: Any, places: Sequence[int]) -> Any:
    mask = ir.Constant(ir.VectorType(I32, len(places)), [ir.Constant(I32, place) for place in places])
    return builder.shuffle_vector(x, ir.Constant(x.type, ir.Undefined), mask)


def _over_groups(builder: Any, x: Any, size: int, combine: Callable[[Any, Any, Any], Any]) -> Any:
    step = size // 2
    while step:
        x = combine(builder, x, _shuffled(builder, x, [place ^ step for place in range(x.type.count)]))
        step //= 2
    return x
