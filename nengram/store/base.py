"""The seam between a model and wherever its table lives: rows in, vectors out, gradients back.

A table can be far larger than what is computed with it, so it is not a Parameter and nothing here assumes
that it is in memory. Reading takes two calls because the rows of a batch are known long before their vectors
are needed: `prefetch` may start moving bytes, `Ticket.vectors` waits for them. Writing takes one: the caller
sends one gradient per distinct row, and the store, which owns the optimiser state, applies an update rule
where the rows are. A tier (host memory, a mapped file, a hot set) is one more store, or wraps one, and keeps
these two classes; no caller changes, and whatever the tier, the same stored bytes give the same vectors.

A store knows row numbers only. Which n-gram sent it there is the business of `nengram.address`.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from nengram.errors import StoreError

if TYPE_CHECKING:
    from nengram.store.codecs import Codec
    from nengram.store.counters import Counters
    from nengram.store.rules import Rule


class Ticket(ABC):
    """A claim on the vectors of one set of rows, open until `release()`.

    As a context manager it releases itself:

        with store.prefetch(rows_BTS) as ticket:
            use(ticket.vectors())
    """

    @abstractmethod
    def vectors(self) -> torch.Tensor:
        """The vectors, `[*rows.shape, E]`, lent until `release()`; copy what must outlive the ticket.

        Waits until they are there. In training, release after the backward pass, which still reads them.
        Raises: StoreError after `release()`, and when the rows could not be read.
        """

    @abstractmethod
    def release(self) -> None:
        """Give the buffer back to the store; waits for reads that are still under way.

        A ticket that is dropped instead costs its buffer and nothing else.
        Raises: StoreError when called twice.
        """

    @property
    @abstractmethod
    def released(self) -> bool:
        """Whether `release()` has been called."""

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(self, *_: object) -> None:
        if not self.released:
            self.release()


class Store(ABC):
    """One table of `num_rows` vectors of `row_width` numbers, stored as `codec` says, lent as `dtype` on `device`.

    counters: what is counted about every request; None, as at the start, counts nothing.
    As a context manager a store closes itself.
    """

    num_rows: int
    row_width: int
    dtype: torch.dtype
    device: torch.device
    codec: "Codec"
    counters: "Counters | None" = None

    @abstractmethod
    def prefetch(self, rows: torch.Tensor) -> Ticket:
        """Ask for the vectors of `rows` (int64, any shape, any order, repeats allowed).

        Reads may go on after it returns; several tickets may be open at once.
        Raises: StoreError that names the first row which is not in [0, num_rows); then nothing is read.
        """

    def read_coded(self, rows_U: torch.Tensor) -> torch.Tensor:
        """The stored bytes of some rows, uint8 `[U, row_bytes]` on the CPU, the caller's own; for tiers above.

        rows_U: int64 `[U]`, strictly ascending. Reads and copies at once, and counts nothing.
        Raises: StoreError for rows that repeat or leave the table, or cannot be read, and for a store that no tier
        can stand on.
        """
        raise StoreError(f"{type(self).__name__} gives no stored bytes: a hot set cannot stand on it")

    @abstractmethod
    def update(self, rows_U: torch.Tensor, grads_UE: torch.Tensor, rule: "Rule", lr: float) -> None:
        """Apply `rule` to the rows given and to no other; `coalesce` makes the two arguments.

        rows_U: int64 `[U]`, strictly ascending, hence distinct. grads_UE: `[U, E]`, of any float dtype.
        Raises: StoreError for rows that repeat or leave the table, a rule other than the one whose state is
        held, or a store that only reads.
        """

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything a checkpoint needs: `weight` `[num_rows, E]`, `step`, and `state.<rule>.<name>` once
        updated.

        These are the live tensors, not copies: save them before the next update. A coded table's `weight` is
        its bytes, uint8 `[num_rows, row_bytes]`.
        Raises: StoreError for a store that only reads: its table is on disk already.
        """

    @abstractmethod
    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Become what `tensors()` described. `weight` alone loads a table with no training history.

        Raises: StoreError for a missing, unknown or misshapen entry; the store is then unchanged.
        """

    def close(self) -> None:  # noqa: B027 - most stores hold nothing but memory
        """Give up files and threads. Closing twice is harmless; `prefetch` raises from here on where there were any."""

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_distinct(rows_U: torch.Tensor, num_rows: int) -> None:
    """Raise StoreError unless `rows_U` is int64 `[U]`, strictly ascending and wholly in [0, num_rows)."""
    check_rows(rows_U, num_rows)
    if rows_U.dim() != 1 or not bool((rows_U[1:] > rows_U[:-1]).all()):
        raise StoreError("rows must be distinct and ascending, as coalesce makes them")


def check_rows(rows: torch.Tensor, num_rows: int) -> None:
    """Raise StoreError unless `rows` is int64 and wholly in [0, num_rows); the first row outside is named."""
    if rows.dtype != torch.int64:
        raise StoreError(f"rows must be int64, not {str(rows.dtype).removeprefix('torch.')}")
    if rows.numel() == 0:
        return
    low, high = rows.aminmax()
    if low >= 0 and high < num_rows:
        return
    position = ((rows < 0) | (rows >= num_rows)).nonzero()[0]
    row = rows[tuple(position)].item()
    raise StoreError(f"row {row} at position {position.tolist()} is outside a table of {num_rows:,} rows")
