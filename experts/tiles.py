"""The compiled loops of expert compute on a CPU: blocks of a few rows times tiles of 32 weight columns.

Loops of numba's own do not keep a block of sums in registers, and all speed here comes of that: each weight is read
once for all rows of a block, and each row's value once for all columns of a tile. So the innermost loops are written in
LLVM's language, which numba compiles for whatever CPU there is.

Weights are int32 arrays of units (experts/vectors.py), everything else is float32.
"""

# llvmlite and numba declare no types, and what is inferred of them is wrong: their builders' methods return a Value.
# pyright: reportArgumentType=false, reportReturnType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from collections.abc import Callable, Sequence

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.extending import intrinsic

from experts.compiled import compiled
from experts.vectors import (
    F32,
    FEATURES,
    FLOATS,
    I32,
    I64,
    INTS,
    LANES,
    VECTOR_BYTES,
    Builder,
    Kind,
    Value,
    at,
    constant,
    fma,
    load,
    rounded,
    silu,
    splat,
    store,
    values_of,
)

TILE = 2 * LANES  # columns
TILE_BYTES = 4 * TILE

MAX_ROWS = 12 if FEATURES.get("avx512f") else 3  # of a block: its sums, and a tile's weights, fill the registers


def _arrange(x, row, expert, weight, x_blocks, begin, distance, factor, row_bytes):
    """Sorts pairs by expert, those of one expert by row, and copies x into blocks. False for a pair that cannot be.

    x: [num_rows, hidden] float32; row, expert: [num_pairs] int32; weight: [num_pairs] float32.
    Out: x_blocks [at least num_pairs, hidden] float32, each block as [hidden][rows of the block]; begin int64
    [num_experts + 1], where each expert's pairs begin; distance [num_pairs] int64, row * row_bytes; factor [num_pairs]
    float32.
    """
    num_pairs, num_experts, hidden = len(row), len(begin) - 1, x.shape[1]
    begin[:] = 0
    for pair in range(num_pairs):
        if not (0 <= expert[pair] < num_experts and 0 <= row[pair] < len(x)):
            return False
        begin[expert[pair] + 1] += 1
    for one in range(num_experts):
        begin[one + 1] += begin[one]
    free, flat = begin[:-1].copy(), x_blocks.reshape(-1)
    for pair in range(num_pairs):
        place = free[expert[pair]]
        free[expert[pair]] = place + 1
        distance[place], factor[place] = row[pair], weight[pair]
    for one in range(num_experts):
        first, last = begin[one], begin[one + 1]
        while first < last:
            size = _block_size(last - first)
            for place in range(size):
                values, begins = x[distance[first + place]], first * hidden + place
                for column in range(hidden):
                    flat[begins + column * size] = values[column]
            first += size
    for pair in range(num_pairs):
        distance[pair] *= row_bytes
    return True


def _activate(kind, begin, x_blocks, w13, act, first_tile, last_tile):
    """silu(gate) * up of all pairs, for the inner columns of some tiles.

    w13: [num_experts, num_tiles, num_units, 32] int32, a tile being 16 columns of gate and 16 of up.
    act: out, [at least num_pairs, at least inner] float32, in the same blocks as x_blocks, rounded to what `kind` has.
    """
    num_units, hidden, inner = w13.shape[2], x_blocks.shape[1], act.shape[1]
    for expert in range(len(begin) - 1):
        for tile in range(first_tile, last_tile):
            weights, first, last = w13[expert, tile].ctypes.data, begin[expert], begin[expert + 1]
            while first < last:
                size = _block_size(last - first)
                source = x_blocks.ctypes.data + 4 * first * hidden
                target = act.ctypes.data + 4 * (first * inner + tile * LANES * size)
                _gate_up(kind, size, source, weights, num_units, target)
                first += size


def _project(kind, begin, distance, factor, act, w2, out, first_tile, last_tile):
    """Adds weight * (w2 act) of all pairs to their rows, expert by expert, for the output columns of some tiles.

    w2: [num_experts, hidden / 32, inner units, 32] int32. out: in and out, [num_rows, hidden] float32.
    """
    num_units = w2.shape[2]
    for expert in range(len(begin) - 1):
        for tile in range(first_tile, last_tile):
            weights, first, last = w2[expert, tile].ctypes.data, begin[expert], begin[expert + 1]
            columns = out.ctypes.data + TILE_BYTES * tile
            while first < last:
                size = _block_size(last - first)
                source = act.ctypes.data + 4 * first * act.shape[1]
                distances, factors = distance[first:].ctypes.data, factor[first:].ctypes.data
                _down(kind, size, source, weights, num_units, columns, distances, factors)
                first += size


def _compute(kind, x, row, expert, weight, w13, w2, x_blocks, act, out):
    """All three steps on one thread: out += the weighted sums of every row's pairs. False as from arrange."""
    begin = np.empty(len(w13) + 1, np.int64)
    distance, factor = np.empty(len(row), np.int64), np.empty(len(row), np.float32)
    if not arrange(x, row, expert, weight, x_blocks, begin, distance, factor, 4 * out.shape[1]):
        return False
    activate(kind, begin, x_blocks, w13, act, 0, w13.shape[1])
    project(kind, begin, distance, factor, act, w2, out, 0, w2.shape[1])
    return True


def _block_size_of(num_left):
    """Rows of the next block when so many pairs of an expert are left: blocks of one expert are about equally large."""
    num_blocks = (num_left + MAX_ROWS - 1) // MAX_ROWS
    return (num_left + num_blocks - 1) // num_blocks


