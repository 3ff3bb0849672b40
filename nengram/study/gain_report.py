"""Where the gain lives, as people read it: a table for each way to split the tokens, and one picture of them all.

Bars of one group add up on the left (contributions) and do not on the right (differences within a part); a large bar on the right
beside a small one on the left is a strong effect on few tokens.
"""

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from nengram.study.outcome import pyplot, save_picture

COLOURS = {"read": "C0", "continued": "C1", "source": "C2", "token": "C4"}


def gain_tables(found: dict) -> list[Table]:
    """A table for each split, a part a row."""
    seeds = len(found["seeds"])
    whole = found["difference"]
    tables = []
    for split in found["splits"].values():
        table = Table(title=split["title"], title_justify="left")
        headings = ("part", "tokens", "without", "with", "difference", "95 % interval", "contribution", "of the gain")
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "part" else "right")
        for part, row in split["parts"].items():
            if row["difference"] is None:
                continue
            table.add_row(
                escape(part),
                f"{row['share']:.1%}",
                f"{row['baseline_nats']:.3f}",
                f"{row['memory_nats']:.3f}",
                f"{row['difference']['mean']:+.4f}",
                interval(row["difference"]),
                f"{row['contribution']['mean']:+.4f}",
                "-" if row["share_of_gain"] is None else f"{row['share_of_gain']:.0%}",
            )
        tables.append(table)
    tables[-1].caption = (
        f"all {found['tokens']:,} test tokens, {seeds} seed{'s' if seeds > 1 else ''}, {found['trained_tokens']:,} tokens trained on; "
        f"nats a token: {found['nats']['baseline']:.4f} without memory, {found['nats']['memory']:.4f} with, "
        f"{whole['mean']:+.4f} ({interval(whole)})"
    )
    tables[-1].caption_justify = "left"
    return tables


def interval(reading: dict) -> str:
    """`-0.1010 .. -0.0690`, or a dash below three seeds."""
    return "-" if reading["low"] is None else f"{reading['low']:+.4f} .. {reading['high']:+.4f}"


def draw_gain(found: dict, path: Path) -> Path | None:
    """A bar for each part of each split: its contribution, and the difference within it. None where matplotlib is not installed."""
    plt = pyplot()
    if plt is None:
        return None
    lines = []  # (label, row or None for a heading, colour)
    for name, split in found["splits"].items():
        lines.append((split["title"], None, ""))
        shown = {part: row for part, row in split["parts"].items() if row["difference"] is not None}
        lines += [(part, row, COLOURS[name.split()[0]]) for part, row in shown.items()]
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.8 + 0.27 * len(lines)), sharey=True, constrained_layout=True)
    for axis, kind in zip(axes, ("contribution", "difference"), strict=True):
        for y, (_, row, colour) in enumerate(lines):
            if row is None:
                continue
            axis.barh(y, row[kind]["mean"], color=colour, height=0.72)
            if row[kind]["low"] is not None:
                axis.plot([row[kind]["low"], row[kind]["high"]], [y, y], color="0.15", lw=1.4)
        axis.axvline(0, color="0.3", lw=0.8)
        axis.grid(axis="x", color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0].set_xlabel("contribution to the whole difference\n(nats a token; each group adds up to it)")
    axes[1].set_xlabel("difference within the part (nats a token)\nbelow zero: memory helps")
    labels = [label if row is None else f"{label}  ({row['share']:.0%})" for label, row, _ in lines]
    axes[0].set_yticks(range(len(lines)), [label.replace("$", r"\$") for label in labels], fontsize=8.5)
    for text, (_, row, _) in zip(axes[0].get_yticklabels(), lines, strict=True):
        text.set_fontweight("bold" if row is None else "normal")
    axes[0].set_ylim(len(lines) - 0.4, -0.7)
    figure.suptitle(
        f"with memory {found['difference']['mean']:+.4f} nats a token: where? (in brackets: share of test tokens)",
        fontsize=11,
    )
    return save_picture(figure, path)
