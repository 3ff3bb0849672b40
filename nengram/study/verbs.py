"""What the verbs of the command line do, as functions: run, show progress, print the result, leave the files.

Each takes a rich Console and returns what it found, so a notebook can call it as well as the shell.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nengram.address import take_census
from nengram.config import Config, TableOptions, load_config
from nengram.errors import DataError
from nengram.files import write_atomic
from nengram.infer import load_run, stream_text
from nengram.infer.stats import to_dict
from nengram.model import Transformer, address_spec, resolve, split_budget
from nengram.study.arm import corpus_place, prepare_for
from nengram.study.compare import arm_config, check, compare, nats_by_source, reference_of
from nengram.study.meter import draw_meter, meter_of
from nengram.study.reading import Reading, open_run, own_corpus
from nengram.study.report import draw, print_results, print_verdict
from nengram.study.tokens import print_gains, starts_of, to_json, token_gains
from nengram.study.trace import print_trace, trace
from nengram.study.tune import tune, tune_table
from nengram.text import CompressionMap, Prepared, load_tokenizer, prepare
from nengram.train import steps_of, token_nats, train
from nengram.train.optim import routing

TEMPLATE_CAVEAT = (
    "This text is rich in templates (country reports, dictionary glosses), which flatters a lookup: "
    "read the gain by source, and try your own text with data.corpus=FILE."
)


def run_compare(config: Config, out: Path, *, resume: bool, console: Console) -> dict:
    """The head-to-head with everything it prints and draws; returns the results. Raises as `compare`."""
    began = time.monotonic()
    config = check(config)
    data = prepare_for(config)
    print_plan(config, data, console)
    results = compare(config, out, resume=resume, console=console)
    print_results(results, console)
    if {"engram", "moe"} <= set(config.compare.arms):
        helped, hurt = token_gains(config, data, out)
        print_gains(helped, hurt, console)
        write_atomic(out / "tokens.json", json.dumps(to_json(helped, hurt), indent=1))
    if config.data.corpus == "bundled":
        console.print(f"\n{TEMPLATE_CAVEAT}")
    print_verdict(results, console, reference_of(config))
    picture = draw(results, out)
    console.print(
        f"\n{time.monotonic() - began:.0f} s. {out / 'results.json'}, {out / 'tokens.json'}, "
        + (str(picture) if picture else "no picture: pip install nengram[plot]")
    )
    return results


def print_plan(config: Config, data: Prepared, console: Console) -> None:
    """What is about to run: text, arms, sizes. Says so when an arm's learning rate was not tuned."""
    sizes = ", ".join(f"{name} {len(split):,}" for name, split in data.splits.items())
    vocab_size = data.tokenizer.get_vocab_size()
    compressed = data.compression.compressed_vocab_size
    console.print(
        f"text: {config.data.corpus} ({', '.join(data.sources)}); tokens: {sizes}; "
        f"vocabulary {vocab_size:,}, compressed {compressed:,} ({1 - compressed / vocab_size:.1%} fewer)"
    )
    for arm in config.compare.arms:
        split = split_budget(
            config.budget.scale,
            config.budget.rho,
            vocab_size=vocab_size,
            arm=arm,
            model=config.model,
            memory=config.memory,
        )
        rows = f", {list(split.memory.rows_per_head)} rows a head" if split.memory.kind != "none" else ""
        console.print(
            f"  {arm:10} {split.cost.total:,} parameters, {split.cost.flops:,} FLOPs a token, rho {split.rho:.0%}, "
            f"{split.model.experts} experts, shared width {split.model.shared_width}{rows}",
            highlight=False,
        )
    untuned = [arm for arm in config.compare.arms if arm not in config.compare.lr]
    if untuned:
        console.print(
            f"  learning rate not tuned for {', '.join(untuned)} (train.lr {config.train.lr}); search with --tune"
        )
    steps = steps_of(resolve(arm_config(config, "moe", 0), vocab_size), data)
    one_pass = (len(data.splits["train"]) - 1) // (config.train.batch * config.model.context)
    if steps > one_pass:
        console.print(
            f"  [bold]note[/]: {steps} steps are more than one pass ({one_pass} steps); tables overfit text they read twice: "
            "train.tokens=0 takes one pass, train.second_pass=fresh_tables draws them anew"
        )
    runs = len(config.compare.arms) * len(config.compare.seeds)
    console.print(f"  {runs} runs of {steps} steps, one thread each", highlight=False)


