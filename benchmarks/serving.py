"""What does a table on disk cost where text is made? Resident and disk by turns, token by token, in one process.

The model is untrained, since speed does not ask what the weights are; the text is real and held out, since speed does ask which rows
are read. Every step of every tier reads the same ids and must give the same logits, bit for bit. Before each step from disk the pages
of the tables are dropped from the page cache, so the hot set is all the memory they have: a tenth or less. That is harsher than life,
where the cache keeps what was read a second ago.

Per batch: the same text three times, its table resident, on disk with rows requested when the ids are known, and on disk with rows
requested only when a layer waits for them. Wall-clock time, because waiting is what is measured; the figure is the sum over all steps
from disk divided by the sum of their neighbours from memory, with the interval that 2,000 resamplings of the pairs give.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.gates import RedGate
from benchmarks.report import figure, result
from nengram.config import MemoryConfig, ModelConfig, load_config
from nengram.infer.hot import count_rows, hot_sets
from nengram.memory import save_table
from nengram.model import Transformer
from nengram.store import Counters, MappedStore, Store, Ticket, TieredStore
from nengram.study.arm import prepare_for
from nengram.text import Prepared

LAYERS = (1, 4)
LIMIT = 1.05  # the interval's upper end, against resident
PREFILL_AIM = 1.25


@dataclass(frozen=True)
class Sizes:
    """Two layers of 16 heads x 640,000 rows of 256 bytes: 4.9 GiB of tables; a forward pass of ten milliseconds or more."""

    width: int = 512
    blocks: int = 8
    row_width: int = 64
    rows_per_head: int = 640_000
    context: int = 256
    hot_share: float = 0.1
    batches: tuple[int, ...] = (1, 8)
    pairs: int = 960
    warmup_windows: int = 1
    prefills: int = 24
    resamples: int = 2_000
    corpus: str = "bundled"


FULL = Sizes()


def run(sizes: Sizes = FULL, data: Prepared | None = None, folder: str | None = None) -> dict:
    """The result of this benchmark. Raises RedGate."""
    data = data or prepare_for(load_config("demo", (f'data.corpus="{sizes.corpus}"',)))
    model = build(sizes, data)
    figures, absolute = [], {}
    with TemporaryDirectory(dir=folder) as place, torch.no_grad():
        tiers = make_tiers(sizes, model, data, Path(place))
        absolute["table_gib"] = sum(s.num_rows * s.row_width * 4 for s in tiers.resident.values()) / 2**30
        for batch in sizes.batches:
            decode = decode_steps(sizes, model, tiers, data, batch)
            figures += decode_figures(sizes, batch, decode, absolute)
            absolute |= counted(sizes, model, tiers, data, batch)
            figures.append(prefill_figure(sizes, model, tiers, data, batch))
        tiers.close()
    what = (
        f"{sizes.blocks} blocks of width {sizes.width}, {len(LAYERS)} memory layers, {absolute['table_gib']:.1f} GiB of table on disk, "
        f"hot set {sizes.hot_share:.0%}, page cache dropped before every step; held-out text of {sizes.corpus}"
    )
    return result("serving", what, "logits of every step equal bit for bit on every tier", figures, absolute)


def build(sizes: Sizes, data: Prepared) -> Transformer:
    """An untrained model with memory in two blocks, its tables resident."""
    torch.manual_seed(0)
    heads = max(1, sizes.width // 64)
    model = Transformer(
        ModelConfig(
            vocab_size=data.vocab_size,
            width=sizes.width,
            blocks=sizes.blocks,
            heads=heads,
            kv_heads=max(1, heads // 4),
            context=sizes.context,
            experts=16,
            expert_width=sizes.width // 2,
            shared_width=sizes.width,
        ),
        MemoryConfig(
            kind="engram",
            blocks=tuple(layer for layer in LAYERS if layer < sizes.blocks),
            row_width=sizes.row_width,
            rows_per_head=(sizes.rows_per_head,) * 2,
        ),
        cids_V=data.compression.cids_V,
    )
    model.init_weights(0)
    return model.eval()


class Late(Store):
    """A store whose rows are requested only when somebody waits for them: serving without prefetch."""

    def __init__(self, below: Store) -> None:
        self.below = below
        self.num_rows, self.row_width, self.codec = below.num_rows, below.row_width, below.codec
        self.dtype, self.device = below.dtype, below.device

    def prefetch(self, rows: torch.Tensor) -> Ticket:
        return LateTicket(self.below, rows)

    def update(self, rows_U, grads_UE, rule, lr) -> None:
        raise NotImplementedError

    def tensors(self) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def load_tensors(self, tensors) -> None:
        raise NotImplementedError

    def read_coded(self, rows_U) -> torch.Tensor:
        raise NotImplementedError


class LateTicket(Ticket):
    """Asks at the first `vectors()`."""

    def __init__(self, below: Store, rows: torch.Tensor) -> None:
        self._below, self._rows, self._ticket, self._over = below, rows, None, False

    def vectors(self) -> torch.Tensor:
        self._ticket = self._ticket or self._below.prefetch(self._rows)
        return self._ticket.vectors()

    def release(self) -> None:
        self._over = True
        if self._ticket:
            self._ticket.release()

    @property
    def released(self) -> bool:
        return self._over


@dataclass
class Tiers:
    """The same tables three ways, and what empties the page cache of the files."""

    resident: dict[int, Store]
    disk: dict[int, Store]
    late: dict[int, Store]
    mapped: list[MappedStore]

    def evict(self) -> None:
        """Drop the files' pages, which are clean, from the page cache."""
        for file in (file for store in self.mapped for file in store.reader.files):
            os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        for store in self.mapped:
            store.close()


