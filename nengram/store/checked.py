"""Trust, and recompute a sample: every request's vectors against plain reads of the file.

The fast path has threads, advice to the kernel, caches, a sort and compiled decoding in it. The slow one has none of
these: a positioned read of one row, the checksum of the chunk it lies in, and the codec's reference in plain Python.
What differs in one bit stops the run. The sample is drawn anew for each request, so a run of any length checks rows
that nobody chose.
"""

import threading

import numpy as np
import torch

from nengram.errors import CheckpointError, StoreError
from nengram.store.base import Store, Ticket
from nengram.store.codecs_reference import decode_reference
from nengram.store.counters import Counters
from nengram.store.lending import LentTicket
from nengram.store.rules import Rule
from nengram.store.table_file import TableReader


class CheckedStore(Store):
    """`below`, with a sample of each request recomputed from `reader`, the table on disk; it owns and closes both.

    sample: share of a request's lookups that are checked; at least one of each request is.
    checked_rows, requests: how many so far. An update of `below` makes the table on disk another one: it is refused.
    Raises, from `vectors()`: StoreError that names the first row that differs, or whose chunk is damaged.
    """

    def __init__(self, below: Store, reader: TableReader, *, sample: float = 0.01, seed: int = 0) -> None:
        if (below.num_rows, below.codec) != (reader.num_rows, reader.codec):
            raise StoreError(f"{reader!r} cannot check {below!r}: they are not the same table")
        if not 0 < sample <= 1:
            raise StoreError(f"the sample is a share above 0, at most 1, not {sample}")
        self.below, self.reader, self.codec = below, reader, below.codec
        self.num_rows, self.row_width = below.num_rows, below.row_width
        self.dtype, self.device = below.dtype, below.device
        self.checked_rows = self.requests = 0
        self._sample, self._random, self._lock = sample, np.random.default_rng(seed), threading.Lock()

    def __repr__(self) -> str:
        return f"CheckedStore({self.below!r}, {self._sample:.0%} recomputed)"

    @property
    def counters(self) -> Counters | None:
        """Those of the store below: a check is no request."""
        return self.below.counters

    @counters.setter
    def counters(self, counters: Counters | None) -> None:
        self.below.counters = counters

    def prefetch(self, rows: torch.Tensor) -> Ticket:
        ticket = self.below.prefetch(rows)
        rows_N = rows.detach().cpu().reshape(-1).numpy().copy()
        return LentTicket(lambda: self._compare(ticket.vectors(), rows_N), ticket.release)

    def _compare(self, vectors: torch.Tensor, rows_N: np.ndarray) -> torch.Tensor:
        places = self._draw(rows_N.size)
        found = vectors.detach().reshape(-1, self.row_width)[torch.from_numpy(places)].cpu()
        for row, vector_E in zip(rows_N[places], found, strict=True):
            expected_E = self._recomputed(int(row))
            if not torch.equal(_bits(vector_E), _bits(expected_E)):
                wrong = int((_bits(vector_E) != _bits(expected_E)).sum())
                raise StoreError(
                    f"row {row:,}: {wrong} of {self.row_width} numbers are not those of {self.reader.path}: "
                    f"{type(self.below).__name__} read it wrong"
                )
        return vectors

    def _draw(self, count: int) -> np.ndarray:
        with self._lock:
            wanted = min(count, max(1, round(self._sample * count)))
            self.requests += 1
            self.checked_rows += wanted
            return np.sort(self._random.choice(count, wanted, replace=False)) if count else np.empty(0, np.int64)

    def _recomputed(self, row: int) -> torch.Tensor:
        try:
            self.reader.verify_rows(row, 1)
            bytes_1B = self.reader.read_rows(row, 1)
        except CheckpointError as error:
            raise StoreError(f"row {row:,} cannot be checked: {error}") from None
        return torch.from_numpy(decode_reference(self.codec, bytes_1B)[0]).to(self.dtype)

    def read_coded(self, rows_U: torch.Tensor) -> torch.Tensor:
        return self.below.read_coded(rows_U)

    def update(self, rows_U: torch.Tensor, grads_UE: torch.Tensor, rule: Rule, lr: float) -> None:
        raise StoreError("a table that is checked against its file cannot be trained: its file would be another table")

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.below.tensors()

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.below.load_tensors(tensors)

    def close(self) -> None:
        self.below.close()
        self.reader.close()


def _bits(vector_E: torch.Tensor) -> torch.Tensor:
    return vector_E.contiguous().view(torch.uint8)
