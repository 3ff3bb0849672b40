"""The twin task drawn: how often each arm knows a fact, over how often it was shown, where memory can and where it cannot.

Above each panel stands a line of its text, with a bracket under what memory can read just before the value: the two panels differ in
nothing else.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nengram.study.outcome import pyplot, save_picture

COLOURS = {"engram": "#c8501e", "moe": "#27517f", "one_row": "#7d8590"}
LABELS = {"one_row": "no lookup", "moe": "pure MoE", "engram": "Engram"}  # lowest name first
STYLES = {"engram": "-", "moe": "-", "one_row": (0, (4, 2))}
PANELS = {
    "facts": ("The pair is an n-gram", ("w", "w", "w", "a", "b", "v")),
    "permuted": ("The same tokens, the pair parted", ("w", "a", "w", "w", "b", "v")),
}
TOKENS = {  # what is written in a token's box, its fill and its ink
    "w": ("word", "#eceef0", "0.45"),
    "a": ("key 1", "#d5e3f3", "#1d3f63"),
    "b": ("key 2", "#d5e3f3", "#1d3f63"),
    "v": ("value", "#f8dccb", "#8a3410"),
}
INK, QUIET = "0.2", "0.5"
ALONE = 30  # per cent: a curve that ends above is named after those that stayed at chance


def draw_twin(found: Mapping, path: Path) -> Path | None:
    """Two panels, thin lines for seeds and thick ones for their mean, to `path`. None where matplotlib is not installed."""
    plt = pyplot()
    if plt is None:
        return None
    figure, grid = plt.subplots(2, 2, figsize=(11, 5), height_ratios=(1, 4.2), sharex="col", sharey="row")
    figure.subplots_adjust(left=0.095, right=0.885, top=0.86, bottom=0.12, wspace=0.32, hspace=0.04)
    task, times = found["task"], found["size"]["times"]
    figure.suptitle(
        f"{task['facts']:,} private facts, learned by twins of equal parameters and FLOPs",
        x=0.095,
        ha="left",
        fontsize=13,
        color=INK,
    )
    for column, (form, (title, line)) in enumerate(PANELS.items()):
        _draw_line(grid[0, column], title, line, form == "facts")
        _draw_curves(grid[1, column], found["forms"][form]["arms"], times, task["chance"])
    grid[1, 0].set_ylabel("facts whose value is right,\namong new words", color=INK)
    return save_picture(figure, path, dpi=150, facecolor="white")


def _draw_line(axis, title: str, line: tuple[str, ...], is_ngram: bool) -> None:
    """One line of the text as boxes, a bracket under the three tokens that memory can read before the value."""
    from matplotlib.patches import FancyBboxPatch

    axis.axis("off")
    axis.set(ylim=(0, 1))
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=4)
    width, gap = 0.118, 0.014
    for place, token in enumerate(line):
        word, fill, ink = TOKENS[token]
        left = place * (width + gap)
        box = {"boxstyle": "round,pad=0,rounding_size=0.02", "fc": fill, "ec": "none", "transform": axis.transAxes}
        axis.add_patch(FancyBboxPatch((left, 0.58), width, 0.34, mutation_aspect=4, **box))
        style = {"fontsize": 8.5, "color": ink, "fontweight": "bold" if token != "w" else "normal"}
        axis.text(left + width / 2, 0.75, word, ha="center", va="center", transform=axis.transAxes, **style)
    left, right = 2 * (width + gap), 5 * (width + gap) - gap
    bracket = {"color": COLOURS["engram"] if is_ngram else QUIET, "transform": axis.transAxes}
    axis.plot([left, left, right, right], [0.5, 0.42, 0.42, 0.5], lw=1.4, clip_on=False, **bracket)
    text = (
        "what memory can read here: holds the pair" if is_ngram else "what memory can read here: key 1 is out of reach"
    )
    axis.text((left + right) / 2, 0.33, text, ha="center", va="top", fontsize=8.5, **bracket)


def _draw_curves(axis, arms: Mapping[str, Mapping], times: int, chance: float) -> None:
    """Accuracy of each arm over the showings, named beside its end."""
    ends = {}
    for arm in ("one_row", "moe", "engram"):
        shown = np.array(arms[arm]["steps"]) / arms[arm]["steps"][-1] * times
        curves_SP = 100 * np.array(arms[arm]["curve"])
        axis.plot(shown, curves_SP.T, color=COLOURS[arm], lw=0.7, alpha=0.35)
        axis.plot(shown, curves_SP.mean(0), color=COLOURS[arm], ls=STYLES[arm], lw=2.2, solid_capstyle="round")
        ends[arm] = 100 * float(np.mean(arms[arm]["shown_accuracy"]))
    axis.axhline(100 * chance, color=QUIET, lw=0.8, ls=":", zorder=0)
    axis.set(xlim=(0, times), ylim=(-1, 103), xlabel="times each fact was shown")
    axis.xaxis.label.set_color(INK)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
    axis.grid(axis="y", color="0.93", lw=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=QUIET, labelcolor=INK, length=3)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("0.8")
    _name_curves(axis, ends, times, chance)


def _name_curves(axis, ends: Mapping[str, float], times: int, chance: float) -> None:
    """Names with final values right of the panel, each at its curve's height or above the one below it."""
    lowest = 0.0
    for arm in sorted(ends, key=lambda arm: (ends[arm] > ALONE, list(LABELS).index(arm))):
        height = max(ends[arm] - 2.5, lowest)
        text = f"{LABELS[arm]}  {ends[arm]:.0f} %"
        style = {"color": COLOURS[arm], "va": "bottom", "fontsize": 9, "fontweight": "bold"}
        axis.text(times * 1.02, height, text, **style)
        lowest = height + 6
    axis.text(times * 0.015, 100 * chance + 1, f"chance {100 * chance:.1f} %", va="bottom", fontsize=8, color=QUIET)
