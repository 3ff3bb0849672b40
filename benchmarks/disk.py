"""How fast do rows come from a cold disk? The store against the best that the disk gives anybody, and against what one writes first.

A file of random rows; the page cache is dropped before every request (`posix_fadvise(DONTNEED)`), so every row costs a device read of
a page. Ours is `MappedStore.prefetch` and `vectors`. The ceiling is a C program compiled here that reads as many random pages with
O_DIRECT: io_uring (raw system calls) or 128 threads of `pread`, whichever is the fastest on this machine for requests of that size,
timed without opening and thread starts. The opponent is `np.memmap` indexed by the same kind of rows; it reads ahead, megabytes for
each row, so it gets few of them. The package `engramdb-python` reads the same file.

Disks are not steady: neighbours, caches of the host, wear. The sides therefore take turns on one file within each round, in changing
order, each on fresh rows that no one has touched, and the figure is the median of the ratios of the rounds. Wall time: waiting is what
is measured.

The file lies in the system's temporary folder (TMPDIR says where) and is removed. Put it on the disk you want to know about; memory
that is no disk (tmpfs) makes no sense here.
"""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.gates import RedGate, require_equal
from benchmarks.report import figure, result
from nengram.store.codecs import make_codec
from nengram.store.mapped import MappedStore
from nengram.store.table_file import TableWriter

PAGE = 4096
SOURCE = Path(__file__).with_name("disk_ceiling.c")
WAYS = {"io_uring, 128 deep": (0, 128), "io_uring, 512 deep": (0, 512), "128 threads": (1, 128)}
BLOCK_ROWS = 2**18
TRIALS = 5  # of each way, before one is chosen


@dataclass(frozen=True)
class Sizes:
    """`batches`: rows of the requests that are timed. `package_rows`: the one of these that memmap and package are held against.
    `memmap_rows`: of the requests that np.memmap gets, and of the check before."""

    num_rows: int = 2**25
    row_bytes: int = 256
    batches: tuple[int, ...] = (256, 4096, 32_768)
    package_rows: int = 4096
    memmap_rows: int = 256
    rounds: int = 9


FULL = Sizes()


@dataclass
class Rounds:
    """Rows per second of each side, and device reads per distinct page of ours: one number a round."""

    rates: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    reads_per_page: dict[int, list[float]] = field(default_factory=dict)

    def ratio(self, ours: tuple[str, int], theirs: tuple[str, int]) -> np.ndarray:
        return np.array(self.rates[ours]) / np.array(self.rates[theirs])

    def median(self, side: str, count: int) -> float:
        return float(np.median(self.rates[side, count]))


def run(sizes: Sizes = FULL) -> dict:
    """The result of this benchmark. Raises RedGate when a side reads wrong rows, or the ceiling cannot be had."""
    with tempfile.TemporaryDirectory(prefix="nengram-disk-") as folder, Table(Path(folder), sizes) as table:
        table.verify()
        with ceiling(Path(folder)) as read_pages:
            ways = {count: fastest_way(table, read_pages, count) for count in sizes.batches}
            sides: dict[tuple[str, int], Callable[[], float]] = {}
            for count in sizes.batches:
                sides["store", count] = lambda count=count: table.store_seconds(count)
                sides["ceiling", count] = lambda count=count: read_pages(table, count, *WAYS[ways[count]])
            sides["np.memmap", sizes.memmap_rows] = lambda: table.memmap_seconds(sizes.memmap_rows)
            if table.package is not None:
                sides["engramdb", sizes.package_rows] = lambda: table.package_seconds(sizes.package_rows)
            rounds = take_turns(table, sides, sizes.rounds)
    return described(sizes, rounds, ways, table.package is not None)


def take_turns(table: "Table", sides: dict[tuple[str, int], Callable[[], float]], count: int) -> Rounds:
    """Every side once a round, in turning order; the first round warms up and is dropped."""
    rounds, names = Rounds(), list(sides)
    for number in range(count + 1):
        for name in names if number % 2 else reversed(names):
            table.drop()
            before = device_bytes()
            rate = name[1] / sides[name]()
            if number:
                rounds.rates.setdefault(name, []).append(rate)
            if number and name[0] == "store" and before is not None:
                reads = (device_bytes() - before) / PAGE / table.pages_asked
                rounds.reads_per_page.setdefault(name[1], []).append(reads)
    return rounds


