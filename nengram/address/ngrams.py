"""How often an n-gram was seen, exactly, for any order, without a hash.

An n-gram of order n is named by (number of its first n-1 ids, last id): two integers below 2**31, packed
into one. So a count is a chain of sorted arrays, one per prefix length; counting and looking up are sorting
and binary search, and no collision is possible at any order or vocabulary.
"""

from dataclasses import dataclass

import numpy as np

from nengram.address.bounds import integer
from nengram.address.inputs import as_numpy, check_flags, check_ids
from nengram.address.spec import MAX_IDS
from nengram.errors import AddressError


@dataclass(frozen=True, eq=False)
class NgramCounts:
    """The U distinct n-grams of a text and how often each occurs.

    ngrams_UN: int64 [U, order], oldest id first, sorted. counts_U: int64 [U].
    levels: for each length up to the order, the sorted packed prefixes.
    """

    order: int
    ngrams_UN: np.ndarray
    counts_U: np.ndarray
    levels: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        """U, the number of distinct n-grams."""
        return len(self.counts_U)


def ngrams_of(cids_T: np.ndarray, start_T: np.ndarray | None, order: int, *, pad_cid: int = -1) -> np.ndarray:
    """The n-gram that ends at each position: int64 [T, order], oldest id first.

    `start_T`: bool [T] or None, true where look-back begins anew (position 0 always does). What lies before
    a start reads `pad_cid`: the spec's pad id gives n-grams as the hash sees them, -1 keeps them apart from
    real pad tokens. Raises AddressError.
    """
    check_ids("ids", cids_T, "T")
    check_flags("starts", start_T, cids_T.shape)
    order = integer("order", order, 1, MAX_IDS)
    pad_cid = integer("pad_cid", pad_cid, -1, MAX_IDS)
    ids_T = as_numpy(cids_T).astype(np.int64)
    if ids_T.size and not (ids_T.min() >= 0 and ids_T.max() < MAX_IDS):
        raise AddressError(f"ids to count must lie in 0..{MAX_IDS - 1}, got {ids_T.min()}..{ids_T.max()}")
    positions_T = np.arange(len(ids_T))
    first_T = np.zeros_like(positions_T)
    if start_T is not None:
        first_T = np.maximum.accumulate(np.where(as_numpy(start_T), positions_T, 0))
    ngrams_TN = np.full((len(ids_T), order), pad_cid, dtype=np.int64)
    for lag in range(min(order, len(ids_T))):
        seen_X = positions_T[lag:] - lag >= first_T[lag:]
        ngrams_TN[lag:, order - 1 - lag][seen_X] = ids_T[: len(ids_T) - lag][seen_X]
    return ngrams_TN


def text_starts(cids_T: np.ndarray, start_T: np.ndarray | None, end_cid: int) -> np.ndarray:
    """bool [T]: the starts given, position 0, and whatever follows an `end_cid` (a spec's; -1: nothing)."""
    begins_T = np.zeros(len(cids_T), dtype=bool) if start_T is None else as_numpy(start_T).copy()
    begins_T[:1] = True
    if end_cid >= 0:
        begins_T[1:] |= as_numpy(cids_T)[:-1] == end_cid
    return begins_T


def ngram_counts(cids_T: np.ndarray, start_T: np.ndarray | None, order: int, *, pad_cid: int = -1) -> NgramCounts:
    """Count the n-grams of one stream of ids; arguments and errors as in `ngrams_of`. O(order x T log T)."""
    ngrams_TN = ngrams_of(cids_T, start_T, order, pad_cid=pad_cid)
    levels = []
    number_T = np.zeros(len(ngrams_TN), dtype=np.int64)
    for column_T in ngrams_TN.T:
        level, first_U, number_T, counts_U = np.unique(
            _packed(number_T, column_T), return_index=True, return_inverse=True, return_counts=True
        )
        levels.append(level)
    return NgramCounts(order, ngrams_TN[first_U], counts_U, tuple(levels))


def count_of(counts: NgramCounts, ngrams_XN: np.ndarray) -> np.ndarray:
    """How often each n-gram (rows of [X, order], oldest id first) was counted: int64 [X], 0 if never.

    Raises AddressError if `ngrams_XN` is not of the counts' order.
    """
    check_ids("n-grams", ngrams_XN, "XN")
    ngrams_XN = as_numpy(ngrams_XN)
    if ngrams_XN.shape[1] != counts.order:
        raise AddressError(f"counts are of order {counts.order}, the n-grams of order {ngrams_XN.shape[1]}")
    number_X = np.zeros(len(ngrams_XN), dtype=np.int64)
    known_X = ((ngrams_XN >= -1) & (ngrams_XN < MAX_IDS)).all(axis=1)
    if len(counts) == 0:
        return number_X
    for level, column_X in zip(counts.levels, ngrams_XN.astype(np.int64).T, strict=True):
        wanted_X = _packed(number_X, column_X)
        number_X = np.minimum(np.searchsorted(level, wanted_X), len(level) - 1)
        known_X &= level[number_X] == wanted_X
    return np.where(known_X, counts.counts_U[number_X], 0)


def _packed(number_X: np.ndarray, last_X: np.ndarray) -> np.ndarray:
    return (number_X << 32) + (last_X + 1)
