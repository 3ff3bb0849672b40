"""Equal tuning for every arm: the same number of runs on one grid of learning rates, judged on dev.

The grid has ratio sqrt 2 and starts around `train.lr`. While any arm's best rate is the first or the last of the grid, the grid grows
on that side, for ALL arms: a baseline that was tried less is a baseline that was wronged (an untuned one nearly doubled the gain of
our pilot). Runs use a seed of their own, so that no seed of the comparison helped to choose its rate. The table's multiplier stays as
the config has it.
"""

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from nengram.config import Config
from nengram.errors import NengramError
from nengram.files import write_atomic
from nengram.study.arm import load_facts, prepare_for
from nengram.study.compare import arm_config, arm_job, check
from nengram.study.processes import run_jobs
from nengram.train import environment

TUNING_SEED = 1000
MOST_POINTS = 10
Arm = TypeVar("Arm", bound=Hashable)


def search(
    arms: Sequence[Arm],
    base_lr: float,
    dev_of: Callable[[list[tuple[Arm, float]]], list[float]],
    *,
    known: Mapping[Arm, Mapping[float, float]] | None = None,
    points: int = 3,
) -> dict[Arm, dict[float, float]]:
    """Dev loss of every arm at every rate of the grid, which grows until no arm's best is at its edge.

    Args:
        arms: what is tuned alike: names of arms, or whatever else tells runs apart.
        base_lr: the grid's middle.
        dev_of: function of a list of (arm, rate) that does the runs and returns their dev losses in that order.
        known: losses of an earlier search.
        points: rates to begin with.
    Raises: NengramError when a grid of 10 rates has no interior best.
    """
    found: dict[Arm, dict[float, float]] = {arm: dict((known or {}).get(arm, {})) for arm in arms}
    exponents = range(-(points // 2), points - points // 2)
    while True:
        grid = [round(base_lr * 2 ** (k / 2), 6) for k in exponents]
        missing = [(arm, lr) for arm in arms for lr in grid if lr not in found[arm]]
        for (arm, lr), dev_nats in zip(missing, dev_of(missing), strict=True):
            found[arm][lr] = dev_nats
        best = {min(grid, key=losses.__getitem__) for losses in found.values()}
        low, high = grid[0] in best, grid[-1] in best
        if not low and not high:
            return found
        exponents = range(exponents[0] - low, exponents[-1] + 1 + high)
        if len(exponents) > MOST_POINTS:
            raise NengramError(
                f"tune: no interior best learning rate on {MOST_POINTS} points around {base_lr}; set train.lr nearer"
            )


def tune(config: Config, out: Path, console: Console) -> dict:
    """Find each arm's learning rate; returns and writes `out/tune.json` with every dev loss. Raises NengramError as `search`."""
    config = check(config)
    data = prepare_for(config)

    def dev_of(pairs: list[tuple[str, float]]) -> list[float]:
        configs = [arm_config(config, arm, TUNING_SEED, lr=lr) for arm, lr in pairs]
        folders = [out / f"{arm}-lr{lr:.5f}" for arm, lr in pairs]
        jobs = [arm_job(one, data, folder, test=False) for one, folder in zip(configs, folders, strict=True)]
        run_jobs(jobs, console)
        return [load_facts(folder)["dev_nats"] for folder in folders]

    losses = search(config.compare.arms, config.train.lr, dev_of)
    found = {
        "environment": environment(),
        "lr": {arm: min(by_rate, key=by_rate.__getitem__) for arm, by_rate in losses.items()},
        "dev_nats": {arm: {f"{lr:.6f}": by_rate[lr] for lr in sorted(by_rate)} for arm, by_rate in losses.items()},
    }
    write_atomic(out / "tune.json", json.dumps(found, indent=1))
    return found


def tune_table(found: dict) -> Table:
    """Dev loss of every arm at every rate, the best bold."""
    rates = list(next(iter(found["dev_nats"].values())))
    table = Table(title="dev loss (nats) by learning rate")
    table.add_column("arm")
    for lr in rates:
        table.add_column(lr, justify="right")
    for arm, losses in found["dev_nats"].items():
        best = min(losses.values())
        table.add_row(
            arm, *(f"[bold]{losses[lr]:.4f}[/]" if losses[lr] == best else f"{losses[lr]:.4f}" for lr in rates)
        )
    return table
