"""What tiers do with row numbers, compiled; imported at first use.

A slow tier wants each row of a request once, in the order in which its file holds them; a hot set wants to know which of
these it has. Both are one pass over a decode step's few hundred rows, and the result is a few flat arrays: between two
steps a forward pass has emptied the caches, and every call out of the interpreter then costs tens of microseconds, so
one call does it all.
"""

import numba
import numpy as np

from nengram.store.kernels import ascending_order, compiled, count_distinct

FEW_ROWS = 96
memcpy = numba.types.ExternalFunction("memcpy", numba.types.uintp(*[numba.types.uint64] * 3))


@compiled
def insertion_order(rows_N, order_N):
    """`ascending_order` for a decode step's rows, too few to fill a radix sort's counters."""
    for i in range(rows_N.size):
        place = i
        while place and rows_N[order_N[place - 1]] > rows_N[i]:
            order_N[place] = order_N[place - 1]
            place -= 1
        order_N[place] = i


@compiled
def distinct_rows(rows_N, num_rows):
    """(-1, `rows_U` ascending, `place_N` with rows_U[place_N] = rows_N); `place_N` is empty where rows_N ascends already.

    The first number is the position of the first row outside the table, if there is one; nothing else counts then.
    """
    ascending = True
    for i in range(rows_N.size):
        if rows_N[i] < 0 or rows_N[i] >= num_rows:
            return i, np.empty(0, np.int64), np.empty(0, np.int64)
        if i and rows_N[i] <= rows_N[i - 1]:
            ascending = False
    if ascending:
        return -1, rows_N.copy(), np.empty(0, np.int64)
    order_N = np.empty(rows_N.size, np.int64)
    if rows_N.size <= FEW_ROWS:
        insertion_order(rows_N, order_N)
    else:
        key_bits = 1
        while num_rows >> key_bits:
            key_bits += 1
        order_N = ascending_order(rows_N, order_N, np.empty(rows_N.size, np.int64), key_bits)
    rows_U, place_N = np.empty(count_distinct(rows_N, order_N), np.int64), np.empty(rows_N.size, np.int64)
    u = -1
    for i in range(rows_N.size):
        row = rows_N[order_N[i]]
        if u < 0 or rows_U[u] != row:
            u += 1
            rows_U[u] = row
        place_N[order_N[i]] = u
    return -1, rows_U, place_N


@compiled
def count_ones(word):
    """How many bits of a 64-bit word are set, by adding neighbours: in pairs, fours, eights, then all bytes at once."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@compiled
def rank_of(words_W, before_W, row):
    """How many set bits stand before this row's bit; -1 where that bit is not set."""
    place, bit = row >> 6, np.uint64(row & 63)
    if not (words_W[place] >> bit) & np.uint64(1):
        return np.int64(-1)
    return np.int64(before_W[place]) + count_ones(words_W[place] & ((np.uint64(1) << bit) - np.uint64(1)))


@compiled
def ranks_of(words_W, before_W, rows_N, ranks_N):
    """`rank_of` every row."""
    for i in range(rows_N.size):
        ranks_N[i] = rank_of(words_W, before_W, rows_N[i])


@compiled
def split_hot(words_W, before_W, rows_N, num_rows, where_N, ranks_H, rows_M):
    """(position of the first row outside the table or -1, distinct hot rows, distinct others).

    ranks_H, rows_M: room for N each; filled, ascending, with the ranks of the hot rows and the numbers of the others.
    where_N: for each lookup h, the place in ranks_H, or -1 - m, m the place in rows_M.
    """
    outside, rows_U, place_N = distinct_rows(rows_N, num_rows)
    hits, misses = 0, 0
    where_U = np.empty(rows_U.size, np.int64)
    for u in range(rows_U.size):
        rank = rank_of(words_W, before_W, rows_U[u])
        if rank >= 0:
            where_U[u], ranks_H[hits] = hits, rank
            hits += 1
        else:
            where_U[u], rows_M[misses] = -1 - misses, rows_U[u]
            misses += 1
    for i in range(rows_N.size if outside < 0 else 0):
        where_N[i] = where_U[place_N[i]] if place_N.size else where_U[i]
    return outside, hits, misses


@compiled
def join_rows(hot, ranks_H, others, where_N, out_NB):
    """Row i of the output: row ranks_H[h] of the table at address `hot`, or row m of the one at `others`; see `split_hot`."""
    row_bytes = out_NB.shape[1]
    for i in range(where_N.size):
        where = where_N[i]
        source = hot + ranks_H[where] * row_bytes if where >= 0 else others + (-1 - where) * row_bytes
        memcpy(np.uint64(out_NB.ctypes.data + i * row_bytes), np.uint64(source), np.uint64(row_bytes))
