"""How fast do rows leave a table in RAM? The whole call that a model makes, against what the machine can do and what others offer.

Ours is `store.prefetch(rows)`, `ticket.vectors()`, `ticket.release()` on a table far larger than any cache, on huge pages. The
ceiling is a loop in C, compiled here with `-O3 -march=native` and the row's size as a constant: prefetch 16 rows ahead, memcpy; it
checks no row number and has no interpreter around it. `F.embedding` writes its output into fresh memory each time, as in a model
that calls it; at 32 MiB that memory comes from the system, smaller outputs the allocator may have kept. `np.take` gets its output
given. Each side of a pair gets its own fresh rows, since rows that the other has just read are in cache; "hot" batches are the same
rows again. The package `engramdb-python` reads the same rows from a file that is wholly in the page cache.

The C compiler and the package are optional: what needs one that is missing is left out, and the result says so.
"""

import ctypes
import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.gates import require_equal
from benchmarks.measure import Timings, interleave
from benchmarks.report import figure, result
from nengram.store.codecs import make_codec
from nengram.store.gather import gather_rows
from nengram.store.host import HostStore
from nengram.store.host_memory import host_zeros

COMPILER = ("gcc", "-O3", "-march=native", "-shared", "-fPIC")
LOOP = """
#include <stdint.h>
#include <string.h>
void gather(const uint8_t *table, const int64_t *rows, uint8_t *out, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        if (i + 16 < count)
            for (int at = 0; at < ROW_BYTES; at += 64)
                __builtin_prefetch(table + rows[i + 16] * ROW_BYTES + at);
        memcpy(out + i * ROW_BYTES, table + rows[i] * ROW_BYTES, ROW_BYTES);
    }
}
"""


class Rows(NamedTuple):
    """Row numbers int64 `[N]`, as each side likes them: the same memory."""

    array_N: np.ndarray
    tensor_N: torch.Tensor


Gather = Callable[[Rows], object]


@dataclass(frozen=True)
class Sizes:
    """`lookups`: of one large call. `batch`: rows of a decode step, `batches` of which make a sample. `engramdb_rows`: of
    one call to the package, which gets a table of `file_rows`. A pair is one sample of each side."""

    num_rows: int = 8 * 2**20
    row_bytes: int = 256
    lookups: int = 131_072
    middle: int = 25_000
    batch: int = 768
    batches: int = 32
    file_rows: int = 2**20
    pairs: int = 40


FULL = Sizes()


def run(sizes: Sizes = FULL) -> dict:
    """The result of this benchmark. Raises RedGate."""
    table = Table(sizes)
    figures, absolute, left_out = [], {}, []
    with c_loop(table) as loop:
        if loop:
            figures += against_c(table, loop, absolute)
        else:
            left_out.append("no gcc: the C loop was left out")
    figures += against_embedding(table, absolute)
    figures += against_take(table, absolute)
    with engramdb_fetch(table) as fetch:
        if fetch:
            figures += against_engramdb(table, fetch, absolute)
        else:
            left_out.append("engramdb-python is not installed: it was left out")
    gib = sizes.num_rows * sizes.row_bytes / 2**30
    what = f"rows of {sizes.row_bytes} bytes out of {gib:.3g} GiB of RAM, by prefetch, vectors and release of a store"
    gate = "every side returns the rows that NumPy's indexing returns"
    return result("gather", what, "; ".join([gate, *left_out]), figures, absolute)