def make_tiers(sizes: Sizes, model: Transformer, data: Prepared, folder: Path) -> Tiers:
    """Write the resident tables to files and open these behind a hot set made from the train split."""
    hot = hot_sets(model.spec, count_rows(model.spec, model.cids_V.numpy(), data.splits["train"]), sizes.hot_share)
    disk, mapped = {}, []
    for layer_id, store in model.stores.items():
        path = folder / f"table-{layer_id}.safetensors"
        save_table(path, store, model.spec, layer_id)
        mapped.append(MappedStore(path))
        disk[layer_id] = TieredStore(mapped[-1], hot[layer_id])
    os.sync()  # what was just written is on its way to the same disk
    return Tiers(dict(model.stores), disk, {layer_id: Late(store) for layer_id, store in disk.items()}, mapped)


def decode_steps(sizes: Sizes, model: Transformer, tiers: Tiers, data: Prepared, batch: int) -> np.ndarray:
    """Seconds of every step, `[steps, 3]`: resident, disk, disk without prefetch. Raises RedGate."""
    arms = (tiers.resident, tiers.disk, tiers.late)
    spent, streams = [], text_of(data, batch, sizes.context)
    windows_left = sizes.warmup_windows
    while len(spent) < sizes.pairs:
        caches = [model.new_cache(batch, sizes.context) for _ in arms]
        ids_BT = next(streams)
        for place in range(sizes.context):
            step = np.empty(3)
            logits = [None] * 3
            for arm in np.roll(np.arange(3), place):  # who goes first changes
                tiers.evict()
                step[arm], logits[arm] = timed(model, arms[arm], ids_BT[:, place : place + 1], caches[arm])
            require_same(logits)
            if place >= 8 and not windows_left:  # the first steps of a window read caches that were just made
                spent.append(step)
        windows_left = max(0, windows_left - 1)
    return np.array(spent[: sizes.pairs])


def timed(model: Transformer, stores: dict[int, Store], ids_BT: torch.Tensor, cache) -> tuple[float, torch.Tensor]:
    """Wall seconds of one forward pass from a tier, and its logits."""
    model.stores = stores
    began = time.perf_counter()
    logits = model(ids_BT, cache=cache)
    return time.perf_counter() - began, logits


def prefill_figure(sizes: Sizes, model: Transformer, tiers: Tiers, data: Prepared, batch: int) -> dict:
    """Whole windows at once, resident and disk by turns."""
    spent, streams = [], text_of(data, batch, sizes.context, skip=0.5)
    for place in range(sizes.prefills):
        ids_BT, step, logits = next(streams), np.empty(2), [None] * 2
        for arm in (0, 1) if place % 2 else (1, 0):
            tiers.evict()
            step[arm], logits[arm] = timed(model, (tiers.resident, tiers.disk)[arm], ids_BT, None)
        require_same(logits)
        spent.append(step)
    spent = np.array(spent)
    what = f"prefill of {batch} x {sizes.context} tokens, disk / resident"
    return interval_figure(what, spent[:, 1], spent[:, 0], sizes, PREFILL_AIM)


