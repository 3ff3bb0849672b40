"""`nengram sweep ... --check`: one point of a finished sweep again, with a seed that the sweep did not have.

A published interval is a promise about runs that nobody has made yet. Whoever doubts it picks a point and a seed; that point and its
reference (pure MoE of the same tokens, or the sweep's first setting) are run, and their difference is held against

    the prediction interval    where one more seed's difference falls 95 times in 100, given the sweep's own seeds

which is wider than the interval of the mean. Every check is a line of checks.jsonl, those that fell outside too.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from nengram.config import Config, dotted_values
from nengram.errors import ConfigError, NengramError, nearest
from nengram.files import write_atomic
from nengram.study.processes import run_jobs
from nengram.study.sweep import ROWS, Corpora, Point, expand, job_of, load_rows, row_of, rows_of
from nengram.study.sweep_report import differences
from nengram.study.verdict import SEEDS_NEEDED, prediction_interval
from nengram.train import environment

CHECKS = "checks.jsonl"


def run_check(config: Config, out: Path, runs: Path, at_once: int, console: Console, words: Iterable[str]) -> dict:
    """Run a point and its reference with a new seed, say whether their difference was to be expected, and keep the answer.

    words: `key=value` of the sweep's axes, enough to mean one point, and `train.seed=N`.
    Returns: what is written to checks.jsonl: point, seed, difference, interval, inside.
    Raises: ConfigError for words that mean no point or several, or a seed of the sweep; NengramError when the sweep has too few
        finished seeds there, or a run fails.
    """
    corpora, asked = Corpora(), dotted_values(words, "--check")
    seed = _new_seed(asked.pop("train.seed", None), config)
    points = expand(config, corpora)
    point = _the_point(points, asked)
    reference = _reference(points, point)
    known = list(rows_of(points, load_rows(out / ROWS)).values())
    low, high = prediction_interval(_published(known, point, out))
    again = [_with_seed(config, one, seed, corpora) for one in (point, reference)]
    jobs = [job_of(one, corpora, runs) for one in again]
    run_jobs(jobs, console, at_once or None)
    rows = [row_of(one, job.folder, corpora(one.config)) for one, job in zip(again, jobs, strict=True)]
    difference = rows[0]["test_nats"] - rows[1]["test_nats"]
    found = {
        "point": point.settings,
        "reference": reference.settings,
        "seed": seed,
        "difference": difference,
        "low": low,
        "high": high,
        "inside": low <= difference <= high,
        "test_nats": [row["test_nats"] for row in rows],
        "environment": environment(),
    }
    kept = (out / CHECKS).read_text(encoding="utf-8") if (out / CHECKS).exists() else ""
    write_atomic(out / CHECKS, kept + json.dumps(found) + "\n")
    console.print(_in_words(found, point), highlight=False, markup=False, soft_wrap=True)
    return found


def _new_seed(seed: object, config: Config) -> int:
    if type(seed) is not int or seed < 0:
        raise ConfigError("--check: say which seed, e.g. train.seed=7")
    if seed in config.sweep.seeds:
        raise ConfigError(f"--check: seed {seed} is one of the sweep's own {list(config.sweep.seeds)}; take another")
    return seed


def _the_point(points: list[Point], asked: dict) -> Point:
    axes = {key for point in points for key in point.settings}
    if unknown := next((key for key in asked if key not in axes), None):
        raise ConfigError(
            f'--check: "{unknown}" is no axis of this sweep{nearest(unknown, axes)}; axes: {", ".join(sorted(axes))}'
        )
    meant = [point for point in points if all(point.settings.get(key) == value for key, value in asked.items())]
    settings = {json.dumps(point.settings, sort_keys=True): point for point in meant}
    if len(settings) != 1:
        told = ", ".join(point.name.rsplit(" ", 1)[0] for point in settings.values())
        raise ConfigError(
            f"--check means {len(settings)} points of the sweep, give axes that mean one; meant: {told or 'none'}"
        )
    return next(iter(settings.values()))


def _reference(points: list[Point], point: Point) -> Point:
    pure = [one for one in points if one.arm == "moe" and one.tokens == point.tokens]
    reference = (pure or points)[0]
    if reference.settings == point.settings:
        raise ConfigError("--check: this point is what the others are read against; choose another")
    return reference


def _published(rows: list[dict], point: Point, out: Path) -> list[float]:
    gaps = [one["difference"] for one in differences(rows) if one["point"] == point.settings and one["difference"]]
    if gaps and len(gaps[0]["differences"]) >= SEEDS_NEEDED:
        return gaps[0]["differences"]
    raise NengramError(
        f"{out / ROWS}: fewer than {SEEDS_NEEDED} finished seeds of this point and its reference; run the sweep first"
    )


def _with_seed(config: Config, point: Point, seed: int, corpora: Corpora) -> Point:
    grid = {key: [value] for key, value in point.settings.items()}
    return expand(config.replace(sweep__grids=[grid], sweep__seeds=[seed]), corpora)[0]


def _in_words(found: dict, point: Point) -> str:
    verdict = "inside" if found["inside"] else "OUTSIDE"
    return (
        f"{point.name.rsplit(' ', 1)[0]}, seed {found['seed']}: difference {found['difference']:+.4f} nats, {verdict} the "
        f"prediction interval {found['low']:+.4f} .. {found['high']:+.4f} of the sweep's seeds"
    )
