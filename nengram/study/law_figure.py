"""The law drawn from `law_summary`: loss over rho, a panel for each training budget, with the paper's numbers and the controls beside.

A seed moves all its losses together, so dots are drawn with their seed's shift taken out, as the fits do; bars are 95 % intervals of
the means under the same reading. Panels have one nats scale, so depths compare by eye; only the level differs.
"""

from pathlib import Path
from typing import Any

import numpy as np

from nengram.study.outcome import pyplot, save_picture
from nengram.study.report import ARM_TITLES
from nengram.study.trace import visible

BUDGETS = ("#1f5fa8", "#0b8a6f", "#8a4fa8", "#a86a1f")
CONTROLS = {  # marker and colour, the same in both places
    "one_row": ("s", "#c0392b"),
    "misaligned": ("D", "#d9822b"),
    "frozen": ("P", "#2a9fb8"),
    "additive": ("X", "#7d5ba6"),
    "no_table": ("v", "#7a7a7a"),
    "wide_shared": ("^", "#4d4d4d"),
}
OTHER = ("o", "#b04a8b")
MEASURES = {"test_nats": "test loss (nats)", "dev_nats": "dev loss (nats)", "bits_per_byte": "bits per byte"}
QUIET = "0.45"
MOST_PANELS = 4


def draw_law(summary: dict[str, Any], path: Path) -> Path | None:
    """Loss over rho as in the paper's Figure 3, to `path`. None without matplotlib, or when the summary has no curve.

    At most four budgets are drawn, the largest ones.
    """
    plt = pyplot()
    curves = summary["curves"][-MOST_PANELS:]
    if plt is None or not curves:
        return None
    labels = [curve["label"] for curve in curves]
    controls = [control for control in summary["controls"] if control["label"] in labels]
    figure = plt.figure(figsize=(11, max(4.6, 2.9 * len(curves) + 0.7)), constrained_layout=True)
    left, right = figure.subfigures(1, 2, width_ratios=(1.75, 1))
    panels = left.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    for number, (panel, curve) in enumerate(zip(panels, curves, strict=True)):
        mine = [control for control in controls if control["label"] == curve["label"]]
        _draw_curve(panel, curve, mine, BUDGETS[number % len(BUDGETS)])
        panel.set_ylabel(MEASURES.get(summary["measure"], summary["measure"]))
    _same_scale(panels)
    panels[-1].set_xlabel("rho: the experts' share of the sparse parameters (the rest is table)")
    panels[-1].legend(
        *_legend(panels), loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False, fontsize=8
    )
    beside = right.subplots(1 + bool(controls), 1, squeeze=False)[:, 0]
    _draw_paper(beside[0], summary["paper"])
    if controls:
        _draw_controls(beside[1], controls, labels)
    return save_picture(figure, path)


