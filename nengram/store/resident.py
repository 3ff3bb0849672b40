"""A whole table in one tensor, on the device that uses it: the store every other tier is measured against.

Two habits decide its speed. The gather writes into a buffer that is used again and again, because a fresh
output costs more in page faults than the random reads themselves (2-3 times at 256-byte rows and above), and
on the CPU it is one compiled call with software prefetch that checks the row numbers on its way; elsewhere it
is `index_select`, which is 3-5 times faster than `table[rows]`. The update touches only the rows it was
given; optimiser state is allocated at the first one, so a table that is only read costs its weights and
nothing else.
"""

from collections.abc import Callable
from functools import partial

import torch

from nengram.errors import StoreError
from nengram.store.base import Store, check_distinct, check_rows
from nengram.store.codecs import Codec, make_codec
from nengram.store.delivery import distinct_rows, flat_rows, gatherer
from nengram.store.lending import BufferRing, Loan, ReadyTicket
from nengram.store.rules import Rule

CODEC_OF = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
Zeros = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


class ResidentStore(Store):
    """A table in one tensor `[num_rows, row_width]` on one device.

    init_std: standard deviation of the initial rows, 0 for zeros. Rows drawn at N(0, 1), torch's own default
        for embeddings, turned a gain into a loss at small scale; 0.02 is what to use. Drawn on the CPU in
        float32 from `seed`, so every device and dtype starts from the same numbers.
    dtype: float32, bfloat16 or float16. Updates are computed in float32 and rounded to nearest.
    poison_released: fill every released buffer with NaN, to find who still reads one.
    zeros: where table and state get their memory, for whoever has better than `torch.zeros`.
    """

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
        zeros: Zeros | None = None,
    ) -> None:
        if num_rows < 1 or row_width < 1:
            raise StoreError(f"a table needs at least one row and one column, not {num_rows} x {row_width}")
        if dtype not in CODEC_OF:
            raise StoreError(f"a resident table is float32, bfloat16 or float16, not {dtype}")
        self._zeros = zeros or partial(_torch_zeros, torch.device(device))
        weight = self._initial_rows(num_rows, row_width, dtype, init_std, seed)
        self._hold(weight, make_codec(CODEC_OF[dtype], row_width), poison_released)

    @classmethod
    def from_bytes(
        cls,
        bytes_RB: torch.Tensor,
        codec: Codec,
        *,
        device: str | torch.device = "cpu",
        poison_released: bool = False,
        zeros: Zeros | None = None,
    ) -> "ResidentStore":
        """A table of coded rows, uint8 `[num_rows, row_bytes]`; on their own device the memory is taken over as it is.

        Rows of a plain codec are trained like any others; coded ones are only read.
        Raises: StoreError for bytes that are not rows of `codec`.
        """
        if bytes_RB.dtype != torch.uint8 or bytes_RB.dim() != 2 or not len(bytes_RB):
            raise StoreError(f"a table of coded rows is uint8 [rows, row_bytes], not {tuple(bytes_RB.shape)}")
        if bytes_RB.shape[1] != codec.row_bytes:
            raise StoreError(f"rows of {codec.row_bytes} bytes are needed for {codec}, not {bytes_RB.shape[1]}")
        store = cls.__new__(cls)
        store._zeros = zeros or partial(_torch_zeros, torch.device(device))
        bytes_RB = bytes_RB.to(device).contiguous()
        weight = bytes_RB.view(codec.vector_dtype) if codec.plain else bytes_RB
        store._hold(weight, codec, poison_released)
        return store

    def _hold(self, weight: torch.Tensor, codec: Codec, poison: bool) -> None:
        self.weight, self.codec = weight, codec
        self.num_rows, self.row_width = len(weight), codec.row_width
        self.dtype, self.device = codec.vector_dtype, weight.device
        self.step = 0
        self.state: dict[str, torch.Tensor] = {}
        self._rule_name: str | None = None
        self._ring = BufferRing(self.row_width, self.dtype, self.device, poison=poison)
        self._coded_ring = BufferRing(codec.row_bytes, torch.uint8, poison=poison)
        self.coded_RB = weight.view(torch.uint8).numpy() if self.device.type == "cpu" else None
        self._address, self._gather_at = weight.data_ptr(), None

    def __repr__(self) -> str:
        name = str(self.dtype).removeprefix("torch.") if self.codec.plain else self.codec.name
        return f"ResidentStore({self.num_rows:,} rows x {self.row_width}, {name} on {self.device})"

    def prefetch(self, rows: torch.Tensor) -> ReadyTicket:
        loan = self._ring.lend(rows.numel())
        try:
            self._gather(rows, loan)
        except BaseException:
            self._ring.take_back(loan)
            raise
        if self.counters is not None:
            rows_N, rows_U, _ = distinct_rows(rows, self.num_rows)
            self.counters.request(rows_N, rows_U)
            self.counters.served("resident", rows_U, bytes_U=self.codec.row_bytes)
        return ReadyTicket(self._ring, loan, loan.vectors(rows.shape))

    def _gather(self, rows: torch.Tensor, loan: Loan) -> None:
        """Fill the loan. Raises: StoreError for rows outside the table."""
        if self.coded_RB is None:
            self._gather_torch(rows, loan)
            return
        coded = loan if self.codec.plain else self._coded_ring.lend(rows.numel())
        outside = self._copy_rows(rows, coded)
        if coded is not loan:
            if outside < 0:
                self.codec.decode(coded.rows(), loan.rows())
            self._coded_ring.take_back(coded)
        if outside >= 0:
            check_rows(rows, self.num_rows)

    def _copy_rows(self, rows: torch.Tensor, coded: Loan) -> int:
        """Bytes of rows into the loan; -1, or the position of the first row outside the table."""
        if not (rows.is_cpu and rows.dtype == torch.int64 and rows.is_contiguous()):
            return gatherer()(self.coded_RB, flat_rows(rows, self.num_rows), coded.array_NB)
        if self._gather_at is None:
            from nengram.store.gather import gather_at  # compiles at first use

            self._gather_at = gather_at(self.codec.row_bytes)
        return self._gather_at(self._address, self.num_rows, rows.data_ptr(), rows.numel(), coded.address)

    @torch.no_grad()
    def _gather_torch(self, rows: torch.Tensor, loan: Loan) -> None:
        check_rows(rows, self.num_rows)
        rows_N = rows.reshape(-1).to(self.device)
        if self.codec.plain:
            torch.index_select(self.weight, 0, rows_N, out=loan.rows())
        else:
            self.codec.decode(self.weight.index_select(0, rows_N), loan.rows())

    def read_coded(self, rows_U: torch.Tensor) -> torch.Tensor:
        check_distinct(rows_U, self.num_rows)
        return self.weight.index_select(0, rows_U.to(self.device)).view(torch.uint8).cpu()

    @torch.no_grad()
    def update(self, rows_U: torch.Tensor, grads_UE: torch.Tensor, rule: Rule, lr: float) -> None:
        self._check_update(rows_U, grads_UE, rule)
        self._ensure_state(rule)
        self.step += 1
        rows_U = rows_U.to(self.device).contiguous()
        grads_UE = grads_UE.to(self.device, torch.float32).contiguous()
        if not self._update_compiled(rows_U, grads_UE, rule, lr):
            self._update_torch(rows_U, grads_UE, rule, lr)

    def _update_compiled(self, rows_U: torch.Tensor, grads_UE: torch.Tensor, rule: Rule, lr: float) -> bool:
        if self.device.type != "cpu" or self.dtype != torch.float32:
            return False
        from nengram.store import kernels  # compiles at first use

        state = {name: whole.numpy() for name, whole in self.state.items()}
        arrays = self.weight.numpy(), state, rows_U.numpy(), grads_UE.numpy()
        return kernels.update_in_place(*arrays, rule, lr=lr, step=self.step)

    def _update_torch(self, rows_U: torch.Tensor, grads_UE: torch.Tensor, rule: Rule, lr: float) -> None:
        weight_UE = self.weight.index_select(0, rows_U).float()
        state = {name: whole.index_select(0, rows_U) for name, whole in self.state.items()}
        weight_UE, state = rule.apply(weight_UE, grads_UE, state, lr=lr, step=self.step)
        self.weight.index_copy_(0, rows_U, weight_UE.to(self.dtype))
        for name, rows in state.items():
            self.state[name].index_copy_(0, rows_U, rows)

    def tensors(self) -> dict[str, torch.Tensor]:
        state = {f"state.{self._rule_name}.{name}": whole for name, whole in self.state.items()}
        return {"weight": self.weight, "step": torch.tensor(self.step), **state}

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        tensors = dict(tensors)
        weight = tensors.pop("weight", None)
        step = tensors.pop("step", torch.tensor(0))
        rule_name, state = _split_state(tensors, self.num_rows)
        if weight is None or weight.shape != self.weight.shape:
            found = "missing" if weight is None else f"{tuple(weight.shape)}"
            raise StoreError(f"weight is {found}, this table is {tuple(self.weight.shape)}")
        if weight.dtype != self.weight.dtype:
            raise StoreError(f"weight is {weight.dtype}, this table is {self.weight.dtype}")
        if step.numel() != 1:
            raise StoreError(f"step is one number, not {tuple(step.shape)}")
        self.weight.copy_(weight)
        self.step = int(step)
        self._rule_name = rule_name
        self.state = {
            name: self._zeros(tuple(whole.shape), torch.float32).copy_(whole) for name, whole in state.items()
        }

    def _initial_rows(self, num_rows: int, row_width: int, dtype: torch.dtype, std: float, seed: int) -> torch.Tensor:
        weight = self._zeros((num_rows, row_width), dtype)
        if std == 0:
            return weight
        generator = torch.Generator().manual_seed(seed)
        if weight.device.type == "cpu" and dtype == torch.float32:
            return weight.normal_(std=std, generator=generator)
        return weight.copy_(torch.empty(num_rows, row_width).normal_(std=std, generator=generator))

    def _check_update(self, rows_U: torch.Tensor, grads_UE: torch.Tensor, rule: Rule) -> None:
        if not self.codec.plain:
            raise StoreError(f"rows coded as {self.codec.name} are only read: train a table of fp32, bf16 or fp16")
        check_rows(rows_U, self.num_rows)
        if rows_U.dim() != 1 or grads_UE.shape != (len(rows_U), self.row_width):
            raise StoreError(
                f"gradients {tuple(grads_UE.shape)} for rows {tuple(rows_U.shape)}, width {self.row_width}: "
                "one gradient per distinct row is needed, as coalesce makes them"
            )
        if not bool((rows_U[1:] > rows_U[:-1]).all()):
            raise StoreError("rows of an update must be distinct and ascending, as coalesce makes them")
        if self._rule_name not in (None, rule.name):
            raise StoreError(
                f"this table's optimiser state is {self._rule_name}, not {rule.name}: "
                "go on with that rule, or load its weight alone to begin anew"
            )

    def _ensure_state(self, rule: Rule) -> None:
        shapes = rule.state_shapes(self.num_rows, self.row_width)
        if self._rule_name is None:
            self.state = {name: self._zeros(shape, torch.float32) for name, shape in shapes.items()}
            self._rule_name = rule.name
        found = {name: tuple(whole.shape) for name, whole in self.state.items()}
        if found != shapes:
            raise StoreError(f"the state that was loaded does not fit {rule.name}: {found}, not {shapes}")


def _torch_zeros(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def _split_state(tensors: dict[str, torch.Tensor], num_rows: int) -> tuple[str | None, dict[str, torch.Tensor]]:
    """The rule's name and its state out of `state.<rule>.<name>` entries."""
    rule_names, state = set(), {}
    for key, whole in tensors.items():
        kind, _, rest = key.partition(".")
        rule_name, _, name = rest.partition(".")
        if kind != "state" or not name:
            raise StoreError(f'a table has no entry "{key}"; it has weight, step and state.<rule>.<name>')
        if whole.dim() == 0 or len(whole) != num_rows:
            raise StoreError(f"{key} has shape {tuple(whole.shape)}, this table has {num_rows:,} rows")
        rule_names.add(rule_name)
        state[name] = whole
    if len(rule_names) > 1:
        raise StoreError(f"state of more than one rule: {', '.join(sorted(rule_names))}")
    return next(iter(rule_names), None), state
