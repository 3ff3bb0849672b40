"""Is addressing as good as free? The compiled hash against the NumPy everyone writes first, and against the gather that follows it.

The sizes are those of the published demo: 98,627 compressed ids, two layers, orders 2 and 3, eight heads, moduli just above 646,400.
Rows are 256 bytes. Both layers read one table of 10.3 million rows (2.6 GB, far beyond any cache), and batches take turns, so that a
row is rarely still in a cache from the time before. Ids come uniform, so that nearly every row is a new one, and with Zipf's
frequencies, as in text, where the rows of common n-grams repeat within a batch.
"""

from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch

from benchmarks.gates import check_rows, require_equal
from benchmarks.measure import interleave
from benchmarks.report import figure, result
from nengram.address import Addresser, AddressSpec
from nengram.store import ResidentStore


@dataclass(frozen=True)
class Sizes:
    """`rows_per_head` is nominal: each head takes the next unused prime."""

    compressed_vocab_size: int = 98_627
    rows_per_head: int = 646_400
    row_width: int = 64  # float32: 256 bytes
    batch: int = 4
    context: int = 1024
    batches: int = 8  # different ones, by turns
    pairs: int = 60


FULL = Sizes()


def run(sizes: Sizes = FULL) -> dict:
    """The result of this benchmark. Raises RedGate."""
    spec = AddressSpec.engram(
        compressed_vocab_size=sizes.compressed_vocab_size,
        rows_per_head=[sizes.rows_per_head] * 2,
        heads=8,
        layer_ids=[1, 15],
        pad_cid=2,
    )
    addresser = Addresser(spec, backend="numba")
    store = numbered_table(max(spec.num_rows(layer_id) for layer_id in spec.layer_ids), sizes.row_width)
    figures, absolute = [], {}
    for draw in (uniform_ids, zipf_ids):
        batches = [draw(sizes, seed) for seed in range(sizes.batches)]
        verify(addresser, store, batches[0])
        on_numpy = interleave(
            addresser, lambda cids_BT: numpy_rows(cids_BT, spec), cycle(batches).__next__, sizes.pairs
        )
        with_rows = cycle([(cids_BT, as_tensors(addresser(cids_BT))) for cids_BT in batches])
        on_gather = interleave(
            lambda given: addresser(given[0]), lambda given: gather(store, given[1]), with_rows.__next__, sizes.pairs
        )
        ids = draw.__name__.removesuffix("_ids")
        figures += [
            figure(f"NumPy form / numba, {ids} ids", on_numpy.speedup, "x", (">=", 3.0)),
            figure(f"hash / gather of the same batch, {ids} ids", on_gather.cost, "share", ("<", 0.10)),
        ]
        tokens = sizes.batch * sizes.context
        absolute |= {
            f"numba_ns_per_token_{ids}": 1e9 * np.median(on_numpy.ours_s) / tokens,
            f"numpy_ns_per_token_{ids}": 1e9 * np.median(on_numpy.theirs_s) / tokens,
            f"gather_ns_per_row_{ids}": 1e9 * np.median(on_gather.theirs_s) / (tokens * 2 * spec.slots),
        }
    what = f"hashing, 2 layers x {spec.slots} slots, batch {sizes.batch} x {sizes.context}, moduli from {sizes.rows_per_head:,}"
    gate = "rows of numba and NumPy equal the plain-integer reference; gathered vectors are those of their rows"
    return result("hashing", what, gate, figures, absolute)


def numpy_rows(cids_BT: np.ndarray, spec: AddressSpec) -> dict[int, np.ndarray]:
    """The opponent: shift, multiply, XOR, one `%` per head, stack; layer by layer."""
    rows = {}
    for layer in spec.layers:
        mix_BT = cids_BT * layer.multipliers[0]
        heads = []
        for lag, moduli in enumerate(layer.moduli, start=1):
            shifted_BT = np.pad(cids_BT, ((0, 0), (lag, 0)), constant_values=spec.pad_cid)[:, : cids_BT.shape[1]]
            mix_BT = mix_BT ^ (shifted_BT * layer.multipliers[lag])
            heads += [mix_BT % modulus for modulus in moduli]
        rows[layer.layer_id] = np.stack(heads, axis=-1) + spec.offsets(layer.layer_id)
    return rows


def gather(store: ResidentStore, rows: dict[int, torch.Tensor]) -> None:
    """Read every layer's rows into buffers of the store's ring, as a forward pass does."""
    tickets = [store.prefetch(rows_BTS) for rows_BTS in rows.values()]
    for ticket in tickets:
        ticket.release()


def verify(addresser: Addresser, store: ResidentStore, cids_BT: np.ndarray) -> None:
    """Raises RedGate."""
    rows = addresser(cids_BT)
    check_rows(rows, cids_BT, addresser.spec)
    for layer_id, rows_BTS in numpy_rows(cids_BT, addresser.spec).items():
        require_equal(f"NumPy rows of layer {layer_id}", rows_BTS, rows[layer_id])
        with store.prefetch(torch.from_numpy(rows_BTS)) as ticket:
            require_equal("gathered vectors", ticket.vectors()[..., -1].numpy(), rows_BTS.astype(np.float32))


def numbered_table(num_rows: int, row_width: int) -> ResidentStore:
    """A table whose row r is full of r. Written, for pages never written to are all one page of zeros, which a cache holds."""
    store = ResidentStore(num_rows, row_width, init_std=0)
    store.weight.copy_(torch.arange(num_rows).unsqueeze(1))
    return store


def uniform_ids(sizes: Sizes, seed: int) -> np.ndarray:
    """int64 [B, T], every compressed id equally likely."""
    return np.random.default_rng(seed).integers(0, sizes.compressed_vocab_size, (sizes.batch, sizes.context))


def zipf_ids(sizes: Sizes, seed: int) -> np.ndarray:
    """int64 [B, T], the id of rank r as likely as 1 / r, drawn independently."""
    until_V = np.cumsum(1 / np.arange(1, sizes.compressed_vocab_size + 1))
    drawn_BT = np.random.default_rng(seed).random((sizes.batch, sizes.context)) * until_V[-1]
    return np.searchsorted(until_V, drawn_BT)


def as_tensors(rows: dict[int, np.ndarray]) -> dict[int, torch.Tensor]:
    """The same numbers as tensors."""
    return {layer_id: torch.from_numpy(rows_BTS) for layer_id, rows_BTS in rows.items()}
