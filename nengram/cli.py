"""The command line: each verb imports its room inside the function and calls one library function.

So `--help` is quick (no torch), and whatever a verb does can be done from Python in one call. A user's mistake ends in one line and
exit code 2; Ctrl-C in 130 and a word on how to go on.
"""

import errno
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro
from tyro.conf import Positional

from nengram.config import TableOptions
from nengram.errors import ConfigError, NengramError

Tables = Annotated[TableOptions, tyro.conf.OmitArgPrefixes]
Overrides = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[section.key=value ...]")]
Source = Annotated[Path, tyro.conf.arg(metavar="SOURCE")]
Into = Annotated[Path, tyro.conf.arg(metavar="INTO")]


def compare(
    config: Positional[str],
    overrides: Positional[Overrides] = (),
    /,
    out: Path | None = None,
    resume: bool = False,
    tune: bool = False,
    table_tier: Literal["resident", "host", "mapped", "tiered"] = "resident",
) -> None:
    """Head-to-head at equal parameters and equal FLOPs: pure MoE, Engram, and the controls.

    Args:
        config: preset name or TOML file with a [budget].
        overrides: dotted keys, e.g. compare.seeds=[0,1,2] train.tokens=100000.
        out: results folder; runs/<name> if not given.
        resume: continue what is there.
        tune: search every arm's learning rate on dev instead, with the same number of runs each.
        table_tier: where tables live: in training (resident or host), and when the arms are judged.
    """
    from nengram.config import load_config

    parsed = load_config(config, overrides)
    if table_tier != "resident":
        parsed = parsed.replace(train__table_tier=table_tier)
    _show(parsed)
    from nengram.study.verbs import run_compare, run_tune

    if tune:
        run_tune(parsed, _folder(out or Path("runs") / f"{parsed.name}-tune"), _console())
    else:
        run_compare(parsed, _folder(out or Path("runs") / parsed.name), resume=resume, console=_console())


def sweep(
    config: Positional[str],
    overrides: Positional[Overrides] = (),
    /,
    over: tuple[str, ...] = (),
    out: Path | None = None,
    runs: Path = Path("runs/arms"),
    dry: bool = False,
    report: bool = False,
    tune: bool = False,
    check: tuple[str, ...] = (),
    at_once: int = 0,
) -> None:
    """Run a config over a grid of any keys, several seeds each, and fit what comes out; continues where it was stopped.

    Args:
        config: preset name or TOML file, with or without [sweep].
        overrides: dotted keys, e.g. sweep.seeds=[0,1,2,3] train.tokens=100000.
        over: axes of the grid, e.g. budget.rho=[1.0,0.8,0.6] train.lr=[0.004,0.006]; in place of the config's own grids.
        out: folder of rows.jsonl, rows.csv, fits and figures; runs/<name>-sweep if not given.
        runs: folder of the run folders, shared by all sweeps.
        dry: print every config with its totals and estimated cost, and run nothing.
        report: only tables, fits and figures of the rows that are there.
        tune: search learning rates at three shares and for every arm instead, with the same number of runs each.
        check: run a finished point again with a new seed, e.g. budget.rho=0.6 train.seed=7, and say whether it was to be expected.
        at_once: runs side by side; one a core if 0.
    """
    from nengram.config import load_config, with_grid

    parsed = with_grid(load_config(config, overrides), over)
    _show(parsed)
    from nengram.study.sweep_verb import run_dry, run_report, run_sweep_verb, run_tune

    out, runs = _folder(out or Path("runs") / f"{parsed.name}-sweep"), _folder(runs)
    if dry:
        run_dry(parsed, out, _console())
    elif report:
        run_report(parsed, out, _console())
    elif tune:
        run_tune(parsed, out, runs, at_once, _console())
    elif check:
        from nengram.study.sweep_check import run_check

        run_check(parsed, out, runs, at_once, _console(), check)
    else:
        run_sweep_verb(parsed, out, runs, at_once, _console())