class Table:
    """Bytes `[R, B]` on huge pages that hold their own place, the store over them, and fresh rows."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        memory_RB = host_zeros((sizes.num_rows, sizes.row_bytes), torch.uint8)
        self.bytes_RB = memory_RB.numpy()
        words_RW = self.bytes_RB.view(np.uint32)
        words_RW[:] = np.arange(words_RW.shape[1], dtype=np.uint32)
        words_RW[:, 0] = np.arange(sizes.num_rows, dtype=np.uint32)
        self.vectors_RE = memory_RB.view(torch.float32)
        self.store = HostStore.from_bytes(memory_RB, make_codec("fp32", sizes.row_bytes // 4))
        self.rng = np.random.default_rng(0)
        self.out_NB = np.zeros((sizes.lookups, sizes.row_bytes), dtype=np.uint8)

    def fresh(self, count: int, below: int = 0) -> Rows:
        """`count` rows, uniform, of the first `below` rows (0: of all)."""
        array_N = self.rng.integers(0, below or self.sizes.num_rows, count)
        return Rows(array_N, torch.from_numpy(array_N))

    def prefetch(self, rows: Rows) -> None:
        """What a model does."""
        ticket = self.store.prefetch(rows.tensor_N)
        ticket.vectors()
        ticket.release()

    def kernel(self, rows: Rows) -> None:
        """The compiled gather alone."""
        gather_rows(self.bytes_RB, rows.array_N, self.out_NB[: len(rows.array_N)])

    def take(self, rows: Rows) -> None:
        """NumPy's own, into given memory; `clip` spares it a copy."""
        np.take(self.bytes_RB, rows.array_N, axis=0, out=self.out_NB[: len(rows.array_N)], mode="clip")

    def embedding(self, rows: Rows) -> torch.Tensor:
        """torch's own, which allocates."""
        return F.embedding(rows.tensor_N, self.vectors_RE)

    def vectors(self, rows: Rows) -> np.ndarray:
        """A copy of what the store lends, as bytes."""
        with self.store.prefetch(rows.tensor_N) as ticket:
            return ticket.vectors().clone().view(torch.uint8).numpy()

    def require(self, what: str, found_NB: np.ndarray, rows: Rows) -> None:
        """Raises RedGate unless these are the bytes of those rows."""
        require_equal(what, found_NB, self.bytes_RB[rows.array_N])


def against_c(table: Table, loop: Gather, absolute: dict[str, float]) -> list[dict]:
    """Share of the ceiling's rate that large calls reach."""
    count = table.sizes.lookups
    rows = table.fresh(count)
    for name, side in (("the C loop", loop), ("the kernel", table.kernel)):
        table.out_NB.fill(0)
        side(rows)
        table.require(name, table.out_NB, rows)
    table.require("the store", table.vectors(rows), rows)
    figures = []
    for name, ours, goal in (("store", table.prefetch, (">=", 0.7)), ("kernel", table.kernel, None)):
        timings = paired(table, ours, loop, count)
        figures.append(figure(f"rate of the {name} / of a C loop, {count:,} rows", timings.speedup, "share", goal))
        absolute[f"{name}_ns_per_row"] = each_ns(timings.ours_s, count)
    absolute["c_loop_ns_per_row"] = each_ns(timings.theirs_s, count)
    absolute["c_loop_gib_per_s"] = table.sizes.row_bytes / absolute["c_loop_ns_per_row"] * 1e9 / 2**30
    return figures


def against_embedding(table: Table, absolute: dict[str, float]) -> list[dict]:
    """What a model would call without a store."""
    rows = table.fresh(table.sizes.middle)
    table.require("F.embedding", table.embedding(rows).view(torch.uint8).numpy(), rows)
    figures = []
    for count, goal in ((table.sizes.lookups, (">=", 2.0)), (table.sizes.middle, None)):
        timings = paired(table, table.prefetch, table.embedding, count)
        figures.append(figure(f"F.embedding, fresh output / store, {count:,} rows", timings.speedup, "x", goal))
        absolute[f"embedding_ns_per_row_{count}"] = each_ns(timings.theirs_s, count)
    return figures


def against_take(table: Table, absolute: dict[str, float]) -> list[dict]:
    """A decode step's rows: the same again and again, and fresh ones."""
    count, batches = table.sizes.batch, table.sizes.batches
    rows = table.fresh(count)
    table.take(rows)
    table.require("np.take", table.out_NB[:count], rows)
    table.require("a batch of the store", table.vectors(rows), rows)
    figures = []
    for state, again in (("hot", rows), ("cold", None)):
        for name, ours, goal in (("store", table.prefetch, ("<=", 1.5)), ("kernel", table.kernel, None)):
            timings = paired(table, ours, table.take, count, batches, again)
            figures.append(figure(f"{name} / np.take, {count} rows, {state}", timings.cost, "x", goal))
            absolute[f"{name}_{count}_rows_{state}_us"] = each_ns(timings.ours_s, batches) / 1e3
        absolute[f"np_take_{count}_rows_{state}_us"] = each_ns(timings.theirs_s, batches) / 1e3
    return figures


