"""A table that stays in its file: what is read of it is in the system's page cache, and what is not costs a device read.

The plain way, indexing a memory map, reads one row after the other and megabytes ahead of each. Here the rows of a
request are made distinct and sorted, every page is asked for before any is waited for, and nothing is read ahead; a row
is one read of a page. `prefetch` returns while the device works; `vectors` waits, decodes each distinct row once, and
spreads them over the lookups. How pages are asked for, and why it is one pass and not many threads: `page_reads.py`.

Read only: training a table in its file is a store of its own.
"""

import os
import time
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from nengram.errors import StoreError
from nengram.store.base import Store, check_distinct
from nengram.store.codec import Codec
from nengram.store.delivery import Delivery, Staged, distinct_rows
from nengram.store.lending import LentTicket
from nengram.store.page_reader import PageReader
from nengram.store.rules import Rule
from nengram.store.table_file import open_table

PAGE_BYTES = 4096  # what a device read is counted as


class Rows(Protocol):
    """What a table in files says of itself."""

    path: Path
    codec: Codec
    num_rows: int


class Reads(Protocol):
    """A request under way, as `page_reader.Reading` is one."""

    def wait(self) -> None: ...

    def drain(self) -> None: ...

    def missed(self) -> np.ndarray: ...


class Pages(Protocol):
    """What begins requests, as `PageReader` does."""

    tells_cached: bool

    def begin(self, rows_U: np.ndarray, out_UB: np.ndarray) -> Reads: ...

    def close(self) -> None: ...


class MappedStore(Store):
    """The table at `path` (a file or a folder of shards), read when it is needed.

    threads: at most this many ask the device at once, beside the caller's. reads: a name of `READS`, else the best
    of this system. device: where vectors are lent; only the CPU was tried.
    Raises: CheckpointError, naming the file, when it is no whole table.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        threads: int = 4,
        device: str | torch.device = "cpu",
        poison_released: bool = False,
        reads: str | None = None,
    ) -> None:
        reader = open_table(path)
        try:
            pages = PageReader(reader, threads=threads, reads=reads)
        except BaseException:
            reader.close()
            raise
        self._hold(reader, pages, device, poison_released)

    @classmethod
    def over(
        cls, reader: Rows, pages: Pages, *, device: str | torch.device = "cpu", poison_released: bool = False
    ) -> "MappedStore":
        """A table in files of another make. It owns both arguments: `pages` closes `reader`."""
        store = cls.__new__(cls)
        store._hold(reader, pages, device, poison_released)
        return store

    def _hold(self, reader: Rows, pages: Pages, device: str | torch.device, poison: bool) -> None:
        self.reader, self.codec, self._pages = reader, reader.codec, pages
        self.num_rows, self.row_width = reader.num_rows, self.codec.row_width
        self.dtype, self.device = self.codec.vector_dtype, torch.device(device)
        self._delivery = Delivery(self.codec, self.device, poison=poison)

    def __repr__(self) -> str:
        return f"MappedStore({str(self.reader.path)!r}, {self.num_rows:,} rows x {self.row_width}, {self.codec.name})"

    def prefetch(self, rows: torch.Tensor) -> LentTicket:
        rows_N, rows_U, place_N = distinct_rows(rows, self.num_rows)
        staged = self._delivery.stage(rows_U.size)
        reading = self._begin(rows_U, staged)
        if self.counters is not None:
            self.counters.request(rows_N, rows_U)
        shape = rows.shape
        return LentTicket(
            lambda: self._finish(reading, rows_U, staged, place_N, shape), lambda: self._give_back(reading, staged)
        )

    def _begin(self, rows_U: np.ndarray, staged: Staged) -> Reads:
        try:
            return self._pages.begin(rows_U, staged.array_UB)
        except BaseException:
            self._delivery.give_back(staged)
            raise

    def _finish(
        self, reading: Reads, rows_U: np.ndarray, staged: Staged, place_N: np.ndarray, shape: torch.Size
    ) -> torch.Tensor:
        began = time.perf_counter()
        reading.wait()
        if self.counters is not None:
            self._count(rows_U, reading.missed(), time.perf_counter() - began)
        return self._delivery.vectors(staged, place_N, shape)

    def _give_back(self, reading: Reads, staged: Staged) -> None:
        reading.drain()
        self._delivery.give_back(staged)

    def read_coded(self, rows_U: torch.Tensor) -> torch.Tensor:
        check_distinct(rows_U, self.num_rows)
        bytes_UB = torch.empty(len(rows_U), self.codec.row_bytes, dtype=torch.uint8)
        self._pages.begin(rows_U.cpu().contiguous().numpy(), bytes_UB.numpy()).wait()
        return bytes_UB

    def update(self, rows_U: torch.Tensor, grads_UE: torch.Tensor, rule: Rule, lr: float) -> None:
        raise self._only_reads()

    def tensors(self) -> dict[str, torch.Tensor]:
        raise self._only_reads()

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        raise self._only_reads()

    def close(self) -> None:
        self._pages.close()

    def _only_reads(self) -> StoreError:
        return StoreError(f"{self.reader.path}: a mapped table is only read: load it resident or host to train it")

    def _count(self, rows_U: np.ndarray, missed_M: np.ndarray, seconds: float) -> None:
        if not self._pages.tells_cached:
            self.counters.served("mapped", rows_U, bytes_U=self.codec.row_bytes)
            self.counters.stalled("mapped", seconds)
            return
        missed = np.zeros(rows_U.size, bool)
        missed[missed_M] = True
        pages_M = self._new_pages(rows_U[missed])
        self.counters.served("page cache", rows_U[~missed], bytes_U=self.codec.row_bytes)
        self.counters.served("disk", rows_U[missed], bytes_U=pages_M * PAGE_BYTES, reads_U=pages_M)
        self.counters.stalled("disk", seconds)

    def _new_pages(self, rows_M: np.ndarray) -> np.ndarray:
        """Pages that each of these rows, ascending, is the first to need."""
        begins = rows_M * self.codec.row_bytes
        firsts, lasts = begins // PAGE_BYTES, (begins + self.codec.row_bytes - 1) // PAGE_BYTES
        before = np.concatenate([[-1], lasts[:-1]])
        return lasts - np.maximum(firsts, before + 1) + 1
