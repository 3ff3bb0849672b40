"""What a benchmark leaves behind: one JSON file each, and the tables that are made from these files and from nothing else.

    {"name", "what", "gate",                what was measured, and what was found equal before
     "figures": [{"what", "median", "bounds": [p10, p90], "samples", "unit", "goal", "met"}],
     "absolute": {"numba_ns_per_token": 51.0, ...},       this machine's own numbers, units in the names
     "environment", "command"}              hardware, versions, load and date

A figure without a goal is there for information: its `goal` and `met` are null.
"""

import json
import operator
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from rich.table import Table

from nengram.files import write_atomic
from nengram.train import environment

SENSES = {">=": operator.ge, "<=": operator.le, "<": operator.lt}
MARK = "<!-- results -->"


def figure(what: str, values: np.ndarray, unit: str, goal: tuple[str, float] | None = None) -> dict:
    """Median and p10..p90 of `values`, held against e.g. `(">=", 3.0)`. unit: "x" (a ratio), "share" (of 1) or "s"."""
    low, median, high = (float(value) for value in np.percentile(values, (10, 50, 90)))
    return {
        "what": what,
        "median": median,
        "bounds": [low, high],
        "samples": len(values),
        "unit": unit,
        "goal": goal and f"{goal[0]} {shown(goal[1], unit)}",
        "met": goal and SENSES[goal[0]](median, goal[1]),
    }


def result(name: str, what: str, gate: str, figures: list[dict], absolute: dict[str, float]) -> dict:
    """A finished benchmark, ready to be saved."""
    return {
        "name": name,
        "what": what,
        "gate": gate,
        "figures": figures,
        "absolute": {key: float(f"{value:.4g}") for key, value in absolute.items()},
        "environment": environment() | {"load_average": f"{os.getloadavg()[0]:.1f}"},
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
    }


def save(found: dict, folder: Path) -> Path:
    """Write `<folder>/<name>.json`, whole or not at all."""
    path = folder / f"{found['name']}.json"
    write_atomic(path, json.dumps(found, indent=1) + "\n")
    return path


def load_all(folder: Path, order: Iterable[str]) -> list[dict]:
    """The saved results of the benchmarks named, those that exist."""
    paths = (folder / f"{name}.json" for name in order)
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def shown(value: float, unit: str) -> str:
    """`3.21x`, `4.5 %`, `12.0 ms`."""
    return {"x": f"{value:.2f}x", "share": f"{value:.1%}".replace("%", " %"), "s": f"{1e3 * value:.1f} ms"}[unit]


def cells(one: dict) -> tuple[str, str, str, str, str]:
    """A figure as text: what, median, p10..p90, goal, met."""
    bounds = " .. ".join(shown(bound, one["unit"]) for bound in one["bounds"])
    met = {True: "yes", False: "MISSED", None: "-"}[one["met"]]
    return one["what"], shown(one["median"], one["unit"]), bounds, one["goal"] or "-", met


def terminal_table(found: dict) -> Table:
    """One benchmark, for the terminal; its gate and absolute figures stand below it."""
    absolute = ", ".join(f"{key} {value:,g}" for key, value in found["absolute"].items())
    table = Table(
        title=found["what"],
        title_justify="left",
        caption=f"checked: {found['gate']}\n{absolute}",
        caption_justify="left",
    )
    for name in (found["name"], "median", "p10 .. p90", "goal", "met"):
        table.add_column(name, justify="left" if name == found["name"] else "right")
    for one in found["figures"]:
        table.add_row(*cells(one), style="bold red" if one["met"] is False else None)
    return table


def markdown_table(all_found: list[dict]) -> str:
    """All results as a Markdown table, and the machines they were taken on."""
    lines = ["| benchmark | figure | median | p10 .. p90 | goal | met |", "|---|---|---:|---:|---:|---|"]
    for found in all_found:
        lines += [f"| {found['name']} | {' | '.join(cells(one))} |" for one in found["figures"]]
    machines: dict[str, list[str]] = {}
    for found in all_found:
        machines.setdefault(machine(found["environment"]), []).append(found["name"])
    return "\n".join([*lines, "", *(f"{', '.join(names)}: {where}." for where, names in machines.items())])


def machine(environment: dict[str, str]) -> str:
    """Hardware, versions and date in one line."""
    return (
        "{cpu}, {cores} cores, {threads} thread, load {load_average}; {system}, Python {python}, torch {torch}, "
        "numpy {numpy}; {date}".format(**environment)
    )


def put_between_marks(text: str, generated: str) -> str:
    """`text` with everything between its two marks replaced."""
    before, _, after = text.split(MARK)
    return f"{before}{MARK}\n{generated}\n{MARK}{after}"
