"""What changed between two tables, in n-grams: row numbers say nothing to anybody.

A hash cannot be inverted, so the names come from a corpus: every distinct n-gram of the text is hashed, and those whose
rows changed are listed, with how many of their heads did. An edited n-gram has all heads changed; one that merely
shares a row with it has one or two, which is what tells an edit from its collateral. Rows that changed and that no
n-gram of the corpus reads are counted and stay nameless.

Both tables stream by, a few mebibytes at a time; what is kept is one number for each row that the corpus reads.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from nengram.address import Addresser, AddressSpec, NgramCounts, ngram_counts, text_starts
from nengram.errors import AddressError, CheckpointError, StoreError
from nengram.memory.packing import checked_blocks
from nengram.memory.table import AnyTable, address_of, check_addresses, open_rows, order_labels

NOTHING = -1  # stands in an n-gram for what lies before a start
NGRAMS_AT_ONCE = 16_384

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class ChangedNgram:
    """An n-gram of the corpus that reads changed rows.

    cids: oldest first, -1 before a start. text: as `text_of` writes it. heads_changed: of `heads` rows that it reads.
    count: how often it occurs in the corpus. largest: the largest difference of a number in its rows.
    """

    text: str
    order: int
    heads_changed: int
    heads: int
    count: int
    largest: float
    cids: tuple[int, ...]


@dataclass(frozen=True)
class TableDiff:
    """Two tables of the same addresses, compared row by row.

    changed: rows in which a number differs by more than the tolerance. by_order: (name, changed rows, rows).
    unread: changed rows that no n-gram of the corpus reads; with padding rows, if any changed. None without a corpus.
    ngrams: the most affected first; `ngrams_changed` counts all, of `ngrams_read` distinct ones.
    """

    layer_id: int
    addresses: str
    rows: int
    changed: int
    largest: float
    by_order: tuple[tuple[str, int, int], ...]
    tokens: int
    ngrams_read: int
    ngrams_changed: int
    unread: int | None
    ngrams: tuple[ChangedNgram, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; a difference that is no number is null."""
        content = asdict(self)
        for place in (content, *content["ngrams"]):
            place["largest"] = place["largest"] if np.isfinite(place["largest"]) else None
        return content


def diff_tables(
    one: str | os.PathLike,
    other: str | os.PathLike,
    cids_T: np.ndarray | None = None,
    start_T: np.ndarray | None = None,
    *,
    text_of: Callable[[tuple[int, ...]], str] = str,
    tolerance: float = 0.0,
    most: int = 20,
    progress: Progress | None = None,
) -> TableDiff:
    """Compare two tables, whatever their codecs, and name the changes by the n-grams of a text.

    cids_T: compressed ids of the text, int64 [T]; start_T: bool, true where look-back begins anew. Without a text
        only rows are counted.
    text_of: spells an n-gram of compressed ids (-1: nothing before). tolerance: a number that differs by this much or
        less is the same. most: n-grams to name.
    Raises: CheckpointError for a damaged table, or two of different addresses or widths; AddressError for the text.
    """
    if not tolerance >= 0:
        raise StoreError(f"a tolerance is 0 or more, not {tolerance}")
    with open_rows(one) as left, open_rows(other) as right:
        spec, layer_id = _common(left, right)
        ngrams = [] if cids_T is None else list(_ngrams(spec, cids_T, start_T))
        read_U = _rows_read(spec, layer_id, ngrams)
        labels = order_labels(spec, layer_id)
        largest_U, changed_L, largest = _compare(left, right, read_U, labels, tolerance, progress)
        found = list(_changed(spec, layer_id, ngrams, read_U, largest_U))
        found.sort(key=lambda ngram: (-ngram[1] / spec.heads, -ngram[3], -ngram[2], ngram[0]))
        return TableDiff(
            layer_id=layer_id,
            addresses=spec.word_code,
            rows=left.num_rows,
            changed=int(changed_L.sum()),
            largest=largest,
            by_order=tuple(
                (name, int(changed), end - first)
                for (name, first, end), changed in zip(labels, changed_L, strict=False)
            ),
            tokens=0 if cids_T is None else len(cids_T),
            ngrams_read=sum(map(len, ngrams)),
            ngrams_changed=len(found),
            unread=None if cids_T is None else int(changed_L.sum() - np.count_nonzero(largest_U)),
            ngrams=tuple(_named(ngram, spec, text_of) for ngram in found[:most]),
        )


def _common(left: AnyTable, right: AnyTable) -> tuple[AddressSpec, int]:
    """The addresses of both tables. Raises: CheckpointError when they are not the same."""
    (spec, layer_id), (other, other_layer) = address_of(left), address_of(right)
    check_addresses(left, spec, layer_id, None)
    if (spec.digest, layer_id) != (other.digest, other_layer):
        raise CheckpointError(
            f"{right.path}: is layer {other_layer} of addresses {other.word_code}, {left.path} is layer {layer_id} of "
            f"{spec.word_code}: their rows belong to other n-grams"
        )
    check_addresses(right, other, other_layer, None)
    if left.codec.row_width != right.codec.row_width:
        widths = f"{right.codec.row_width} numbers, those of {left.path} {left.codec.row_width}"
        raise CheckpointError(f"{right.path}: its rows have {widths}")
    return spec, layer_id


