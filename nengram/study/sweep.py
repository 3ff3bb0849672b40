"""A sweep asks one question at many points: any config keys, every combination, several seeds.

    grids  ->  points  ->  runs (a process and a thread each, as many as there are cores)  ->  rows.jsonl, one line a run

The file of rows is the memory of the sweep. A point whose row is there is not run again, in whichever checkout and however long ago:
a row holds the whole config of its run, and belongs to a point when no key says otherwise. Runs that were cut off go on from their
last checkpoint. So a sweep is stopped at any time, grown by more points or seeds, and continued by the same command.

Everything that can be wrong with a point is found before the first run starts: sizes that no budget gives, text too short for one pass.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nengram.config import BudgetConfig, CompareConfig, Config, SweepConfig, TrainConfig, as_dict, flat
from nengram.errors import ConfigError, DataError, NengramError
from nengram.files import sha256_bytes, write_atomic
from nengram.model import resolve
from nengram.model.cost import Cost
from nengram.model.transformer import Transformer
from nengram.study.arm import load_facts, load_nats, prepare_for
from nengram.study.compare import arm_job, nats_by_source
from nengram.study.processes import THREADS, Job, run_jobs
from nengram.study.sweep_rates import rate_at
from nengram.text import Prepared
from nengram.train import environment, steps_of

ROWS = "rows.jsonl"
RUNS = Path("runs/arms")  # run folders by what is run, so that two studies with a point in common share it
WHERE_IT_LIES = {  # no part of a run; the text itself is known by its digest
    "name",
    "data.corpus",
    "data.cache",
    "train.checkpoint_every",
    "train.log_every",
    "train.table_tier",
}
TABLE_KEYS = ("table_lr_multiplier", "table_rule", "table_clip", "meter_every")


@dataclass(frozen=True)
class Point:
    """One run of a sweep: what was set, the config that it makes (sizes written out), and what it costs."""

    settings: dict[str, Any]  # the keys of the grid, dotted
    seed: int
    config: Config  # as a run takes it, budget and all
    resolved: Config  # every size written out
    cost: Cost
    corpus: str  # digest of its text
    tokens: int  # of training, in whole steps
    tuned: bool  # its learning rate was searched or set by the grid

    @property
    def arm(self) -> str:
        """The arm that is really run: memory without a table is pure MoE."""
        return self.resolved.budget.arm

    @property
    def name(self) -> str:
        """What was set, in words, for people: `rho=0.6 tokens=409600 s0`."""
        return " ".join(
            (*(f"{key.split('.')[-1]}={_short(value)}" for key, value in self.settings.items()), f"s{self.seed}")
        )

    @property
    def digest(self) -> str:
        """Hex digest of everything that decides the run."""
        return sha256_bytes(json.dumps([facts_of(self.resolved), self.corpus], sort_keys=True).encode())[:16]


def expand(config: Config, data: "Corpora") -> list[Point]:
    """Every point: grid by grid as written, within a grid seed by seed, no run twice.

    Raises: ConfigError or DataError that names the first impossible point; ConfigError for a sweep without points.
    """
    points: dict[str, Point] = {}
    for grid, seed in product(grids_of(config), config.sweep.seeds):
        for values in product(*grid.values()):
            point = _point(config, dict(zip(grid, values, strict=True)), seed, data)
            points.setdefault(point.digest, point)
    return list(points.values())


def grids_of(config: Config) -> list[dict[str, list]]:
    """The sweep's grids; one empty grid (the config itself) is a grid too. Raises ConfigError for an axis without values."""
    for grid in config.sweep.grids:
        for key, values in grid.items():
            if not values:
                raise ConfigError(f'sweep: "{key}" has no values')
    if not config.sweep.grids or not config.sweep.seeds:
        raise ConfigError("sweep: nothing to sweep; give --over KEY=[...] or [sweep] grids, and at least one seed")
    return list(config.sweep.grids)


class Corpora:
    """Prepared text by the data section of a config; a sweep over tokenizers has several."""

    def __init__(self) -> None:
        self._known: dict[str, Prepared] = {}

    def __call__(self, config: Config) -> Prepared:
        """The text of a config. Raises DataError, ConfigError."""
        key = json.dumps(as_dict(config.data), sort_keys=True)
        if key not in self._known:
            self._known[key] = prepare_for(config)
        return self._known[key]


def _point(config: Config, settings: dict[str, Any], seed: int, corpora: Corpora) -> Point:
    words = ", ".join(f"{key}={_short(value)}" for key, value in settings.items()) or "the config itself"
    try:
        asked = config.replace(**{key.replace(".", "__"): value for key, value in settings.items()})
        rate = None if "train.lr" in settings else rate_at(config.sweep.rates, asked)
        asked = run_config(asked, seed, rate)
        data = corpora(asked)
        resolved = resolve(asked, data.tokenizer.get_vocab_size())
        if resolved.memory.kind == "none":
            asked, resolved = _without_table(asked), _without_table(resolved)
        if config.sweep.repeat is False:
            _check_text(resolved, data)
        tokens = steps_of(resolved, data) * resolved.train.batch * resolved.model.context
        tuned = rate is not None or "train.lr" in settings
        with torch.device("meta"):
            cost = Transformer(resolved.model, resolved.memory).cost()
        return Point(settings, seed, asked, resolved, cost, data.digest, tokens, tuned)
    except (ConfigError, DataError) as error:
        raise type(error)(f"sweep: the point {words} cannot be run: {error}") from None


