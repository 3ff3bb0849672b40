"""The health of a table, as people read it: its rows by order, its gates by history, and a picture of both."""

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from nengram.study.outcome import pyplot, save_picture

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
MEDIAN = QUANTILES.index(0.5)
NORM_COLOURS = {"at_start": "0.75", "untouched": "C0", "touched": "C1"}
BOX_STYLE = {"showfliers": False, "patch_artist": True, "medianprops": {"color": "black"}}


def rows_table(found: dict) -> Table:
    """What training did to the rows: a line for each memory layer and order."""
    table = Table(title=f"{escape(found['run'])}: rows after {found['trained_tokens']:,} tokens", title_justify="left")
    for heading in (
        "layer",
        "order",
        "rows",
        "never\ntouched",
        "n-grams",
        "a row",
        "shared\nlookups",
        "purity",
        "updates\nmedian",
        "\n95 %",
        "norm at\nstart",
        "\nuntouched",
        "\ntouched",
    ):
        table.add_column(heading, justify="right")
    for layer_id, layer in found["tables"].items():
        for order, one in layer["orders"].items():
            table.add_row(
                str(layer_id),
                str(order),
                f"{one['rows']:,}",
                f"{one['never_touched']:.1%}",
                f"{one['ngrams']:,}",
                f"{one['ngrams_per_touched_row']:.1f}",
                f"{one['shared_lookups']:.0%}",
                f"{one['purity']:.2f}",
                f"{one['updates'][MEDIAN]:,.0f}",
                f"{one['updates'][QUANTILES.index(0.95)]:,.0f}",
                *(_median(one["norms"][kind]) for kind in NORM_COLOURS),
            )
    table.caption = "norms: medians over rows"
    table.caption_justify = "left"
    return table


def gates_table(found: dict) -> Table:
    """Gate and share of the residual by how often the n-gram was read in training: a line for each block, order and class."""
    table = Table(title=f"on {found['dev_positions']:,} positions of dev", title_justify="left")
    for heading in ("block", "order", "read in training", "positions", "gate", "update / residual"):
        table.add_column(heading, justify="left" if heading == "read in training" else "right")
    for block, one in found["blocks"].items():
        for order, classes in one["by_history"].items():
            for name, row in classes.items():
                measures = (_number(row["gate"]), _number(row["residual_share"]))
                table.add_row(str(block), str(order), name, f"{row['positions']:.1%}", *measures)
    return table


def _median(values: list[float] | None) -> str:
    return "-" if values is None else f"{values[MEDIAN]:.3f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def draw_health(found: dict, path: Path) -> Path | None:
    """Four panels: how full and how shared the table is, updates a row, norms, and the gate by history. None without matplotlib."""
    plt = pyplot()
    if plt is None:
        return None
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 7), constrained_layout=True)
    orders = [
        (f"layer {layer_id}\n{order}-grams" if len(found["tables"]) > 1 else f"{order}-grams", one)
        for layer_id, layer in found["tables"].items()
        for order, one in layer["orders"].items()
    ]
    _draw_shares(axes[0, 0], orders)
    _draw_updates(axes[0, 1], orders)
    _draw_norms(axes[1, 0], orders)
    _draw_gates(axes[1, 1], found["blocks"])
    for axis in axes.flat:
        axis.grid(axis="y", color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"health of the table after {found['trained_tokens']:,} training tokens (boxes: quartiles over rows; whiskers: 5-95 %)",
        fontsize=11,
    )
    return save_picture(figure, path)


def _draw_shares(axis, orders: list[tuple[str, dict]]) -> None:
    measures = {"never_touched": "rows never touched", "shared_lookups": "lookups of a shared row", "purity": "purity"}
    for place, (measure, label) in enumerate(measures.items()):
        x = [number + (place - 1) * 0.26 for number in range(len(orders))]
        bars = axis.bar(x, [one[measure] for _, one in orders], 0.24, label=label, color=f"C{place}")
        axis.bar_label(bars, fmt="{:.0%}", fontsize=8)
    axis.set_xticks(range(len(orders)), [label for label, _ in orders])
    axis.set(ylim=(0, 1.25), yticks=(0, 0.25, 0.5, 0.75, 1), ylabel="share", title="how full, how shared")
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="upper center")


def _draw_updates(axis, orders: list[tuple[str, dict]]) -> None:
    boxes = [_box(one["updates"]) | {"label": label} for label, one in orders]
    axis.bxp(boxes, **BOX_STYLE, widths=0.4, boxprops={"facecolor": NORM_COLOURS["touched"]})
    axis.set_yscale("symlog", linthresh=1)
    axis.set_ylim(0, 3 * max(1, *(box["whishi"] for box in boxes)))
    axis.set(ylabel="training steps that read a row", title="updates of a touched row")


def _draw_norms(axis, orders: list[tuple[str, dict]]) -> None:
    for place, (kind, colour) in enumerate(NORM_COLOURS.items()):
        some = [(number, one["norms"][kind]) for number, (_, one) in enumerate(orders) if one["norms"][kind]]
        axis.bxp(
            [_box(values) for _, values in some],
            positions=[number + (place - 1) * 0.26 for number, _ in some],
            widths=0.2,
            **BOX_STYLE,
            manage_ticks=False,
            boxprops={"facecolor": colour},
        )
        if some:
            axis.plot([], [], "s", color=colour, label=kind.replace("_", " "))
    axis.set_xticks(range(len(orders)), [label for label, _ in orders])
    axis.set_yscale("log")
    axis.set(ylabel="norm", title="norm of a row")
    axis.legend(frameon=False, fontsize=8)


def _draw_gates(axis, blocks: dict) -> None:
    gated = any(one["gate"] for one in blocks.values())
    for block, one in blocks.items():
        for order, classes in one["by_history"].items():
            measure = "gate" if gated else "residual_share"
            shown = [(name, row[measure]) for name, row in classes.items() if row[measure] is not None]
            axis.plot(*zip(*shown, strict=True), "o-", label=f"block {block}, {order}-grams")
    axis.set_ylim(0, 1 if gated else None)
    axis.set(
        xlabel="times the n-gram was read in training",
        ylabel="mean gate" if gated else "update / residual",
        title="how far a lookup is believed, on dev",
    )
    axis.legend(frameon=False, fontsize=8)


def _box(values: list[float]) -> dict:
    """What `Axes.bxp` draws, from the quantiles."""
    low, first, median, third, high = values[1:-1]
    return {"whislo": low, "q1": first, "med": median, "q3": third, "whishi": high, "fliers": []}
