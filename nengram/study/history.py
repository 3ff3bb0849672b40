"""How often had the model met what it reads? Counted in the tokens a run really trained on, not in the whole split.

At each position a memory layer reads the n-grams of compressed ids that end there, cut where look-back begins anew: at a document, and
at the left edge of a window, in training as in evaluation. Two counts follow from that for every token that is predicted:

    read        how often the n-gram ending just before the token was read in training: the updates its rows have had of it
    continued   how often that n-gram was followed by this very token: whether the answer, too, was there to be learnt

A short run reads a part of the split, in an order that its seed chose, so the training windows are walked again exactly as the loop
walked them, further passes included. Counts are exact: n-grams are numbered by sorting, no hash, no collision. Half a million tokens
and four orders take about two seconds.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from nengram.address import AddressSpec, ngrams_of, text_starts
from nengram.config import Config
from nengram.text import Batch, Batches, Packed, eval_windows

CLASSES = ("never", "1-3", "4-31", "32+")
FROM_TIMES = (1, 4, 32)  # where each class after the first begins


class Positions(NamedTuple):
    """Every position a model reads, windows laid end to end: int64 [X], and bool starts.

    ids_X: token ids. targets_X: the tokens that follow. start_X: look-back begins anew here.
    positions_X: where in the split the targets stand.
    """

    ids_X: np.ndarray
    targets_X: np.ndarray
    start_X: np.ndarray
    positions_X: np.ndarray


class History(NamedTuple):
    """For each position: int64 [X], times its n-gram was read in training, and times it was followed by the same target."""

    read_X: np.ndarray
    continued_X: np.ndarray


def training_batches(config: Config, packed: Packed, steps: int) -> Iterator[Batch]:
    """The batches of a run's first `steps` steps, as the training loop drew them. packed: the train split."""
    batches = Batches(
        packed,
        batch=config.train.batch,
        context=config.model.context,
        seed=config.train.seed,
        passes=None,
        on_repeat=lambda pass_index: None,
    )
    return (batch for batch, _ in islice(batches, steps))


def trained_positions(config: Config, packed: Packed, steps: int) -> Positions:
    """Every position that a run's training read, in its order. packed: the train split."""
    return positions_of(training_batches(config, packed, steps))


def judged_positions(config: Config, packed: Packed) -> Positions:
    """Every position that evaluation reads of a held-out split."""
    return positions_of(eval_windows(packed, batch=config.train.batch, context=config.model.context))


def positions_of(batches: Iterable[Batch]) -> Positions:
    """The positions of some batches that have a target, window after window."""
    parts = []
    for batch in batches:
        start_BT = batch.start_BT.copy()
        start_BT[:, 0] = True
        real_BT = batch.positions_BT >= 0  # what has no target comes after all that has: nothing looks back on it
        arrays = (batch.ids_BT, batch.targets_BT, start_BT, batch.positions_BT)
        parts.append([array_BT[real_BT] for array_BT in arrays])
    return Positions(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def history_of(spec: AddressSpec, cids_V: np.ndarray, trained: Positions, asked: Positions) -> dict[int, History]:
    """How often the run had met each of the asked positions' n-grams, by order 2..max_order.

    Args:
        spec: the addresses of the memory; its pad id stands before every start, as the hash sees it.
        cids_V: compressed id of every token id.
        trained, asked: as `trained_positions` and `judged_positions` give them.
    Raises: AddressError for ids outside the spec's vocabulary.
    """
    found = {}
    for order in range(2, spec.max_order + 1):
        trained_XN, asked_XN = (ngrams_read(spec, cids_V, positions, order) for positions in (trained, asked))
        number_X, number_Y = numbered(trained_XN, asked_XN)
        with_target_X, with_target_Y = (
            np.stack([number, positions.targets_X], axis=1)
            for number, positions in ((number_X, trained), (number_Y, asked))
        )
        found[order] = History(
            times(number_X, number_Y),
            times(*numbered(with_target_X, with_target_Y)),
        )
    return found


def ngrams_read(spec: AddressSpec, cids_V: np.ndarray, positions: Positions, order: int) -> np.ndarray:
    """The n-gram of compressed ids that a memory layer reads at each position: int64 [X, order], oldest id first."""
    cids_X = cids_V[positions.ids_X]
    return ngrams_of(cids_X, text_starts(cids_X, positions.start_X, spec.end_cid), order, pad_cid=spec.pad_cid)


def numbered(some_XN: np.ndarray, others_YN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One number for every distinct row of both arrays (non-negative integers below 2**31): int64 [X], [Y]."""
    rows_ZN = np.concatenate([some_XN, others_YN])
    number_Z = np.zeros(len(rows_ZN), dtype=np.int64)
    for column_Z in rows_ZN.T:
        _, number_Z = np.unique((number_Z << 32) + column_Z, return_inverse=True)
    return number_Z[: len(some_XN)], number_Z[len(some_XN) :]


def times(number_X: np.ndarray, number_Y: np.ndarray) -> np.ndarray:
    """How often each of number_Y stands in number_X: int64 [Y]."""
    most = max(int(numbers.max(initial=-1)) for numbers in (number_X, number_Y))
    return np.bincount(number_X, minlength=most + 1)[number_Y]


def history_class(times_X: np.ndarray) -> np.ndarray:
    """Index into `CLASSES` of each count: int64, of the same shape."""
    return np.digitize(times_X, FROM_TIMES)
