"""A comparison of arms on one frozen model: which runs there are, one line of a file for each that is finished, and how to go on.

Tuning comes first: every arm at every rate of one grid, a quarter of the tokens, one seed that is not reported, judged on dev
text. An arm whose best rate is at an end of the grid is tried beyond it, rate by rate, until it is not. Then every arm at its best
rate with every seed, judged on test text, on text of other kinds and on questions. A line is written when its run is done, and a
run depends on its own line's settings alone, so a comparison may be killed at any moment, started again and be the same. A line
counts only for the design that it was made with (its digest): settings, text and model.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from nengram.errors import ConfigError, DataError, nearest
from nengram.files import sha256_bytes
from nengram.hf.arms import ARMS, Sizes, make_arm
from nengram.hf.recall import Sheet, recall_table, score
from nengram.hf.retrofit import Windows, by_source, train_arm, window_nats
from nengram.hf.suffix import Suffix
from nengram.train import environment

TUNING_SEED = 99
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
LADDER = (1e-5, 3e-5, 1e-4, *RATES, 3e-2, 1e-1, 3e-1)  # what is tried beyond a grid's ends


@dataclass(frozen=True)
class Design:
    """What decides every number: arms, seeds, rates tried, tokens a run, batch, sizes of the graft; `of`: digests of model and text.

    Raises: ConfigError for an unknown arm (nearest named), or nothing to run.
    """

    arms: tuple[str, ...] = ARMS
    seeds: tuple[int, ...] = (0, 1, 2)
    tokens: int = 100_352
    batch: int = 4
    rates: tuple[float, ...] = RATES
    sizes: Sizes = field(default_factory=Sizes)
    of: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for arm in self.arms:
            if arm not in ARMS:
                raise ConfigError(f'unknown arm "{arm}"{nearest(arm, ARMS)}; there are {", ".join(ARMS)}')
        if not self.arms or not self.seeds or not self.rates or self.tokens < 1:
            raise ConfigError("give at least one arm, one seed, one rate and some tokens")

    @property
    def digest(self) -> str:
        """Of all that a single run depends on: not which other arms and seeds there are."""
        facts = asdict(self)
        del facts["arms"], facts["seeds"]
        return sha256_bytes(json.dumps(facts, sort_keys=True).encode())[:16]

    @property
    def tuning_tokens(self) -> int:
        """Tokens of a tuning run."""
        return self.tokens // 4


@dataclass(frozen=True)
class Material:
    """The text of a comparison, with hidden states: windows to train on, to tune on, to be judged on; questions."""

    train: Windows
    dev: Windows
    test: Windows
    sheet: Sheet
    sheet_hidden_RTD: np.ndarray


@dataclass(frozen=True)
class Run:
    """One line to be: "tune" or "run", at a rate (0: nothing is trained)."""

    kind: str
    arm: str
    seed: int
    lr: float

    @property
    def key(self) -> tuple:
        """What tells it from the other lines of its design."""
        return self.kind, self.arm, self.seed, self.lr


def read_rows(path: str | os.PathLike) -> list[dict]:
    """The finished runs of a file, of whatever design; a last line that was cut off by a kill is left out.

    Raises: DataError naming the first other line that is no JSON object.
    """
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            if number < len(lines):
                raise DataError(f"{path}: line {number} is no result; mend or remove it") from None
    return rows


def append_row(path: str | os.PathLike, row: dict) -> None:
    """Add a line, synced; what a kill left of an unfinished one is cut off first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        file.seek(0)
        whole = file.read()
        file.truncate(whole.rfind(b"\n") + 1)
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def best_rates(design: Design, rows: list[dict]) -> dict[str, float]:
    """Of every arm whose tuning is finished, the rate of the lowest dev loss (0 for an arm that trains nothing)."""
    found = {arm: tuned(design, arm, rows) for arm in design.arms if arm != "none"}
    best = {arm: _lowest(nats) for arm, nats in found.items() if not rates_left(design, nats)}
    return best | ({"none": 0.0} if "none" in design.arms else {})


def tuned(design: Design, arm: str, rows: list[dict]) -> dict[float, float]:
    """Dev nats of one arm by the rates that it was tried at."""
    own = (row for row in rows if row["kind"] == "tune" and row["design"] == design.digest and row["arm"] == arm)
    return {row["lr"]: row["dev_nats"] for row in own}


def rates_left(design: Design, nats: dict[float, float]) -> list[float]:
    """Rates at which an arm is still to be tried: those of the grid, then one beyond the end where its best is (of a grid of two or
    fewer every rate is an end: nothing beyond).
    """
    left = [lr for lr in design.rates if lr not in nats]
    if left or len(design.rates) < 3:
        return left
    best = _lowest(nats)
    if best == max(nats):
        return [lr for lr in LADDER if lr > best][:1]
    if best == min(nats):
        return [lr for lr in LADDER if lr < best][-1:]
    return []


