"""Which rows are worth their place in memory: those that text reads most.

N-grams follow Zipf's law, so a tenth of a table answers most of what is asked of it. The choice is static, by frequency, from a corpus
or from a recording of real requests: it needs no bookkeeping per lookup, and under independent draws it beats a least-recently-used
cache of the same size by several points. A corpus is read as the model reads it, one stream with look-back beginning anew at each
document.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nengram.address import Addresser, AddressSpec
from nengram.errors import CheckpointError, ConfigError
from nengram.memory import MemoryStep, hot_name
from nengram.store import HotSet, RowCounts
from nengram.text import Packed

TOKENS_AT_ONCE = 65_536


def count_rows(spec: AddressSpec, cids_V: np.ndarray, packed: Packed) -> dict[int, RowCounts]:
    """How often a split reads each row of each memory layer. cids_V: compressed id of every token id, int64 `[V]`."""
    counts = new_counts(spec)
    address = Addresser(spec)
    state = address.new_state(1)
    start_N = np.zeros(len(packed), dtype=bool)
    start_N[packed.doc_starts_D] = True
    for first in range(0, len(packed), TOKENS_AT_ONCE):
        part = slice(first, first + TOKENS_AT_ONCE)
        cids_BT = cids_V[packed.ids_N[part].astype(np.int64)][None]
        for layer_id, rows_BTS in address(cids_BT, start_BT=start_N[part][None], state=state).items():
            counts[layer_id].add(rows_BTS)
    return counts


def new_counts(spec: AddressSpec) -> dict[int, RowCounts]:
    """Counts at zero for every memory layer of a spec."""
    return {
        layer_id: RowCounts(spec.num_rows(layer_id), addresses=spec.digest, layer_id=layer_id)
        for layer_id in spec.layer_ids
    }


def hot_sets(spec: AddressSpec, counts: Mapping[int, RowCounts], share: float) -> dict[int, HotSet]:
    """Of each table, the rows read most: `share` of its rows, fewer when fewer were ever read. Raises: ConfigError."""
    check_share(share)
    return {
        layer_id: HotSet.from_counts(*one.arrays(), int(share * one.num_rows), belongs_to=hot_name(spec, layer_id))
        for layer_id, one in counts.items()
    }


def check_share(share: float) -> None:
    """Raises: ConfigError unless `share` is one."""
    if not 0 <= share <= 1:
        raise ConfigError(f"hot share {share} must lie in 0..1: it is a share of the table's rows")


class RowRecorder:
    """Counts the rows of every memory step it is shown, for a hot set made of real requests."""

    def __init__(self, spec: AddressSpec) -> None:
        self.counts = new_counts(spec)

    def __call__(self, step: MemoryStep) -> None:
        for layer_id, rows_BTS in step.rows.items():
            self.counts[layer_id].add(rows_BTS.cpu().numpy())

    def save(self, folder: str | Path) -> list[Path]:
        """One file per memory layer. Raises: OSError."""
        paths = [Path(folder) / counts_name(layer_id) for layer_id in self.counts]
        for path, counts in zip(paths, self.counts.values(), strict=True):
            counts.save(path)
        return paths


def counts_name(layer_id: int) -> str:
    """File name of one memory layer's row counts."""
    return f"row-counts-{layer_id}.safetensors"


def load_counts(folder: str | Path, spec: AddressSpec) -> dict[int, RowCounts]:
    """What a `RowRecorder` saved for these addresses. Raises: CheckpointError when a file is missing, damaged or of others."""
    found = {layer_id: RowCounts.load(Path(folder) / counts_name(layer_id)) for layer_id in spec.layer_ids}
    for layer_id, counts in found.items():
        if counts.addresses != spec.digest or counts.num_rows != spec.num_rows(layer_id):
            raise CheckpointError(
                f"{Path(folder) / counts_name(layer_id)}: rows of other addresses than {spec.word_code}"
            )
    return found