def train(
    config: Positional[str], overrides: Positional[Overrides] = (), /, out: Path | None = None, resume: bool = False
) -> None:
    """Train one model.

    Args:
        config: preset name, TOML file or run folder.
        overrides: dotted keys, e.g. data.corpus=my.txt budget.arm=moe train.lr=0.004.
        out: run folder; runs/<name>-<arm> if not given.
        resume: continue from the last checkpoint, exactly.
    """
    from nengram.config import load_config

    parsed = load_config(config, overrides)
    _show(parsed)
    from nengram.study.verbs import run_train

    out = _folder(out or Path("runs") / f"{parsed.name}-{parsed.budget.arm}")
    run_train(parsed, out, resume=resume, console=_console())


def eval(
    run: Positional[Path],
    /,
    split: Literal["dev", "test"] = "test",
    corpus: str = "",
    control: Literal["hashed", "permuted", "one_row", "misaligned"] = "hashed",
    json: bool = False,
    tables: Tables = TableOptions(),  # noqa: B008 - frozen
    tasks: str = "",
    adapter: tuple[Path, ...] = (),
    limit: int = 0,
    shots: int | None = None,
    batch: int = 8,
    device: str = "auto",
    out: Path | None = None,
) -> None:
    """Held-out loss of a finished run, overall and by source; or the scores of any model on lm-eval's tasks.

    Args:
        run: run folder; with --tasks also a folder of transformers.
        split: which part of the corpus.
        corpus: judge on other text than the run's own.
        control: replace the rows that the memory reads; "permuted" shows what the table's content is worth.
        json: print JSON instead of a table.
        tables: where the tables are read from.
        tasks: lm-eval's tasks instead, with commas between: nengram_facts, nengram_text (no network), hellaswag, ...
        adapter: with --tasks: folders of memories and LoRAs to put on the model.
        limit: with --tasks: questions per task; 0: all.
        shots: with --tasks: solved examples before each question.
        batch: with --tasks: questions at once.
        device: with --tasks: where the model is, e.g. cuda; "auto": an accelerator if there is one.
        out: with --tasks: folder for results.json; runs/<name>-eval if not given.
    """
    if tasks:
        from nengram.hf.harness import run_tasks

        _no_others("--tasks", corpus=corpus, control=control.removeprefix("hashed"), split=split.removeprefix("test"))
        asked = {"limit": limit or None, "shots": shots, "batch_size": batch, "device": device, "adapters": adapter}
        out = _folder(out or Path("runs") / f"{run.resolve().name}-eval")
        names = [name for name in tasks.split(",") if name]
        run_tasks(run, names, out=out, as_json=json, console=_console(stderr=json), tables=tables, **asked)
        return
    _no_others("an evaluation without --tasks", adapter=adapter, limit=limit, shots=shots, out=out)
    from nengram.study.verbs import run_eval

    console = _console(stderr=json)
    run_eval(run, split=split, corpus=corpus, control=control, as_json=json, tables=tables, console=console)


