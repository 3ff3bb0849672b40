"""What a stream of ids has to remember: the last N-1 of each sequence, *as a later position would see them*.

Everything at or beyond a barrier is already rewritten to pad, so the state needs no flags of its own. It is
a few integers on the CPU whatever device hashes; taking a snapshot for speculative decoding, or reordering
beams, is a copy.
"""

from typing import Any

import numpy as np

from nengram.address.bounds import shown
from nengram.address.inputs import as_numpy
from nengram.address.spec import AddressSpec
from nengram.errors import AddressError


class StreamState:
    """The effective last `max_order - 1` ids of B sequences, most recent first.

    Make one with `Addresser.new_state`; each call it is passed to carries it on in place.
    """

    def __init__(self, spec: AddressSpec, batch: int) -> None:
        self.spec = spec
        self._history_BH = np.full((batch, spec.max_order - 1), spec.pad_cid, dtype=np.int64)

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return len(self._history_BH)

    def snapshot(self) -> np.ndarray:
        """A copy, int64 [B, max_order - 1], for `restore`."""
        return self._history_BH.copy()

    def restore(self, snapshot: np.ndarray) -> None:
        """Go back to a snapshot, of any batch size. Raises AddressError if it is not this spec's."""
        lags, vocab = self.spec.max_order - 1, self.spec.compressed_vocab_size
        history = as_numpy(snapshot)
        if history.ndim != 2 or history.shape[1] != lags or history.dtype.kind not in "iu":
            found = f"{history.dtype} {list(history.shape)}"
            raise AddressError(f"a snapshot of this spec is integers [B, {lags}], got {found}")
        if ((history < 0) | (history >= vocab)).any():
            raise AddressError(f"the snapshot holds ids outside 0..{vocab - 1}: it belongs to another spec")
        self._history_BH = history.astype(np.int64)

    def reorder(self, index_B: Any) -> None:
        """Sequence i continues what sequence `index_B[i]` was (beam search); the batch may grow or shrink.

        index_B: a list, array or tensor of integers [new B]. Raises AddressError if one is out of range.
        """
        index = as_numpy(index_B)
        if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
            raise AddressError(f"reorder needs sequence numbers [B], got {index.dtype} {list(index.shape)}")
        if ((index < 0) | (index >= self.batch)).any():
            wrong = shown(index.tolist())
            raise AddressError(f"reorder names a sequence outside 0..{self.batch - 1}: {wrong}")
        self._history_BH = self._history_BH[index.astype(np.intp)]
