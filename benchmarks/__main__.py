"""Run benchmarks by name, or all: verify, measure, print, write `benchmarks/results/<name>.json`.

A missed goal is said plainly and is no failure: it is a finding. Only a red gate (a fast path that disagrees with its reference) makes
the exit code non-zero, and leaves that benchmark's last result as it was.
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.gates import RedGate
from benchmarks.report import load_all, markdown_table, put_between_marks, save, terminal_table
from nengram.errors import nearest
from nengram.files import write_atomic

NAMES = (
    "hashing",
    "moe",
    "backbone",
    "memory_path",
    "fused_projection",
    "row_update",
    "gather",
    "startup",
    "disk",
    "serving",
    "table_tools",
    "graft",
)
ONLY_WHEN_NAMED = (
    "disk",
    "serving",
    "table_tools",
    "graft",
)  # minutes, 5 to 24 GiB of disk, or an opponent's interpreter
FOLDER = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 1 when a gate was red, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Ratios in one run, on one thread.")
    parser.add_argument(
        "names",
        nargs="*",
        metavar="name",
        help=f"any of {', '.join(NAMES)}; none: all but {', '.join(ONLY_WHEN_NAMED)}",
    )
    parser.add_argument("--table", action="store_true", help="measure nothing; renew the table in benchmarks/README.md")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in NAMES:
            parser.error(f'no benchmark "{name}"{nearest(name, NAMES)}; there are {", ".join(NAMES)}')
    torch.set_num_threads(1)
    names = options.names or [name for name in NAMES if name not in ONLY_WHEN_NAMED]
    red = 0 if options.table else run_all(names, Console())
    table = markdown_table(load_all(FOLDER, NAMES))
    write_atomic(README, put_between_marks(README.read_text(encoding="utf-8"), table))
    if options.table:
        print(table)
    return red


def run_all(names, console: Console) -> int:
    """Run, print and save each; 1 when any gate was red."""
    red, missed = 0, []
    for name in names:
        try:
            found = importlib.import_module(f"benchmarks.{name}").run()
        except RedGate as reason:
            console.print(f"[bold red]RED[/] {name}: {reason}. Nothing was measured.", highlight=False)
            red = 1
            continue
        console.print(terminal_table(found), highlight=False)
        save(found, FOLDER)
        missed += [f"{name}: {one['what']}" for one in found["figures"] if one["met"] is False]
    console.print("\n".join(f"[bold red]MISSED[/] {what}" for what in missed) or "no goal missed", highlight=False)
    return red


if __name__ == "__main__":
    sys.exit(main())
