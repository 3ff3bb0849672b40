"""What was asked of a store, and which tier answered: the numbers one needs before arguing about caches.

A store sees row numbers; the caller gives ranges of them names (the orders of an n-gram, say), and everything is
counted per name. Within one request a row that is asked for many times is read once, so a tier's hits are DISTINCT
rows: over all tiers they add up to `distinct`. Counting costs a sort of the request where the tier does not sort
anyway, so it is off unless `store.counters` is set.

Names of tiers: `resident`, `host`, `hot` (the rows a tiered store keeps in memory), `page cache` and `disk` (a mapped
file's rows, by whether they had to be fetched; `mapped` where the system does not tell).
"""

import copy
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from nengram.errors import StoreError

UNLABELLED = "unlabelled"  # rows in no range; listed only when there were any
ROWS, DISTINCT = 0, 1
HITS, READS, BYTES = 0, 1, 2


class Counters:
    """Counts per label and tier, and seconds stalled per tier; any thread may add.

    labels: (name, first row, row after the last), half-open ranges that do not overlap; other rows are counted too.
    Raises: StoreError for ranges that are empty or overlap, or a name given twice.
    """

    def __init__(self, labels: Sequence[tuple[str, int, int]] = ()) -> None:
        self.labels = tuple((str(name), int(first), int(end)) for name, first, end in labels)
        ordered = sorted(self.labels, key=lambda label: label[1])
        for (name, first, end), (other, begin, _) in zip(ordered, [*ordered, ("", np.inf, 0)][1:], strict=True):
            if not 0 <= first < end:
                raise StoreError(f'the label "{name}" has no rows: {first} to {end}')
            if begin < end:
                raise StoreError(f'the labels "{name}" and "{other}" overlap at row {begin}')
        self._names = [name for name, _, _ in ordered] + [UNLABELLED]
        if len(set(self._names)) < len(self._names):
            raise StoreError(f"a label is given twice, or is called {UNLABELLED}: {', '.join(self._names)}")
        self._firsts = np.array([first for _, first, _ in ordered], np.int64)
        self._ends = np.array([end for _, _, end in ordered], np.int64)
        self._lock = threading.Lock()
        self._asked_L2 = np.zeros((len(self._names), 2), np.int64)
        self._tiers_L3: dict[str, np.ndarray] = {}
        self._totals: dict[str, float] = {"requests": 0}
        self._stalled_s: dict[str, float] = {}
        self._is_inner = False

    def inner(self) -> "Counters":
        """The same counts, for a store below another: what it is asked, the one above has counted already."""
        inner = copy.copy(self)
        inner._is_inner = True
        return inner

    def request(self, rows_N: np.ndarray, rows_U: np.ndarray) -> None:
        """A store was asked for `rows_N` (int64, any order), of which `rows_U` are distinct."""
        if self._is_inner:
            return
        asked_L2 = np.stack([self._by_label(rows_N), self._by_label(rows_U)], axis=1)
        with self._lock:
            self._totals["requests"] += 1
            self._asked_L2 += asked_L2

    def served(
        self, tier: str, rows_U: np.ndarray, *, bytes_U: int | np.ndarray = 0, reads_U: int | np.ndarray = 1
    ) -> None:
        """`tier` had these distinct rows; bytes_U, reads_U: what each cost, one number for all or one for each."""
        served_L3 = np.stack(
            [self._by_label(rows_U, cost) for cost in (1, reads_U, bytes_U)],
            axis=1,
        )
        with self._lock:
            self._tiers_L3[tier] = self._tiers_L3.get(tier, 0) + served_L3

    def stalled(self, tier: str, seconds: float) -> None:
        """Someone waited for `tier`."""
        with self._lock:
            self._stalled_s[tier] = self._stalled_s.get(tier, 0.0) + seconds

    def merge(self, other: "Counters") -> None:
        """Add what `other` counted under the same labels. Raises: StoreError for other labels."""
        if other.labels != self.labels:
            raise StoreError("counters of other labels cannot be added up")
        with other._lock:
            asked_L2, requests = other._asked_L2.copy(), other._totals["requests"]
            tiers_L3 = {tier: counts.copy() for tier, counts in other._tiers_L3.items()}
            stalled_s = dict(other._stalled_s)
        with self._lock:
            self._asked_L2 += asked_L2
            self._totals["requests"] += requests
            for tier, counts in tiers_L3.items():
                self._tiers_L3[tier] = self._tiers_L3.get(tier, 0) + counts
            for tier, seconds in stalled_s.items():
                self._stalled_s[tier] = self._stalled_s.get(tier, 0.0) + seconds

    def to_dict(self) -> dict[str, Any]:
        """For JSON: `requests`, `stalled_s` per tier, `total`, and `labels` in the order of their rows.

        `total` and each label: `rows` asked for, `distinct` of them (request by request), and per tier `hits`
        (distinct rows), `reads` and `bytes`.
        """
        with self._lock:
            asked_L2 = self._asked_L2.copy()
            tiers_L3 = {tier: counts.copy() for tier, counts in self._tiers_L3.items()}
            stalled_s, requests = dict(self._stalled_s), int(self._totals["requests"])
        labels = {
            name: _described(asked_L2[place], {tier: counts[place] for tier, counts in tiers_L3.items()})
            for place, name in enumerate(self._names)
            if name != UNLABELLED or asked_L2[place, ROWS]
        }
        total = _described(asked_L2.sum(0), {tier: counts.sum(0) for tier, counts in tiers_L3.items()})
        return {"requests": requests, "stalled_s": stalled_s, "total": total, "labels": labels}

    def _by_label(self, rows: np.ndarray, cost: int | np.ndarray = 1) -> np.ndarray:
        """Sum of `cost` over the rows of each label, int64 [L]."""
        place = np.searchsorted(self._firsts, rows, side="right") - 1
        inside = place >= 0
        inside[inside] = rows[inside] < self._ends[place[inside]]
        place[~inside] = len(self._names) - 1
        if isinstance(cost, np.ndarray):
            return np.bincount(place, weights=cost, minlength=len(self._names)).astype(np.int64)
        return np.bincount(place, minlength=len(self._names)) * cost


def _described(asked_2: np.ndarray, tiers_3: dict[str, np.ndarray]) -> dict[str, Any]:
    tiers = {
        tier: {"hits": int(counts[HITS]), "reads": int(counts[READS]), "bytes": int(counts[BYTES])}
        for tier, counts in tiers_3.items()
    }
    return {"rows": int(asked_2[ROWS]), "distinct": int(asked_2[DISTINCT]), "tiers": tiers}
