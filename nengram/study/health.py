"""The health of a trained table: which rows learnt, how often, from how many n-grams, and how far the gate believes them.

Everything is counted in the tokens the run really trained on, walked again as the training loop walked them. Per memory layer and
n-gram order (each n-gram is looked up once in every head):

    never touched      share of rows that no lookup of training read; they should be as they were drawn
    n-grams a row      distinct n-grams of training per row that was touched
    shared lookups     share of training lookups that met a row which another n-gram reads as well
    purity             share of a row's lookups that are its most frequent n-gram's, over all lookups: 1 without collisions
    updates            training steps that read a row: its optimiser steps, since a step sums its gradients per row first. A frozen
                       table is read and has none
    norms              of touched rows and of untouched ones, as quantiles over rows

and per block with memory, over evenly spread positions of dev: the gate (mean over branches) and the share of the residual (norm of
the update over norm of what it is added to), both by how often the n-gram had been read in training. A gate that opens for n-grams
never met believes noise; rows with few updates still hold their initial numbers.

A run that drew its tables anew at each pass (train.second_pass = "fresh_tables") is counted over its last pass. Where further passes
left rare n-grams out ("mask_rare"), updates are without them; lookups are all that the text asked for.
"""

import json
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from nengram.address import Addresser, ngram_counts, text_starts
from nengram.address.census import rows_of_ngrams
from nengram.errors import CheckpointError
from nengram.infer import LoadedRun, load_run
from nengram.memory import Engram
from nengram.model import Transformer
from nengram.store import Store
from nengram.study.codecs import vectors_of
from nengram.study.health_report import QUANTILES, draw_health, gates_table, rows_table
from nengram.study.history import (
    CLASSES,
    history_class,
    ngrams_read,
    numbered,
    positions_of,
    times,
    training_batches,
)
from nengram.study.outcome import keep_outcome
from nengram.study.reading import own_corpus
from nengram.text import Batch, Packed, eval_windows
from nengram.train import environment
from nengram.train.evaluate import tensors_of
from nengram.train.passes import SEEDS_APART, FurtherPasses

DEV_TOKENS = 32_768


def table_health(run_folder: Path, *, dev_tokens: int = DEV_TOKENS) -> dict:
    """What training made of a finished run's tables.

    Args:
        dev_tokens: judge gates on about so many positions of dev.
    Returns {"run", "trained_tokens", "tables": {layer_id: {"rows", "row_width", "orders": {order: {"rows", "ngrams",
    "never_touched", "ngrams_per_touched_row", "shared_lookups", "purity", "updates", "norms": {"touched", "untouched", "at_start"},
    "untouched_as_drawn"}}}}, "blocks": {block: {"gate", "residual_share", "by_history": {order: {class: {"positions", "gate",
    "residual_share"}}}}}, "dev_positions", "environment"}. Quantiles are those of `QUANTILES`, None over no rows; the gate of an
    ungated layer is None; "untouched_as_drawn" is the share of untouched rows that equal their first values, bit for bit, None
    where all rows were touched.
    Raises: CheckpointError for a run that is unfinished, has no memory, or whose rows were not chosen by n-grams (a row control);
    DataError when its corpus is not there any more.
    """
    run_folder = Path(run_folder)
    run = load_run(run_folder)
    if run.model.spec is None:
        raise CheckpointError(f"{run_folder}: this model has no memory layer, hence no table")
    if run.config.memory.control != "hashed":
        raise CheckpointError(
            f'{run_folder}: its rows were chosen by the control "{run.config.memory.control}", not by n-grams: '
            "there is no lookup whose health could be told"
        )
    data = own_corpus(run, run_folder)
    train = data.splits["train"]
    drawn_in = last_drawn_pass(run, train)
    batches = training_batches(run.config, train, run.facts["step"])
    batches = [batch for batch in batches if batch.pass_index >= drawn_in]
    return {
        "run": str(run_folder),
        "trained_tokens": sum(batch.ids_BT.size for batch in batches),
        "tables": _tables(run, batches, _steps_read(run, batches, train), _as_drawn(run, drawn_in)),
        **_gates(run, batches, data.splits["dev"], dev_tokens),
        "environment": environment(),
    }


def last_drawn_pass(run: LoadedRun, train: Packed) -> int:
    """The pass at whose beginning the tables as they are were drawn: the first, unless each pass drew its own."""
    per_step = run.config.train.batch * run.config.model.context
    is_fresh = run.config.train.second_pass == "fresh_tables"
    return (run.facts["step"] - 1) // ((len(train) - 1) // per_step) if is_fresh else 0


