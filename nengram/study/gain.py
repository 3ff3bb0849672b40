"""Where the gain lives: the loss of runs with memory minus that of runs without, split by what was known of each token.

Runs are paired by seed, so each pair read the same tokens in the same order, and is compared on the same test tokens. Three ways to
split them: by the history of the n-gram that the memory reads just before the token, and of the n-gram with the token
(`nengram.study.history`, counted per seed, since a seed decides which text a short run reads); by source; by class of token
(`nengram.study.token_classes`). For each part, with its interval over seeds (`nengram.study.verdict`):

    difference     mean loss with memory minus without, within the part; below zero memory helps
    contribution   share of tokens x difference: what the part adds to the difference over all tokens

The contributions of one split add up to the whole difference, seed by seed, so a large effect on a rare kind of token and a small one
on a common kind are seen for what they are. A class is counted in what that run read; to a model that has read more, fewer n-grams
are new.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from nengram.errors import CheckpointError, ConfigError
from nengram.files import word_code
from nengram.infer import LoadedRun, load_run
from nengram.study.arm import NATS, load_nats
from nengram.study.gain_report import draw_gain, gain_tables
from nengram.study.history import CLASSES, history_class, history_of, judged_positions, trained_positions
from nengram.study.outcome import keep_outcome
from nengram.study.reading import own_corpus
from nengram.study.token_classes import CLASSES as TOKEN_CLASSES
from nengram.study.token_classes import token_classes
from nengram.study.verdict import paired
from nengram.text import Prepared
from nengram.train import environment

SPLIT_TITLES = {
    "read": "{order}-gram read, times in training",
    "continued": "{order}-gram and the token, times in training",
    "source": "source",
    "token": "kind of token",
}


@dataclass(frozen=True)
class Split:
    """One way to part the test tokens: names of the parts, and the part of each token, int64 [N] (-1: judged by no window)."""

    title: str
    parts: tuple[str, ...]
    part_N: np.ndarray


@dataclass(frozen=True)
class Pair:
    """Two runs of one seed. nats_2N: float64 [2, N], loss of each test token with memory and without."""

    seed: int
    splits: dict[str, Split]
    nats_2N: np.ndarray


def gain_report(memory: Sequence[Path], baseline: Sequence[Path]) -> dict:
    """Where the runs with memory gain over those without, paired by seed.

    Args:
        memory, baseline: run folders that a comparison or a sweep left, with the losses of their test tokens; any order.
    Returns {"memory", "baseline", "seeds", "trained_tokens", "tokens", "nats": {"memory", "baseline"}, "difference",
    "splits": {name: {"title", "parts": {part: {"share", "memory_nats", "baseline_nats", "difference", "contribution",
    "share_of_gain"}}}}, "environment"}; losses in nats a token, means over seeds; a difference or contribution is a paired result as
    a dict (`nengram.study.verdict.Paired`), None where no seed has such a token.
    Raises: CheckpointError for a run that is unfinished, has no test losses, or does not fit its partner; ConfigError for no runs or
    seeds that do not pair; DataError when the corpus is not there any more.
    """
    opened = _paired_runs([Path(run) for run in memory], [Path(run) for run in baseline])
    (first_folder, first), _ = opened[0]
    data = own_corpus(first, first_folder)
    by_text = _text_splits(first, data)
    pairs = [_pair(*runs, data, by_text) for runs in opened]
    whole = [float(np.nanmean(pair.nats_2N[0]) - np.nanmean(pair.nats_2N[1])) for pair in pairs]
    return {
        "memory": [str(folder) for (folder, _), _ in opened],
        "baseline": [str(folder) for _, (folder, _) in opened],
        "seeds": [pair.seed for pair in pairs],
        "trained_tokens": _trained_tokens(first),
        "tokens": int(np.isfinite(pairs[0].nats_2N[0]).sum()),
        "nats": {
            name: float(np.mean([np.nanmean(pair.nats_2N[place]) for pair in pairs]))
            for place, name in enumerate(("memory", "baseline"))
        },
        "difference": paired(whole).to_dict(),
        "splits": {name: _split_report(name, pairs) for name in pairs[0].splits},
        "environment": environment(),
    }


def _paired_runs(memory: list[Path], baseline: list[Path]) -> list[tuple[tuple[Path, LoadedRun], ...]]:
    """The runs, opened, as pairs of one seed, ascending."""
    if not memory or not baseline:
        raise ConfigError("give at least one run with memory and one without")
    with_memory, without = _by_seed(memory), _by_seed(baseline)
    if with_memory.keys() != without.keys():
        alone = min(with_memory.keys() ^ without.keys())
        folder, _ = (with_memory | without)[alone]
        raise ConfigError(
            f"{folder}: its seed {alone} has no partner; seeds with memory {sorted(with_memory)}, without {sorted(without)}"
        )
    for folder, run in with_memory.values():
        if run.model.spec is None:
            raise CheckpointError(f"{folder}: this model has no memory layer; give it among the runs without")
    pairs = [(with_memory[seed], without[seed]) for seed in sorted(with_memory)]
    for one in (run for pair in pairs for run in pair):
        _check_alike(pairs[0][0], one)
    return pairs


def _by_seed(folders: list[Path]) -> dict[int, tuple[Path, LoadedRun]]:
    runs: dict[int, tuple[Path, LoadedRun]] = {}
    for folder in folders:
        run = load_run(folder)
        seed = run.config.train.seed
        if seed in runs:
            raise ConfigError(f"{runs[seed][0]} and {folder} are both of seed {seed}: give one run a seed")
        if not (folder / NATS).is_file():
            raise CheckpointError(f"{folder}: has no losses of its test tokens ({NATS}); compare and sweep leave them")
        runs[seed] = folder, run
    return runs


def _check_alike(one: tuple[Path, LoadedRun], other: tuple[Path, LoadedRun]) -> None:
    """Raises CheckpointError naming both folders and the first thing they differ in: text, tokenizer, tokens, windows, n-grams."""
    (folder, run), (other_folder, other_run) = one, other
    theirs = _identity(other_run)
    for part, mine in _identity(run).items():
        if part in theirs and mine != theirs[part]:
            raise CheckpointError(f"{folder} and {other_folder} differ in their {part}: {mine} and {theirs[part]}")


def _identity(run: LoadedRun) -> dict[str, str | int]:
    """What the runs of one report have in common."""
    found = {
        "corpus": word_code(run.facts["corpus"]),
        "tokenizer": word_code(run.facts["tokenizer"]),
        "training tokens": _trained_tokens(run),
        "train.batch": run.config.train.batch,
        "model.context": run.config.model.context,
    }
    if run.model.spec is not None:
        found |= {"memory.max_order": run.model.spec.max_order, "compressed ids": word_code(run.compression.digest)}
    return found


def _trained_tokens(run: LoadedRun) -> int:
    return run.facts["step"] * run.config.train.batch * run.config.model.context


def _text_splits(run: LoadedRun, data: Prepared) -> dict[str, Split]:
    """The splits that no run has a part in."""
    test = data.splits["test"]
    kind_N = token_classes(test, data.tokenizer, data.compression.cids_V, data.splits["train"])
    return {
        "source": Split(SPLIT_TITLES["source"], test.sources, test.source_of(np.arange(len(test)))),
        "token": Split(SPLIT_TITLES["token"], TOKEN_CLASSES, kind_N),
    }


def _pair(
    memory: tuple[Path, LoadedRun], baseline: tuple[Path, LoadedRun], data: Prepared, by_text: dict[str, Split]
) -> Pair:
    (folder, run), (other_folder, _) = memory, baseline
    test = data.splits["test"]
    nats_2N = np.stack([load_nats(folder), load_nats(other_folder)]).astype(np.float64)
    judged_2N = np.isfinite(nats_2N)
    if nats_2N.shape[1] != len(test) or (judged_2N[0] != judged_2N[1]).any() or not judged_2N.any():
        raise CheckpointError(f"{folder} and {other_folder} were judged on different test tokens")
    trained = trained_positions(run.config, data.splits["train"], run.facts["step"])
    asked = judged_positions(run.config, test)
    by_history = {}
    for order, history in history_of(run.model.spec, run.compression.cids_V, trained, asked).items():
        for name, times_X in zip(("read", "continued"), history, strict=True):
            part_N = np.full(len(test), -1)
            part_N[asked.positions_X] = history_class(times_X)
            by_history[f"{name} {order}"] = Split(SPLIT_TITLES[name].format(order=order), CLASSES, part_N)
    return Pair(run.config.train.seed, by_history | by_text, nats_2N)


def _split_report(name: str, pairs: list[Pair]) -> dict:
    parts = pairs[0].splits[name].parts
    sums = np.array([_sums(pair, name) for pair in pairs])  # [seeds, (tokens, nats with, nats without), parts]
    whole = sums.sum(axis=2)
    gain = float(np.mean((whole[:, 1] - whole[:, 2]) / whole[:, 0]))
    found = {}
    for place, part in enumerate(parts):
        tokens_S, with_S, without_S = sums[:, :, place].T
        there_S = tokens_S > 0
        contribution_S = (with_S - without_S) / whole[:, 0]
        difference_S = (with_S - without_S)[there_S] / tokens_S[there_S]
        found[part] = {
            "share": float(np.mean(tokens_S / whole[:, 0])),
            "memory_nats": float(np.mean(with_S[there_S] / tokens_S[there_S])) if there_S.any() else None,
            "baseline_nats": float(np.mean(without_S[there_S] / tokens_S[there_S])) if there_S.any() else None,
            "difference": paired(difference_S).to_dict() if there_S.any() else None,
            "contribution": paired(contribution_S).to_dict(),
            "share_of_gain": float(contribution_S.mean() / gain) if gain else None,
        }
    return {"title": pairs[0].splits[name].title, "parts": found}


def _sums(pair: Pair, name: str) -> list[np.ndarray]:
    """Of every part: tokens, and summed losses with memory and without."""
    split, judged_N = pair.splits[name], np.isfinite(pair.nats_2N[0])
    part_X = split.part_N[judged_N]
    return [
        np.bincount(part_X, weights, minlength=len(split.parts))
        for weights in (None, *(nats_N[judged_N] for nats_N in pair.nats_2N))
    ]


def run_gain(
    memory: list[Path], baseline: list[Path], *, out: Path | None = None, as_json: bool = False, console: Console
) -> dict:
    """`gain_report` for the command line: tables, or JSON; with `out`, gain.json and gain.png in that folder. Raises as it does."""
    if as_json:
        found = gain_report(memory, baseline)
        print(json.dumps(found, indent=1))
    else:
        with console.status("counting what the runs had read"):
            found = gain_report(memory, baseline)
        for table in gain_tables(found):
            console.print(table)
    if out is not None:
        keep_outcome(found, out, "gain", draw_gain, None if as_json else console)
    return found
