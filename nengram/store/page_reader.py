"""Reads of many rows from the files of a table: begun at once, finished when they are waited for.

A request begins on the caller's thread, which copies whatever is in memory. After a few rows that are not, the rest
goes to a pool of threads: asking an idle device for a page costs 9 us of a core in a busy queue and 100 in an empty one
(on a virtual machine, which leaves the guest for it), which is then not the caller's. After a request that had to fetch
rows the next one goes to the pool at once; one that is wholly in memory, the usual case of a table that fits the page
cache, never sees the pool and its 20-50 us of hand-over. Several requests may be under way at once.

Files are watched: once its rows have been read, a file whose length or time of change is not what it was is refused,
since they may be of two tables (before it is touched too, where it is mapped). One that was replaced by another under
its name is still the table that was opened: it goes on being read, and a warning says so once.

Threads do not survive a fork; a child makes its own at its first request. Requests under way stay the parent's.
"""

import mmap
import os
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np

from nengram.errors import CheckpointError, StoreError
from nengram.store.table_file import TableFile, TableReader

INLINE_MISSES = 4  # rows that the caller's thread asks the device for before the pool takes over
INLINE_ROWS = 512  # and rows that it copies
ROWS_PER_THREAD = 256  # below this, one more thread costs more than it brings


class CachedReads:
    """Rows by positioned reads, which tell a row in memory from one that is not."""

    tells_cached = survives_truncation = True

    def __init__(self, files: list[TableFile]) -> None:
        from nengram.store import page_reads  # compiles at first use

        for file in files:
            os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_RANDOM)  # else one row reads megabytes ahead
        fds_S, offsets_S = np.array([(file.fd, file.rows_offset) for file in files], np.int64).T.copy()
        where = fds_S, offsets_S, _firsts(files)
        self.begin, self.finish = partial(page_reads.read_cached, *where), partial(page_reads.read_missed, *where)

    def close(self) -> None:
        """Nothing to give up: the files are the reader's."""


class MappedReads:
    """Rows out of a mapping, for systems without such reads. Every row counts as missing: nobody tells."""

    tells_cached = survives_truncation = False

    def __init__(self, files: list[TableFile]) -> None:
        from nengram.store import page_reads

        self._maps = [mmap.mmap(file.fd, 0, access=mmap.ACCESS_READ) for file in files]
        for mapping in self._maps:
            mapping.madvise(mmap.MADV_RANDOM)
        starts = [np.frombuffer(mapping, np.uint8).ctypes.data for mapping in self._maps]
        bases_S = np.array([start + file.rows_offset for start, file in zip(starts, files, strict=True)], np.int64)
        where = bases_S, _firsts(files)
        self.begin, self.finish = partial(page_reads.advise_mapped, *where), partial(page_reads.copy_mapped, *where)

    def close(self) -> None:
        """Unmap the files."""
        for mapping in self._maps:
            mapping.close()


READS = {"cached": CachedReads, "mapping": MappedReads}


def best_reads() -> str:
    """The name in `READS` of what this system does best."""
    return "cached" if getattr(os, "RWF_NOWAIT", None) is not None else "mapping"


