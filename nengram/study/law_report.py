"""The law in the terminal, made from `law_summary` alone: losses over rho, fits, the claim, what controls keep, rows, equal time.

Names come out of files; whatever is printed of them is shown as it is, markup and control characters included.
"""

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from nengram.study.report import ARM_TITLES
from nengram.study.trace import visible

EDGES = {"low": "at the lowest share", "high": "at the highest share"}


def tables(summary: dict[str, Any]) -> list[Table]:
    """All tables of a summary; parts without runs are left out."""
    curves = summary["curves"]
    parts = (
        (fits_table, [curve for curve in curves if curve["quadratic"]]),
        (claims_table, [curve for curve in curves if curve["claim"]], summary["tokens_to_show"]),
        (controls_table, summary["controls"]),
        (rows_table, summary["rows"]),
        (cpu_table, summary["equal_cpu"]),
    )
    return [*map(losses_table, curves), *(make(*given) for make, *given in parts if given[0])]


def losses_table(curve: dict[str, Any]) -> Table:
    """One training budget, a share a line: the loss and its paired difference to pure MoE."""
    names = ("rho", "table rows", "lr", "loss", "seeds", "against\npure MoE", "95 % interval", "by the rule")
    table = _table(f"{name(curve['label'])}: loss over rho", names, left=(7,))
    best = min(point["mean"] for point in curve["points"])
    for point in curve["points"]:
        reading = point["against_moe"]
        lr = "-" if point["lr"] is None else f"{point['lr']:.4f}"
        loss = f"{point['mean']:.4f}"
        table.add_row(
            f"{point['rho']:.0%}",
            f"{point['rows']:,}" if point["rows"] else "-",
            lr,
            f"[bold]{loss}[/]" if point["mean"] == best else loss,
            str(len(point["losses"])),
            *(_difference(reading) if reading else ("-", "-")),
            {"memory wins": "lower", "memory loses": "higher"}.get(reading["verdict"], reading["verdict"])
            if reading
            else "-",
        )
    notes = [f"unfinished seeds, in no fit: {curve['unfinished_seeds']}"] if curve["unfinished_seeds"] else []
    if curve["total_over_active"]:
        notes.append(
            f"P_tot/P_act {curve['total_over_active']:.1f} (the paper: 10), "
            f"{curve['tokens_per_parameter']:.2g} training tokens a parameter (the paper: about 10)"
        )
    table.caption = "\n".join(notes)
    return table


def fits_table(curves: Sequence[dict]) -> Table:
    """Both shapes and whether they fit; the quadratic's optimum with its interval and how often it fell on an end."""
    names = (
        "budget",
        "quadratic\nfits",
        "monotone\nfits",
        "optimum",
        "95 %\ninterval",
        "at the\nends",
        "by seeds",
        "lowest\npoint",
    )
    table = _table("two shapes, fixed before the run (p of the lack of fit)", names, left=(0, 1, 2))
    for curve in curves:
        quadratic, optimum = curve["quadratic"], curve["optimum"]
        cells = ["-", "-", "-", "-"]
        if optimum:
            cells = [
                _shares(optimum["low"], optimum["high"]),
                f"{optimum['share_low_edge']:.0%} low, {optimum['share_high_edge']:.0%} high",
                _shares(*optimum["by_seeds"]),
                _shares(*optimum["grid"]),
            ]
        edge = f" ({EDGES[quadratic['edge']]})" if quadratic["edge"] else ""
        monotone = f"{_fit(curve['monotone']['lack_of_fit'])}, {curve['monotone']['direction']}"
        place = f"{quadratic['optimum']:.0%}{edge}"
        table.add_row(name(curve["label"]), _fit(quadratic["lack_of_fit"]), monotone, place, *cells)
    table.caption = (
        "interval: normal noise of the seeds' size; by seeds: seeds drawn with replacement, too narrow below ten;\n"
        "lowest point: 95 % range of the grid's lowest point; go by it where the quadratic does not fit"
    )
    return table


def claims_table(curves: Sequence[dict], trends: Sequence[dict] = ()) -> Table:
    """The interior point against both ends, and the seeds, or tokens, that it would take to show it."""
    names = ("budget", "point", "against", "difference", "95 % interval", "held out", "seeds\nneeded", "claim")
    table = _table("an interior optimum? the point must beat both ends by twice the standard error", names, left=(0, 7))
    for curve in curves:
        claim = curve["claim"]
        for end, against, held in (
            ("low_end", "against_low", "held_out_low"),
            ("high_end", "against_high", "held_out_high"),
        ):
            first = end == "low_end"
            needed = curve["power"][end]["seeds_needed"]
            table.add_row(
                name(curve["label"]) if first else "",
                f"{claim['point']:.0%}" if first else "",
                f"{claim[end]:.0%}",
                *_difference(claim[against]),
                f"{claim[held]['mean']:+.4f}",
                f"{needed:,}" if needed else "none would do",
                claim["words"] if first else "",
            )
    notes = [
        "held out: each seed at the point that the other seeds choose;",
        "seeds needed: to show this difference 4 times in 5",
    ]
    for trend in trends:
        for end, words in (("low_end", "lowest"), ("high_end", "highest")):
            told = f"about {trend[end] / 1e6:.2g} M tokens" if trend[end] else "no number of tokens: it does not grow"
            notes.append(
                f"were the trend over log tokens to go on, these seeds would show it against the {words} share at {told}"
            )
    table.caption = "\n".join(notes)
    return table