def _steps_read(run: LoadedRun, batches: list[Batch], train: Packed) -> dict[int, np.ndarray]:
    """How many training steps read each row, int64 [R] by layer."""
    spec, cids_V = run.model.spec, run.compression.cids_V
    address = Addresser(spec)
    passes = FurtherPasses(run.model, run.config, train, tier="resident")
    steps = {layer_id: np.zeros(spec.num_rows(layer_id), dtype=np.int64) for layer_id in spec.layer_ids}
    for batch in batches:
        rows = address(cids_V[batch.ids_BT], start_BT=batch.start_BT)
        rare = passes.before(batch.pass_index, begins=False)  # begins: would draw the tables anew
        if rare is not None:
            keep_BTS = rare.keep({layer_id: torch.from_numpy(rows_BTS) for layer_id, rows_BTS in rows.items()}).numpy()
            rows = {layer_id: rows_BTS[keep_BTS] for layer_id, rows_BTS in rows.items()}
        for layer_id, some in rows.items():
            steps[layer_id][np.unique(some)] += 1
    return steps


def _tables(run: LoadedRun, batches: list[Batch], steps: dict[int, np.ndarray], first: dict[int, np.ndarray]) -> dict:
    spec, cids_V = run.model.spec, run.compression.cids_V
    address = Addresser(spec)
    positions = positions_of(batches)
    cids_X = cids_V[positions.ids_X]
    start_X = text_starts(cids_X, positions.start_X, spec.end_cid)
    found = {
        layer_id: {"rows": spec.num_rows(layer_id), "row_width": run.config.memory.row_width, "orders": {}}
        for layer_id in spec.layer_ids
    }
    vectors = {layer_id: _vectors(run.model.stores[layer_id]) for layer_id in spec.layer_ids}
    frozen = run.config.memory.frozen
    for order in range(2, spec.max_order + 1):
        counts = ngram_counts(cids_X, start_X, order, pad_cid=spec.pad_cid)
        for layer_id, rows_UK in rows_of_ngrams(address, counts, spec.slot_orders == order).items():
            slots = np.flatnonzero(spec.slot_orders == order)
            low = int(spec.offsets(layer_id)[slots[0]])
            span = slice(low, low + int(spec.moduli(layer_id)[slots].sum()))
            parts = (of[layer_id][span] for of in (steps, vectors, first))
            found[layer_id]["orders"][order] = _order_health(
                rows_UK - low, counts.counts_U, *parts, is_learnt=not frozen
            )
    return found


def _order_health(
    rows_UK: np.ndarray,
    counts_U: np.ndarray,
    steps_R: np.ndarray,
    vectors_RE: np.ndarray,
    first_RE: np.ndarray,
    *,
    is_learnt: bool,
) -> dict:
    """One order of one table. rows_UK: row of each distinct n-gram in each head, from 0; counts_U: how often it was asked for."""
    num_rows, heads = len(steps_R), rows_UK.shape[1]
    rows_Z, reads_Z = rows_UK.ravel(), np.repeat(counts_U, heads)
    ngrams_R = np.bincount(rows_Z, minlength=num_rows)
    reads_R = np.bincount(rows_Z, reads_Z, minlength=num_rows)
    most_R = np.zeros(num_rows, dtype=np.int64)
    np.maximum.at(most_R, rows_Z, reads_Z)
    touched_R = steps_R > 0
    norms_R = np.linalg.norm(vectors_RE, axis=1)
    same_R = (vectors_RE == first_RE).all(axis=1)
    return {
        "rows": num_rows,
        "ngrams": len(counts_U),
        "never_touched": float(1 - touched_R.mean()),
        "ngrams_per_touched_row": float(ngrams_R[touched_R].mean()),
        "shared_lookups": float(reads_R[ngrams_R > 1].sum() / reads_R.sum()),
        "purity": float(most_R.sum() / reads_R.sum()),
        "updates": quantiles(steps_R[touched_R] * is_learnt),
        "norms": {
            "touched": quantiles(norms_R[touched_R]),
            "untouched": quantiles(norms_R[~touched_R]),
            "at_start": quantiles(np.linalg.norm(first_RE, axis=1)),
        },
        "untouched_as_drawn": None if touched_R.all() else float(same_R[~touched_R].mean()),
    }


