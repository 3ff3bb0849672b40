"""Coded rows in host memory become vectors where they are used: the last step of every tier that is not resident.

A tier stages the DISTINCT rows of a request, ascending, as bytes. They are decoded once each and then spread over the
lookups that asked for them, so a row that a prefill chunk repeats is read, copied and decoded once.

On a GPU the bytes cross the bus coded and distinct, from page-locked memory on a stream of their own; the stream that
computes waits for the copy's event, not the CPU. That path follows the documentation of torch.cuda (streams, events,
`record_stream`); only the CPU was tried.
"""

from functools import cache
from typing import Any

import numpy as np
import torch

from nengram.store.base import check_rows
from nengram.store.codecs import Codec
from nengram.store.lending import BufferRing, Loan


@cache
def gatherer() -> Any:
    """`gather_rows`, compiled at first use."""
    from nengram.store.gather import gather_rows

    return gather_rows


@cache
def compiled() -> Any:
    """The module of kernels, compiled at first use."""
    from nengram.store import row_kernels

    return row_kernels


def flat_rows(rows: torch.Tensor, num_rows: int) -> np.ndarray:
    """Row numbers of a request as int64 `[N]` on the host; not yet checked but for their dtype."""
    if rows.dtype != torch.int64:
        check_rows(rows, num_rows)
    rows_N = (rows if rows.is_cpu else rows.cpu()).numpy()
    return rows_N if rows_N.ndim == 1 and rows_N.flags.c_contiguous else np.ascontiguousarray(rows_N).reshape(-1)


def distinct_rows(rows: torch.Tensor, num_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`rows_N` as asked, `rows_U` of them distinct and ascending, `place_N` with rows_U[place_N] = rows_N.

    `place_N` is empty when the request is distinct and ascending already. Raises: StoreError for rows outside the table.
    """
    rows_N = flat_rows(rows, num_rows)
    outside, rows_U, place_N = compiled().distinct_rows(rows_N, num_rows)
    if outside >= 0:
        check_rows(rows, num_rows)
    return rows_N, rows_U, place_N


class Staged:
    """Distinct rows on their way: `array_UB` is what the tier fills. Holds whatever the request has been lent."""

    __slots__ = ("array_UB", "coded", "copied", "lent")

    def __init__(self, coded: Loan) -> None:
        self.coded: Loan | None = coded
        self.array_UB = coded.array_NB
        self.lent: Loan | None = None
        self.copied: tuple[torch.Tensor, Any] | None = None  # rows on the device, and the event that says so


class Delivery:
    """Stages, decodes, spreads and lends, for one codec and device."""

    def __init__(self, codec: Codec, device: torch.device | str = "cpu", *, poison: bool = False) -> None:
        self.codec, self.device = codec, torch.device(device)
        is_cpu = self.device.type == "cpu"
        staged = (codec.row_width, codec.vector_dtype) if codec.plain else (codec.row_bytes, torch.uint8)
        self._staging = BufferRing(*staged, poison=poison, pinned=not is_cpu)
        self._lent = BufferRing(codec.row_width, codec.vector_dtype, poison=poison)
        self._stream = None if is_cpu else torch.cuda.Stream(self.device)

    def stage(self, count: int) -> Staged:
        """Room for the bytes of `count` rows."""
        return Staged(self._staging.lend(count))

    def send(self, staged: Staged) -> None:
        """The bytes are there: start whatever copy the device needs. `vectors` does so too if this was not called."""
        if self._stream is None or staged.copied is not None:
            return
        with torch.cuda.stream(self._stream):
            on_device = staged.coded.rows().to(self.device, non_blocking=True)
            staged.copied = on_device, self._stream.record_event()

    def vectors(self, staged: Staged, place_N: np.ndarray, shape: torch.Size) -> torch.Tensor:
        """`[*shape, E]`: distinct row `place_N[i]` for lookup i; each distinct row once where `place_N` is empty."""
        if self._stream is not None:
            return self._on_device(staged, place_N).view(*shape, self.codec.row_width)
        if place_N.size == 0 and self.codec.plain:
            return staged.coded.vectors(shape)  # the staged rows themselves are lent
        staged.lent = self.decoded(staged) if place_N.size == 0 else self._spread(staged, place_N)
        self._staging.take_back(staged.coded)
        staged.coded = None
        return staged.lent.vectors(shape)

    def give_back(self, staged: Staged) -> None:
        """End of the loan; nobody writes to the staged bytes any more."""
        if staged.copied is not None:
            staged.copied[1].synchronize()  # the copy reads page-locked memory that is about to be used again
        if staged.coded is not None:
            self._staging.take_back(staged.coded)
        if staged.lent is not None:
            self._lent.take_back(staged.lent)
        staged.coded = staged.lent = staged.copied = None

    def decoded(self, staged: Staged) -> Loan:
        """Coded rows as vectors, in a buffer that goes back with `lending().take_back`."""
        decoded = self._lent.lend(len(staged.array_UB))
        self.codec.decode(staged.coded.rows(), decoded.rows())
        return decoded

    def lending(self) -> BufferRing:
        """The ring of vectors."""
        return self._lent

    def _spread(self, staged: Staged, place_N: np.ndarray) -> Loan:
        lent = self._lent.lend(place_N.size)
        if self.codec.plain:
            gatherer()(staged.array_UB, place_N, lent.array_NB)
            return lent
        decoded = self.decoded(staged)
        gatherer()(decoded.array_NB, place_N, lent.array_NB)
        self._lent.take_back(decoded)
        return lent

    def _on_device(self, staged: Staged, place_N: np.ndarray) -> torch.Tensor:
        self.send(staged)
        on_device, copied = staged.copied
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        on_device.record_stream(current)  # it was allocated on the side stream
        vectors_UE = on_device if self.codec.plain else self.codec.decode(on_device)
        if place_N.size == 0:
            return vectors_UE
        return vectors_UE.index_select(0, torch.from_numpy(place_N).to(self.device))