def gain(
    memory: Positional[tuple[Path, ...]],
    /,
    against: tuple[Path, ...],
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Where the gain lives: the difference of two arms split by history of the n-gram, source and kind of token.

    Args:
        memory: run folders with memory, one a seed.
        against: run folders without it, of the same seeds and text.
        out: folder for gain.json and gain.png.
        json: print JSON instead of tables.
    """
    from nengram.study.gain import run_gain

    run_gain(list(memory), list(against), out=_folder(out), as_json=json, console=_console(stderr=json))


def generate(
    run: Positional[Path],
    prompt: Positional[str],
    /,
    tokens: int = 64,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
    tables: Tables = TableOptions(),  # noqa: B008 - frozen
) -> None:
    """Continue a prompt, streaming.

    Args:
        run: run folder.
        prompt: text to continue.
        tokens: most tokens to add.
        temperature: 0 is greedy.
        top_k: sample among the k likeliest; 0: all.
        seed: of the sampling.
        tables: where the tables are read from.
    """
    from nengram.study.verbs import run_generate

    sampling = {"tokens": tokens, "temperature": temperature, "top_k": top_k, "seed": seed}
    run_generate(run, prompt, **sampling, tables=tables, console=_console(stderr=True))


def export(run: Positional[Path], into: Positional[Into], /) -> None:
    """Write a finished run as a folder of transformers: AutoModelForCausalLM, AutoTokenizer and their tools open it.

    Args:
        run: run folder.
        into: the folder; one that an earlier export wrote is replaced, whole or not at all.
    """
    from nengram.hf.export import export

    folder = export(run, _folder(into))
    _console().print(f"{folder}: import nengram.hf, then AutoModelForCausalLM.from_pretrained({str(folder)!r})")


def serve(
    run: Positional[Path],
    /,
    adapter: tuple[Path, ...] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    continuous_batching: bool = False,
    tables: Tables = TableOptions(),  # noqa: B008 - frozen
) -> None:
    """Answer OpenAI-style requests, whole or streamed: /v1/completions, /v1/chat/completions.

    Args:
        run: run folder, or folder of transformers.
        adapter: folders of memories and LoRAs to put on the model.
        host: address to listen on; others than this machine reach it at 0.0.0.0.
        port: to listen on; 0: any that is free.
        device: where the model is, e.g. cuda; "auto": an accelerator if there is one.
        continuous_batching: refused: it packs requests into one row, and a memory would look back into the wrong one.
        tables: where the tables are read from.
    """
    from nengram.hf.serve import run_serve

    how = {"adapters": adapter, "host": host, "port": port, "device": device}
    console = _console(stderr=True)
    run_serve(run, **how, continuous_batching=continuous_batching, tables=tables, console=console)


def graft(
    model: Positional[Path],
    /,
    text: str,
    out: Path,
    blocks: tuple[int, ...] = (1,),
    rows: int = 4096,
    max_order: int = 3,
    heads: int = 4,
    row_width: int = 32,
    compress: bool = True,
    steps: int = 0,
    batch: int = 4,
    context: int = 128,
    lr: float = 1e-3,
    base_lr: float = 1e-4,
    table_lr: float = 0.5,
    schedule: Literal["memory", "first", "full"] = "memory",
    control: bool = True,
    seed: int = 0,
    eval_tokens: int = 20_000,
    doc_token: str = "",
    device: str = "auto",
    checkpoint_every: int = 50,
    resume: bool = False,
) -> None:
    """Train a memory onto a local model of transformers, and say what its lookup is worth.

    Args:
        model: local folder of a causal model, with its tokenizer.json.
        text: .txt or .jsonl file, or a folder; or "bundled".
        out: folder of the adapter.
        blocks: zero-based blocks that read a memory.
        rows: of each head and order.
        max_order: n-grams of 2 up to so many tokens.
        heads: hash heads of each order.
        row_width: numbers in a row.
        compress: look up spellings of one word as one (by the tokenizer); --no-compress hashes ids as they are.
        steps: of the optimiser; one pass over the text if 0.
        batch: sequences per step.
        context: tokens of a sequence.
        lr: of the memory's parameters.
        base_lr: of the model's, where they learn.
        table_lr: of the tables.
        schedule: what learns: the memory, the memory first and then both, or both.
        control: train the one-row control as well.
        seed: of hash, weights and the order of the text.
        eval_tokens: held-out tokens that are judged; 0: all.
        doc_token: the token that separates documents, where it cannot be guessed.
        device: where the model is, e.g. cuda; "auto": an accelerator if there is one.
        checkpoint_every: steps between checkpoints.
        resume: continue from the last checkpoint, exactly.
    """
    from nengram.hf.graft_run import GraftPlan
    from nengram.hf.graft_verb import run_graft

    sizes = {"blocks": blocks, "rows_per_head": (rows,) * (max_order - 1), "heads": heads, "row_width": row_width}
    rates = {"lr": lr, "base_lr": base_lr, "table_lr": table_lr, "schedule": schedule}
    lengths = {"steps": steps, "batch": batch, "context": context, "checkpoint_every": checkpoint_every}
    plan = GraftPlan(sizes | {"compress": compress}, seed=seed, **rates, **lengths)
    how = {"doc_token": doc_token, "control": control, "eval_tokens": eval_tokens, "resume": resume, "device": device}
    run_graft(model, text, _folder(out), plan, **how, console=_console())


def trace(
    text: Positional[str],
    /,
    config: str = "demo",
    tokenizer: str = "",
    run: Path | None = None,
    heads: int = 2,
    json: bool = False,
) -> None:
    """From text to rows: tokens, compressed ids, n-grams, table rows.

    Args:
        text: what to trace.
        config: preset whose tokenizer and addresses are used.
        tokenizer: a tokenizer.json to use instead of the preset's.
        run: a finished run whose tokenizer and addresses are used.
        heads: how many heads of each order to show; 0: all.
        json: print JSON instead of a table.
    """
    from nengram.study.verbs import run_trace

    run_trace(text, config=config, tokenizer=tokenizer, run=run, heads=heads, as_json=json, console=_console())


def twin(seeds: tuple[int, ...] = (0,), out: Path | None = None, tune: bool = False, json: bool = False) -> None:
    """What memory is for, in twenty seconds: private facts that a table holds, and a form of them that it cannot.

    Args:
        seeds: one run of every arm each; three or more give a verdict.
        out: folder for twin.json and twin.png, or twin.tune.json.
        tune: search every arm's learning rate instead.
        json: print JSON instead of a table.
    """
    from nengram.study.twin import run_twin

    run_twin(seeds=seeds, out=_folder(out), as_json=json, tune=tune, console=_console(stderr=json))


def data(
    action: Positional[Literal["fetch", "show"]],
    what: Positional[str] = "facts",
    /,
    into: Path | None = None,
    accept_new: bool = False,
    vocab_size: int = 4096,
) -> None:
    """Fetch text, or show what a corpus holds.

    Args:
        action: "fetch" a mix of sources, or "show" sizes, merged ids and the census of a corpus.
        what: the mix ("facts") or the corpus ("bundled", "facts", a file or folder).
        into: folder to fetch into; data/<mix> if not given.
        accept_new: take files whose SHA-256 is not the pinned one.
        vocab_size: of the tokenizer that `show` trains.
    """
    if action == "fetch":
        from nengram.text.fetch import fetch

        report = fetch(what, into or Path("data") / what, accept_new=accept_new)
        sys.exit(1 if report.refused else 0)
    from nengram.study.verbs import run_show

    run_show(what, vocab_size=vocab_size, console=_console())


def plan(
    target: Positional[str],
    overrides: Positional[Overrides] = (),
    /,
    device_gib: float = 0.0,
    host_gib: float | None = None,
    disk_iops: float | None = None,
    link_gib_per_s: float | None = None,
    codec: str = "",
    corpus: str = "",
    tokens: int = 0,
    measure: bool = False,
    disk_folder: Path | None = None,
    json: bool = False,
) -> None:
    """How large the tables are, where they fit, how often a hot set answers, and which tier limits the speed.

    Args:
        target: preset name, TOML file, run folder, table file or folder of shards.
        overrides: dotted keys, e.g. memory.row_width=64 data.vocab_size=8192.
        device_gib: memory for tables on the accelerator.
        host_gib: RAM for tables; what is free here now if not given.
        disk_iops: random 4 KiB reads a second of the disk; assumed if neither given nor measured.
        link_gib_per_s: between host and accelerator; assumed if neither given nor measured.
        codec: how rows are stored; the target's own if not given.
        corpus: text that the hit rates are counted on; the target's own if not given.
        tokens: training budget to recommend rows per head for.
        measure: measure this machine's ceilings first, a few seconds.
        disk_folder: where --measure makes its scratch file of 1 GiB; the system's temporary folder if not given.
        json: print JSON instead of tables.
    """
    from nengram.study.plan_verb import run_plan

    run_plan(
        target,
        overrides,
        device_gib=device_gib,
        host_gib=host_gib,
        ceilings={"disk_iops": disk_iops, "link_gib_per_s": link_gib_per_s},
        codec=codec,
        corpus=corpus,
        tokens=tokens,
        measured=measure,
        disk_folder=disk_folder,
        as_json=json,
        console=_console(),
    )


def conform(
    dialect: Literal["", "engram", "deepseek_v41", "qwen_ple"] = "",
    against: Literal["nengram", "transformers", "engram-peft"] = "nengram",
    command: str = "",
    python: str = "",
    timeout: float = 60.0,
    out: Path | None = None,
) -> None:
    """Whether an implementation computes the published addresses: first difference, known bug, one line for a README.

    Args:
        dialect: only this one; all if not given.
        against: whom to ask: this package's own fast path, or another that is installed.
        command: ask this command instead: it answers each JSON line of its input with a JSON line.
        python: the interpreter that has the implementation, where --against needs one of its own.
        timeout: seconds to wait for one answer.
        out: file for the result as JSON.
    """
    from nengram.conform.verb import run_conform

    replies = {}
    if against == "transformers" and not command:
        from nengram.hf import conform_qwen_reply

        replies["transformers"] = conform_qwen_reply
    asked = {"dialect": dialect, "against": against, "command": command, "python": python}
    passed = run_conform(**asked, timeout_s=timeout, out=out, console=_console(), replies=replies)
    sys.exit(0 if passed else 1)


def table_stat(paths: Positional[tuple[Path, ...]], /, json: bool = False) -> None:
    """Say what a table is: codec, rows, bytes, what was ever written, addresses, rows of each n-gram order.

    Args:
        paths: table files, folders of shards, or folders and runs that hold tables.
        json: print JSON instead of text.
    """
    from nengram.study.table_verbs import run_stat

    run_stat(paths, as_json=json, console=_console())


def table_verify(paths: Positional[tuple[Path, ...]], /, json: bool = False) -> None:
    """Read tables wholly: every checksum, and the row counts, made again from the primes of their addresses.

    Args:
        paths: table files, folders of shards, or folders and runs that hold tables.
        json: print JSON instead of text.
    """
    from nengram.study.table_verbs import run_verify

    run_verify(paths, as_json=json, console=_console())


def table_pack(
    source: Positional[Source],
    into: Positional[Into],
    /,
    codec: str = "",
    shards: int = 1,
    scale: float | None = None,
) -> None:
    """Write a table again: in another codec, in shards, or in the newest format. Optimiser state stays behind.

    Args:
        source: table file or folder of shards.
        into: the new file; with --shards above 1 a folder.
        codec: fp32, bf16, fp16, fp8, fp8_tensor, int8 or int4; the same codec, hence a copy, if not given.
        shards: files to cut it into, by rows.
        scale: of codec fp8_tensor; found in a pass over the table if not given.
    """
    from nengram.study.table_verbs import run_pack

    run_pack(source, into, codec=codec, shards=shards, scale=scale, console=_console())


def table_slice(
    source: Positional[Source], into: Positional[Into], /, rows: str = "", order: int | None = None
) -> None:
    """Cut some rows out of a table, into a file that says which they are.

    Args:
        source: table file or folder of shards.
        into: the new file.
        rows: FIRST:END, END not included.
        order: all rows of one n-gram order instead, e.g. 2.
    """
    from nengram.study.table_verbs import run_slice

    run_slice(source, into, rows=rows, order=order, console=_console())


def table_create(
    into: Positional[Into],
    target: Positional[str],
    overrides: Positional[Overrides] = (),
    /,
    layer: int | None = None,
    codec: str = "",
    scale: float | None = None,
) -> None:
    """Make a table of zeros: a sparse file, which takes no space until it is written.

    Args:
        into: the new file.
        target: whose addresses: preset name, TOML file, run folder or table.
        overrides: dotted keys, e.g. memory.row_width=64.
        layer: memory layer, where there are several.
        codec: how rows are stored; the target's own if not given.
        scale: of codec fp8_tensor; 1 if not given.
    """
    from nengram.study.table_verbs import run_create

    run_create(into, target, overrides, layer=layer, codec=codec, scale=scale, console=_console())


def table_convert(
    source: Positional[Source],
    into: Positional[Into],
    /,
    to: Literal["nengram", "deepseek_v41", "qwen_ple"] = "nengram",
    layers: tuple[int, ...] = (),
    shards: int = 1,
    scale: float | None = None,
    config: Path | None = None,
    tokenizer: str = "",
) -> None:
    """Turn the tables of a released checkpoint into table files, or tables into such a checkpoint; bytes are copied.

    Args:
        source: checkpoint folder or file (what it is, is found out), or tables: a file, a folder of them, a run.
        into: folder for the tables, or for the checkpoint; a single layer may name a .safetensors file.
        to: what to make.
        layers: only these memory layers, by the ids of their hash.
        shards: files per table, by rows.
        scale: of FP8 rows in a checkpoint that holds no tensor with their scale.
        config: the checkpoint's config.json, where it does not lie beside.
        tokenizer: the checkpoint's tokenizer.json, where it does not lie beside; checks the compressed vocabulary.
    """
    from nengram.study.table_verbs import run_convert

    run_convert(
        source,
        into,
        to=to,
        layers=layers,
        shards=shards,
        scale=scale,
        config=config,
        tokenizer=tokenizer,
        console=_console(),
    )


def table_diff(
    one: Positional[Source],
    other: Positional[Annotated[Path, tyro.conf.arg(metavar="OTHER")]],
    /,
    corpus: str = "",
    tokenizer: str = "",
    doc_token: str = "",
    tolerance: float = 0.0,
    most: int = 20,
    json: bool = False,
) -> None:
    """What changed between two tables: how many rows, and which n-grams of a corpus read them.

    Args:
        one: table file or folder of shards.
        other: another of the same addresses, in any codec.
        corpus: text to name the changes by: "bundled", "facts", a file or folder; rows are only counted if not given.
        tokenizer: the tables' tokenizer.json, where it does not lie beside one of them.
        doc_token: the token that separates documents, where it cannot be guessed.
        tolerance: numbers that differ by this much or less are the same.
        most: n-grams to name.
        json: print JSON instead of text.
    """
    from nengram.study.table_verbs import run_diff

    run_diff(
        one,
        other,
        corpus=corpus,
        tokenizer=tokenizer,
        doc_token=doc_token,
        tolerance=tolerance,
        most=most,
        as_json=json,
        console=_console(),
    )


def table_codecs(
    run: Positional[Path],
    /,
    codecs: tuple[str, ...] = (),
    split: Literal["dev", "test"] = "dev",
    tokens: int = 0,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """What each codec costs a finished run: bytes, error of a row, and the loss with its tables so coded.

    Args:
        run: run folder.
        codecs: only these; all if not given.
        split: held-out text to judge on.
        tokens: judge about so many; 0: the whole split.
        out: folder for codecs.json and codecs.png.
        json: print JSON instead of a table.
    """
    from nengram.store.codecs import CODECS
    from nengram.study.codecs import run_codec_report

    chosen = codecs or tuple(CODECS)
    options = {"codecs": chosen, "split": split, "tokens": tokens, "as_json": json, "out": _folder(out)}
    run_codec_report(run, **options, console=_console())


def table_health(run: Positional[Path], /, out: Path | None = None, json: bool = False) -> None:
    """What training did to a run's tables: rows touched, shared and updated, their norms, and the gate by frequency.

    Args:
        run: run folder.
        out: folder for health.json and health.png.
        json: print JSON instead of tables.
    """
    from nengram.study.health import run_health

    run_health(run, as_json=json, out=_folder(out), console=_console(stderr=json))


VERBS = {
    "compare": compare,
    "sweep": sweep,
    "train": train,
    "eval": eval,
    "gain": gain,
    "generate": generate,
    "graft": graft,
    "serve": serve,
    "export": export,
    "trace": trace,
    "twin": twin,
    "data": data,
    "plan": plan,
    "conform": conform,
    "table stat": table_stat,
    "table verify": table_verify,
    "table pack": table_pack,
    "table slice": table_slice,
    "table create": table_create,
    "table convert": table_convert,
    "table diff": table_diff,
    "table codecs": table_codecs,
    "table health": table_health,
}
GROUPS = {
    "table": "Tables on disk: describe, verify, pack, slice, create, convert, diff; what codecs cost, what training did."
}


KEPT = {  # what an end before the end leaves of the verbs that take long
    "compare": "what was finished is kept, --resume continues",
    "train": "what was finished is kept, --resume continues",
    "graft": "what was finished is kept, --resume continues",
    "sweep": "what was finished is kept, the same command continues",
}
OF_THE_USER = (  # errors of the system that a user can mend
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
)


def main() -> None:
    """Entry point of the `nengram` command."""
    warnings.showwarning = _warn
    try:
        choose(VERBS, prog="nengram", description="Conditional memory (Engram) for language models.")
    except NengramError as error:
        _end(str(error), 2)
    except KeyboardInterrupt:
        _end(f"interrupted; {KEPT.get(''.join(sys.argv[1:2]), 'nothing half-written is left')}", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno not in OF_THE_USER:
            raise
        kept = KEPT.get("".join(sys.argv[1:2]), "nothing half-written is left")
        _end(f"{error.filename or 'disk'}: {error.strerror}; {kept}", 2)


def choose(verbs: dict[str, Callable], **options: Any) -> Any:
    """Parse the command line and call the verb it names: "table stat" is the verb `stat` of the group `table`.

    options: as `tyro.cli` takes them.
    """
    grouped: dict[str, dict[str, Callable]] = {}
    for name, function in verbs.items():
        group, _, own = name.rpartition(" ")
        grouped.setdefault(group, {})[own] = function
    top = [(name, function, None) for name, function in grouped.pop("", {}).items()]
    top += [(name, _one_of([(*verb, None) for verb in inner.items()]), GROUPS[name]) for name, inner in grouped.items()]
    return tyro.cli(_one_of(top), **options)


def _one_of(choices: list[tuple[str, Any, str | None]]) -> Any:
    """The type that tyro reads as one subcommand of several: name, function or such a type, description."""
    subcommand = tyro.conf.subcommand
    return Union[  # noqa: UP007 - made at run time
        tuple(Annotated[Any, subcommand(name, constructor=made, description=about)] for name, made, about in choices)
    ]


def _folder(path: Path | None) -> Path | None:
    """A folder for results, there or yet to be made. Raises ConfigError, before hours of work, where a file is in its place."""
    for place in (path, *path.parents) if path else ():
        if place.exists() and not place.is_dir():
            raise ConfigError(f"{place}: is a file; results need a folder, choose another --out")
    return path


def _no_others(what: str, **given: Any) -> None:
    """Raises ConfigError for the first option that says something and would not be heard."""
    for name, value in given.items():
        if value:
            raise ConfigError(f"--{name} has no part in {what}: leave it out")


def _end(message: str, code: int) -> None:
    print(f"nengram: {message}", file=sys.stderr)
    sys.exit(code)


def _warn(message, *_) -> None:
    print(f"nengram: note: {message}", file=sys.stderr)


def _console(*, stderr: bool = False):
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140, stderr=stderr)


def _show(config) -> None:
    from nengram.config import differences

    for key, default, value in differences(config):
        print(
            f"  {key} = {json.dumps(value)}"
            + (f"  (default {json.dumps(default)})" if default not in ("", [], {}) else "")
        )
