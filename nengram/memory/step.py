"""One object per forward pass: which rows every memory layer reads, and where their gradients go.

Rows depend on token ids alone, so those of ALL layers are computed once, at the top, and asked for in the
order in which the blocks will need them. Layers only read from the step. Recomputation (activation
checkpointing) and replicas therefore see the same vectors, and a fetch from a slow tier has the blocks before
its layer to hide behind.

    with MemoryStep.begin(cids_BT, addresser, stores) as step:
        loss = model(..., step)          # a memory layer calls step.vectors(layer_id)
        loss.backward()
        step.update(rule, lr)            # or scale step.grads() first and pass it as grads=

The vectors are a leaf of the graph, not a Parameter: after the backward pass their gradient is summed per
distinct row and handed to the store.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from nengram.errors import AddressError, StoreError
from nengram.store import Store, Ticket, coalesce

if TYPE_CHECKING:
    from nengram.address import Addresser, AddressSpec, StreamState
    from nengram.store import Rule

Control = Callable[[torch.Tensor, "AddressSpec", int], torch.Tensor]
RowGrads = dict[int, tuple[torch.Tensor, torch.Tensor]]


class MemoryStep:
    """The rows, tickets and vectors of one forward pass, made by `begin` and released after the update.

    rows: `{layer_id: rows_BTS}` as read, after any control. blocked_BT: as given, for the layers' gates.
    frozen: no gradient reaches the vectors, and there will be no update. keep_BTS: false where a slot is not read, by `mask`.
    asked: whether anybody has asked for its `grads`.
    """

    def __init__(
        self,
        rows: dict[int, torch.Tensor],
        stores: Mapping[int, Store],
        blocked_BT: torch.Tensor | None,
        *,
        frozen: bool = False,
    ) -> None:
        self.rows, self.blocked_BT, self.frozen = rows, blocked_BT, frozen
        self.keep_BTS: torch.Tensor | None = None
        self.asked = False
        self._stores = stores
        self._with_grad = torch.is_grad_enabled() and not frozen
        self._tickets: dict[int, Ticket] = {}
        self._leaves: dict[int, torch.Tensor] = {}
        try:
            for layer_id, rows_BTS in rows.items():
                self._tickets[layer_id] = stores[layer_id].prefetch(rows_BTS)
        except BaseException:
            self.release()
            raise

    @classmethod
    def begin(
        cls,
        cids_BT: torch.Tensor | None,
        addresser: "Addresser",
        stores: Mapping[int, Store],
        *,
        start_BT: torch.Tensor | None = None,
        blocked_BT: torch.Tensor | None = None,
        state: "StreamState | None" = None,
        control: Control | None = None,
        frozen: bool = False,
        context: int = 0,
    ) -> "MemoryStep":
        """Compute the rows of every layer and request them in block order.

        cids_BT, start_BT, blocked_BT, state: as `Addresser` takes them (compressed ids). stores: one per
        layer id.
        control: `(rows_BTS, spec, layer_id) -> rows_BTS`, applied to every layer's rows: `address.one_row` as
            it is, the other row controls in a lambda.
        frozen: the tables are not learned. Else gradients will be collected if grad mode is on now.
        context: so many positions at the front are only looked back on: the step is of those after them.
        Raises: AddressError without ids, StoreError for a layer with no store or a table of another size.
        """
        if cids_BT is None:
            raise AddressError("memory layers need token ids: embeddings (inputs_embeds) have no addresses")
        spec = addresser.spec
        for layer_id in spec.layer_ids:
            _check_store(stores.get(layer_id), layer_id, spec)
        rows = addresser(cids_BT, start_BT=start_BT, blocked_BT=blocked_BT, state=state)
        if context:
            rows = {layer_id: rows_BTS[:, context:] for layer_id, rows_BTS in rows.items()}
            blocked_BT = None if blocked_BT is None else blocked_BT[:, context:]
        if control is not None:
            rows = {layer_id: control(rows_BTS, spec, layer_id) for layer_id, rows_BTS in rows.items()}
        rows = {layer_id: torch.as_tensor(rows[layer_id]) for layer_id in _by_need(spec)}
        return cls(rows, stores, None if blocked_BT is None else torch.as_tensor(blocked_BT), frozen=frozen)

    def mask(self, keep_BTS: torch.Tensor) -> None:
        """Do not read slots where `keep_BTS` is false, in any layer: vectors of zeros, no gradient, no update of their rows.

        keep_BTS: bool [B, T, S]. Raises: StoreError for another shape, and once vectors have been read.
        """
        shape = tuple(next(iter(self.rows.values())).shape)
        if tuple(keep_BTS.shape) != shape or keep_BTS.dtype != torch.bool:
            raise StoreError(f"a mask of slots is bool {shape}, not {keep_BTS.dtype} {tuple(keep_BTS.shape)}")
        if self._leaves:
            raise StoreError("slots are masked before their vectors are read: these were read already")
        self.keep_BTS = keep_BTS

    def vectors(self, layer_id: int) -> torch.Tensor:
        """The vectors of one layer, `[B, T, S, E]`: at every call the same tensor, a leaf of the graph.

        Raises: AddressError for a layer this step does not have, StoreError after `release`.
        """
        if layer_id not in self.rows:
            raise AddressError(f"no memory layer {layer_id} in this step; there are {list(self.rows)}")
        if layer_id not in self._leaves:
            if layer_id not in self._tickets:
                raise StoreError("this memory step was released; begin a new one")
            vecs_BTSE = self._tickets[layer_id].vectors().detach()
            if self.keep_BTS is not None:
                vecs_BTSE = vecs_BTSE.masked_fill(~self.keep_BTS.to(vecs_BTSE.device).unsqueeze(-1), 0.0)
            self._leaves[layer_id] = vecs_BTSE.requires_grad_(self._with_grad)
        return self._leaves[layer_id]

    def grads(self) -> RowGrads:
        """After the backward pass: `{layer_id: (rows_U, grads_UE)}`, one float32 gradient per distinct row.

        Lookups at blocked positions are left out, and masked ones: a lazy rule must not move what was not
        used. A layer that had no part in the loss is absent. Scale these in place to clip.
        Raises: StoreError when no layer has a gradient.
        """
        if not self.has_grads():
            raise StoreError("no gradient has reached a table: begin the step in grad mode, then loss.backward()")
        self.asked = True
        found = {layer_id: leaf.grad for layer_id, leaf in self._leaves.items() if leaf.grad is not None}
        return {layer_id: self._coalesced(layer_id, grad_BTSE) for layer_id, grad_BTSE in found.items()}

    def has_grads(self) -> bool:
        """Whether a backward pass has reached a table, and the step was not released since."""
        return any(leaf.grad is not None for leaf in self._leaves.values())

    def update(self, rule: "Rule", lr: float, *, grads: RowGrads | None = None) -> None:
        """Let every store apply `rule` to its rows, then release. grads: those of `grads()`, once scaled."""
        for layer_id, (rows_U, grads_UE) in (self.grads() if grads is None else grads).items():
            self._stores[layer_id].update(rows_U, grads_UE, rule, lr)
        self.release()

    def release(self) -> None:
        """Give every buffer back. Releasing twice is harmless; `vectors` raises from here on."""
        self._leaves.clear()
        while self._tickets:
            self._tickets.popitem()[1].release()

    def __enter__(self) -> "MemoryStep":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _coalesced(self, layer_id: int, grad_BTSE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows_BTS = self.rows[layer_id]
        used_BTS = self._used()
        if used_BTS is None:
            return coalesce(rows_BTS, grad_BTSE)
        return coalesce(rows_BTS[used_BTS.to(rows_BTS.device)], grad_BTSE[used_BTS.to(grad_BTSE.device)])

    def _used(self) -> torch.Tensor | None:
        """Which slots took part, `[B, T, S]`; None: all."""
        if self.blocked_BT is None:
            return self.keep_BTS
        shape = next(iter(self.rows.values())).shape
        used_BTS = ~self.blocked_BT.unsqueeze(-1).expand(shape)
        return used_BTS if self.keep_BTS is None else used_BTS & self.keep_BTS.to(used_BTS.device)


def _by_need(spec: "AddressSpec") -> list[int]:
    """Layer ids from the first block up; in the spec's own order where blocks are not known."""
    if any(layer.block_index is None for layer in spec.layers):
        return list(spec.layer_ids)
    return [layer.layer_id for layer in sorted(spec.layers, key=lambda layer: layer.block_index)]


def _check_store(store: Store | None, layer_id: int, spec: "AddressSpec") -> None:
    if store is None:
        raise StoreError(f"memory layer {layer_id} has no store")
    if store.num_rows != spec.num_rows(layer_id):
        needed = spec.num_rows(layer_id)
        raise StoreError(f"memory layer {layer_id} addresses {needed:,} rows, its store has {store.num_rows:,}")
