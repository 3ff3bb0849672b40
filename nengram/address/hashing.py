"""Rows of every memory layer, once per batch, before the forward pass: nothing here needs anything but ids.

The public demo hashes every layer again inside each layer. One pass for all of them costs a few tens of
nanoseconds a token and can run early, on another thread, or once for ever. Ids on the CPU take a compiled
serial loop (`kernels.py`), ids on another device torch operations (`tensors.py`). Both equal `reference.py`
exactly, and a text may be cut anywhere: whole, in chunks, or token by token, the rows are the same.
"""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from nengram.address.bounds import integer, shown
from nengram.address.inputs import as_numpy, check_flags, check_ids, is_tensor
from nengram.address.spec import MAX_IDS, AddressSpec
from nengram.address.state import StreamState
from nengram.errors import AddressError, nearest

if TYPE_CHECKING:
    from torch import Tensor

BACKENDS = ("auto", "numba", "torch")


class Addresser:
    """Compressed ids into the rows of all memory layers: `Addresser(spec)(cids_BT) -> {layer_id: rows_BTS}`.

    `backend`: "numba" (ids on the CPU), "torch" (any device), or "auto": numba for ids on the CPU, torch
    elsewhere. The rows are equal. Raises AddressError if the backend is unknown.
    """

    def __init__(self, spec: AddressSpec, *, backend: str = "auto") -> None:
        if backend not in BACKENDS:
            close = nearest(str(backend), BACKENDS)
            raise AddressError(f"unknown backend {shown(backend)}{close}; known: {', '.join(BACKENDS)}")
        self.spec = spec
        self.backend = backend
        self._multipliers_LN = np.stack([spec.multipliers(layer_id) for layer_id in spec.layer_ids])
        self._moduli_LS = np.stack([spec.moduli(layer_id) for layer_id in spec.layer_ids])
        self._offsets_LS = np.stack([spec.offsets(layer_id) for layer_id in spec.layer_ids])

    def new_state(self, batch: int) -> StreamState:
        """The state at the beginning of `batch` sequences: nothing seen yet, all pad. Raises AddressError."""
        return StreamState(self.spec, integer("batch", batch, 0, MAX_IDS))

    def __call__(
        self,
        cids_BT: "np.ndarray | Tensor",
        *,
        start_BT: "np.ndarray | Tensor | None" = None,
        blocked_BT: "np.ndarray | Tensor | None" = None,
        state: StreamState | None = None,
    ) -> "dict[int, np.ndarray] | dict[int, Tensor]":
        """Rows of each layer's table: int64 [B, T, S], slots order-major then head.

        NumPy ids give NumPy rows, a tensor gives tensors on its device.

        cids_BT: integers in 0..compressed_vocab_size - 1; where blocked, anything, for it is never read.
        start_BT: bool, true where look-back begins anew: the position sees itself and nothing before it.
        blocked_BT: bool, true where a position breaks n-grams: all its slots read pad, and no later position
            sees it or anything beyond it.
        state: what came before; carried past this chunk in place, and left as it was if the call raises.

        Raises AddressError on a wrong type, shape or state, and on the first id out of range (position,
        value, bound). On an accelerator that check waits for the device once per call.
        """
        check_ids("ids", cids_BT, "BT")
        check_flags("start_BT", start_BT, cids_BT.shape)
        check_flags("blocked_BT", blocked_BT, cids_BT.shape)
        history_BH = self._history(state, len(cids_BT))
        hash_rows = self._by_loop if self._chosen(cids_BT) == "numba" else self._by_tensors
        rows, history_BH = hash_rows(cids_BT, start_BT, blocked_BT, history_BH)
        if state is not None:
            state.restore(history_BH)
        return dict(zip(self.spec.layer_ids, rows, strict=True))

    def _chosen(self, cids_BT: Any) -> str:
        device = str(cids_BT.device) if is_tensor(cids_BT) else "cpu"
        if device == "cpu":
            return "torch" if self.backend == "torch" else "numba"
        if self.backend == "numba":
            raise AddressError(f'backend "numba" reads ids on the CPU, these are on {device}: use backend="auto"')
        return "torch"

    def _history(self, state: StreamState | None, batch: int) -> np.ndarray:
        if state is None:
            return StreamState(self.spec, batch).snapshot()
        if not isinstance(state, StreamState):
            raise AddressError(f"state must come from Addresser.new_state, got {type(state).__name__}")
        if state.spec is not self.spec and state.spec != self.spec:
            raise AddressError(
                f"the state belongs to address spec {state.spec.word_code}, this is {self.spec.word_code}"
            )
        if state.batch != batch:
            raise AddressError(f"the state holds {state.batch} sequences, the ids {batch}")
        return state.snapshot()

    @cached_property
    def _reciprocals_LS(self) -> np.ndarray:
        from nengram.address import kernels

        return kernels.reciprocals(self._moduli_LS)

    def _by_loop(self, cids_BT: Any, start_BT: Any, blocked_BT: Any, history_BH: np.ndarray) -> tuple[Any, np.ndarray]:
        from nengram.address import kernels

        ids_BT = np.require(as_numpy(cids_BT), np.int64, ["C", "W"])
        rows_LBTS = np.empty((len(self.spec.layers), *ids_BT.shape, self.spec.slots), dtype=np.int64)
        wrong = kernels.fill_rows(
            ids_BT,
            kernels.barriers(ids_BT.shape, start_BT, blocked_BT),
            history_BH,
            self.spec.compressed_vocab_size,
            self.spec.pad_cid,
            self.spec.end_cid,
            self._multipliers_LN.view(np.uint64),
            self._moduli_LS.view(np.uint64),
            self._reciprocals_LS,
            self._offsets_LS,
            rows_LBTS,
        )
        if wrong >= 0:
            self._refuse(cids_BT, wrong)
        if not is_tensor(cids_BT):
            return rows_LBTS, history_BH
        import torch

        return torch.from_numpy(rows_LBTS), history_BH

    def _by_tensors(
        self, cids_BT: Any, start_BT: Any, blocked_BT: Any, history_BH: np.ndarray
    ) -> tuple[Any, np.ndarray]:
        from nengram.address import tensors

        device = cids_BT.device if is_tensor(cids_BT) else "cpu"
        ids_BT, start_BT, blocked_BT = tensors.inputs(cids_BT, start_BT, blocked_BT, device)
        wrong = tensors.first_out_of_range(ids_BT, blocked_BT, self.spec.compressed_vocab_size)
        if wrong >= 0:
            self._refuse(cids_BT, wrong)
        history_BH, moduli_LS, offsets_LS = (
            tensors.placed(values, device) for values in (history_BH, self._moduli_LS, self._offsets_LS)
        )
        start_BT = tensors.starts_after(ids_BT, start_BT, self.spec.end_cid)
        seen = tensors.look_back(ids_BT, start_BT, blocked_BT, history_BH, self.spec.pad_cid)
        layers = zip(self._multipliers_LN.tolist(), moduli_LS, offsets_LS, strict=True)
        rows = [tensors.rows_of_layer(seen, *numbers) for numbers in layers]
        history_BH = tensors.next_history(seen, history_BH, self.spec.end_cid)
        return rows if is_tensor(cids_BT) else [rows_BTS.numpy() for rows_BTS in rows], as_numpy(history_BH)

    def _refuse(self, cids_BT: Any, flat_position: int) -> None:
        b, t = divmod(flat_position, cids_BT.shape[1])
        raise AddressError(
            f"compressed id {int(cids_BT[b, t])} at sequence {b}, position {t} is outside "
            f"0..{self.spec.compressed_vocab_size - 1}: ids and spec come from different vocabularies, "
            "or the position is not text and must be blocked"
        )
