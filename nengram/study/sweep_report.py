"""A sweep as people read it: the plan before anything runs, the points with paired differences after.

Differences are paired by seed with the first point of the sweep (or the pure MoE of the same training budget, where there is one), and
their 95 % intervals are Student's t over seeds, as in every comparison here.
"""

import csv
import io
import json
import math
from collections.abc import Sequence
from statistics import median

import numpy as np
from rich.table import Table

from nengram.study.sweep import Point
from nengram.study.verdict import paired

FLOPS_PER_CPU_S = 3.0e10  # what one core gave in the first sweeps; rows of the same study replace it
STEP_FLOPS = 3  # a training step costs three forward passes


def dry_table(points: Sequence[Point], done: dict[str, dict], flops_per_cpu_s: float) -> Table:
    """Every config with its totals and estimated CPU minutes; one line a setting, all its seeds."""
    minutes = sum(cpu_seconds(point, flops_per_cpu_s) for point in points if point.digest not in done) / 60
    title = f"{len(points)} runs, {len(done)} of them done; about {minutes:.0f} CPU minutes of training to go"
    table = Table(title=title, title_justify="left")
    headers = (
        "arm",
        "rho",
        "also",
        "experts",
        "shared",
        "rows\na head",
        "params\nM",
        "table\nM",
        "MFLOPs",
        "lr",
        "tokens",
        "CPU\nmin",
    )
    for name in (*headers, "done"):
        table.add_column(name, justify="left" if name in ("arm", "also") else "right")
    for same in by_setting(points):
        first = same[0]
        memory, model, cost = first.resolved.memory, first.resolved.model, first.cost
        rows = sorted(set(memory.rows_per_head)) if memory.kind != "none" else []
        table.add_row(
            first.arm,
            f"{first.resolved.budget.rho:.2f}",
            also(first.settings),
            str(model.experts),
            str(model.shared_width),
            "/".join(f"{n:,}" for n in rows) or "-",
            f"{cost.total / 1e6:.3f}",
            f"{cost.table / 1e6:.3f}" if cost.table else "-",
            f"{cost.flops / 1e6:.3f}",
            f"{first.config.train.lr:.5f}{'' if first.tuned else chr(10) + 'untuned'}",
            f"{first.tokens:,}",
            f"{sum(cpu_seconds(point, flops_per_cpu_s) for point in same) / 60:.1f}",
            f"{sum(point.digest in done for point in same)}/{len(same)}",
        )
    return table


def also(settings: dict) -> str:
    """What a point sets beside its arm, share, tokens and rate: `gate=plain blocks=[0]`."""
    own = ("budget.arm", "budget.rho", "train.tokens", "train.lr")
    return " ".join(f"{key.split('.')[-1]}={json.dumps(value)}" for key, value in settings.items() if key not in own)


def by_setting(points: Sequence[Point]) -> list[list[Point]]:
    """Points that differ in the seed alone, together."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(json.dumps(point.settings, sort_keys=True), []).append(point)
    return list(groups.values())


def cpu_seconds(point: Point, flops_per_cpu_s: float) -> float:
    """Estimated CPU seconds of a run's training."""
    return STEP_FLOPS * point.cost.flops * point.tokens / flops_per_cpu_s


def flops_per_cpu_s(rows: Sequence[dict]) -> float:
    """Training FLOPs a CPU second that finished rows reached (median), or the figure taken before."""
    if not rows:
        return FLOPS_PER_CPU_S
    return median(STEP_FLOPS * row["cost"]["flops"] * row["tokens"] / row["cpu_seconds"] for row in rows)


def differences(rows: Sequence[dict]) -> list[dict]:
    """Per setting: seeds, mean loss, and the paired difference to its reference, as `paired(...).to_dict()`.

    The reference of a setting is pure MoE at the same tokens, or else the sweep's first setting; None for itself.
    """
    groups: dict[str, dict[int, dict]] = {}
    for row in rows:
        groups.setdefault(json.dumps(row["point"], sort_keys=True), {})[row["seed"]] = row
    pure = {next(iter(group.values()))["tokens"]: group for group in groups.values() if _is_pure(group)}
    first = next(iter(groups.values()), {})
    found = []
    for group in groups.values():
        one = next(iter(group.values()))
        reference = pure.get(one["tokens"], first)
        shared = [seed for seed in group if seed in reference]
        gaps = [group[seed]["test_nats"] - reference[seed]["test_nats"] for seed in shared]
        found.append(
            {
                "point": one["point"],
                "arm": one["arm"],
                "rho": one["rho"],
                "tokens": one["tokens"],
                "seeds": sorted(group),
                "test_nats": float(np.mean([row["test_nats"] for row in group.values()])),
                "to": next(iter(reference.values()))["point"],
                "difference": paired(gaps).to_dict() if gaps and group is not reference else None,
            }
        )
    return found


def _is_pure(group: dict[int, dict]) -> bool:
    return next(iter(group.values()))["arm"] == "moe"


def points_table(found: Sequence[dict]) -> Table:
    """Mean test loss of each setting and its paired difference."""
    table = Table(
        title="test loss, and the paired difference to the reference (below zero: better)", title_justify="left"
    )
    for name in ("arm", "rho", "also", "tokens", "seeds", "test nats", "difference", "95 % interval", "detectable"):
        table.add_column(name, justify="left" if name in ("arm", "also") else "right")
    for one in found:
        gap = one["difference"]
        cells = ("reference", "", "")
        if gap:
            interval = "-" if gap["low"] is None else f"{gap['low']:+.4f} .. {gap['high']:+.4f}"
            detectable = "-" if gap["detectable"] is None else f"{gap['detectable']:.4f}"
            cells = (f"{gap['mean']:+.4f}", interval, detectable)
        head = (one["arm"], f"{one['rho']:.2f}", also(one["point"]), f"{one['tokens']:,}", str(len(one["seeds"])))
        table.add_row(*head, f"{one['test_nats']:.4f}", *cells)
    return table


def to_csv(rows: Sequence[dict]) -> str:
    """Rows as CSV: what was set, then the figures; nested ones as dotted columns, the config left out."""
    settings = list(dict.fromkeys(key for row in rows for key in row["point"]))
    plain = (
        "arm",
        "rho",
        "seed",
        "tokens",
        "lr",
        "tuned",
        "dev_nats",
        "test_nats",
        "test_nats_permuted",
        "bits_per_byte",
    )
    costs = ("total", "active", "table", "flops")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*settings, *plain, *costs, "rows", "cpu_seconds", "run"])
    for row in rows:
        writer.writerow(
            [
                *(json.dumps(row["point"].get(key)) for key in settings),
                *("" if row[key] is None or _is_nan(row[key]) else row[key] for key in plain),
                *(row["cost"][key] for key in costs),
                row["rows"],
                round(row["cpu_seconds"], 1),
                row["run"],
            ]
        )
    return text.getvalue()


def _is_nan(value) -> bool:
    return isinstance(value, float) and math.isnan(value)
