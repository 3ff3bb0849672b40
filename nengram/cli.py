"""The command line: each verb imports its room inside the function and calls one library function.

So `--help` is quick (no torch), and whatever a verb does can be done from Python in one call. A user's mistake ends in one line and
exit code 2; Ctrl-C in 130 and a word on how to go on.
"""

import errno
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from nengram.errors import NengramError

Overrides = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[section.key=value ...]")]


def compare(
    config: Positional[str],
    overrides: Positional[Overrides] = (),
    /,
    out: Path | None = None,
    resume: bool = False,
    tune: bool = False,
) -> None:
    """Head-to-head at equal parameters and equal FLOPs: pure MoE, Engram, and the controls.

    Args:
        config: preset name or TOML file with a [budget].
        overrides: dotted keys, e.g. compare.seeds=[0,1,2] train.tokens=100000.
        out: results folder; runs/<name> if not given.
        resume: continue what is there.
        tune: search every arm's learning rate on dev instead, with the same number of runs each.
    """
    from nengram.config import load_config

    parsed = load_config(config, overrides)
    _show(parsed)
    from nengram.study.verbs import run_compare, run_tune

    if tune:
        run_tune(parsed, out or Path("runs") / f"{parsed.name}-tune", _console())
    else:
        run_compare(parsed, out or Path("runs") / parsed.name, resume=resume, console=_console())


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

    run_train(parsed, out or Path("runs") / f"{parsed.name}-{parsed.budget.arm}", resume=resume, console=_console())


def eval(
    run: Positional[Path],
    /,
    split: Literal["dev", "test"] = "test",
    corpus: str = "",
    control: Literal["hashed", "permuted", "one_row", "misaligned"] = "hashed",
    json: bool = False,
) -> None:
    """Held-out loss of a finished run, overall and by source.

    Args:
        run: run folder.
        split: which part of the corpus.
        corpus: judge on other text than the run's own.
        control: replace the rows that the memory reads; "permuted" shows what the table's content is worth.
        json: print JSON instead of a table.
    """
    from nengram.study.verbs import run_eval

    run_eval(run, split=split, corpus=corpus, control=control, as_json=json, console=_console())


def generate(
    run: Positional[Path],
    prompt: Positional[str],
    /,
    tokens: int = 64,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
) -> None:
    """Continue a prompt, streaming.

    Args:
        run: run folder.
        prompt: text to continue.
        tokens: most tokens to add.
        temperature: 0 is greedy.
        top_k: sample among the k likeliest; 0: all.
        seed: of the sampling.
    """
    from nengram.infer import load_run, stream_text

    loaded = load_run(run)
    print(prompt, end="", flush=True)
    for piece in stream_text(loaded, prompt, max_tokens=tokens, temperature=temperature, top_k=top_k, seed=seed):
        print(harmless(piece), end="", flush=True)
    print()


def harmless(text: str) -> str:
    """Text without control characters but line ends and tabs: what a model writes shall not steer the terminal."""
    return "".join(char for char in text if char.isprintable() or char in "\n\t")


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


VERBS = {"compare": compare, "train": train, "eval": eval, "generate": generate, "trace": trace, "data": data}


def main() -> None:
    """Entry point of the `nengram` command."""
    warnings.showwarning = _warn
    try:
        tyro.extras.subcommand_cli_from_dict(
            VERBS, prog="nengram", description="Conditional memory (Engram) for language models."
        )
    except NengramError as error:
        _end(str(error), 2)
    except KeyboardInterrupt:
        _end("interrupted; what was finished is kept, --resume continues", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        _end(f"{error.filename or 'disk'}: {error.strerror}; nothing half-written is left, --resume continues", 2)


def _end(message: str, code: int) -> None:
    print(f"nengram: {message}", file=sys.stderr)
    sys.exit(code)


def _warn(message, *_) -> None:
    print(f"nengram: note: {message}", file=sys.stderr)


def _console():
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)


def _show(config) -> None:
    from nengram.config import differences

    for key, default, value in differences(config):
        print(
            f"  {key} = {json.dumps(value)}"
            + (f"  (default {json.dumps(default)})" if default not in ("", [], {}) else "")
        )