_block_size = compiled(_block_size_of)
arrange, activate, project = map(compiled, (_arrange, _activate, _project))
compute = compiled(_compute)


@intrinsic
def _gate_up(typing_context, kind, num_rows, x, weights, num_units, act):
    """_emit_gate_up for a block of num_rows."""

    def emit(context, builder, signature, arguments):
        _, rows, *operands = arguments
        _emit_for_each_size(builder, rows, lambda size: _emit_gate_up(builder, _kind_of(kind), size, *operands))
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 5), emit


@intrinsic
def _down(typing_context, kind, num_rows, act, weights, num_units, out, distances, factors):
    """_emit_down for a block of num_rows."""

    def emit(context, builder, signature, arguments):
        _, rows, act, weights, num_units, *sums = arguments
        _emit_for_each_size(
            builder, rows, lambda size: _emit_down(builder, _kind_of(kind), size, act, weights, num_units, sums)
        )
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 7), emit


def _kind_of(number_type: types.Type) -> Kind:
    return {types.float32: Kind.FLOAT32, types.uint16: Kind.BFLOAT16, types.int16: Kind.FLOAT16}[number_type]


def _emit_gate_up(
    b: Builder, kind: Kind, num_rows: int, x: Value, weights: Value, num_units: Value, act: Value
) -> None:
    """Activations of 16 inner columns: silu(gate) * up, rounded to `kind`, where gate, up = weights x.

    x: address of [inner][num_rows] float32. weights: address of [num_units][32] units, 16 columns of gate, 16 of up.
    act: address of [16][num_rows] float32, written.
    """
    for row, (gate, up) in enumerate(_products(b, kind, num_rows, x, weights, num_units)):
        activations = rounded(b, kind, b.fmul(silu(b, gate), up))
        for column in range(LANES):
            value = b.extract_element(activations, ir.Constant(I32, column))
            store(b, value, at(b, act, 4 * (column * num_rows + row)), align=4)


def _emit_down(
    b: Builder, kind: Kind, num_rows: int, act: Value, weights: Value, num_units: Value, sums: Sequence[Value]
) -> None:
    """Adds a block's weighted products with 32 output columns to their rows.

    act: address of [inner][num_rows] float32. weights: address of [num_units][32] units.
    sums: addresses of the columns in row 0; of [num_rows] int64, each row's distance from there in bytes; and of
    [num_rows] float32, the weights of the pairs.
    """
    out, distances, factors = sums
    for row, products in enumerate(_products(b, kind, num_rows, act, weights, num_units)):
        target = b.add(out, load(b, at(b, distances, 8 * row), I64, align=8))
        factor = splat(b, load(b, at(b, factors, 4 * row), F32, align=4), FLOATS)
        for vector, product in enumerate(products):
            address = at(b, target, VECTOR_BYTES * vector)
            before = load(b, address, FLOATS, align=4)
            store(b, b.fadd(before, b.fmul(factor, product)), address, align=4)


def _emit_for_each_size(b: Builder, num_rows: Value, emit: Callable[[int], None]) -> None:
    """Code for blocks of 1 to MAX_ROWS rows, of which the one runs that num_rows (int64) says."""
    after = b.append_basic_block("after")
    choice = b.switch(num_rows, after)
    for size in range(1, MAX_ROWS + 1):
        block = b.append_basic_block(f"rows{size}")
        choice.add_case(ir.Constant(I64, size), block)
        b.position_at_end(block)
        emit(size)
        b.branch(after)
    b.position_at_end(after)


def _products(b: Builder, kind: Kind, num_rows: int, x: Value, weights: Value, num_units: Value) -> list[list[Value]]:
    """[num_rows][2] vectors: each row times a tile's first and last 16 columns; num_units > 0.

    A sum's terms are added one by one in their order, whatever num_rows is: a row has the same bits in every block.
    """
    before, loop, after = b.block, b.append_basic_block("units"), b.append_basic_block("sums")
    b.branch(loop)
    b.position_at_end(loop)
    unit = b.phi(I64)
    starts = [[b.phi(FLOATS) for _ in range(2)] for _ in range(num_rows)]
    tile = b.add(weights, b.mul(unit, ir.Constant(I64, TILE_BYTES)))
    columns = [values_of(b, kind, load(b, at(b, tile, VECTOR_BYTES * v), INTS, align=VECTOR_BYTES)) for v in range(2)]
    values_bytes = 4 * num_rows * kind.values_per_unit
    values = b.add(x, b.mul(unit, ir.Constant(I64, values_bytes)))
    sums = [list(of_row) for of_row in starts]
    for part in range(kind.values_per_unit):
        for row in range(num_rows):
            value = splat(b, load(b, at(b, values, 4 * (part * num_rows + row)), F32, align=4), FLOATS)
            for v in range(2):
                sums[row][v] = fma(b, value, columns[v][part], sums[row][v])
    following = b.add(unit, ir.Constant(I64, 1))
    unit.add_incoming(ir.Constant(I64, 0), before)
    unit.add_incoming(following, loop)
    for row in range(num_rows):
        for start, total in zip(starts[row], sums[row], strict=True):
            start.add_incoming(constant(0.0, FLOATS), before)
            start.add_incoming(total, loop)
    b.cbranch(b.icmp_unsigned("<", following, num_units), loop, after)
    b.position_at_end(after)
    return sums
