"""Buffers that are lent with a ticket and come back with its release.

A fresh output costs more in page faults than the random reads that fill it (2-3 times at 256-byte rows and above), so
buffers are used again and again, and with them the views that a request of the same size needs: for a decode step's few
hundred rows, making views anew costs as much as the gather. A buffer that is lent is not in the ring, hence cannot be
lent twice; who still reads one after its release finds NaN there when `poison` is on.
"""

import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch

from nengram.errors import StoreError
from nengram.store.base import Ticket

BUFFERS_KEPT = 4  # one per memory layer in flight is usual; more may be lent, these many are kept for reuse
NAN_BYTE = 0xFF  # float32, bfloat16 and float16 of nothing but ones are NaN
increment_version = torch.autograd.graph.increment_version


class Loan:
    """A buffer on loan. `array_NB`, on the CPU, is what was lent of it, as bytes of rows; `address` is where it begins.

    Views are kept from loan to loan, and made of numpy where that will do: in a step whose forward pass has pushed
    everything else out of the caches, each call into torch costs tens of microseconds.
    """

    __slots__ = ("address", "array_NB", "buffer", "capacity", "count", "shape", "shaped", "whole_NB")

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer, self.capacity, self.count = buffer, len(buffer), -1
        self.address = buffer.data_ptr()
        self.whole_NB = buffer.view(torch.uint8).numpy() if buffer.is_cpu else None
        self.array_NB: np.ndarray | None = None
        self.shape = self.shaped = None

    def cut(self, count: int) -> None:
        """Lend the first `count` rows."""
        self.count, self.shape = count, None
        if self.whole_NB is not None:
            self.array_NB = self.whole_NB[:count]

    def rows(self) -> torch.Tensor:
        """What was lent, `[count, width]`."""
        return self.vectors((self.count,))

    def vectors(self, shape: Sequence[int]) -> torch.Tensor:
        """What was lent, as `[*shape, width]`: a tensor of the borrower's own."""
        if shape == self.shape:
            return self.shaped.detach()
        self.shape, self.shaped = shape, self.buffer[: self.count]
        if len(shape) != 1:
            self.shaped = self.shaped.view(*shape, self.buffer.shape[1])
        return self.shaped.detach()


class BufferRing:
    """Buffers of rows of `width` numbers of `dtype`, lent out and taken back, by any thread.

    pinned: page-locked host memory, from which a GPU copies without waiting for the CPU. Only the CPU was tried.
    """

    def __init__(
        self,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        poison: bool = False,
        pinned: bool = False,
    ) -> None:
        self._width, self._dtype, self._device = width, dtype, torch.device(device)
        self._poison, self._pinned = poison, pinned
        self._free: list[Loan] = []
        self._lock = threading.Lock()

    def lend(self, count: int) -> Loan:
        """Room for `count` rows, contents undefined."""
        loan = self._take(count)
        if loan is None:
            with torch.inference_mode(False):  # a buffer born under inference mode could never serve training
                buffer = torch.empty(
                    count, self._width, dtype=self._dtype, device=self._device, pin_memory=self._pinned
                )
            loan = Loan(buffer)
        else:
            increment_version(loan.buffer)  # compiled code writes unseen, and a late backward must notice
        if loan.count != count:
            loan.cut(count)
        return loan

    def take_back(self, loan: Loan) -> None:
        """The end of a loan. The caller has made sure that nothing writes to the buffer any more."""
        if self._poison:
            loan.buffer.view(torch.uint8).fill_(NAN_BYTE)
        with self._lock:
            if len(self._free) < BUFFERS_KEPT:
                self._free.append(loan)

    def _take(self, count: int) -> Loan | None:
        with self._lock:
            free = self._free
            for place in range(len(free) - 1, -1, -1):  # the last that came back is the likeliest to be in cache
                if free[place].capacity >= count:
                    return free.pop(place)
            if free:
                free.pop(0)  # too small, hence replaced by a larger one
            return None


class LentTicket(Ticket):
    """Vectors in lent buffers, there when `finish` has been waited for.

    finish: called once, by the first `vectors()`; its error is raised again by every later call.
    give_back: called once, by `release()`; it waits for whoever still writes.
    """

    def __init__(self, finish: Callable[[], torch.Tensor], give_back: Callable[[], None]) -> None:
        self._finish, self._give_back = finish, give_back
        self._vectors: torch.Tensor | None = None

    @property
    def released(self) -> bool:
        return self._give_back is None

    def vectors(self) -> torch.Tensor:
        if self._give_back is None:
            raise after_release()
        if self._vectors is None:
            self._vectors = self._finish()
        return self._vectors

    def release(self) -> None:
        if self._give_back is None:
            raise after_release()
        give_back, self._give_back = self._give_back, None
        self._vectors = self._finish = None
        give_back()


class ReadyTicket(Ticket):
    """Vectors that lie in one lent buffer already."""

    __slots__ = ("_loan", "_ring", "_vectors")

    def __init__(self, ring: BufferRing, loan: Loan, vectors: torch.Tensor) -> None:
        self._ring, self._loan, self._vectors = ring, loan, vectors

    @property
    def released(self) -> bool:
        return self._vectors is None

    def vectors(self) -> torch.Tensor:
        if self._vectors is None:
            raise after_release()
        return self._vectors

    def release(self) -> None:
        if self._vectors is None:
            raise after_release()
        self._vectors = None
        self._ring.take_back(self._loan)


def after_release() -> StoreError:
    """The error of a ticket that is used after its release."""
    return StoreError("this ticket was released and its buffer may hold other rows; prefetch again")
