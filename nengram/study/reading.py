"""Opening a run with its tables on any tier, and telling afterwards what was read.

The tier changes speed and memory, never a vector, so it is an option of reading a run and no part of it. A tiered table needs to know
which rows are read most: from a recording, or from the text the run was trained on, counted once and kept beside the run.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nengram.config import TableOptions
from nengram.errors import CheckpointError, DataError
from nengram.files import word_code, write_atomic
from nengram.infer import LoadedRun, load_run
from nengram.infer.hot import RowRecorder, check_share, count_rows, counts_name, hot_sets, load_counts
from nengram.infer.stats import to_dict, watch
from nengram.memory import MemoryStep
from nengram.store import Counters, HotSet, RowCounts
from nengram.study.arm import prepare_for
from nengram.text import Prepared

COUNTS = "row-counts"  # folder inside a run


@dataclass
class Reading:
    """A run that is open, and what is told about its tables at the end."""

    run: LoadedRun
    counters: dict[int, Counters]
    tokens: int = 0


@contextmanager
def open_run(folder: Path, options: TableOptions, console: Console) -> Iterator[Reading]:
    """Open a run as `options` say; at the end print and write what they ask for, and close the tables.

    Raises: as `load_run`; CheckpointError for recorded rows that are missing or of other addresses; ConfigError for a hot share.
    """
    hot = hot_for(folder, options, console) if options.table_tier == "tiered" else None
    run = load_run(folder, tier=options.table_tier, hot=hot, checked_share=options.verify_rows)
    recorder = RowRecorder(run.model.spec) if options.record_rows and run.model.spec else None
    reading = Reading(run, watch(run.model) if options.stats or options.stats_to else {})

    def observe(step: MemoryStep) -> None:
        reading.tokens += next(iter(step.rows.values()))[..., 0].numel()
        if recorder:
            recorder(step)

    run.model.observer = observe
    try:
        yield reading
        if options.stats:
            console.print(stats_table(to_dict(reading.counters, reading.tokens)))
        if options.stats_to:
            write_atomic(options.stats_to, json.dumps(to_dict(reading.counters, reading.tokens), indent=1))
        if recorder:
            recorder.save(options.record_rows)
    finally:
        for store in run.model.stores.values():
            store.close()


def hot_for(folder: Path, options: TableOptions, console: Console) -> dict[int, HotSet]:
    """The hot rows of a finished run, by the recording that the options name or by its own training text."""
    check_share(options.hot_share)
    run = load_run(folder, tier="mapped")
    spec = run.model.spec
    for store in run.model.stores.values():
        store.close()
    if spec is None:
        return {}
    if options.hot_from:
        return hot_sets(spec, load_counts(options.hot_from, spec), options.hot_share)
    return hot_sets(spec, training_counts(folder, run, console), options.hot_share)


def training_counts(folder: Path, run: LoadedRun, console: Console) -> dict[int, RowCounts]:
    """How often the train split reads each row, kept in the run's folder for the next time. Raises: as `own_corpus`."""
    with suppress(CheckpointError):
        return load_counts(folder / COUNTS, run.model.spec)
    console.print("counting the rows that the training text reads ...", highlight=False)
    counts = count_rows(run.model.spec, run.compression.cids_V, own_corpus(run, folder).splits["train"])
    try:
        for layer_id, one in counts.items():
            one.save(folder / COUNTS / counts_name(layer_id))
    except OSError as error:  # a run that may only be read is still a run
        console.print(
            f"the counts are not kept in {folder / COUNTS}: {error.strerror}", highlight=False, soft_wrap=True
        )
    return counts


def own_corpus(run: LoadedRun, folder: Path) -> Prepared:
    """The text a run was trained on. Raises: DataError when that is not what lies there now: its splits would mix."""
    data = prepare_for(run.config)
    if data.digest != run.facts["corpus"]:
        raise DataError(
            f"{run.config.data.corpus}: is not the text {folder} was trained on "
            f"({word_code(run.facts['corpus'])}, now {word_code(data.digest)}); its splits would mix"
        )
    return data


def stats_table(stats: dict) -> Table:
    """Per memory layer and n-gram order: rows asked for, distinct ones, who had them, bytes, and the time spent waiting."""
    table = Table(title=f"tables: {stats['tokens']:,} tokens read", title_justify="left", caption_justify="left")
    for name in ("layer", "rows", "distinct", "from", "rows there", "share", "kB"):
        table.add_column(name, justify="left" if name in ("layer", "from") else "right")
    for layer_id, layer in stats["layers"].items():
        for label, counts in layer["labels"].items():
            head = (f"{layer_id}, {label}", f"{counts['rows']:,}", f"{counts['distinct']:,}")
            for tier, found in counts["tiers"].items():
                share = found["hits"] / max(1, counts["distinct"])
                table.add_row(*head, tier, f"{found['hits']:,}", f"{share:.1%}", f"{found['bytes'] / 1e3:,.1f}")
                head = ("", "", "")
    table.caption = (
        "; ".join(map(_waiting, stats["layers"], stats["layers"].values())) or "this model has no memory layer"
    )
    return table


def _waiting(layer_id: str, layer: dict) -> str:
    waited_s = sum(layer["stalled_s"].values())
    each = f", {1e6 * waited_s / layer['requests']:,.0f} us each" if layer["requests"] else ""
    return f"layer {layer_id}: waited {1e3 * waited_s:,.1f} ms for {layer['requests']:,} requests{each}"