def require_same(logits: list[torch.Tensor]) -> None:
    """Raises RedGate unless all tiers said the same."""
    if not all(torch.equal(logits[0], other) for other in logits[1:]):
        raise RedGate("a tier gave other logits than the resident table")


def decode_figures(sizes: Sizes, batch: int, spent: np.ndarray, absolute: dict) -> list[dict]:
    """The ratio that is held against its goal, the same without prefetch, and the milliseconds behind them."""
    resident, disk, late = spent.T
    for name, arm in (("resident", resident), ("disk", disk), ("disk_without_prefetch", late)):
        absolute[f"batch_{batch}_{name}_ms"] = 1e3 * float(np.mean(arm))
        absolute[f"batch_{batch}_{name}_median_ms"] = 1e3 * float(np.median(arm))
    return [
        interval_figure(f"decode at batch {batch}, disk / resident", disk, resident, sizes, LIMIT),
        interval_figure(f"decode at batch {batch}, disk without prefetch / resident", late, resident, sizes),
    ]


def interval_figure(what: str, ours: np.ndarray, theirs: np.ndarray, sizes: Sizes, limit: float | None = None) -> dict:
    """Ratio of sums with its bootstrap 95 % interval; the goal is held against the interval's upper end."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(ours), (sizes.resamples, len(ours)))
    low, high = np.percentile(ours[picks].sum(1) / theirs[picks].sum(1), (2.5, 97.5))
    found = figure(what, np.array([ours.sum() / theirs.sum()]), "x", None)
    found |= {"bounds": [float(low), float(high)], "samples": len(ours)}
    if limit is not None:
        found |= {"goal": f"upper end <= {limit:.2f}x", "met": bool(high <= limit)}
    return found


def counted(sizes: Sizes, model: Transformer, tiers: Tiers, data: Prepared, batch: int) -> dict[str, float]:
    """Of one step of all layers, on average: rows asked for, distinct ones, device reads; and the share that the hot set answered.

    One window more, not timed: counting is not free.
    """
    for store in tiers.disk.values():
        store.counters = Counters([("all", 0, store.num_rows)])
    cache, ids_BT = model.new_cache(batch, sizes.context), next(text_of(data, batch, sizes.context))
    for place in range(sizes.context):
        tiers.evict()
        timed(model, tiers.disk, ids_BT[:, place : place + 1], cache)
    seen = [store.counters.to_dict() for store in tiers.disk.values()]
    steps = seen[0]["requests"]
    found = {
        "rows_a_step": sum(one["total"]["rows"] for one in seen) / steps,
        "distinct_rows_a_step": sum(one["total"]["distinct"] for one in seen) / steps,
        "device_reads_a_step": sum(one["total"]["tiers"].get("disk", {"reads": 0})["reads"] for one in seen) / steps,
        "hot_share": sum(one["total"]["tiers"]["hot"]["hits"] for one in seen)
        / sum(one["total"]["distinct"] for one in seen),
        "disk_waited_us_a_step": 1e6 * sum(sum(one["stalled_s"].values()) for one in seen) / steps,
    }
    for store in tiers.disk.values():
        store.counters = None
    return {f"batch_{batch}_{name}": value for name, value in found.items()}


def text_of(data: Prepared, batch: int, context: int, skip: float = 0.0) -> Iterator[torch.Tensor]:
    """Windows of held-out text for ever, int64 [batch, context], each stream going on where it was."""
    ids_N = torch.from_numpy(data.splits["test"].ids_N.astype(np.int64))
    starts = np.linspace(skip * len(ids_N) / batch, len(ids_N), batch, endpoint=False).astype(int)
    while True:
        yield torch.stack([ids_N[(start + torch.arange(context)) % len(ids_N)] for start in starts])
        starts = (starts + context) % len(ids_N)