class PageReader:
    """Begins reads of a table's rows. Raises: StoreError for a name that is not in `READS`."""

    def __init__(self, reader: TableReader, *, threads: int, reads: str | None = None) -> None:
        name = reads or best_reads()
        if name not in READS or threads < 1:
            raise StoreError(f"rows are read by {' or '.join(READS)} and 1 thread or more, not {name}, {threads}")
        self.reader, self._threads = reader, threads
        self._reads = READS[name](reader.files)
        self.tells_cached = self._reads.tells_cached
        self._watched = [Watched(file) for file in reader.files]
        self._borders_S = _firsts(reader.files)[:-1]
        self._closed = False
        self._pool: ThreadPoolExecutor | None = None
        self.is_cold = False  # the request that was waited for last had to fetch rows
        self._pool_of = 0

    def begin(self, rows_U: np.ndarray, out_UB: np.ndarray) -> "Reading":
        """Start reading `rows_U` (inside the table, strictly ascending) into `out_UB`.

        Raises: StoreError when this was closed, or a mapped file was changed or cut short.
        """
        self.require_open()
        watched = self._touched(rows_U)
        if not self._reads.survives_truncation:
            for file in watched:
                file.check()
        reading = Reading(self, watched, rows_U, out_UB)
        reading.start()
        return reading

    def require_open(self) -> None:
        """Raises: StoreError after `close`: the descriptors may by now be other files."""
        if self._closed:
            raise StoreError(f"{self.reader.path}: this store was closed; open the table again")

    def submit(self, work, *given) -> Future:
        """Have a thread of the pool do it."""
        if self._pool is None or self._pool_of != os.getpid():
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="nengram-rows")
            self._pool_of = os.getpid()
        return self._pool.submit(work, *given)

    def pieces(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Rows `begin` to `end` of a request, cut for the threads."""
        count = min(self._threads, -(-(end - begin) // ROWS_PER_THREAD))
        cuts = [begin + (end - begin) * piece // count for piece in range(count + 1)]
        return list(zip(cuts, cuts[1:], strict=False))

    def close(self) -> None:
        """Wait for the threads and let go of the files."""
        self._closed = True
        if self._pool is not None and self._pool_of == os.getpid():
            self._pool.shutdown()
        self._pool = None
        self._reads.close()
        self.reader.close()

    def _touched(self, rows_U: np.ndarray) -> list["Watched"]:
        if rows_U.size == 0:
            return []
        if len(self._watched) == 1:
            return self._watched
        return [self._watched[s] for s in np.unique(np.searchsorted(self._borders_S, rows_U, side="right") - 1)]


class Reading:
    """One request under way. `missed()` are the places of rows that were not in memory."""

    def __init__(self, pages: PageReader, watched: list["Watched"], rows_U: np.ndarray, out_UB: np.ndarray) -> None:
        self._pages, self._watched, self._rows_U, self._out_UB = pages, watched, rows_U, out_UB
        self._missed_U = np.empty(rows_U.size, np.int64)
        self._inline, self._jobs = 0, []

    def start(self) -> None:
        """Copy what is in memory; leave to the pool what the last request, or a few misses, show to be work."""
        total, done = self._rows_U.size, 0
        if not self._pages.is_cold:
            done, self._inline = self._ask(0, min(total, INLINE_ROWS), INLINE_MISSES)
        if done < total:
            self._jobs = [self._pages.submit(self._read, *piece) for piece in self._pages.pieces(done, total)]

    def wait(self) -> None:
        """Until every row is there. Raises: StoreError in one line when one could not be read, or a file was changed."""
        self._pages.require_open()
        results = [job.result() for job in self._jobs]
        self._pages.is_cold = bool(self._inline or any(count for (_, count), _ in results))
        bad = [place for _, place in results]
        if self._inline:
            bad.append(self._pages._reads.finish(self._rows_U, self._missed_U[: self._inline], self._out_UB))
        for file in self._watched:
            file.check()
        failed = [place for place in bad if place >= 0]
        if failed:
            raise self._failure(int(self._rows_U[min(failed)]))

    def drain(self) -> None:
        """Until nobody writes any more, whatever came of it."""
        for job in self._jobs:
            job.exception()

    def missed(self) -> np.ndarray:
        """Places of the rows that had to be fetched, once waited for, ascending."""
        begins = [(0, self._inline), *(job.result()[0] for job in self._jobs)]
        return np.concatenate([self._missed_U[begin : begin + count] for begin, count in begins])

    def _ask(self, begin: int, end: int, stop_at: int) -> tuple[int, int]:
        return self._pages._reads.begin(self._rows_U, begin, end, stop_at, self._out_UB, self._missed_U)

    def _read(self, begin: int, end: int) -> tuple[tuple[int, int], int]:
        """On a thread: where its misses lie, and the place of the first row that could not be read, or -1."""
        _, count = self._ask(begin, end, end - begin + 1)
        missed_M = self._missed_U[begin : begin + count]
        return (begin, count), self._pages._reads.finish(self._rows_U, missed_M, self._out_UB)

    def _failure(self, row: int) -> StoreError:
        try:
            self._pages.reader.read_rows(row, 1)
        except (CheckpointError, StoreError) as error:
            return StoreError(f"row {row:,}: {error}")
        return StoreError(f"row {row:,} of {self._pages.reader.path} could not be read; check the disk and try again")


class Watched:
    """A file that must stay as it was when it was opened."""

    def __init__(self, file: TableFile) -> None:
        self._file = file
        self._opened = self._now()
        self._said = False

    def check(self) -> None:
        """Raises: StoreError when the file was written to or cut short. Warns once when it was replaced."""
        found = self._now()
        if found[:2] != self._opened[:2]:
            was, now = self._opened[0], found[0]
            how = f"cut from {was:,} to {now:,} bytes" if now < was else "changed"
            raise StoreError(
                f"{self._file.path}: was {how} while it was open: its rows may be of two tables; open it again"
            )
        if found[2] == 0 and not self._said:
            self._said = True
            warnings.warn(
                f"{self._file.path}: was replaced or removed while it was open; the table that was opened goes on "
                "being read: open it again for the new one",
                stacklevel=2,
            )

    def _now(self) -> tuple[int, int, int]:
        stat = os.fstat(self._file.fd)
        return stat.st_size, stat.st_mtime_ns, stat.st_nlink


def _firsts(files: list[TableFile]) -> np.ndarray:
    """First row of each file counted from the table's first, and the row after the last: int64 [S + 1]."""
    counts = [file.num_rows for file in files]
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
