"""What a text does to a table, counted before anything is trained: how full, how shared, how much of new text
it has met.

A slot of p rows that U distinct n-grams fall into at random is balls in bins: a given row stays empty with
probability (1 - 1/p)**U, and a given n-gram has its row to itself with probability (1 - 1/p)**(U - 1).
Printing both beside the counts shows at once whether a hash is good (they agree) and whether a table is
large enough. Sharing alone is no alarm: several n-grams per row are usual, and heads tell them apart.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nengram.address.hashing import Addresser
from nengram.address.inputs import check_flags, check_ids
from nengram.address.ngrams import NgramCounts, count_of, ngram_counts, ngrams_of, text_starts
from nengram.address.spec import AddressSpec
from nengram.errors import AddressError

WELL_TOUCHED = 8
NGRAMS_AT_ONCE = 16_384

Text = np.ndarray | Iterable[tuple[np.ndarray, np.ndarray | None]]


@dataclass(frozen=True)
class OrderCensus:
    """One layer, one n-gram order; shares are 0..1 and averaged over the order's heads.

    distinct_ngrams: U, as the hash sees them (what lies before a start is pad).
    rows: rows of all heads together.
    oversubscription: distinct n-grams per row of one head.
    occupied, expected_occupied: rows that at least one n-gram of the text reads; and for a random hash.
    shared, expected_shared: distinct n-grams whose row another one reads as well; and for a random hash.
    well_touched: rows read at least 8 times over the text.
    held_out_unseen: positions of the held-out text whose n-gram never occurs in the text; None without one.
    """

    layer_id: int
    order: int
    distinct_ngrams: int
    rows: int
    oversubscription: float
    occupied: float
    expected_occupied: float
    shared: float
    expected_shared: float
    well_touched: float
    held_out_unseen: float | None


@dataclass(frozen=True)
class Census:
    """Counts for every layer and order of a spec. `tokens` and `held_out_tokens` are positions read."""

    spec_digest: str
    tokens: int
    held_out_tokens: int
    orders: tuple[OrderCensus, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def take_census(spec: AddressSpec, train: Text, *, held_out: Text | None = None) -> Census:
    """Count what `train` does to the tables of `spec`, and how much of `held_out` it has met.

    A text is an array of compressed ids [T] or [B, T], or an iterable of pairs (ids, starts), `starts` bool
    of the same shape or None. Every pair and every row of ids begins anew. Raises AddressError if `train`
    is empty or an id out of range.
    """
    cids_T, start_T = _stream(spec, train)
    if not len(cids_T):
        raise AddressError("a census needs text: there are no ids to count")
    address = Addresser(spec)
    held = None if held_out is None else _stream(spec, held_out)
    orders = []
    for order in range(2, spec.max_order + 1):
        counts = ngram_counts(cids_T, start_T, order, pad_cid=spec.pad_cid)
        unseen = None if held is None else _unseen(counts, *held, spec.pad_cid)
        orders += _order_censuses(address, counts, unseen)
    orders.sort(key=lambda one: (spec.layer_ids.index(one.layer_id), one.order))
    return Census(spec.digest, len(cids_T), 0 if held is None else len(held[0]), tuple(orders))


def _stream(spec: AddressSpec, text: Text) -> tuple[np.ndarray, np.ndarray]:
    pieces = [_flat(pair) for pair in ([(text, None)] if isinstance(text, np.ndarray) else text)]
    cids_T = np.concatenate([cids for cids, _ in pieces] or [np.zeros(0, dtype=np.int64)])
    start_T = np.concatenate([starts for _, starts in pieces] or [np.zeros(0, dtype=bool)])
    wrong = np.flatnonzero((cids_T < 0) | (cids_T >= spec.compressed_vocab_size))
    if len(wrong):
        at, bound = wrong[0], spec.compressed_vocab_size - 1
        raise AddressError(f"compressed id {cids_T[at]} at position {at} of the text is outside 0..{bound}")
    return cids_T, text_starts(cids_T, start_T, spec.end_cid)


def _flat(pair: tuple[np.ndarray, np.ndarray | None]) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise AddressError(f"a text is an array of ids or pairs (ids, starts), got a {type(pair).__name__} among them")
    cids, starts = pair
    cids_BT = np.atleast_2d(cids)
    check_ids("ids", cids_BT, "BT")
    check_flags("starts", starts, np.shape(cids))
    start_BT = np.zeros(cids_BT.shape, dtype=bool) if starts is None else np.atleast_2d(starts).copy()
    start_BT[:, :1] = True
    return cids_BT.ravel().astype(np.int64), start_BT.ravel()


def _unseen(counts: NgramCounts, cids_T: np.ndarray, start_T: np.ndarray, pad_cid: int) -> float | None:
    if not len(cids_T):
        return None
    return float(np.mean(count_of(counts, ngrams_of(cids_T, start_T, counts.order, pad_cid=pad_cid)) == 0))


def _order_censuses(address: Addresser, counts: NgramCounts, unseen: float | None) -> list[OrderCensus]:
    spec, distinct = address.spec, len(counts)
    in_order = spec.slot_orders == counts.order
    rows_by_layer = rows_of_ngrams(address, counts, in_order)
    censuses = []
    for layer_id, rows_UK in rows_by_layer.items():
        moduli_K = spec.moduli(layer_id)[in_order]
        occupied, well_touched, alone = np.mean([_tally(rows_U, counts.counts_U) for rows_U in rows_UK.T], axis=0)
        censuses.append(
            OrderCensus(
                layer_id=layer_id,
                order=counts.order,
                distinct_ngrams=distinct,
                rows=int(moduli_K.sum()),
                oversubscription=float(distinct / moduli_K.mean()),
                occupied=float(occupied / moduli_K.mean()),
                expected_occupied=float(1 - np.average(_missed(moduli_K, distinct), weights=moduli_K)),
                shared=float(1 - alone / distinct),
                expected_shared=float(1 - np.mean(_missed(moduli_K, distinct - 1))),
                well_touched=float(well_touched / moduli_K.mean()),
                held_out_unseen=unseen,
            )
        )
    return censuses


def rows_of_ngrams(address: Addresser, counts: NgramCounts, in_order: np.ndarray) -> dict[int, np.ndarray]:
    """Rows [U, heads] of each distinct n-gram: hash it as a sequence and keep its last position."""
    parts = []
    for first in range(0, len(counts), NGRAMS_AT_ONCE):
        rows = address(counts.ngrams_UN[first : first + NGRAMS_AT_ONCE])
        parts.append({layer_id: rows_BTS[:, -1, in_order] for layer_id, rows_BTS in rows.items()})
    layer_ids = address.spec.layer_ids
    return {layer_id: np.concatenate([part[layer_id] for part in parts]) for layer_id in layer_ids}


def _tally(rows_U: np.ndarray, counts_U: np.ndarray) -> tuple[int, int, int]:
    """Of one head: rows read at all, rows read at least WELL_TOUCHED times, n-grams alone in their row."""
    _, row_of_U, ngrams_R = np.unique(rows_U, return_inverse=True, return_counts=True)
    reads_R = np.bincount(row_of_U, weights=counts_U)
    return len(ngrams_R), int((reads_R >= WELL_TOUCHED).sum()), int((ngrams_R == 1).sum())


def _missed(moduli_K: np.ndarray, balls: int) -> np.ndarray:
    """The probability that none of `balls` random n-grams falls into a given row."""
    return (1 - 1 / moduli_K) ** balls