def _ngrams(spec: AddressSpec, cids_T: np.ndarray, start_T: np.ndarray | None) -> Iterator[NgramCounts]:
    """The distinct n-grams of a text, order by order, as the hash sees them."""
    if not len(cids_T):
        raise AddressError("the corpus has no token: there is no n-gram to name")
    if cids_T.min() < 0 or cids_T.max() >= spec.compressed_vocab_size:
        found = f"{cids_T.min()}..{cids_T.max()}"
        raise AddressError(
            f"the corpus has compressed ids {found}, these addresses are for 0..{spec.compressed_vocab_size - 1}"
        )
    start_T = text_starts(cids_T, start_T, spec.end_cid)
    for order in range(2, spec.max_order + 1):
        yield ngram_counts(cids_T, start_T, order, pad_cid=NOTHING)


def _rows_of(spec: AddressSpec, layer_id: int, counts: NgramCounts) -> Iterator[np.ndarray]:
    """Rows [n, heads] of distinct n-grams, many at a time: each is hashed as a sequence of its own."""
    address, in_order = Addresser(spec), spec.slot_orders == counts.order
    for first in range(0, len(counts), NGRAMS_AT_ONCE):
        ngrams_UN = counts.ngrams_UN[first : first + NGRAMS_AT_ONCE]
        yield address(np.where(ngrams_UN == NOTHING, spec.pad_cid, ngrams_UN))[layer_id][:, -1, in_order]


def _rows_read(spec: AddressSpec, layer_id: int, ngrams: Iterable[NgramCounts]) -> np.ndarray:
    """Every row that the text reads, int64 [U], ascending."""
    rows = [np.unique(rows_UK) for counts in ngrams for rows_UK in _rows_of(spec, layer_id, counts)]
    return np.unique(np.concatenate(rows)) if rows else np.zeros(0, np.int64)


def _compare(
    left: AnyTable,
    right: AnyTable,
    read_U: np.ndarray,
    labels: list[tuple[str, int, int]],
    tolerance: float,
    progress: Progress | None,
) -> tuple[np.ndarray, np.ndarray, float]:
    """The difference in each row of `read_U` (0: unchanged), changed rows by label (padding last), and the largest."""
    ends = np.array([end for _, _, end in labels])
    largest_U, changed_L, largest, first = np.zeros(len(read_U)), np.zeros(len(labels) + 1, np.int64), 0.0, 0
    total = left.num_rows * left.codec.row_bytes
    for block_NB in checked_blocks(left):
        count = len(block_NB)
        rows_X, differences_X = _differences(left, right, block_NB, _checked_rows(right, first, count), tolerance)
        if len(rows_X):
            rows_X += first
            np.add.at(changed_L, np.searchsorted(ends, rows_X, side="right"), 1)
            largest = max(largest, float(differences_X.max()))
            place_X = np.searchsorted(read_U, rows_X)
            known_X = read_U[np.minimum(place_X, len(read_U) - 1)] == rows_X if len(read_U) else place_X < 0
            largest_U[place_X[known_X]] = differences_X[known_X]
        first += count
        if progress:
            progress(first * left.codec.row_bytes, total)
    return largest_U, changed_L, largest


def _checked_rows(table: AnyTable, first: int, count: int) -> np.ndarray:
    return np.concatenate(list(checked_blocks(table, first, first + count)))


def _differences(
    left: AnyTable, right: AnyTable, left_NB: np.ndarray, right_NB: np.ndarray, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a block that differ by more than the tolerance, and by how much; NaN against a number is infinitely far."""
    rows_X = np.arange(len(left_NB))
    if left.codec == right.codec:
        rows_X = np.flatnonzero((left_NB != right_NB).any(axis=1))
    if not len(rows_X):
        return rows_X, np.zeros(0)
    left_XE, right_XE = (
        table.codec.decode(torch.from_numpy(np.ascontiguousarray(bytes_NB[rows_X]))).double()
        for table, bytes_NB in ((left, left_NB), (right, right_NB))
    )
    same_XE = (left_XE == right_XE) | (left_XE.isnan() & right_XE.isnan())
    distance_XE = (left_XE - right_XE).abs().nan_to_num_(nan=torch.inf).masked_fill_(same_XE, 0)
    distance_X = distance_XE.amax(1).numpy()
    changed_X = distance_X > tolerance
    return rows_X[changed_X], distance_X[changed_X]


Affected = tuple[tuple[int, ...], int, int, float]  # compressed ids, heads changed, count, largest difference


def _changed(
    spec: AddressSpec, layer_id: int, ngrams: Iterable[NgramCounts], read_U: np.ndarray, largest_U: np.ndarray
) -> Iterator[Affected]:
    """The n-grams that read a changed row."""
    for counts in ngrams:
        first = 0
        for rows_NK in _rows_of(spec, layer_id, counts):
            largest_NK = largest_U[np.searchsorted(read_U, rows_NK)]
            heads_N = np.count_nonzero(largest_NK, axis=1)
            for place in np.flatnonzero(heads_N):
                cids = tuple(counts.ngrams_UN[first + place].tolist())
                yield cids, int(heads_N[place]), int(counts.counts_U[first + place]), float(largest_NK[place].max())
            first += len(rows_NK)


def _named(ngram: Affected, spec: AddressSpec, text_of: Callable[[tuple[int, ...]], str]) -> ChangedNgram:
    cids, heads_changed, count, largest = ngram
    return ChangedNgram(text_of(cids), len(cids), heads_changed, spec.heads, count, largest, cids)