def _as_drawn(run: LoadedRun, drawn_in: int) -> dict[int, np.ndarray]:
    """The rows as they were drawn at the beginning of a pass, float32 [R, E] by layer."""
    fresh = Transformer(run.config.model, run.config.memory, cids_V=run.compression.cids_V)
    fresh.create_tables(run.config.train.seed + drawn_in * SEEDS_APART)
    return {layer_id: _vectors(store) for layer_id, store in fresh.stores.items()}


def _vectors(store: Store) -> np.ndarray:
    return np.concatenate([vectors_NE.numpy() for _, vectors_NE in vectors_of(store)])


def quantiles(values: np.ndarray) -> list[float] | None:
    """The `QUANTILES` of some values, None of none."""
    return np.quantile(values, QUANTILES).tolist() if values.size else None


@torch.no_grad()
def _gates(run: LoadedRun, batches: list[Batch], dev: Packed, dev_tokens: int) -> dict:
    sizes = {"batch": run.config.train.batch, "context": run.config.model.context}
    windows = list(eval_windows(dev, **sizes))
    windows = windows[:: max(1, len(dev) // max(dev_tokens, sizes["batch"] * sizes["context"]))]
    trained, asked = positions_of(batches), positions_of(windows)
    heard = _heard(run.model, windows)
    class_by_order = {}
    for order in range(2, run.model.spec.max_order + 1):
        both = (ngrams_read(run.model.spec, run.compression.cids_V, one, order) for one in (trained, asked))
        class_by_order[order] = history_class(times(*numbered(*both)))
    blocks = {
        block: {name: None if values_X is None else quantiles(values_X) for name, values_X in measures.items()}
        | {"by_history": {order: _by_class(class_X, measures) for order, class_X in class_by_order.items()}}
        for block, measures in heard.items()
    }
    return {"blocks": blocks, "dev_positions": len(asked.ids_X)}


def _by_class(class_X: np.ndarray, measures: dict[str, np.ndarray | None]) -> dict:
    """Share of positions and mean of each measure in every history class; None where there is no position, or no gate."""
    found = {}
    for place, name in enumerate(CLASSES):
        here_X = class_X == place
        found[name] = {"positions": float(here_X.mean())} | {
            measure: float(values_X[here_X].mean()) if values_X is not None and here_X.any() else None
            for measure, values_X in measures.items()
        }
    return found


def _heard(model: Transformer, windows: list[Batch]) -> dict[int, dict[str, np.ndarray | None]]:
    """Gate and share of the residual at every position of the windows that has a target: float32 [X] each, by block."""
    parts: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    real_BT = np.empty(0)

    def listen(block: int):
        parts[block] = []

        def hook(layer, inputs, delta_BTGD) -> None:
            vecs, hidden_BTGD = inputs
            gated = isinstance(layer, Engram) and layer.gate != "open"
            gate_BT = (
                layer.gates(vecs, hidden_BTGD).mean(dim=2) if gated else torch.full(hidden_BTGD.shape[:2], torch.nan)
            )
            share_BT = delta_BTGD.flatten(2).norm(dim=2) / hidden_BTGD.flatten(2).norm(dim=2)
            parts[block].append((gate_BT.numpy()[real_BT], share_BT.numpy()[real_BT]))

        return hook

    hooks = [
        block.memory.register_forward_hook(listen(index))
        for index, block in enumerate(model.blocks)
        if block.memory is not None
    ]
    try:
        for window in windows:
            ids_BT, _, start_BT = tensors_of(window, model.embed.weight.device)
            real_BT = window.positions_BT >= 0
            model(ids_BT, start_BT=start_BT)
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for block, some in parts.items():
        gate_X, share_X = (np.concatenate(values) for values in zip(*some, strict=True))
        found[block] = {"gate": None if np.isnan(gate_X).all() else gate_X, "residual_share": share_X}
    return found


def run_health(run: Path, *, as_json: bool = False, out: Path | None = None, console: Console) -> dict:
    """`table_health` for the command line: tables, or JSON; with `out`, health.json and health.png in that folder. Raises as that."""
    if as_json:
        found = table_health(run)
        print(json.dumps(found, indent=1))
    else:
        with console.status("walking the training text again"):
            found = table_health(run)
        console.print(rows_table(found))
        console.print(gates_table(found))
    if out is not None:
        keep_outcome(found, out, "health", draw_health, None if as_json else console)
    return found
