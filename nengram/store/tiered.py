"""The rows that are asked for most often in memory, every other row where it was: a hot set above any store.

Hot rows are kept as the store below codes them and decoded by the same codec, so they are the same bits. A request is
made distinct first; the store below sees only the rows that are not hot, ascending, and its reads are under way while
the hot ones are gathered. What is hot is chosen once (`HotSet`), and nothing is evicted: a static set by frequency hits
more often than an LRU of its size, and a lookup writes nothing.
"""

import numpy as np
import torch

from nengram.store.base import Store, Ticket, check_rows
from nengram.store.counters import Counters
from nengram.store.delivery import Delivery, Staged, compiled, flat_rows, gatherer
from nengram.store.host_memory import host_zeros
from nengram.store.hot_set import HotSet, RowIndex
from nengram.store.lending import LentTicket, Loan
from nengram.store.rules import Rule

PIECE_BYTES = 16 << 20  # of hot rows read at once at the start
FEW_ROWS = 1024  # a gather of more is worth its software prefetch


class TieredStore(Store):
    """`hot_rows` (int64, or a `HotSet`) in memory, above `below`, which it owns and closes.

    Hot rows are read once, here, ascending and in pieces. An update goes to the store below, and hot rows follow; do
    not update that store behind this one's back.
    Raises: StoreError for hot rows outside the table.
    """

    def __init__(self, below: Store, hot_rows: np.ndarray | HotSet, *, poison_released: bool = False) -> None:
        hot = hot_rows if isinstance(hot_rows, HotSet) else HotSet(hot_rows)
        self.below, self.codec = below, below.codec
        self.num_rows, self.row_width = below.num_rows, below.row_width
        self.dtype, self.device = below.dtype, below.device
        self._rows_H, self._index = hot.rows_H, RowIndex(hot.rows_H, below.num_rows)
        self._hot_HB = host_zeros((len(hot), self.codec.row_bytes), torch.uint8)
        self._hot_array_HB, self._hot_address = self._hot_HB.numpy(), self._hot_HB.data_ptr()
        self._read_hot(np.arange(len(hot)))
        self._delivery = Delivery(self.codec, poison=poison_released)

    def __repr__(self) -> str:
        return f"TieredStore({len(self._rows_H):,} hot rows above {self.below!r})"

    @property
    def counters(self) -> Counters | None:
        """Shared with the store below, which counts only what it serves."""
        return self._counters

    @counters.setter
    def counters(self, counters: Counters | None) -> None:
        self._counters = counters
        self.below.counters = None if counters is None else counters.inner()

    _counters: Counters | None = None

    def prefetch(self, rows: torch.Tensor) -> LentTicket:
        rows_N = flat_rows(rows, self.num_rows)
        where_N, ranks_H, rows_M = np.empty((3, rows_N.size), np.int64)
        index = self._index
        outside, hits, misses = compiled().split_hot(
            index.words_W, index.before_W, rows_N, self.num_rows, where_N, ranks_H, rows_M
        )
        if outside >= 0:
            check_rows(rows, self.num_rows)
        ranks_H, rows_M = ranks_H[:hits], rows_M[:misses]
        colder = self.below.prefetch(torch.from_numpy(rows_M)) if misses else None
        if self.counters is not None:
            rows_H = self._rows_H[ranks_H]
            self.counters.request(rows_N, np.concatenate([rows_H, rows_M]))
            self.counters.served("hot", rows_H, bytes_U=self.codec.row_bytes)
        return self._ticket(colder, ranks_H, where_N, rows.shape)

    def _ticket(self, colder: Ticket | None, ranks_H: np.ndarray, where_N: np.ndarray, shape: torch.Size) -> LentTicket:
        """Vectors out of hot rows, which are staged now, and those of the ticket below, once they are there."""
        staged = None
        if not self._is_gathered_late(ranks_H):
            staged = self._delivery.stage(ranks_H.size)
            gatherer()(self._hot_array_HB, ranks_H, staged.array_UB)
        lent: list[Loan] = []

        def finish() -> torch.Tensor:
            below_ME = None if colder is None else colder.vectors().contiguous()
            if self.device.type != "cpu":
                return self._joined_on_device(staged, below_ME, where_N).view(*shape, self.row_width)
            lent.append(self._joined(staged, ranks_H, below_ME, where_N))
            return lent[0].vectors(shape)

        def give_back() -> None:
            if colder is not None:
                colder.release()
            if staged is not None:
                self._delivery.give_back(staged)
            for loan in lent:
                self._delivery.lending().take_back(loan)

        return LentTicket(finish, give_back)

    def _is_gathered_late(self, ranks_H: np.ndarray) -> bool:
        """Whether hot rows go straight from their table to the vectors: few of them, and nothing to decode."""
        return self.codec.plain and self.device.type == "cpu" and ranks_H.size <= FEW_ROWS

    def _joined(
        self, staged: Staged | None, ranks_H: np.ndarray, below_ME: torch.Tensor | None, where_N: np.ndarray
    ) -> Loan:
        others = 0 if below_ME is None else below_ME.data_ptr()
        ring = self._delivery.lending()
        lent = ring.lend(where_N.size)
        if staged is None:
            compiled().join_rows(self._hot_address, ranks_H, others, where_N, lent.array_NB)
            return lent
        in_order_H = np.arange(ranks_H.size)
        if self.codec.plain:
            compiled().join_rows(staged.array_UB.ctypes.data, in_order_H, others, where_N, lent.array_NB)
            return lent
        decoded = self._delivery.decoded(staged)
        compiled().join_rows(decoded.array_NB.ctypes.data, in_order_H, others, where_N, lent.array_NB)
        ring.take_back(decoded)
        return lent

    def _joined_on_device(self, staged: Staged, below_ME: torch.Tensor | None, where_N: np.ndarray) -> torch.Tensor:
        """As `_joined`, in torch operations. Only the CPU was tried."""
        hot_HE = self.codec.decode(torch.from_numpy(staged.array_UB).to(self.device))
        whole_UE = hot_HE if below_ME is None else torch.cat([hot_HE, below_ME])
        position_N = np.where(where_N >= 0, where_N, len(hot_HE) - 1 - where_N)
        return whole_UE.index_select(0, torch.from_numpy(position_N).to(self.device))

    def read_coded(self, rows_U: torch.Tensor) -> torch.Tensor:
        return self.below.read_coded(rows_U)

    def update(self, rows_U: torch.Tensor, grads_UE: torch.Tensor, rule: Rule, lr: float) -> None:
        self.below.update(rows_U, grads_UE, rule, lr)
        ranks_U = self._index.ranks(rows_U.cpu().contiguous().numpy())
        self._read_hot(ranks_U[ranks_U >= 0])

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.below.tensors()

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.below.load_tensors(tensors)
        self._read_hot(np.arange(len(self._rows_H)))

    def close(self) -> None:
        self.below.close()

    def _read_hot(self, ranks: np.ndarray) -> None:
        """Take the hot rows of these ranks, ascending, from the store below."""
        step = max(1, PIECE_BYTES // self.codec.row_bytes)
        for begin in range(0, len(ranks), step):
            piece = ranks[begin : begin + step]
            rows_U = torch.from_numpy(self._rows_H[piece])
            self._hot_HB[torch.from_numpy(piece)] = self.below.read_coded(rows_U)