def controls_table(controls: Sequence[dict]) -> Table:
    """What each control keeps of Engram's gain over pure MoE, and both paired differences."""
    names = ("control", "rho", "loss", "keeps", "95 % interval", "against Engram", "against pure MoE")
    table = _table("controls: the part of the gain that is left without the lookup, the learning, the gate ...", names)
    several = len({control["label"] for control in controls}) > 1
    for control in controls:
        title = visible(ARM_TITLES.get(control["arm"], control["arm"])).replace("␣", " ")
        keeps = control["keeps"]
        table.add_row(
            escape(title) + (f", {name(control['label'])}" if several else ""),
            f"{control['rho']:.0%}",
            f"{control['mean']:.4f}",
            "-" if keeps["share"] is None else f"{keeps['share']:.0%}",
            "-" if keeps["low"] is None else f"{keeps['low']:.0%} .. {keeps['high']:.0%}",
            *(" ± ".join(_half(control[against])) for against in ("against_engram", "against_moe")),
        )
    table.caption = "keeps: (pure MoE - control) / (pure MoE - Engram), interval by Fieller's theorem over seeds"
    return table


def rows_table(lines: Sequence[dict]) -> Table:
    """Loss against the number of table rows: the straight line over log2(rows)."""
    names = ("line", "rows", "nats per doubling", "95 % interval", "R2", "straight line fits")
    table = _table("loss against log2 of the table rows", names, left=(0, 5))
    for line in lines:
        fit = line["fit"]
        interval = "-" if fit["low"] is None else f"{fit['low']:+.4f} .. {fit['high']:+.4f}"
        sizes = f"{line['rows'][0]:,} .. {line['rows'][-1]:,}"
        table.add_row(
            name(line["label"]), sizes, f"{fit['slope']:+.4f}", interval, f"{fit['r2']:.3f}", _fit(fit["lack_of_fit"])
        )
    return table


def cpu_table(readings: Sequence[dict]) -> Table:
    """Engram against pure MoE at equal tokens and at equal CPU time."""
    names = ("budget", "rho", "CPU s", "at equal tokens", "at equal CPU time", "95 % interval")
    table = _table("second reading: equal CPU time instead of equal tokens, Engram - pure MoE", names)
    inside = [reading for reading in readings if reading["paired"]]
    for reading in inside or readings:
        told = _difference(reading["paired"]) if reading["paired"] else ("outside pure MoE's budgets", "-")
        table.add_row(
            name(reading["label"]),
            f"{reading['rho']:.0%}",
            f"{reading['seconds']:,.0f}",
            f"{reading['equal_tokens']['mean']:+.4f}",
            *told,
        )
    table.caption = (
        "pure MoE's loss is read off a straight line over log CPU seconds between its own training budgets"
        + (f";\n{left} readings outside them are left out" if (left := len(readings) - len(inside)) and inside else "")
    )
    return table


def name(text: str) -> str:
    """A label as rich may print it: nothing in it is taken for markup, nothing is obeyed by the terminal."""
    return escape(visible(text).replace("␣", " "))


def _table(title: str, names: Sequence[str], left: tuple[int, ...] = (0,)) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for place, column in enumerate(names):
        table.add_column(column, justify="left" if place in left else "right", overflow="fold")
    return table


def _difference(reading: dict[str, Any]) -> tuple[str, str]:
    interval = "-" if reading["low"] is None else f"{reading['low']:+.4f} .. {reading['high']:+.4f}"
    return f"{reading['mean']:+.4f}", interval


def _half(reading: dict[str, Any]) -> list[str]:
    mean = f"{reading['mean']:+.4f}"
    return [mean] if reading["low"] is None else [mean, f"{reading['high'] - reading['mean']:.4f}"]


def _shares(low: float, high: float) -> str:
    return f"{low:.0%} .. {high:.0%}"


def _fit(found: dict[str, Any]) -> str:
    if found["p"] is None:
        return "cannot be said"
    chance = f"p {found['p']:.2g}" if found["p"] >= 1e-4 else "p < 0.0001"
    return f"{'no' if found['refused'] else 'yes'}, {chance}"
