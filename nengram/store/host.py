"""A table in host memory for a device that computes: on huge pages, or page-locked and copied asynchronously.

Host memory is an order of magnitude larger than a GPU's, and rows are known before they are needed, so the copy hides
behind the blocks before the memory layer. Rows are gathered on the host, distinct and still coded, into page-locked
staging; they cross the bus on a stream of their own and are decoded on the device (`delivery.py`).

Where the device is the CPU itself there is nothing to copy: the store is a resident one on huge pages. Either way it
trains as a resident table does, bit for bit, for it is one.

The GPU path is written against the documentation of torch.cuda; only the CPU was tried.
"""

from functools import partial

import torch

from nengram.errors import StoreError
from nengram.store.base import Store, Ticket
from nengram.store.codecs import Codec
from nengram.store.delivery import Delivery, distinct_rows, gatherer
from nengram.store.host_memory import host_zeros
from nengram.store.lending import LentTicket
from nengram.store.resident import ResidentStore
from nengram.store.rules import Rule


class HostStore(Store):
    """A table `[num_rows, row_width]` in host memory, lent on `device`; the other arguments are `ResidentStore`'s."""

    def __init__(
        self,
        num_rows: int,
        row_width: int,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        init_std: float = 0.02,
        seed: int = 0,
        poison_released: bool = False,
    ) -> None:
        table = ResidentStore(
            num_rows,
            row_width,
            dtype=dtype,
            init_std=init_std,
            seed=seed,
            poison_released=poison_released,
            zeros=partial(host_zeros, pinned=_is_pinned(device)),
        )
        self._hold(table, device, poison_released)

    @classmethod
    def from_bytes(
        cls,
        bytes_RB: torch.Tensor,
        codec: Codec,
        *,
        device: str | torch.device = "cpu",
        poison_released: bool = False,
    ) -> "HostStore":
        """A table of coded rows, uint8 `[num_rows, row_bytes]`, taken over as they lie.

        `host_zeros` makes memory that is worth filling for it: on huge pages, page-locked for a GPU.
        Raises: StoreError for bytes that are not rows of `codec`.
        """
        zeros = partial(host_zeros, pinned=_is_pinned(device))
        store = cls.__new__(cls)
        table = ResidentStore.from_bytes(bytes_RB, codec, poison_released=poison_released, zeros=zeros)
        store._hold(table, device, poison_released)
        return store

    def _hold(self, table: ResidentStore, device: str | torch.device, poison: bool) -> None:
        self._table = table
        self.num_rows, self.row_width = table.num_rows, table.row_width
        self.dtype, self.codec, self.device = table.dtype, table.codec, torch.device(device)
        self._delivery = None if self.device.type == "cpu" else Delivery(self.codec, self.device, poison=poison)

    def __repr__(self) -> str:
        return f"HostStore({self.num_rows:,} rows x {self.row_width}, {self.codec.name}, lent on {self.device})"

    def prefetch(self, rows: torch.Tensor) -> Ticket:
        if self._delivery is None and self.counters is None:
            return self._table.prefetch(rows)
        rows_N, rows_U, place_N = distinct_rows(rows, self.num_rows)
        if self.counters is not None:
            self.counters.request(rows_N, rows_U)
            self.counters.served("host", rows_U, bytes_U=self.codec.row_bytes)
        if self._delivery is None:
            return self._table.prefetch(rows)
        delivery, staged = self._delivery, self._delivery.stage(rows_U.size)
        gatherer()(self._table.coded_RB, rows_U, staged.array_UB)
        delivery.send(staged)
        return LentTicket(
            lambda: delivery.vectors(staged, place_N, rows.shape),
            lambda: delivery.give_back(staged),
        )

    def read_coded(self, rows_U: torch.Tensor) -> torch.Tensor:
        return self._table.read_coded(rows_U)

    def update(self, rows_U: torch.Tensor, grads_UE: torch.Tensor, rule: Rule, lr: float) -> None:
        self._table.update(rows_U.cpu(), grads_UE.cpu(), rule, lr)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._table.tensors()

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self._table.load_tensors(tensors)


def _is_pinned(device: str | torch.device) -> bool:
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise StoreError(f"a host table is lent on cpu or cuda, not on {kind}")
    return kind == "cuda"
