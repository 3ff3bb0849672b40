"""`nengram sweep`: plan, tune or run, then tables, fits and figures from the rows alone.

A sweep over rho ends in the law's tables and figure; one over table sizes alone in the line of loss against log rows; any sweep in the
table of paired differences. Everything is made from rows.jsonl, so it can be made again without a run.
"""

import json
import sys
from pathlib import Path

from rich.console import Console

from nengram.config import Config
from nengram.errors import NengramError
from nengram.files import write_atomic
from nengram.study import law_figure, law_report
from nengram.study.arm import load_facts
from nengram.study.law import law_summary
from nengram.study.processes import run_jobs
from nengram.study.sweep import ROWS, Corpora, Point, expand, job_of, load_rows, rows_of, run_sweep
from nengram.study.sweep_rates import (
    Node,
    load_found,
    nodes_of,
    print_search,
    rates_toml,
    to_json,
)
from nengram.study.sweep_report import differences, dry_table, flops_per_cpu_s, points_table, to_csv
from nengram.study.tune import TUNING_SEED, search
from nengram.train import environment


def run_dry(config: Config, out: Path, console: Console) -> list[Point]:
    """Print every config of the sweep with its totals and what it will cost. Raises ConfigError, DataError."""
    points = expand(config, Corpora())
    rows = load_rows(out / ROWS)
    rate = flops_per_cpu_s(rows)
    done = rows_of(points, rows)
    console.print(dry_table(points, done, rate))
    console.print(f"estimated at {rate / 1e9:.0f} GFLOPs a CPU second, evaluation not included", highlight=False)
    return points


def run_sweep_verb(config: Config, out: Path, runs: Path, at_once: int, console: Console) -> list[dict]:
    """Run the sweep, then report on its rows. Raises: ConfigError, DataError, NengramError when runs failed."""
    rows, failures = run_sweep(config, out, runs, console, at_once or None)
    report(rows, out, console)
    if failures:
        told = "; ".join(f"{name}: {why}" for name, why in failures.items())
        raise NengramError(f"{len(failures)} of {len(rows) + len(failures)} runs failed ({told}); the others are kept")
    return rows


def run_report(config: Config, out: Path, console: Console) -> list[dict]:
    """Report on the rows that are there, and run nothing. Raises: ConfigError, DataError; NengramError when there are none."""
    points = expand(config, Corpora())
    found = rows_of(points, load_rows(out / ROWS))
    if not found:
        raise NengramError(f"{out / ROWS}: no row of this sweep yet")
    console.print(f"{len(found)} of {len(points)} runs", highlight=False)
    rows = [found[point.digest] for point in points if point.digest in found]
    report(rows, out, console)
    return rows


def report(rows: list[dict], out: Path, console: Console) -> None:
    """Tables on the console; rows.csv, sweep.json and the figures in `out`."""
    if not rows:
        return
    found = differences(rows)
    console.print(points_table(found))
    summary = {"what": "paired differences of a sweep", "command": command(), "differences": found}
    for path in _fits(rows, out, console, summary):
        console.print(f"  {path}", highlight=False, soft_wrap=True)
    write_atomic(out / "rows.csv", to_csv(rows))
    write_atomic(out / "sweep.json", json.dumps(summary | {"environment": ran_on(rows)}, indent=1) + "\n")


def ran_on(rows: list[dict]) -> dict[str, str]:
    """Where and when the runs were made, not the report: `environment()` of every row, differing values side by side."""
    made = [row.get("environment", {}) for row in rows]
    keys = dict.fromkeys(key for one in made for key in one)
    return {key: ", ".join(dict.fromkeys(one[key] for one in made if key in one)) for key in keys}


def run_tune(config: Config, out: Path, runs: Path, at_once: int, console: Console) -> dict[Node, dict[float, float]]:
    """Search the learning rates of the sweep's nodes; once there are rows, the best share's too. Writes tune.json."""
    corpora = Corpora()
    points = expand(config, corpora)
    nodes = nodes_of(points, best_shares([row for row in rows_of(points, load_rows(out / ROWS)).values()]))
    found = load_found(out / "tune.json", config)
    for tokens in dict.fromkeys(node.tokens for node in nodes):

        def dev_of(pairs: list[tuple[Node, float]]) -> list[float]:
            jobs = [
                job_of(_tuning_point(config, points, node, lr, corpora), corpora, runs, test=False)
                for node, lr in pairs
            ]
            run_jobs(jobs, console, at_once or None)
            return [load_facts(job.folder)["dev_nats"] for job in jobs]

        found |= search([node for node in nodes if node.tokens == tokens], config.train.lr, dev_of, known=found)
        write_atomic(out / "tune.json", json.dumps(to_json(found, config, environment(), command()), indent=1) + "\n")
    print_search(found, console)
    console.print(rates_toml(found), markup=False, highlight=False)
    return found


def best_shares(rows: list[dict]) -> dict[int, float]:
    """The memory arm's share with the lowest mean test loss, by tokens asked for; only shares that all seeds have."""
    losses: dict[int, dict[float, list[float]]] = {}
    for row in rows:
        if row["arm"] in ("engram", "moe") and "budget.rho" in row["point"]:
            losses.setdefault(row["config"]["train.tokens"], {}).setdefault(row["point"]["budget.rho"], []).append(
                row["test_nats"]
            )
    return {
        tokens: min(by_rho, key=lambda rho: sum(by_rho[rho]) / len(by_rho[rho])) for tokens, by_rho in losses.items()
    }


def _tuning_point(config: Config, points: list[Point], node: Node, lr: float, corpora: Corpora) -> Point:
    """A point of the node's arm, share and tokens, with the tuning seed and this rate."""
    like = next(
        point
        for point in points
        if ("engram" if point.arm == "moe" else point.arm) == node.arm and point.config.train.tokens == node.tokens
    )
    settings = {"budget.arm": node.arm, "budget.rho": node.rho, "train.tokens": node.tokens, "train.lr": lr}
    tuning = config.replace(sweep__grids=[{key: [value] for key, value in (like.settings | settings).items()}])
    return expand(tuning.replace(sweep__seeds=[TUNING_SEED]), corpora)[0]


def _fits(rows: list[dict], out: Path, console: Console, summary: dict) -> list[Path]:
    """The law's part of the report, as far as the rows hold a curve over rho or over rows: tables, `summary["law"]`, figures."""
    try:
        summary["law"] = found = law_summary(rows)
    except ModuleNotFoundError as error:
        console.print(f"no fits without {error.name}: pip install nengram[study], and give the command again")
        return []
    if not found["curves"] and not found["rows"]:
        return []
    for table in law_report.tables(found):
        console.print(table)
    drawn = (law_figure.draw_law(found, out / "law.png"), law_figure.draw_rows(found, out / "rows.png"))
    return [path for path in drawn if path]


def command() -> str:
    """The command line that made the rows; a report of them is no other command."""
    return "nengram " + " ".join(word for word in sys.argv[1:] if word != "--report")
