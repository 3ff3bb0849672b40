"""Rows of files, many at once, from one thread: the system calls, compiled; imported at first use.

A cold row costs a device read of some 100 us, so what counts is how many are under way. One thread that says which
pages it will need (`posix_fadvise(WILLNEED)`, which returns before the read is done) keeps the device's queue as full
as a hundred threads do that each wait for their own page, and needs no hand-over. A row whose page is in memory is
copied by the same pass: `preadv2(RWF_NOWAIT)` copies it or says that it would have to wait. That is one call per row,
cold or warm; and unlike a mapping it takes no page fault for a page that this process has not touched, and cannot be
killed by SIGBUS when the file is cut short.

Where a system has no such call, the file is mapped, `madvise(WILLNEED)` says which pages are needed, and rows are
copied out of the mapping. Figures: docs/decisions/0017-tiers.md.

In all of these: `rows_U` ascends strictly; file s holds rows `firsts_S[s]` to `firsts_S[s + 1]`; `out_UB` gets row u at u.
"""

import mmap
import os
from typing import Any

import numba
import numpy as np
from numba import types

RWF_NOWAIT = getattr(os, "RWF_NOWAIT", None)
POSIX_FADV_WILLNEED = getattr(os, "POSIX_FADV_WILLNEED", 3)
MADV_WILLNEED = getattr(mmap, "MADV_WILLNEED", 3)
PAGE = mmap.PAGESIZE

_preadv2 = types.ExternalFunction(
    "preadv2", types.int64(types.int32, types.uintp, types.int32, types.int64, types.int32)
)
_fadvise = types.ExternalFunction("posix_fadvise", types.int32(types.int32, types.int64, types.int64, types.int32))
_pread = types.ExternalFunction("pread", types.int64(types.int32, types.uintp, types.uint64, types.int64))
_madvise = types.ExternalFunction("madvise", types.int32(types.uintp, types.uint64, types.int32))
_memcpy = types.ExternalFunction("memcpy", types.uintp(types.uintp, types.uintp, types.uint64))


def _compile(function: Any) -> Any:
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache folder can be written
        return numba.njit(nogil=True)(function)


@_compile
def read_cached(fds_S, offsets_S, firsts_S, rows_U, begin, end, stop_at, out_UB, missed_U):
    """Copy what is in memory and ask for the rest: (where it stopped, how many are missing).

    Goes from `begin` to `end`, or until `stop_at` rows are missing; their places are left in `missed_U` from `begin` on.
    """
    row_bytes = out_UB.shape[1]
    vector = np.empty(2, np.uint64)
    vector[1] = row_bytes
    missed, shard, asked = 0, 0, np.int64(0)  # pages below `asked` were asked for
    for u in range(begin, end):
        while rows_U[u] >= firsts_S[shard + 1]:
            shard, asked = shard + 1, 0
        offset = offsets_S[shard] + (rows_U[u] - firsts_S[shard]) * row_bytes
        vector[0] = out_UB.ctypes.data + u * row_bytes
        if _preadv2(fds_S[shard], vector.ctypes.data, 1, offset, RWF_NOWAIT) == row_bytes:
            continue
        first, asked = max(offset & -PAGE, asked), (offset + row_bytes + PAGE - 1) & -PAGE
        if first < asked:
            _fadvise(fds_S[shard], first, asked - first, POSIX_FADV_WILLNEED)
        missed_U[begin + missed] = u
        missed += 1
        if missed == stop_at:
            return u + 1, missed
    return end, missed


@_compile
def read_missed(fds_S, offsets_S, firsts_S, rows_U, missed_M, out_UB):
    """Wait for the rows at places `missed_M`; -1, or the place of the first that could not be read."""
    row_bytes = out_UB.shape[1]
    shard = 0
    for m in range(missed_M.size):
        u = missed_M[m]
        while rows_U[u] >= firsts_S[shard + 1]:
            shard += 1
        offset = offsets_S[shard] + (rows_U[u] - firsts_S[shard]) * row_bytes
        done = 0
        while done < row_bytes:
            got = _pread(
                fds_S[shard], out_UB.ctypes.data + u * row_bytes + done, np.uint64(row_bytes - done), offset + done
            )
            if got <= 0:
                return u
            done += got
    return -1


@_compile
def advise_mapped(bases_S, firsts_S, rows_U, begin, end, stop_at, out_UB, missed_U):
    """`read_cached` for mappings, of which nobody tells what is in memory: asks for every page, copies nothing.

    bases_S: addresses at which the rows of each file begin.
    """
    row_bytes = out_UB.shape[1]
    missed, shard, asked = 0, 0, np.int64(0)
    for u in range(begin, end):
        while rows_U[u] >= firsts_S[shard + 1]:
            shard, asked = shard + 1, 0
        address = bases_S[shard] + (rows_U[u] - firsts_S[shard]) * row_bytes
        first, asked = max(address & -PAGE, asked), (address + row_bytes + PAGE - 1) & -PAGE
        if first < asked:
            _madvise(np.uint64(first), np.uint64(asked - first), MADV_WILLNEED)
        missed_U[begin + missed] = u
        missed += 1
        if missed == stop_at:
            return u + 1, missed
    return end, missed


@_compile
def copy_mapped(bases_S, firsts_S, rows_U, missed_M, out_UB):
    """`read_missed` for mappings: copies, waiting for pages as it goes. A file that was cut short ends the process."""
    row_bytes = out_UB.shape[1]
    shard = 0
    for m in range(missed_M.size):
        u = missed_M[m]
        while rows_U[u] >= firsts_S[shard + 1]:
            shard += 1
        address = bases_S[shard] + (rows_U[u] - firsts_S[shard]) * row_bytes
        _memcpy(np.uint64(out_UB.ctypes.data + u * row_bytes), np.uint64(address), np.uint64(row_bytes))
    return -1
