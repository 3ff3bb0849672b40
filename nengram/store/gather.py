"""Rows of bytes out of a table in memory: one pass, the cache lines of rows to come already under way.

A gather waits for memory and for nothing else, so what counts is how many misses are in flight. A core overlaps the
misses of the few rows that its instruction window holds; `AHEAD` rows of software prefetch keep it at the limit of its
miss buffers. What stands between two misses must be short, so the size of a row is a constant of the compiled code, and
prefetch and copy are written out without loop or call: with loops over a size that is only known at the call, 256-byte
rows take a third longer. A size met for the first time is compiled, in less than a second, and kept in numba's cache.

Rows are bytes here: what they mean is a codec's business. Nothing is allocated, the interpreter's lock is not held, and
the arguments go straight from the interpreter into the compiled function, so that a batch of a few hundred rows is not
mostly overhead.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

AHEAD = 16  # rows between a prefetch and its copy
LINE_BYTES = 64
MOST_LINES = 16
BYTES = types.Array(types.uint8, 2, "C", readonly=True)
ROWS = types.Array(types.int64, 1, "C", readonly=True)
SIGNATURE = types.int64(BYTES, ROWS, types.uint8[:, ::1])


def gather_rows(table_RB: np.ndarray, rows_N: np.ndarray, out_NB: np.ndarray) -> int:
    """Copy row `rows_N[i]` of the table to row i of the output.

    table_RB: uint8 `[R, B]`; read-only will do. rows_N: int64 `[N]`. out_NB: uint8 `[N, B]`, apart from the table. All
        C-contiguous.
    Returns -1, or the position of the first row outside the table, of which nothing is read; rows before it are copied.
    Raises: TypeError for other dtypes or layouts, ValueError for an output of another size.
    """
    return gather_of(table_RB.shape[-1])(table_RB, rows_N, out_NB)


@cache
def gather_of(row_bytes: int) -> Callable[[np.ndarray, np.ndarray, np.ndarray], int]:
    """`gather_rows` for rows of one size."""

    def gather(table_RB, rows_N, out_NB):
        num_rows, count = table_RB.shape[0], rows_N.size
        if out_NB.shape[0] != count or out_NB.shape[1] != row_bytes or table_RB.shape[1] != row_bytes:
            raise ValueError("the output is not one row of the table's bytes for each row asked for")
        for i in range(-AHEAD, count):
            if i + AHEAD < count:
                _prefetch(table_RB, rows_N[np.uint64(i + AHEAD)], row_bytes)
            if i >= 0:
                row = rows_N[np.uint64(i)]  # unsigned places spare the check for negative indices
                if row < 0 or row >= num_rows:
                    return i
                _copy(out_NB, i, table_RB, row, row_bytes)
        return -1

    try:
        return njit(SIGNATURE, cache=True, nogil=True)(gather)
    except RuntimeError:  # neither the package's folder nor the user's cache folder can be written
        return njit(SIGNATURE, nogil=True)(gather)


@cache
def gather_at(row_bytes: int) -> Callable[[int, int, int, int, int], int]:
    """`gather_rows` by addresses: (table, its rows, row numbers, how many, output) -> the same result; nothing is checked.

    For a decode step's few hundred rows, making arrays of tensors and handing them over costs as much as the gather.
    """
    gather = gather_of(row_bytes)

    def gather_addresses(table, num_rows, rows, count, out):
        table_RB = carray(_pointer(table), (num_rows, row_bytes), np.uint8)
        out_NB = carray(_pointer(out), (count, row_bytes), np.uint8)
        return gather(table_RB, carray(_pointer(rows), (count,), np.int64), out_NB)

    return njit(types.int64(*[types.int64] * 5), cache=True, nogil=True)(gather_addresses)


@intrinsic
def _pointer(typing_context, address):
    """An address as a pointer."""

    def build(context, builder, signature, given):
        return builder.inttoptr(given[0], cgutils.voidptr_t)

    return types.voidptr(address), build


@intrinsic(prefer_literal=True)
def _prefetch(typing_context, table_RB, row, row_bytes):
    """Ask for the cache lines of a row; nothing is read, and no row number can fault."""

    def build(context, builder, signature, given):
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        for_reading, keep_in_all_caches, data_cache = (ir.Constant(word, value) for value in (0, 3, 1))
        begin = _row(context, builder, signature.args[0], given[0], given[1], row_bytes.literal_value)
        for place in _lines(row_bytes.literal_value):
            line = builder.gep(begin, [ir.Constant(ir.IntType(64), place)])
            builder.call(function, [line, for_reading, keep_in_all_caches, data_cache])
        return context.get_dummy_value()

    return types.void(table_RB, types.int64, row_bytes), build


@intrinsic(prefer_literal=True)
def _copy(typing_context, out_NB, place, table_RB, row, row_bytes):
    """Copy row `row` of the table to row `place` of the output."""

    def build(context, builder, signature, given):
        kinds, count = signature.args, row_bytes.literal_value
        target = _row(context, builder, kinds[0], given[0], given[1], count)
        source = _row(context, builder, kinds[2], given[2], given[3], count)
        cgutils.raw_memcpy(builder, target, source, ir.Constant(ir.IntType(64), count), 1)
        return context.get_dummy_value()

    return types.void(out_NB, types.int64, table_RB, types.int64, row_bytes), build


def _lines(row_bytes: int) -> list[int]:
    """Places in a row at which a prefetch reaches every line it touches, wherever in a line it begins.

    Of a long row only the first lines: what follows in sequence, the core prefetches by itself.
    """
    places = list(range(0, row_bytes, LINE_BYTES))
    ends_alike = row_bytes % LINE_BYTES == 0
    return (places if ends_alike else [*places, row_bytes - 1])[:MOST_LINES]


def _row(context: Any, builder: Any, kind: Any, array: Any, row: Any, row_bytes: int) -> Any:
    """Pointer to the first byte of a row."""
    begin = builder.mul(row, ir.Constant(ir.IntType(64), row_bytes))
    return builder.gep(context.make_array(kind)(context, builder, array).data, [begin])