def described(sizes: Sizes, rounds: Rounds, ways: dict[int, str], has_package: bool) -> dict:
    """Figures and absolute numbers."""
    figures, absolute = [], {}
    for count in sizes.batches:
        shares = rounds.ratio(("store", count), ("ceiling", count))
        figures.append(figure(f"rate of the store / of O_DIRECT, {count:,} rows", shares, "share", (">=", 0.40)))
        for side in ("store", "ceiling"):
            absolute[f"{side}_rows_per_s_{count}"] = rounds.median(side, count)
    largest = sizes.batches[-1]
    against = rounds.ratio(("store", sizes.package_rows), ("np.memmap", sizes.memmap_rows))
    figures.append(figure("rate of the store / of np.memmap", against, "x", (">=", 20.0)))
    absolute["np_memmap_rows_per_s"] = rounds.median("np.memmap", sizes.memmap_rows)
    left_out = []
    if has_package:
        against = rounds.ratio(("store", sizes.package_rows), ("engramdb", sizes.package_rows))
        figures.append(figure(f"rate of the store / of engramdb, {sizes.package_rows:,} rows", against, "x"))
        absolute["engramdb_rows_per_s"] = rounds.median("engramdb", sizes.package_rows)
    else:
        left_out.append("engramdb-python is not installed: it was left out")
    if rounds.reads_per_page:
        reads = np.array(rounds.reads_per_page[largest])
        figures.append(figure(f"device reads / distinct page, {largest:,} rows", reads, "x", ("<=", 1.02)))
    else:
        left_out.append("this system does not count a process's device reads: they were left out")
    ceilings = ", ".join(f"{way} for {count:,}" for count, way in ways.items())
    gib = sizes.num_rows * sizes.row_bytes / 2**30
    what = f"cold rows of {sizes.row_bytes} bytes out of a file of {gib:.3g} GiB; the ceiling is {ceilings}"
    gate = "the store, np.memmap and the package read the rows that were written"
    return result("disk", what, "; ".join([gate, *left_out]), figures, absolute)


