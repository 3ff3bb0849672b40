"""The learning rates of a sweep: searched at few points with equal effort, interpolated between, verified at the best.

Tuning every point would cost more than the sweep, tuning none would favour whichever arm likes the guess. So, per training budget:

    1. nodes    pure MoE (rho 1), the middle and the lowest share of the memory arm, and each other arm at its own share
    2. search   one grid for all nodes, as for the arms of a comparison (`nengram.study.tune`)
    3. between  log rate is linear in rho
    4. verify   once the sweep has rows, tuning again adds the best share as a node: its rate is searched too, not believed

`tune.json` holds every dev loss, and the `rates` to put into the preset's [sweep] section.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nengram.config import Config, RateConfig, differences
from nengram.errors import NengramError
from nengram.study.tune import TUNING_SEED


def rate_at(rates: Sequence[RateConfig], config: Config) -> float | None:
    """The tuned rate of a run: that of its arm and budget of tokens, interpolated over rho; None where nothing was tuned.

    Pure MoE is the upper end of the memory arm. Outside the searched shares the nearest one holds.
    """
    arm, rho = config.budget.arm, config.budget.rho
    if arm == "moe":
        arm, rho = "engram", 1.0
    nodes = {
        1.0 if rate.arm == "moe" else rate.rho: math.log(rate.lr)
        for rate in rates
        if rate.tokens in (0, config.train.tokens) and ("engram" if rate.arm == "moe" else rate.arm) == arm
    }
    if not nodes:
        return None
    below = max((node for node in nodes if node <= rho), default=min(nodes))
    above = min((node for node in nodes if node >= rho), default=max(nodes))
    share = 0.0 if above == below else (rho - below) / (above - below)
    return round(math.exp(nodes[below] + share * (nodes[above] - nodes[below])), 6)


@dataclass(frozen=True)
class Node:
    """Where a rate is searched."""

    arm: str
    rho: float
    tokens: int


def nodes_of(points: Sequence, best: dict[int, float]) -> list[Node]:
    """The nodes of a sweep's points: three shares of the memory arm, one of each other arm, per training budget.

    best: share with the lowest loss by tokens, from rows; it becomes a node as well.
    """
    shares: dict[tuple[str, int], set[float]] = {}
    for point in points:
        arm = "engram" if point.arm == "moe" else point.arm
        rho = 1.0 if point.arm == "moe" else point.config.budget.rho
        shares.setdefault((arm, point.config.train.tokens), set()).add(rho)
    nodes = []
    for (arm, tokens), rhos in shares.items():
        ordered = sorted(rhos, reverse=True)
        chosen = {ordered[0], ordered[len(ordered) // 2], ordered[-1]} if arm == "engram" else set(ordered)
        if arm == "engram" and tokens in best:
            chosen.add(best[tokens])
        nodes += [Node(arm, rho, tokens) for rho in sorted(chosen, reverse=True)]
    return nodes


def rates_of(found: dict[Node, dict[float, float]]) -> list[RateConfig]:
    """The best rate of every node."""
    return [
        RateConfig(arm=node.arm, rho=node.rho, tokens=node.tokens, lr=min(losses, key=losses.get))
        for node, losses in found.items()
    ]


def to_json(found: dict[Node, dict[float, float]], config: Config, environment: dict[str, str], command: str) -> dict:
    """What tune.json holds."""
    return {
        "what": f"dev loss of each node at each learning rate, seed {TUNING_SEED}",
        "settings": settings_of(config),
        "command": command,
        "environment": environment,
        "rates": [asdict(rate) for rate in rates_of(found)],
        "dev_nats": [
            {**asdict(node), "by_rate": {f"{lr:.6f}": nats for lr, nats in sorted(losses.items())}}
            for node, losses in found.items()
        ],
    }


def rates_toml(found: dict[Node, dict[float, float]]) -> str:
    """The lines to put below [sweep] of a preset."""
    lines = (
        f"  {{ arm = {json.dumps(rate.arm)}, rho = {rate.rho:g}, tokens = {rate.tokens}, lr = {rate.lr:g} }},"
        for rate in rates_of(found)
    )
    return "\n".join(("rates = [", *lines, "]"))


def print_search(found: dict[Node, dict[float, float]], console: Console) -> None:
    """A table of dev losses, each node's best bold; grids of different budgets may have grown to different rates."""
    rates = sorted({lr for losses in found.values() for lr in losses})
    table = Table(title="dev loss (nats) by learning rate", title_justify="left")
    for name in ("arm", "rho", "tokens", *(f"{lr:.5f}" for lr in rates)):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for node, losses in found.items():
        best = min(losses, key=losses.get)
        shown = {lr: f"{nats:.4f}" for lr, nats in losses.items()} | {best: f"[bold]{losses[best]:.4f}[/]"}
        cells = (shown.get(lr, "-") for lr in rates)
        table.add_row(node.arm, f"{node.rho:g}", f"{node.tokens:,}", *cells)
    console.print(table)


def load_found(path: Path, config: Config) -> dict[Node, dict[float, float]]:
    """The dev losses of a tune.json, none if there is no file or it is of other settings. Raises NengramError for a damaged one."""
    if not path.exists():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        found = {
            Node(one["arm"], one["rho"], one["tokens"]): {float(lr): nats for lr, nats in one["by_rate"].items()}
            for one in tree["dev_nats"]
        }
        return found if tree["settings"] == settings_of(config) else {}
    except (ValueError, KeyError, TypeError) as error:
        raise NengramError(f"{path}: damaged ({error}); delete it to search again") from None


def settings_of(config: Config) -> dict:
    """What a search holds fixed: every key that differs from its default, but for those it varies and the study's own."""
    varied = (
        "budget.arm",
        "budget.rho",
        "train.tokens",
        "train.lr",
        "train.seed",
        "name",
        "data.cache",
        "train.test_tokens",
    )
    return {
        key: value
        for key, _, value in differences(config)
        if key not in varied and not key.startswith(("compare.", "sweep."))
    }