def _lowest(nats: dict[float, float]) -> float:
    return min(nats, key=lambda lr: nats[lr] if math.isfinite(nats[lr]) else math.inf)


def runs_left(design: Design, rows: list[dict]) -> list[Run]:
    """What is to be done next, in order; reported runs of an arm stand here once its tuning is finished. Seed by seed."""
    done = {(row["kind"], row["arm"], row["seed"], row["lr"]) for row in rows if row["design"] == design.digest}
    learning = [arm for arm in design.arms if arm != "none"]
    tuning = [
        Run("tune", arm, TUNING_SEED, lr) for arm in learning for lr in rates_left(design, tuned(design, arm, rows))
    ]
    best = best_rates(design, rows)
    reported = [
        Run("run", arm, seed, best[arm])
        for seed in design.seeds
        for arm in design.arms
        if arm in best and (arm != "none" or seed == design.seeds[0])
    ]
    return [run for run in tuning + reported if run.key not in done]


def run_all(
    design: Design,
    suffix: Suffix,
    cids_V: np.ndarray,
    material: Material,
    path: str | os.PathLike,
    *,
    say: Callable[[str], None] = print,
) -> Iterator[dict]:
    """Do what is left, appending to `path`, and yield every new row."""
    began, tokens_done = time.monotonic(), 0
    while left := runs_left(design, read_rows(path)):
        run = left[0]
        arms_to_come = len(design.seeds) * sum(arm != "none" for arm in design.arms)
        tokens_left = _tokens_left(design, read_rows(path), arms_to_come)

        def progress(
            step: int, steps: int, loss: float, run: Run = run, left: int = tokens_left, done: int = tokens_done
        ) -> None:
            tokens = _tokens(design, run) * step // steps
            rate = (done + tokens) / (time.monotonic() - began)
            if step % 10 == 0 or step == steps:
                eta_min = (left - tokens) / rate / 60
                say(f"{run.kind} {run.arm} seed {run.seed} lr {run.lr:g}: step {step}/{steps}, {loss:.3f} nats, "
                    f"{rate:.0f} tokens/s, {eta_min:.0f} min to go")  # fmt: skip

        row = one_run(design, run, suffix, cids_V, material, progress)
        tokens_done += _tokens(design, run)
        append_row(path, row)
        yield row


def one_run(
    design: Design,
    run: Run,
    suffix: Suffix,
    cids_V: np.ndarray,
    material: Material,
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> dict:
    """Train and judge one arm; the line that is kept of it."""
    began, tokens = time.monotonic(), _tokens(design, run)
    ids_NT = material.train.ids_NT[:, :-1]
    row = {"kind": run.kind, "arm": run.arm, "seed": run.seed, "lr": run.lr, "design": design.digest, "tokens": tokens}
    with make_arm(run.arm, suffix, cids_V, ids_NT, sizes=design.sizes, seed=run.seed) as arm:
        row["parameters"] = arm.counts(ids_NT)
        if tokens:
            settings = {"lr": run.lr, "tokens": tokens, "batch": design.batch, "seed": run.seed}
            row["train_nats"] = train_arm(arm, suffix, material.train, **settings, progress=progress)
        row["train_seconds"] = round(time.monotonic() - began, 1)
        if run.kind == "tune":
            row["dev"] = by_source(window_nats(arm, suffix, material.dev), material.dev.sources)
            row["dev_nats"] = float(np.mean(list(row["dev"].values())))
        else:
            row["test"] = by_source(window_nats(arm, suffix, material.test), material.test.sources)
            row["recall"] = recall_table(material.sheet, score(arm, suffix, material.sheet, material.sheet_hidden_RTD))
    row["seconds"] = round(time.monotonic() - began, 1)
    import transformers

    return row | {"environment": environment() | {"transformers": transformers.__version__}}


def _tokens(design: Design, run: Run) -> int:
    if run.arm == "none":
        return 0
    return design.tuning_tokens if run.kind == "tune" else design.tokens


def _tokens_left(design: Design, rows: list[dict], reported: int) -> int:
    """Training tokens of all runs that are not done, those whose rate is not known yet among them."""
    mine = [row for row in rows if row["design"] == design.digest and row["arm"] in design.arms]
    tried = sum(row["kind"] == "tune" and row["lr"] in design.rates for row in mine)
    ran = sum(row["kind"] == "run" and row["arm"] != "none" and row["seed"] in design.seeds for row in mine)
    tuning = len(design.rates) * sum(arm != "none" for arm in design.arms)
    return max(0, tuning - tried) * design.tuning_tokens + max(0, reported - ran) * design.tokens