def run_tune(config: Config, out: Path, console: Console) -> dict:
    """Search every arm's learning rate; prints the table and the line for the preset. Raises as `tune`."""
    found = tune(config, out, console)
    console.print(tune_table(found))
    console.print(
        f"[compare]\nlr = {{ {', '.join(f'{arm} = {lr}' for arm, lr in found['lr'].items())} }}", markup=False
    )
    return found


def run_train(config: Config, out: Path, *, resume: bool, console: Console) -> Path:
    """Train one model with a progress line; returns the run folder. Raises as `train`."""
    data = prepare_for(config)
    print_routing(config, data, console)
    columns = (
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    record = None
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("train", total=None, loss="")
        for record in train(config, data, out, resume=resume):
            rate = f"loss {record.loss_nats:.3f}  {record.tokens_per_s:,.0f} tokens/CPU-s"
            progress.update(bar, completed=record.step, total=record.steps, loss=rate)
            if not console.is_terminal and record.step % max(1, config.train.log_every) == 0:
                console.print(f"step {record.step}/{record.steps}  {rate}", highlight=False)
            if record.dev_nats_permuted is not None:
                lookup = record.dev_nats_permuted - record.dev_nats
                told = f"step {record.step}: dev {record.dev_nats:.4f} nats, of which the lookup saves {lookup:+.4f}"
                console.print(told, highlight=False)
    if record is None:
        console.print(f"{out}: this run is finished; nothing to do")
    else:
        console.print(
            f"{record.tokens:,} tokens, dev {record.dev_nats:.4f} nats, {record.cpu_seconds:.0f} CPU-s; {out / 'final'}"
        )
        if config.train.meter_every and (picture := draw_meter({config.name: [meter_of(out)]}, out / "meter.png")):
            console.print(f"the lookup's contribution over training: {picture}", highlight=False, soft_wrap=True)
    return out


def print_routing(config: Config, data: Prepared, console: Console) -> None:
    """What moves which parameters of the model that a config asks for. Raises ConfigError."""
    resolved = resolve(config, data.tokenizer.get_vocab_size())
    with torch.device("meta"):
        model = Transformer(resolved.model, resolved.memory)
    table = Table(title=f"train.optimizer {resolved.train.optimizer}, train.schedule {resolved.train.schedule}")
    for name in ("kind", "moved by", "tensors", "parameters", "rate", "decay"):
        table.add_column(name, justify="left" if name in ("kind", "moved by") else "right")
    for route in routing(model, resolved.train):
        numbers = (f"{route.tensors:,}", f"{route.parameters:,}", f"{route.lr:g}", f"{route.decay:g}")
        table.add_row(route.kind, route.rule, *numbers)
    console.print(table)


def run_eval(
    run: Path, *, split: str, corpus: str, control: str, as_json: bool, tables: TableOptions, console: Console
) -> dict:
    """Loss by source of a finished run, under a row control if asked. Raises CheckpointError, DataError; as `open_run`."""
    with open_run(run, tables, console) as reading:
        losses = _losses(run, reading, split=split, corpus=corpus, control=control)
        if as_json:
            stats = {"stats": to_dict(reading.counters, reading.tokens)} if tables.stats else {}
            about = {"run": str(run), "split": split, "control": control, "table_tier": tables.table_tier}
            print(json.dumps(about | {"losses": losses} | stats, indent=1))
            return losses
        table = Table(title=f"{run}, {split} split, rows {control}")
        for name in ("source", "nats a token", "bits per byte"):
            table.add_column(name, justify="left" if name == "source" else "right")
        for source, loss in losses.items():
            table.add_row(source, f"{loss['nats']:.4f}", f"{loss['bits_per_byte']:.4f}")
        console.print(table)
    return losses


def _losses(run: Path, reading: Reading, *, split: str, corpus: str, control: str) -> dict:
    loaded, config = reading.run, reading.run.config
    if corpus:
        data = prepare(
            corpus_place(corpus),
            tokenizer_path=run / "final" / "tokenizer.json",
            doc_token=config.data.doc_token or None,
            cache_folder=config.data.cache,
        )
    else:
        data = own_corpus(loaded, run)
    packed = data.splits[split]
    nats_N = token_nats(loaded.model, packed, batch=config.train.batch, context=config.model.context, control=control)
    return nats_by_source(nats_N, packed)


def run_generate(
    run: Path,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    tables: TableOptions,
    console: Console,
) -> str:
    """Continue a prompt on stdout as it is made; `console` (not stdout) gets the statistics. Raises as `stream_text`, `open_run`."""
    written = []
    with open_run(run, tables, console) as reading:
        pieces = stream_text(reading.run, prompt, max_tokens=tokens, temperature=temperature, top_k=top_k, seed=seed)
        print(prompt, end="", flush=True)
        for piece in pieces:
            written.append(piece)
            print(harmless(piece), end="", flush=True)
        print()
    return "".join(written)


def harmless(text: str) -> str:
    """Text without control characters but line ends and tabs: what a model writes shall not steer the terminal."""
    return "".join(char for char in text if char.isprintable() or char in "\n\t")


def run_trace(
    text: str, *, config: str, tokenizer: str, run: Path | None, heads: int, as_json: bool, console: Console
) -> dict:
    """Text to rows, with a run's addresses, a tokenizer.json, or a preset's. Raises DataError, CheckpointError, ConfigError."""
    if run:
        loaded = load_run(run)
        if loaded.model.spec is None:
            raise DataError(f"{run}: this model has no memory layer to trace")
        parts = loaded.tokenizer, loaded.compression, loaded.model.spec
    else:
        parsed = load_config(config, (f"data.tokenizer={json.dumps(tokenizer)}",) if tokenizer else ())
        if tokenizer:
            loaded_tokenizer = load_tokenizer(tokenizer)
            compression = CompressionMap.build(loaded_tokenizer)
        else:
            data = prepare_for(parsed)
            loaded_tokenizer, compression = data.tokenizer, data.compression
        resolved = resolve(parsed, loaded_tokenizer.get_vocab_size())
        if not resolved.memory.compress:
            compression = CompressionMap.identity(len(compression.cids_V), compression.tokenizer_digest)
        spec = address_spec(
            resolved.memory, compression.compressed_vocab_size, int(compression.cids_V[resolved.memory.pad_id])
        )
        parts = loaded_tokenizer, compression, spec
    result = trace(text, *parts)
    if as_json:
        json.dump(result.to_dict(), sys.stdout, indent=1, ensure_ascii=False)
        print()
    else:
        print_trace(result, console, heads=heads)
    return result.to_dict()


def run_show(what: str, *, vocab_size: int, console: Console) -> dict:
    """Sizes of a corpus, what the compression merged, and the census of the demo's tables on it. Raises DataError."""
    config = load_config("demo", (f"data.corpus={json.dumps(what)}", f"data.vocab_size={vocab_size}"))
    data = prepare_for(config)
    table = Table(title=f"{what}: {data.tokenizer.get_vocab_size():,} token ids")
    for name in ("source", "train tokens", "dev", "test", "test bytes"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for source in data.sources:
        counts = [data.splits[split].tokens_by_source[source] for split in ("train", "dev", "test")]
        table.add_row(source, *(f"{n:,}" for n in (*counts, data.splits["test"].bytes_by_source[source])))
    console.print(table)
    report = data.compression.report(data.tokenizer, top=8)
    console.print(
        f"compression: {report.vocab_size:,} -> {report.compressed_vocab_size:,} ids ({report.reduction:.1%} fewer); largest groups: "
        + ", ".join(f"{group.key!r} {group.count}" for group in report.groups),
        markup=False,
    )
    resolved = resolve(config, data.tokenizer.get_vocab_size())
    spec = address_spec(
        resolved.memory, data.compression.compressed_vocab_size, int(data.compression.cids_V[resolved.memory.pad_id])
    )
    train_split, test = data.splits["train"], data.splits["test"]
    streams = [(data.compression(part.ids_N.astype(np.int64)), starts_of(part)) for part in (train_split, test)]
    census = take_census(spec, [streams[0]], held_out=[streams[1]])
    table = Table(title=f"census of the demo's tables ({spec.word_code}) on one pass over train")
    for name in (
        "layer",
        "order",
        "n-grams",
        "n-grams/row",
        "rows touched",
        "expected",
        ">= 8 times",
        "unseen in test",
    ):
        table.add_column(name, justify="right")
    for order in census.orders:
        table.add_row(*census_row(order))
    console.print(table)
    return {"compression": report.reduction, "census": census.to_dict()}


def census_row(order) -> tuple[str, ...]:
    """One order of a census as text."""
    return (
        str(order.layer_id),
        str(order.order),
        f"{order.distinct_ngrams:,}",
        f"{order.oversubscription:.1f}",
        f"{order.occupied:.1%}",
        f"{order.expected_occupied:.1%}",
        f"{order.well_touched:.1%}",
        "-" if order.held_out_unseen is None else f"{order.held_out_unseen:.1%}",
    )
