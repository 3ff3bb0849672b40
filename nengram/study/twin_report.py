"""The twin task as people read it: a terminal table with the verdict, and the same as Markdown for the documents."""

from collections.abc import Iterator, Mapping

import numpy as np
from rich.console import Console
from rich.table import Table

from nengram.study.report import ARM_TITLES

FORM_TITLES = {"facts": "facts: the pair is an n-gram", "permuted": "permuted: the pair is parted"}


def print_twin(found: Mapping, console: Console) -> None:
    """The table, and whether the task separates."""
    console.print(twin_table_of(found))
    for form, of in found["forms"].items():
        for arm, reading in of["readings"].items():
            console.print(f"{FORM_TITLES[form]}: {ARM_TITLES[arm]} - pure MoE: {in_words(reading)}", highlight=False)
    console.print(
        f"[bold]{verdict_of(found)}[/]  ({found['wall_seconds']:.0f} s, {found['cpu_seconds']:.0f} CPU-seconds)",
        highlight=False,
    )


def twin_table_of(found: Mapping) -> Table:
    """Accuracy and loss on shown and on never shown pairs, an arm a row, form after form."""
    seeds = len(found["seeds"])
    table = Table(title=f"{told(found)}, mean of {seeds} seed{'s' if seeds > 1 else ''}", title_justify="left")
    for name in ("form", "arm", "params\nM", "MFLOPs\n/token", "right,\nshown", "right,\nnever", "nats,\nshown"):
        table.add_column(name, justify="left" if name in ("form", "arm") else "right")
    for form, arm, cells in _rows(found):
        bold = "bold" if found["forms"][form]["readings"].get(arm, {}).get("verdict") == "learns the facts" else ""
        table.add_row(FORM_TITLES[form] if arm == "moe" else "", ARM_TITLES[arm], *cells, style=bold)
    return table


def markdown_of(found: Mapping) -> str:
    """The same as Markdown, with the paired differences, the verdict and where the numbers come from."""
    header = ["text", "arm", "parameters, M", "MFLOPs a token", "right, shown", "right, never shown", "nats, shown"]
    rows = [[FORM_TITLES[form], ARM_TITLES[arm], *cells] for form, arm, cells in _rows(found)]
    readings = [
        f"- {FORM_TITLES[form]}: {ARM_TITLES[arm]} - pure MoE: {in_words(reading)}"
        for form, of in found["forms"].items()
        for arm, reading in of["readings"].items()
    ]
    rule = "|".join(["---", "---", *["---:"] * (len(header) - 2)])
    table = [" | ".join(cells) for cells in (header, *rows)]
    lines = [f"| {table[0]} |", f"|{rule}|", *(f"| {line} |" for line in table[1:])]
    machine = "{cpu}, {cores} cores, threads {threads}; {system}, Python {python}, torch {torch}; {date}.".format(
        **found["environment"]
    )
    seeds = found["seeds"]
    effort = f"seeds {', '.join(map(str, seeds))}, {found['cpu_seconds'] / len(seeds):.0f} CPU-seconds a seed"
    source = f"`{found['command']}`: {told(found)}; {effort}. {machine}"
    return "\n\n".join(["\n".join(lines), "\n".join(readings), f"{verdict_of(found)} {source}"])


def told(found: Mapping) -> str:
    """`1,728 facts, each shown 10 times, 103,680 tokens, chance 6.2 %`."""
    task = found["task"]
    shown = f"{task['facts']:,} facts, each shown {found['size']['times']} times"
    return f"{shown}, {task['tokens']:,} tokens, chance {percent(task['chance'])}"


def verdict_of(found: Mapping) -> str:
    """One sentence."""
    return {
        True: "The task separates: Engram learns the facts where a lookup can hold them, and nothing else learns any.",
        False: "The task does NOT separate by the rule.",
        None: f"No verdict: {len(found['seeds'])} seed(s), three are needed.",
    }[found["separates"]]


def in_words(reading: Mapping) -> str:
    """`+0.912 right, 95 % interval +0.900 .. +0.924; -2.701 nats: learns the facts`."""
    accuracy = reading["accuracy"]
    interval = "" if accuracy["low"] is None else f", 95 % interval {accuracy['low']:+.3f} .. {accuracy['high']:+.3f}"
    return f"{accuracy['mean']:+.3f} right{interval}; {reading['nats']['mean']:+.3f} nats: {reading['verdict']}"


def percent(share: float) -> str:
    """`6.2 %`."""
    return f"{100 * share:.1f} %"


def rates_table(found: Mapping) -> Table:
    """Loss on shown facts by learning rate, an arm and form a row, the best bold."""
    rates = list(next(iter(found["shown_nats"]["facts"].values())))
    table = Table(title="loss on the values of shown facts (nats) by learning rate", title_justify="left")
    for name in ("form", "arm", *rates):
        table.add_column(name, justify="left" if name in ("form", "arm") else "right")
    for form, arms in found["shown_nats"].items():
        for arm, losses in arms.items():
            best = min(losses.values())
            cells = (f"[bold]{nats:.3f}[/]" if nats == best else f"{nats:.3f}" for nats in losses.values())
            table.add_row(form, arm, *cells)
    return table


def _rows(found: Mapping) -> Iterator[tuple[str, str, list[str]]]:
    for form, of in found["forms"].items():
        for arm, figures in of["arms"].items():
            cost = found["costs"][arm]
            right = (percent(np.mean(figures[f"{which}_accuracy"])) for which in ("shown", "unshown"))
            nats = f"{np.mean(figures['shown_nats']):.3f}"
            yield form, arm, [f"{cost['total'] / 1e6:.3f}", f"{cost['flops'] / 1e6:.3f}", *right, nats]
