"""Arithmetic with vectors of 16 numbers in LLVM's language, for the code that experts/tiles.py emits.

Weights are read in units of 32 bits: one float32, or two neighbours of 16 bits along the inner dimension, the first one
in the low half. What they are multiplied with is float32, and products and sums are float32: bfloat16 instructions,
where a CPU has them, add in another order than vLLM's kernel does, and tokens would drift from those of one process.

numba compiles a cached function again when its own file changes, and looks at no other: after a change here, tiles.py
has to be touched, too.
"""

# llvmlite and numba declare no types, and what is inferred of them is wrong: their builders' methods return a Value.
# pyright: reportArgumentType=false, reportReturnType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from collections.abc import Sequence
from enum import Enum

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features

LANES = 16
VECTOR_BYTES = 4 * LANES
FEATURES = get_host_cpu_features()

Builder = ir.IRBuilder
Value = ir.Value

I16, I32, I64, F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
SHORTS, INTS, FLOATS = (ir.VectorType(element, LANES) for element in (I16, I32, F32))
HALVES = ir.VectorType(ir.HalfType(), LANES)


class Kind(Enum):
    """Type of weights, x and activations; compiled code is told by the type of a number of no meaning."""

    FLOAT32 = np.float32
    BFLOAT16 = np.uint16
    FLOAT16 = np.int16

    @property
    def values_per_unit(self) -> int:
        return 1 if self is Kind.FLOAT32 else 2


def values_of(b: Builder, kind: Kind, units: Value) -> list[Value]:
    """The numbers in 16 units as float32 vectors, the first of each unit first."""
    if kind is Kind.FLOAT32:
        return [b.bitcast(units, FLOATS)]
    if kind is Kind.BFLOAT16:  # the upper half of a float32
        low, high = b.shl(units, constant(16, INTS)), b.and_(units, constant(0xFFFF0000, INTS))
        return [b.bitcast(low, FLOATS), b.bitcast(high, FLOATS)]
    halves = (b.trunc(shifted, SHORTS) for shifted in (units, b.lshr(units, constant(16, INTS))))
    return [b.fpext(b.bitcast(half, HALVES), FLOATS) for half in halves]


def rounded(b: Builder, kind: Kind, values: Value) -> Value:
    """16 float32 values as the nearest ones that `kind` has, ties to even."""
    if kind is Kind.FLOAT32:
        return values
    if kind is Kind.FLOAT16:
        return b.fpext(b.fptrunc(values, HALVES), FLOATS)
    bits = b.bitcast(values, INTS)
    odd = b.and_(b.lshr(bits, constant(16, INTS)), constant(1, INTS))
    nearest = b.and_(b.add(b.add(bits, constant(0x7FFF, INTS)), odd), constant(0xFFFF0000, INTS))
    return b.select(b.fcmp_unordered("uno", values, values), values, b.bitcast(nearest, FLOATS))


def silu(b: Builder, x: Value) -> Value:
    """x / (1 + exp(-x))."""
    return b.fdiv(x, b.fadd(constant(1.0, FLOATS), _exp(b, b.fneg(x))))


def _exp(b: Builder, x: Value) -> Value:
    """exp within 20 units in the last place, as torch's exp_u20 and vLLM's kernel have it, to the bit.

    x = n ln 2 + r with a whole n, and a polynomial of degree 5 for exp(r), |r| <= ln 2 / 2 (Cephes' scheme with the
    coefficients of that function). A better one would move activations that lie between two 16-bit values, and with
    them tokens. Of a NaN anything: times x it is one again.
    """
    lowest = constant(-87.33654022216797, FLOATS)  # ln of the smallest normal number; what is below is 0
    clipped = call(b, "llvm.minnum.v16f32", [x, constant(88.72283935546875, FLOATS)])
    clipped = call(b, "llvm.maxnum.v16f32", [clipped, lowest])
    n = call(b, "llvm.floor.v16f32", [fma(b, clipped, constant(1.4426950216293335, FLOATS), constant(0.5, FLOATS))])
    r = fma(b, b.fneg(n), constant(0.6931471824645996, FLOATS), clipped)
    y = constant(0.00828929059, FLOATS)
    for coefficient in (0.0418978221, 0.166676521, 0.499991506, 0.999999701, 1.0):
        y = fma(b, y, r, constant(coefficient, FLOATS))
    # 2^n as 2 * 2^(n - 1): n may be 128.
    exponent = b.shl(b.add(b.fptosi(n, INTS), constant(126, INTS)), constant(23, INTS))
    power = b.select(b.fcmp_ordered("<", x, lowest), constant(0.0, FLOATS), b.bitcast(exponent, FLOATS))
    return b.fmul(b.fmul(y, power), constant(2.0, FLOATS))


def constant(value: float, vector: ir.VectorType) -> Value:
    return ir.Constant(vector, [value] * LANES)


def splat(b: Builder, scalar: Value, vector: ir.VectorType) -> Value:
    nothing = ir.Constant(vector, ir.Undefined)
    first = b.insert_element(nothing, scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(first, nothing, constant(0, INTS))


def at(b: Builder, address: Value, offset_bytes: int) -> Value:
    return b.add(address, ir.Constant(I64, offset_bytes))


def load(b: Builder, address: Value, of: ir.Type, *, align: int) -> Value:
    return b.load(b.inttoptr(address, of.as_pointer()), align=align)


def store(b: Builder, value: Value, address: Value, *, align: int) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=align)


def fma(b: Builder, x: Value, y: Value, z: Value) -> Value:
    return call(b, "llvm.fma.v16f32", [x, y, z])


def call(b: Builder, name: str, operands: Sequence[Value]) -> Value:
    """An instruction of LLVM that gives 16 floats."""
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(FLOATS, [operand.type for operand in operands]), name)
    return b.call(function, operands)