def draw_rows(summary: dict[str, Any], path: Path) -> Path | None:
    """Loss over log2 of the table rows with the straight line, to `path`. None without matplotlib, or without such a line."""
    plt = pyplot()
    lines = summary["rows"][-len(BUDGETS) :]
    if plt is None or not lines:
        return None
    figure, axis = plt.subplots(figsize=(6.4, 4.4), constrained_layout=True)
    for line, colour in zip(lines, BUDGETS, strict=False):
        rows_P, losses_SP, fit = np.array(line["rows"]), np.array(line["losses"]), line["fit"]
        axis.plot(
            np.tile(rows_P, (len(losses_SP), 1)), _aligned(losses_SP), "o", color=colour, ms=3.5, alpha=0.35, mew=0
        )
        axis.errorbar(
            rows_P, losses_SP.mean(axis=0), line["half_width"], fmt="o", color=colour, ms=6, capsize=3, lw=1.2
        )
        interval = "" if fit["low"] is None else f" ({fit['low']:+.4f} .. {fit['high']:+.4f})"
        label = f"{_plain(line['label'])}: {fit['slope']:+.4f}{interval} a doubling, R² {fit['r2']:.3f}"
        axis.plot(rows_P, fit["intercept"] + fit["slope"] * np.log2(rows_P), color=colour, lw=1.6, label=label)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1e3:.3g} k" if value < 1e6 else f"{value / 1e6:.3g} M")
    ticks = sorted({count for line in lines for count in line["rows"]})
    axis.set_xticks(ticks if len(ticks) <= 10 else ticks[:: len(ticks) // 8])
    axis.set(xlabel="table rows (log scale)", ylabel=MEASURES.get(summary["measure"], summary["measure"]))
    axis.set_title("loss against table rows, all else fixed", fontsize=10, loc="left")
    _quiet(axis)
    axis.legend(frameon=False, fontsize=8, loc="upper right")
    return save_picture(figure, path)


def _draw_curve(axis: Any, curve: dict[str, Any], controls: list[dict], colour: str) -> None:
    rho_P = np.array([point["rho"] for point in curve["points"]])
    mean_P = np.array([point["mean"] for point in curve["points"]])
    if curve["seeds"]:
        losses_SP = np.array([[point["losses"][str(s)] for point in curve["points"]] for s in curve["seeds"]])
        mean_P = losses_SP.mean(axis=0)
        beside_SP = 100 * np.tile(rho_P, (len(losses_SP), 1)) + 1.4
        axis.plot(beside_SP, _aligned(losses_SP), "o", color=colour, ms=3.5, alpha=0.5, mew=0)
        axis.plot([], [], "o", color=colour, ms=3.5, alpha=0.5, mew=0, label="its seeds, common shift out")
    if curve["optimum"]:
        low, high = _range(curve)
        axis.axvspan(100 * low - 0.4, 100 * high + 0.4, color=colour, alpha=0.12, lw=0, label="optimum, 95 % range")
    if rho_P[-1] == 1:
        axis.axhline(mean_P[-1], color=QUIET, lw=1, ls="--", label="pure MoE")
    if curve["quadratic"]:
        x = np.linspace(rho_P[0], rho_P[-1], 200)
        parabola = np.vander(x, 3, increasing=True) @ np.array(curve["quadratic"]["coefficients"])
        refused = curve["quadratic"]["lack_of_fit"]["refused"]
        told = "quadratic, refused" if refused else "quadratic"
        axis.plot(100 * x, parabola, color=colour, lw=1.6, ls=":" if refused else "-", label=told)
        place = (100 * curve["quadratic"]["optimum"], curve["quadratic"]["loss"])
        if not refused:
            axis.plot(
                *place, marker="*", ms=13, color=colour, mec="white", mew=0.8, ls="", zorder=5, label="its optimum"
            )
    axis.errorbar(
        100 * rho_P, mean_P, curve["half_width"], fmt="o", ms=5.5, color=colour, capsize=3, lw=1.2, label="Engram"
    )
    for control in controls:
        marker, own = CONTROLS.get(control["arm"], OTHER)
        axis.plot(100 * control["rho"], control["mean"], marker, ms=7, color=own, mec="white", mew=0.8, zorder=4)
    axis.set_title(f"{_plain(curve['label'])}: {_words(curve)}", fontsize=10, loc="left")
    axis.set_xlim(min(-3, 100 * rho_P[0] - 3), 103)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
    _quiet(axis)


def _words(curve: dict[str, Any]) -> str:
    """The optimum and the claim, in a line."""
    if not curve["optimum"]:
        return "too few seeds for a fit"
    low, high = _range(curve)
    if curve["quadratic"]["lack_of_fit"]["refused"]:
        where = f"{low:.0%} to {high:.0%}" if high > low else f"{low:.0%}"
        return f"no parabola, lowest point {where}; {curve['claim']['words']}"
    return f"optimum {curve['optimum']['value']:.0%} ({low:.0%} to {high:.0%}); {curve['claim']['words']}"


def _range(curve: dict[str, Any]) -> tuple[float, float]:
    """Where the optimum lies: the parabola's interval, or the grid's lowest points where no parabola fits."""
    found = curve["optimum"]
    return found["grid"] if curve["quadratic"]["lack_of_fit"]["refused"] else (found["low"], found["high"])


def _draw_paper(axis: Any, paper: dict[str, Any]) -> None:
    """The paper's two published losses as differences to its pure MoE, its optimum, and where the two are about equal."""
    moe, best = paper["points"]["1.0"], paper["points"]["0.8"]
    axis.axvspan(*(100 * end for end in paper["optimum"]), color="0.5", alpha=0.2, lw=0)
    axis.axhline(0, color=QUIET, lw=1, ls="--")
    axis.plot([100, 80], [0, best - moe], "o", color="k", ms=6)
    axis.plot(100 * paper["about_equal_to_moe"], 0, "o", mfc="white", mec="k", ms=6)
    axis.annotate(f"{moe}", (100, 0), (0, 7), textcoords="offset points", fontsize=8, ha="center")
    axis.annotate(
        f"{best} ({best - moe:+.4f})", (80, best - moe), (-9, -3), textcoords="offset points", fontsize=8, ha="right"
    )
    axis.annotate("about equal", (40, 0), (0, 7), textcoords="offset points", fontsize=8, ha="center")
    axis.annotate("optimum\n75-80 %", (77.5, -0.0035), fontsize=8, ha="center", va="center", color="0.3")
    axis.set(xlim=(-3, 106), ylim=(-0.018, 0.004), ylabel="loss - pure MoE (nats)", xlabel="rho")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
    axis.set_yticks([-0.015, -0.01, -0.005, 0])
    axis.set_title("the paper, at 9.9 B parameters", fontsize=10, loc="left")
    _quiet(axis)


def _draw_controls(axis: Any, controls: list[dict], labels: list[str]) -> None:
    """What each control keeps of the gain, with Fieller's intervals; its mark is that of the left panels."""
    arms = list(dict.fromkeys(control["arm"] for control in controls))
    arms.sort(key=lambda arm: np.mean([c["keeps"]["share"] or 0 for c in controls if c["arm"] == arm]))
    budgets = [label for label in labels if any(control["label"] == label for control in controls)]
    for control in controls:
        share, low, high = (control["keeps"][name] for name in ("share", "low", "high"))
        if share is None:
            continue
        marker, own = CONTROLS.get(control["arm"], OTHER)
        apart = 0.5 * (budgets.index(control["label"]) - (len(budgets) - 1) / 2) / len(budgets)
        y = arms.index(control["arm"]) - apart
        if low is not None:
            axis.plot([100 * low, 100 * high], [y, y], color=own, lw=2)
        axis.plot(100 * share, y, marker, ms=7.5, color=own, mec="white", mew=0.8)
    axis.axvline(0, color=QUIET, lw=1, ls="--")
    axis.axvline(100, color=BUDGETS[0], lw=1, ls="--")
    axis.set_yticks(range(len(arms)), [_plain(ARM_TITLES.get(arm, arm)).split(" (")[0] for arm in arms], fontsize=8)
    axis.set_ylim(-0.6, len(arms) - 0.4)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
    axis.set_xlabel("share of the gain kept\n(0 % is pure MoE, 100 % is Engram)")
    above = f"; from the top: {', '.join(map(_plain, budgets))}" if len(budgets) > 1 else ""
    axis.set_title(f"controls: what is left of the gain{above}", fontsize=10 if not above else 8, loc="left")
    _quiet(axis)


def _aligned(losses_SP: np.ndarray) -> np.ndarray:
    """Losses with each seed's own shift taken out."""
    return losses_SP - losses_SP.mean(axis=1, keepdims=True) + losses_SP.mean()


def _same_scale(panels: Any) -> None:
    """The same height in nats for every panel."""
    height = max(np.ptp(panel.get_ylim()) for panel in panels)
    for panel in panels:
        middle = np.mean(panel.get_ylim())
        panel.set_ylim(middle - height / 2, middle + height / 2)


def _legend(panels: Any) -> tuple[list, list]:
    """Handles and labels of all panels, each label once."""
    found = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _plain(text: str) -> str:
    """A name as a figure may show it: a dollar sign starts no formula, no control characters."""
    return visible(text).replace("␣", " ").replace("$", r"\$")


def _quiet(axis: Any) -> None:
    axis.grid(axis="y", color="0.92", lw=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
