"""Where the gain lives: the law's runs at one share against pure MoE, split by history, source and kind of token.

    python experiments/2026-11-22-history/run.py [--rho 0.6] [--runs runs/arms]

Needs the run folders of `nengram sweep experiments/2026-11-22-law/sweep.toml`, which keep the loss of every judged test token.
Writes gain.json and gain.png beside this file.
"""

import argparse
from pathlib import Path

from rich.console import Console

from nengram.study.gain import run_gain
from nengram.study.sweep import load_rows

LAW = Path(__file__).parents[1] / "2026-11-22-law" / "rows.jsonl"


def main() -> None:
    """Pair the runs by seed, and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rho", type=float, default=0.6)
    parser.add_argument("--runs", type=Path, default=Path("runs/arms"))
    options = parser.parse_args()
    rows = load_rows(LAW)
    memory, baseline = (
        {row["seed"]: options.runs / row["run"] for row in rows if row["arm"] == arm and abs(row["rho"] - rho) < 0.02}
        for arm, rho in (("engram", options.rho), ("moe", 1.0))
    )
    seeds = sorted(memory.keys() & baseline.keys())
    console = Console(width=140)
    run_gain([memory[s] for s in seeds], [baseline[s] for s in seeds], out=Path(__file__).parent, console=console)


if __name__ == "__main__":
    main()
