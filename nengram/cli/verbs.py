"""The verbs that train, ask, generate and show, in the order of a first day."""

import sys
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from nengram.cli.terminal import Overrides, Tables, no_others, results_folder, show, terminal
from nengram.config import TableOptions


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
    show(parsed)
    from nengram.study.verbs import run_compare, run_tune

    if tune:
        run_tune(parsed, results_folder(out or Path("runs") / f"{parsed.name}-tune"), terminal())
    else:
        run_compare(parsed, results_folder(out or Path("runs") / parsed.name), resume=resume, console=terminal())


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
    show(parsed)
    from nengram.study.sweep_verb import run_dry, run_report, run_sweep_verb, run_tune

    out, runs = results_folder(out or Path("runs") / f"{parsed.name}-sweep"), results_folder(runs)
    if dry:
        run_dry(parsed, out, terminal())
    elif report:
        run_report(parsed, out, terminal())
    elif tune:
        run_tune(parsed, out, runs, at_once, terminal())
    elif check:
        from nengram.study.sweep_check import run_check

        run_check(parsed, out, runs, at_once, terminal(), check)
    else:
        run_sweep_verb(parsed, out, runs, at_once, terminal())


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
    show(parsed)
    from nengram.study.verbs import run_train

    out = results_folder(out or Path("runs") / f"{parsed.name}-{parsed.budget.arm}")
    run_train(parsed, out, resume=resume, console=terminal())


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

        no_others("--tasks", corpus=corpus, control=control.removeprefix("hashed"), split=split.removeprefix("test"))
        asked = {"limit": limit or None, "shots": shots, "batch_size": batch, "device": device, "adapters": adapter}
        out = results_folder(out or Path("runs") / f"{run.resolve().name}-eval")
        names = [name for name in tasks.split(",") if name]
        run_tasks(run, names, out=out, as_json=json, console=terminal(stderr=json), tables=tables, **asked)
        return
    no_others("an evaluation without --tasks", adapter=adapter, limit=limit, shots=shots, out=out)
    from nengram.study.verbs import run_eval

    console = terminal(stderr=json)
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

    run_gain(list(memory), list(against), out=results_folder(out), as_json=json, console=terminal(stderr=json))


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
    run_generate(run, prompt, **sampling, tables=tables, console=terminal(stderr=True))


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

    run_trace(text, config=config, tokenizer=tokenizer, run=run, heads=heads, as_json=json, console=terminal())


def twin(seeds: tuple[int, ...] = (0,), out: Path | None = None, tune: bool = False, json: bool = False) -> None:
    """What memory is for, in twenty seconds: private facts that a table holds, and a form of them that it cannot.

    Args:
        seeds: one run of every arm each; three or more give a verdict.
        out: folder for twin.json and twin.png, or twin.tune.json.
        tune: search every arm's learning rate instead.
        json: print JSON instead of a table.
    """
    from nengram.study.twin import run_twin

    run_twin(seeds=seeds, out=results_folder(out), as_json=json, tune=tune, console=terminal(stderr=json))


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

    run_show(what, vocab_size=vocab_size, console=terminal())


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
        console=terminal(),
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
    passed = run_conform(**asked, timeout_s=timeout, out=out, console=terminal(), replies=replies)
    sys.exit(0 if passed else 1)
