"""Which rows are worth memory: the most frequent ones of a corpus or a recorded trace, chosen once.

A static set by frequency hits 3-13 points more often than an LRU of the same size under Zipf draws, and its lookup
keeps no books: a bit per row says whether it is hot, and a count per 64 rows where it lies among the hot ones. That is
1.5 bits a row, so the index of 400 million rows is 72 MB, and a lookup touches two cache lines.
"""

import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nengram.errors import CheckpointError, StoreError
from nengram.files import write_atomic

FORMAT = "nengram-hot-set-1"


class HotSet:
    """Rows of one table, ascending. belongs_to: whatever tells that table's row numbers from another's.

    A row number means nothing by itself: pass the digest of what chose it, and `load` refuses a set of another.
    Raises: StoreError for rows that are not int64, or negative. Repeats count once.
    """

    def __init__(self, rows: np.ndarray, *, belongs_to: str = "") -> None:
        rows = np.asarray(rows)
        if rows.dtype != np.int64 or rows.ndim != 1:
            raise StoreError(f"a hot set is a list of int64 rows, not {rows.dtype} of shape {rows.shape}")
        self.rows_H = np.unique(rows)
        if self.rows_H.size and self.rows_H[0] < 0:
            raise StoreError(f"a hot set has no row {self.rows_H[0]}")
        self.belongs_to = belongs_to

    def __len__(self) -> int:
        return self.rows_H.size

    def __repr__(self) -> str:
        return f"HotSet({len(self):,} rows)"

    @classmethod
    def from_counts(cls, rows: np.ndarray, counts: np.ndarray, budget_rows: int, *, belongs_to: str = "") -> "HotSet":
        """The `budget_rows` most frequent rows, of equally frequent ones the lower; rows never seen are left out.

        rows: distinct, int64 `[U]`, any order; counts: how often each was asked for, `[U]`.
        Raises: StoreError when they do not fit together, or a row occurs twice.
        """
        rows, counts = np.asarray(rows), np.asarray(counts)
        if rows.shape != counts.shape or rows.ndim != 1:
            raise StoreError(f"one count for each row is needed, not {counts.shape} for {rows.shape}")
        if budget_rows < 0:
            raise StoreError(f"a hot set has 0 rows or more, not {budget_rows}")
        if np.unique(rows).size < rows.size:
            raise StoreError("a row is counted twice: give each row once, with all its counts")
        seen = counts > 0
        rows, counts = rows[seen], counts[seen]
        order = np.lexsort((rows, -counts.astype(np.int64)))
        return cls(rows[order[:budget_rows]], belongs_to=belongs_to)

    def save(self, path: str | os.PathLike) -> None:
        """Write the set as safetensors (`rows` int64 `[H]`), whole or not at all. Raises: OSError."""
        write_atomic(path, save({"rows": self.rows_H}, {"format": FORMAT, "belongs_to": self.belongs_to}))

    @classmethod
    def load(cls, path: str | os.PathLike, belongs_to: str | None = None) -> "HotSet":
        """What `save` wrote. belongs_to: refuse the set of any other table.

        Raises: CheckpointError, naming the file.
        """
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; a hot set is expected here")
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                rows = file.get_tensor("rows") if metadata.get("format") == FORMAT else None
            if rows is None:
                raise CheckpointError(f"{path}: holds no hot set (format {metadata.get('format', 'none')!r})")
            found = cls(rows, belongs_to=metadata.get("belongs_to", ""))
        except (OSError, SafetensorError, ValueError, TypeError, StoreError) as error:
            raise CheckpointError(f"{path}: damaged, or no hot set ({' '.join(str(error).split())})") from None
        if not np.array_equal(rows, found.rows_H):
            raise CheckpointError(f"{path}: damaged: the rows of a hot set ascend")
        if belongs_to is not None and found.belongs_to != belongs_to:
            raise CheckpointError(
                f'{path}: is a hot set for "{found.belongs_to}", this table\'s rows are "{belongs_to}": '
                "it would keep other rows hot; make one from this table's counts"
            )
        return found


class RowIndex:
    """Bitmap and running counts over `num_rows` rows: whether a row is in a set, and its rank there.

    Raises: StoreError for a row outside the table.
    """

    def __init__(self, rows_H: np.ndarray, num_rows: int) -> None:
        if rows_H.size and not rows_H[-1] < num_rows:
            raise StoreError(f"the hot set has row {rows_H[-1]:,}, the table only {num_rows:,} rows")
        self.words_W = np.zeros(-(-num_rows // 64), np.uint64)
        np.bitwise_or.at(self.words_W, rows_H >> 6, np.uint64(1) << (rows_H & 63).astype(np.uint64))
        places_W = np.arange(self.words_W.size, dtype=np.int64) << 6
        self.before_W = np.searchsorted(rows_H, places_W).astype(np.uint32)

    def ranks(self, rows_N: np.ndarray) -> np.ndarray:
        """Place of each row in the set, int64 `[N]`, -1 where it is not in it. Rows lie in the table."""
        from nengram.store import row_kernels  # compiles at first use

        ranks_N = np.empty(rows_N.size, np.int64)
        row_kernels.ranks_of(self.words_W, self.before_W, rows_N, ranks_N)
        return ranks_N
