"""Windows of a packed split: shuffled for training, in order for evaluation; the place travels with each.

Training: a pass shuffles the documents, lays them end to end, cuts the run into windows of `context` inputs
(the target of each being the next token) and shuffles the windows, so that one batch does not sit inside one
long article. Every token is an input once per pass, save the last ones that fill no whole batch. The place is
three small numbers, not a generator's insides: any pass is rebuilt from (seed, pass), so a run continues
exactly, in another process, from whatever state it saved. The orders come from the raw bits of PCG64, which
NumPy promises never to change; it makes no such promise for its own permutations.

`start_BT` is true exactly where a document begins (its separator). A window that begins in the middle of a
document carries no mark at t = 0: without a carried state nothing looks back across a window's left edge
anyway, and with one it should.

Repeating is loud. A table remembers what it read, and a second pass over the same text overfits it first, so
by default there is one pass, and asking for more warns when the second begins.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from nengram.errors import ConfigError, DataError
from nengram.text.pack import Packed

NO_TARGET = -100  # what torch's cross entropy ignores


class Batch(NamedTuple):
    """Windows of a split: int64 [B, T] ids, targets and the targets' positions in packed.ids_N; bool starts.

    `positions_BT` lays per-token losses back on the text. Where there is no target it is -1, the target -100.
    """

    ids_BT: np.ndarray
    targets_BT: np.ndarray
    start_BT: np.ndarray
    positions_BT: np.ndarray
    pass_index: int = 0


class Batches:
    """Iterate over (Batch, state): `state` is a small dict fit for JSON, the place after that batch.

    Batches(..., state=state) gives exactly the batches that would have followed. `passes` is how often the
    split is read before the iteration ends (None: for ever). Before the second pass `on_repeat(pass_index)`
    is called once, else a warning is given.

    Raises DataError when the split does not fill one batch, or when `state` was saved from other data, sizes
    or another seed; ConfigError for a batch or context below 1 or a negative seed.
    """

    def __init__(
        self,
        packed: Packed,
        *,
        batch: int,
        context: int,
        seed: int,
        state: dict | None = None,
        passes: int | None = 1,
        on_repeat: Callable[[int], None] | None = None,
    ) -> None:
        _check_sizes(batch, context)
        if seed < 0:
            raise ConfigError(f"the seed of the data must not be negative, and {seed} is")
        self.packed, self.batch, self.context, self.seed = packed, batch, context, seed
        self.passes, self.on_repeat = passes, on_repeat
        self.steps_in_one_pass = (len(packed) - 1) // (batch * context)
        if not self.steps_in_one_pass:
            raise DataError(
                f"the split holds {len(packed):,} tokens and one batch of {batch} x {context} needs "
                f"{batch * context + 1:,}; give more text, or a smaller batch or context"
            )
        self._is_start_N = _starts(packed)
        self._pass_index, self._step = self._place(state)
        self._warned = False

    @property
    def tokens_in_one_pass(self) -> int:
        """Targets that one pass gives: whole batches only."""
        return self.steps_in_one_pass * self.batch * self.context

    @property
    def state(self) -> dict:
        """The place now, before the next batch."""
        return self._identity | {"pass_index": self._pass_index, "step": self._step}

    def __iter__(self) -> Iterator[tuple[Batch, dict]]:
        while self.passes is None or self._pass_index < self.passes:
            if self._pass_index > 0 and not self._warned:
                self._warned = True
                self._warn()
            yield from self._one_pass()

    def _one_pass(self) -> Iterator[tuple[Batch, dict]]:
        pass_index, steps = self._pass_index, self.steps_in_one_pass
        run_N, window_starts = self._arrangement(pass_index)
        for step in range(self._step, steps):
            chosen_B = window_starts[step * self.batch : (step + 1) * self.batch]
            places_BT = run_N[chosen_B[:, None] + np.arange(self.context + 1)]
            self._pass_index, self._step = (pass_index, step + 1) if step + 1 < steps else (pass_index + 1, 0)
            yield _batch(self.packed, self._is_start_N, places_BT, pass_index), self.state

    def _arrangement(self, pass_index: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions of ids_N in the order of this pass, and where in that order each window begins."""
        bits = np.random.PCG64([self.seed, pass_index])
        lengths_D = np.diff(self.packed.doc_starts_D, append=len(self.packed))
        order_D = _shuffled(len(lengths_D), bits)
        lengths_D = lengths_D[order_D]
        shift_D = self.packed.doc_starts_D[order_D] - (np.cumsum(lengths_D) - lengths_D)
        run_N = np.arange(len(self.packed)) + np.repeat(shift_D, lengths_D)
        return run_N, _shuffled((len(self.packed) - 1) // self.context, bits) * self.context

    @property
    def _identity(self) -> dict:
        sizes = {"batch": self.batch, "context": self.context, "seed": self.seed}
        return {"data": self.packed.digest[:16], **sizes}

    def _place(self, state: dict | None) -> tuple[int, int]:
        if state is None:
            return 0, 0
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise DataError(f"the saved place in the data has {name} {state.get(name)}, this run {value}")
        pass_index, step = state.get("pass_index"), state.get("step")
        whole = type(pass_index) is int and type(step) is int
        if not whole or pass_index < 0 or not 0 <= step < self.steps_in_one_pass:
            raise DataError(f"the saved place in the data is damaged: pass {pass_index}, step {step}")
        return pass_index, step

    def _warn(self) -> None:
        if self.on_repeat is not None:
            return self.on_repeat(self._pass_index)
        warnings.warn(
            f"all {self.tokens_in_one_pass:,} tokens of the split have been read and are about to repeat; "
            "memory tables overfit on repeated text",
            stacklevel=3,
        )


def eval_windows(packed: Packed, batch: int, context: int) -> Iterator[Batch]:
    """Every token of the split but the first as a target exactly once, in an order that never varies.

    All batches are [batch, context]; places past the end have id 0, target -100 and position -1. The rows of
    one batch lie far apart in the split, so that the misaligned control, which swaps rows between sequences,
    does not meet neighbouring text.

    Raises DataError when the split holds fewer than two tokens, ConfigError for a batch or context below 1.
    """
    _check_sizes(batch, context)
    if len(packed) < 2:
        raise DataError(f"the split holds {len(packed)} tokens: there is nothing to predict")
    is_start_N = _starts(packed)
    windows = -(-(len(packed) - 1) // context)
    steps = -(-windows // batch)
    for step in range(steps):
        first_B = (step + steps * np.arange(batch)) * context
        places_BT = first_B[:, None] + np.arange(context + 1)
        yield _batch(packed, is_start_N, places_BT, 0)


def _batch(packed: Packed, is_start_N: np.ndarray, places_BT: np.ndarray, pass_index: int) -> Batch:
    """Inputs and targets from [B, T+1] positions of ids_N; positions at or past its end are padding."""
    real_BT = places_BT < len(packed)
    places_BT = np.where(real_BT, places_BT, 0)
    ids_BT = np.where(real_BT, packed.ids_N[places_BT].astype(np.int64), 0)
    has_target_BT = real_BT[:, 1:]
    return Batch(
        ids_BT=np.ascontiguousarray(ids_BT[:, :-1]),
        targets_BT=np.where(has_target_BT, ids_BT[:, 1:], NO_TARGET),
        start_BT=(is_start_N[places_BT] & real_BT)[:, :-1].copy(),
        positions_BT=np.where(has_target_BT, places_BT[:, 1:], -1),
        pass_index=pass_index,
    )


def _shuffled(length: int, bits: np.random.PCG64) -> np.ndarray:
    return np.argsort(bits.random_raw(length), kind="stable")


def _starts(packed: Packed) -> np.ndarray:
    is_start_N = np.zeros(len(packed), bool)
    is_start_N[packed.doc_starts_D] = True
    return is_start_N


def _check_sizes(batch: int, context: int) -> None:
    if batch < 1 or context < 1:
        raise ConfigError(f"batch and context must be at least 1, not {batch} and {context}")