class Table:
    """The file, everyone who reads it, and fresh rows. Row r's bytes are a function of r, so that they can be checked."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self.sizes, self.path = sizes, folder / "table"
        self.rng = np.random.default_rng(0)
        codec = make_codec("fp32", sizes.row_bytes // 4)
        with TableWriter(self.path, codec, sizes.num_rows, {}) as writer:
            for first in range(0, sizes.num_rows, BLOCK_ROWS):
                writer.write(expected(np.arange(first, min(first + BLOCK_ROWS, sizes.num_rows)), sizes.row_bytes))
        self.store = MappedStore(self.path)
        self.fd = os.open(self.path, os.O_RDONLY)
        os.fsync(self.fd)
        self.rows_offset = self.store.reader.files[0].rows_offset
        self.pages_asked = 0
        self.package = None
        if importlib.util.find_spec("engramdb") is not None and self.rows_offset % sizes.row_bytes == 0:
            self.package = folder / "package"
            self.package.mkdir()
            (self.package / "shard_000.bin").symlink_to(self.path)  # its rows begin at byte 0: ours are further down

    def __enter__(self) -> "Table":
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()
        os.close(self.fd)

    def drop(self) -> None:
        """Put the file out of the page cache."""
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def fresh(self, count: int) -> np.ndarray:
        """Rows int64 `[count]`, uniform."""
        return self.rng.integers(0, self.sizes.num_rows, count)

    def pages(self, rows_N: np.ndarray) -> np.ndarray:
        """Distinct pages of the file that hold these rows."""
        begins = self.rows_offset + rows_N * self.sizes.row_bytes
        return np.union1d(begins // PAGE, (begins + self.sizes.row_bytes - 1) // PAGE)

    def store_seconds(self, count: int) -> float:
        """One request of the store, waited for."""
        rows_N = self.fresh(count)
        self.pages_asked = self.pages(rows_N).size
        rows = torch.from_numpy(rows_N)
        began = time.perf_counter()
        ticket = self.store.prefetch(rows)
        ticket.vectors()
        spent = time.perf_counter() - began
        ticket.release()
        return spent

    def memmap_seconds(self, count: int) -> float:
        """NumPy's memory map as it comes, opened before the clock starts."""
        rows_N, mapped_RB = self.fresh(count), self.memmap()
        began = time.perf_counter()
        mapped_RB[rows_N]
        return time.perf_counter() - began

    def memmap(self) -> np.memmap:
        shape = self.sizes.num_rows, self.sizes.row_bytes
        return np.memmap(self.path, np.uint8, "r", self.rows_offset, shape)

    def package_seconds(self, count: int) -> float:
        """The package's fetch, opened before the clock starts."""
        rows, store = self.package_rows(self.fresh(count)), self.package_store()
        began = time.perf_counter()
        store.fetch(rows)
        return time.perf_counter() - began

    def package_rows(self, rows_N: np.ndarray) -> list[int]:
        return (rows_N + self.rows_offset // self.sizes.row_bytes).tolist()

    def package_store(self):
        from engramdb import Store

        rows = self.sizes.num_rows + self.rows_offset // self.sizes.row_bytes
        return Store(str(self.package), 1, rows, self.sizes.row_bytes)

    def verify(self) -> None:
        """Raises RedGate unless everyone reads what was written."""
        rows_N = self.fresh(self.sizes.memmap_rows)
        wanted_NB = expected(rows_N, self.sizes.row_bytes)
        with self.store.prefetch(torch.from_numpy(rows_N)) as ticket:
            require_equal("rows of the store", ticket.vectors().view(torch.uint8).numpy(), wanted_NB)
        require_equal("rows of np.memmap", self.memmap()[rows_N], wanted_NB)
        if self.package is not None:
            found = np.frombuffer(self.package_store().fetch(self.package_rows(rows_N)), np.uint8)
            require_equal("rows of engramdb", found.reshape(wanted_NB.shape), wanted_NB)


ReadPages = Callable[[Table, int, int, int], float]


@contextmanager
def ceiling(folder: Path) -> Iterator[ReadPages]:
    """Seconds in which the compiled reader reads the pages of `count` fresh rows. Raises RedGate without a compiler."""
    if shutil.which("gcc") is None:
        raise RedGate("no gcc: there is no ceiling to measure against")
    library = folder / "ceiling.so"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, SOURCE, "-lpthread"], check=True)
    function = ctypes.CDLL(str(library)).read_pages
    function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    function.restype = ctypes.c_double

    def read_pages(table: Table, count: int, way: int, depth: int) -> float:
        pages_P = table.rng.permutation(table.pages(table.fresh(count)))
        return function(str(table.path).encode(), pages_P.ctypes.data, pages_P.size, way, depth)

    yield read_pages


def fastest_way(table: Table, read_pages: ReadPages, count: int) -> str:
    """The name in `WAYS` of what reads requests of `count` rows fastest here. Raises RedGate when none works."""
    spent: dict[str, list[float]] = {}
    for _ in range(TRIALS):
        for name, way in WAYS.items():
            table.drop()
            seconds = read_pages(table, count, *way)
            if seconds > 0:
                spent.setdefault(name, []).append(seconds)
    if not spent:
        raise RedGate("pages cannot be read with io_uring nor with threads: there is no ceiling to measure against")
    return min(spent, key=lambda name: float(np.median(spent[name])))


def expected(rows_N: np.ndarray, row_bytes: int) -> np.ndarray:
    """Bytes of rows, uint8 `[N, B]`: random to look at, no two alike."""
    words_NW = (rows_N[:, None] * (row_bytes // 8) + np.arange(row_bytes // 8)).astype(np.uint64)
    words_NW *= np.uint64(0x9E3779B97F4A7C15)
    words_NW ^= words_NW >> np.uint64(29)
    words_NW *= np.uint64(0xBF58476D1CE4E5B9)
    return words_NW.view(np.uint8)


def device_bytes() -> int | None:
    """Bytes this process has caused to be read from devices, all threads; None where nobody counts."""
    try:
        counted = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return None
    return int(counted["read_bytes"])