def run_config(config: Config, seed: int, lr: float | None = None) -> Config:
    """One run of a study: its seed, its rate, and nothing that belongs to the study."""
    train = replace(config.train, seed=seed, lr=lr or config.train.lr)
    return replace(config, name="", train=train, compare=CompareConfig(), sweep=SweepConfig())


def _without_table(config: Config) -> Config:
    """How a table would be trained says nothing about a run that has none, and Engram without one is pure MoE."""
    arm = "moe" if config.budget.arm == "engram" else config.budget.arm
    train = replace(config.train, **{key: getattr(TrainConfig(), key) for key in TABLE_KEYS})
    return replace(config, budget=replace(config.budget, arm=arm), train=train)


def _check_text(config: Config, data: Prepared) -> None:
    one_pass = len(data.splits["train"]) - 1
    if config.train.tokens > one_pass:
        raise DataError(
            f"train.tokens asks for {config.train.tokens:,} tokens, one pass over the text has {one_pass:,}; "
            "give more text, ask for fewer, or allow it with sweep.repeat=true"
        )


def facts_of(config: Config) -> dict[str, Any]:
    """What decides a run's result, as flat keys."""
    tree = flat(as_dict(replace(config, budget=replace(config.budget, scale=0))))
    return {
        key: value
        for key, value in tree.items()
        if key not in WHERE_IT_LIES and not key.startswith(("compare.", "sweep."))
    }


def same_run(row_config: dict[str, Any], config: Config) -> bool:
    """Whether a row's config means this run: equal in every key; a key that the row is too old to know has its default."""
    mine, defaults = facts_of(config), facts_of(Config(budget=BudgetConfig()))
    return all(row_config.get(key, defaults.get(key)) == value for key, value in mine.items())


def load_rows(path: Path) -> list[dict]:
    """The rows of a file, none if it is missing. Raises NengramError naming the line that is damaged."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
        try:
            rows.append(json.loads(line))
            rows[-1]["config"], rows[-1]["corpus"]
        except (ValueError, KeyError, TypeError):
            raise NengramError(
                f"{path}: line {number} is no row of a sweep; delete it, its run will be done again"
            ) from None
    return rows


def rows_of(points: Iterable[Point], rows: list[dict]) -> dict[str, dict]:
    """The row of every point that has one, by the point's digest."""
    found = {}
    for point in points:
        for row in rows:
            if row["corpus"] == point.corpus and row["seed"] == point.seed and same_run(row["config"], point.resolved):
                found[point.digest] = row | {"point": point.settings}
                break
    return found


def job_of(point: Point, corpora: Corpora, runs: Path, *, test: bool = True) -> Job:
    """The process that does a point's run in its folder below `runs`."""
    folder = runs / f"{point.digest}{'' if test else '-dev'}"
    return replace(arm_job(point.config, corpora(point.config), folder, test=test), name=point.name)


def run_sweep(
    config: Config, out: Path, runs: Path, console: Console, at_once: int | None = None
) -> tuple[list[dict], dict[str, str]]:
    """Run what has no row yet; rows are written one by one as runs finish.

    Returns: the rows of this sweep's points, and the points that failed with the reason.
    Raises: ConfigError, DataError before anything starts.
    """
    corpora, path = Corpora(), out / ROWS
    points = expand(config, corpora)
    rows = load_rows(path)
    done = rows_of(points, rows)
    jobs = {job_of(point, corpora, runs): point for point in points if point.digest not in done}
    failures: dict[str, str] = {}
    console.print(f"{len(points)} points, {len(done)} of them done before", highlight=False)

    def keep(job: Job) -> None:
        point = jobs[job]
        row = row_of(point, job.folder, corpora(point.config))
        rows.append(row)
        done[point.digest] = row
        write_atomic(path, "".join(f"{json.dumps(row)}\n" for row in rows))

    for job in jobs:
        if job.done.exists():
            keep(job)
    waiting = [job for job in jobs if not job.done.exists()]
    run_jobs(waiting, console, at_once, finished=keep, failed=lambda job, why: failures.update({job.name: why}))
    return [done[point.digest] for point in points if point.digest in done], failures


def row_of(point: Point, folder: Path, data: Prepared) -> dict:
    """What a finished run says, as one line: the point, its costs, its losses, its config and machine."""
    facts = load_facts(folder)
    by_source = nats_by_source(load_nats(folder), data.splits["test"])
    return {
        "point": point.settings,
        "arm": point.arm,
        "rho": facts["rho"],
        "seed": point.seed,
        "tokens": facts["tokens"],
        "lr": facts["lr"],
        "tuned": point.tuned,
        "dev_nats": facts["dev_nats"],
        "test_nats": facts["test_nats"],
        "test_nats_permuted": facts.get("test_nats_permuted"),
        "bits_per_byte": by_source["all"]["bits_per_byte"],
        "nats_by_source": {source: found["nats"] for source, found in by_source.items() if source != "all"},
        "cost": facts["cost"],
        "rows": facts["cost"]["table"] // point.resolved.memory.row_width if facts["cost"]["table"] else 0,
        "cpu_seconds": facts["cpu_ms_per_token"] * facts["tokens"] / 1e3,
        "cpu_ms_per_token": facts["cpu_ms_per_token"],
        "memory_share": facts["memory_share"],
        "run": folder.name,
        "addresses": facts["addresses"],
        "corpus": data.digest,
        "config": facts_of(point.resolved),
        "environment": environment() | {"threads": str(THREADS)},
    }


def _short(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")) if isinstance(value, (list, tuple)) else f"{value}"
