"""A whole table in one tensor, on the device that uses it: the store every other tier is measured against.

Two habits decide its speed. The gather writes into a buffer that is used again and again, because a fresh
output costs more in page faults than the random reads themselves (2-3 times at 256-byte rows and above), and
it is `index_select`, which is 3-5 times faster than `table[rows]`. The update touches only the rows it was
given; optimiser state is allocated at the first one, so a table that is only read costs its weights and
nothing else.
"""

import math

import torch

from nengram.errors import StoreError
from nengram.store.base import Store, Ticket, check_rows
from nengram.store.rules import Rule

BUFFERS_KEPT = 4  # one per memory layer in flight is usual; more may be lent, these many are kept for reuse


class BufferRing:
    """Flat buffers lent out and taken back. One that is lent is not in the ring: it cannot be lent twice."""

    def __init__(self, dtype: torch.dtype, device: torch.device, poison: bool) -> None:
        self._dtype, self._device, self._poison = dtype, device, poison
        self._free: list[torch.Tensor] = []

    def lend(self, numel: int) -> torch.Tensor:
        """A flat buffer of at least `numel` numbers, contents undefined."""
        for place, buffer in enumerate(self._free):
            if buffer.numel() >= numel:
                return self._free.pop(place)
        if self._free:
            self._free.pop(0)  # too small, hence replaced by the larger one
        with torch.inference_mode(False):  # a buffer born under inference mode could never serve training
            return torch.empty(numel, dtype=self._dtype, device=self._device)

    def take_back(self, buffer: torch.Tensor) -> None:
        if self._poison:
            buffer.fill_(math.nan)
        if len(self._free) < BUFFERS_KEPT:
            self._free.append(buffer)


class ResidentTicket(Ticket):
    """Vectors already gathered into a lent buffer."""

    def __init__(self, ring: BufferRing, buffer: torch.Tensor, vectors: torch.Tensor) -> None:
        self._ring, self._buffer, self._vectors = ring, buffer, vectors

    @property
    def released(self) -> bool:
        return self._buffer is None

    def vectors(self) -> torch.Tensor:
        self._require_open()
        return self._vectors

    def release(self) -> None:
        self._require_open()
        self._ring.take_back(self._buffer)
        self._buffer = self._vectors = None

    def _require_open(self) -> None:
        if self.released:
            raise StoreError("this ticket was released and its buffer may hold other rows; prefetch again")


class ResidentStore(Store):
    """A table in one tensor `[num_rows, row_width]` on one device.

    init_std: standard deviation of the initial rows, 0 for zeros. Rows drawn at N(0, 1), torch's own default
        for embeddings, turned a gain into a loss at small scale; 0.02 is what to use. Drawn on the CPU in
        float32 from `seed`, so every device and dtype starts from the same numbers.
    dtype: float32, bfloat16 or float16. Updates are computed in float32 and rounded to nearest.
    poison_released: fill every released buffer with NaN, to find who still reads one.
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
    ) -> None:
        if num_rows < 1 or row_width < 1:
            raise StoreError(f"a table needs at least one row and one column, not {num_rows} x {row_width}")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise StoreError(f"a resident table is float32, bfloat16 or float16, not {dtype}")
        self.num_rows, self.row_width = num_rows, row_width
        self.dtype = dtype
        self.weight = _initial_rows(num_rows, row_width, init_std, seed).to(device=device, dtype=dtype)
        self.device = self.weight.device
        self.step = 0
        self.state: dict[str, torch.Tensor] = {}
        self._rule_name: str | None = None
        self._ring = BufferRing(dtype, self.device, poison_released)

    def __repr__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"ResidentStore({self.num_rows:,} rows x {self.row_width}, {name} on {self.device})"

    def prefetch(self, rows: torch.Tensor) -> ResidentTicket:
        check_rows(rows, self.num_rows)
        buffer = self._ring.lend(rows.numel() * self.row_width)
        vectors = buffer[: rows.numel() * self.row_width].view(rows.numel(), self.row_width)
        with torch.no_grad():
            torch.index_select(self.weight, 0, rows.reshape(-1).to(self.device), out=vectors)
        return ResidentTicket(self._ring, buffer, vectors.view(*rows.shape, self.row_width))

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
        if weight.dtype != self.dtype:
            raise StoreError(f"weight is {weight.dtype}, this table is {self.dtype}")
        if step.numel() != 1:
            raise StoreError(f"step is one number, not {tuple(step.shape)}")
        self.weight.copy_(weight)
        self.step = int(step)
        self._rule_name = rule_name
        self.state = {name: whole.to(self.device, torch.float32, copy=True) for name, whole in state.items()}

    def _check_update(self, rows_U: torch.Tensor, grads_UE: torch.Tensor, rule: Rule) -> None:
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
            self.state = {name: torch.zeros(shape, device=self.device) for name, shape in shapes.items()}
            self._rule_name = rule.name
        found = {name: tuple(whole.shape) for name, whole in self.state.items()}
        if found != shapes:
            raise StoreError(f"the state that was loaded does not fit {rule.name}: {found}, not {shapes}")


def _initial_rows(num_rows: int, row_width: int, std: float, seed: int) -> torch.Tensor:
    if std == 0:
        return torch.zeros(num_rows, row_width)
    return torch.empty(num_rows, row_width).normal_(std=std, generator=torch.Generator().manual_seed(seed))


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
