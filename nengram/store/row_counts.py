"""How often each row of a table is read: what a hot set is built from, be it a corpus or a recording of real requests.

Most rows of a large table are never read, so counts are kept as two sorted arrays, the rows read and how often, and cost memory by
what was read, not by what the table holds. New reads wait in a list and are merged in bulk: one sort per sixteen million.
"""

import json
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nengram.errors import CheckpointError, StoreError
from nengram.files import write_atomic

FORMAT = "nengram-row-counts-1"
MERGE_AT = 16_000_000  # reads


class RowCounts:
    """Reads of one table's rows. addresses: digest of the address spec that chose them, "" if unknown; layer_id: whose table."""

    def __init__(self, num_rows: int, *, addresses: str = "", layer_id: int = 0) -> None:
        if num_rows < 1:
            raise StoreError(f"a table has at least one row, not {num_rows}")
        self.num_rows, self.addresses, self.layer_id = num_rows, addresses, layer_id
        self._rows_U, self._counts_U = np.empty(0, np.int64), np.empty(0, np.int64)
        self._pending: list[np.ndarray] = []
        self._waiting = 0

    def add(self, rows: np.ndarray) -> None:
        """Count a request: int64, any shape, repeats allowed. Raises: StoreError for rows outside the table."""
        rows_N = np.asarray(rows).reshape(-1)
        if rows_N.dtype != np.int64:
            raise StoreError(f"rows must be int64, not {rows_N.dtype}")
        if rows_N.size and not (rows_N.min() >= 0 and rows_N.max() < self.num_rows):
            raise StoreError(
                f"rows {rows_N.min()}..{rows_N.max()} are not all inside a table of {self.num_rows:,} rows"
            )
        self._pending.append(rows_N.copy())
        self._waiting += rows_N.size
        if self._waiting >= MERGE_AT:
            self._merge()

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows read, int64 [U] ascending, and how often, int64 [U]."""
        self._merge()
        return self._rows_U, self._counts_U

    def save(self, path: str | os.PathLike) -> None:
        """Write the counts as safetensors, whole or not at all. Raises: OSError."""
        rows_U, counts_U = self.arrays()
        about = {"num_rows": self.num_rows, "addresses": self.addresses, "layer_id": self.layer_id}
        write_atomic(
            path, save({"rows_U": rows_U, "counts_U": counts_U}, {"format": FORMAT, "about": json.dumps(about)})
        )

    @classmethod
    def load(cls, path: str | os.PathLike) -> "RowCounts":
        """What `save` wrote. Raises: CheckpointError, naming the file, for anything else."""
        path = Path(path)
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise CheckpointError(f"{path}: holds no row counts (format {metadata.get('format', 'none')!r})")
                about = json.loads(metadata["about"])
                counts = cls(int(about["num_rows"]), addresses=str(about["addresses"]), layer_id=int(about["layer_id"]))
                rows_U, counts_U = file.get_tensor("rows_U"), file.get_tensor("counts_U")
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file of row counts") from None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, StoreError) as error:
            raise CheckpointError(f"{path}: damaged row counts ({' '.join(str(error).split())})") from None
        sound = (
            rows_U.dtype == counts_U.dtype == np.int64
            and rows_U.ndim == 1
            and rows_U.shape == counts_U.shape
            and bool((rows_U[1:] > rows_U[:-1]).all())
            and (not rows_U.size or (rows_U[0] >= 0 and rows_U[-1] < counts.num_rows and counts_U.min() > 0))
        )
        if not sound:
            raise CheckpointError(f"{path}: damaged row counts (rows must ascend and lie in the table)")
        counts._rows_U, counts._counts_U = rows_U, counts_U
        return counts

    def _merge(self) -> None:
        if not self._pending:
            return
        rows_X = np.concatenate([self._rows_U, *self._pending])
        times_X = np.ones(rows_X.size, np.int64)
        times_X[: self._counts_U.size] = self._counts_U
        self._rows_U, place_X = np.unique(rows_X, return_inverse=True)
        self._counts_U = np.bincount(place_X, weights=times_X).astype(np.int64)
        self._pending, self._waiting = [], 0
