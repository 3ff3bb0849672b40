"""Equal tuning for every arm: the same number of runs on one grid of learning rates, judged on dev.

The grid has ratio sqrt 2 and starts around `train.lr`. While any arm's best rate is the first or the last of the grid, the grid grows
on that side, for ALL arms: a baseline that was tried less is a baseline that was wronged (an untuned one nearly doubled the gain of
our pilot). Runs use a seed of their own, so that no seed of the comparison helped to choose its rate. The table's multiplier stays as
the config has it.
"""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nengram.config import Config
from nengram.errors import NengramError
from nengram.files import write_atomic
from nengram.study.arm import FACTS, prepare_for
from nengram.study.compare import arm_config, arm_job, check
from nengram.study.processes import run_jobs
from nengram.train import environment

TUNING_SEED = 1000
MOST_POINTS = 10


def tune(config: Config, out: Path, console: Console, points: int = 3) -> dict:
    """Find each arm's learning rate; returns and writes `out/tune.json` with every dev loss.

    Raises: NengramError when no interior best is found on a grid of 10 points.
    """
    config = check(config)
    data = prepare_for(config)
    exponents = range(-(points // 2), points - points // 2)
    while True:
        jobs = {
            (arm, k): arm_job(
                arm_config(config, arm, TUNING_SEED, lr=rate(config, k)),
                data,
                out / f"{arm}-lr{rate(config, k):.5f}",
                test=False,
            )
            for arm in config.compare.arms
            for k in exponents
        }
        run_jobs(list(jobs.values()), console)
        dev = {key: json.loads((job.folder / FACTS).read_text())["dev_nats"] for key, job in jobs.items()}
        best = {arm: min(exponents, key=lambda k, arm=arm: dev[arm, k]) for arm in config.compare.arms}
        low, high = exponents[0] in best.values(), exponents[-1] in best.values()
        if not low and not high:
            break
        exponents = range(exponents[0] - low, exponents[-1] + 1 + high)
        if len(exponents) > MOST_POINTS:
            raise NengramError(
                f"tune: no interior best learning rate on {MOST_POINTS} points around {config.train.lr}; set train.lr nearer"
            )
    found = {
        "environment": environment(),
        "lr": {arm: round(rate(config, k), 6) for arm, k in best.items()},
        "dev_nats": {arm: {f"{rate(config, k):.6f}": dev[arm, k] for k in exponents} for arm in config.compare.arms},
    }
    write_atomic(out / "tune.json", json.dumps(found, indent=1))
    return found


def rate(config: Config, exponent: int) -> float:
    """The grid's learning rate number `exponent`: train.lr x sqrt(2) ** exponent."""
    return config.train.lr * 2 ** (exponent / 2)


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