def against_engramdb(table: Table, fetch: Callable[[list[int]], bytes], absolute: dict[str, float]) -> list[dict]:
    """The package reads a file in the page cache, we the same rows of the table. It gets the list it likes best, ready made."""
    sizes, figures = table.sizes, []
    for count, batches, goal in ((sizes.batch, sizes.batches, 10.0), (sizes.middle, 1, 5.0)):
        rows = table.fresh(count, sizes.file_rows)
        found_NB = np.frombuffer(fetch(rows.array_N.tolist()), dtype=np.uint8).reshape(count, sizes.row_bytes)
        table.require("engramdb", found_NB, rows)

        def inputs(count: int = count, batches: int = batches) -> tuple[list[Rows], list[list[int]]]:
            ours, theirs = ([table.fresh(count, sizes.file_rows) for _ in range(batches)] for _ in range(2))
            return ours, [rows.array_N.tolist() for rows in theirs]

        timings = interleave(
            lambda given: each(table.prefetch, given[0]), lambda given: each(fetch, given[1]), inputs, sizes.pairs
        )
        figures.append(figure(f"engramdb Store.fetch / store, {count:,} rows", timings.speedup, "x", (">=", goal)))
        absolute[f"engramdb_{count}_rows_us"] = each_ns(timings.theirs_s, batches) / 1e3
    return figures


def paired(
    table: Table, ours: Gather, theirs: Gather, count: int, batches: int = 1, again: Rows | None = None
) -> Timings:
    """Timings of `batches` calls a side: each side on its own fresh rows, or every call on the rows `again`."""

    def inputs() -> tuple[list[Rows], list[Rows]]:
        if again is not None:
            return [again] * batches, [again] * batches
        return tuple([table.fresh(count) for _ in range(batches)] for _ in range(2))

    return interleave(
        lambda given: each(ours, given[0]), lambda given: each(theirs, given[1]), inputs, table.sizes.pairs
    )


def each(gather: Callable, batches: list) -> None:
    """One call a batch."""
    for rows in batches:
        gather(rows)


def each_ns(seconds: np.ndarray, parts: int) -> float:
    """Median of samples, in nanoseconds for each of their `parts`."""
    return 1e9 * float(np.median(seconds)) / parts


@contextmanager
def c_loop(table: Table) -> Iterator[Gather | None]:
    """The compiled ceiling, or None where there is no compiler."""
    if shutil.which(COMPILER[0]) is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "loop.so"
        source = library.with_suffix(".c")
        source.write_text(LOOP)
        defined = f"-DROW_BYTES={table.sizes.row_bytes}"
        subprocess.run([*COMPILER, defined, "-o", library, source], check=True)
        gather = ctypes.CDLL(str(library)).gather
        gather.argtypes, gather.restype = [ctypes.c_void_p] * 3 + [ctypes.c_int64], None
        addresses = table.bytes_RB.ctypes.data, table.out_NB.ctypes.data
        yield lambda rows: gather(addresses[0], rows.tensor_N.data_ptr(), addresses[1], len(rows.array_N))


@contextmanager
def engramdb_fetch(table: Table) -> Iterator[Callable[[list[int]], bytes] | None]:
    """The package's `Store.fetch` over the table's first rows in a file just written, hence cached; None without it."""
    if importlib.util.find_spec("engramdb") is None:
        yield None
        return
    from engramdb import Store

    with tempfile.TemporaryDirectory() as folder:
        table.bytes_RB[: table.sizes.file_rows].tofile(Path(folder) / "shard_000.bin")
        store = Store(folder, 1, table.sizes.file_rows, table.sizes.row_bytes)
        yield store.fetch
        store.close()
