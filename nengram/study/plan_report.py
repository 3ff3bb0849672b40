"""A plan in the terminal, made from its JSON alone: what is printed is in the file, and an old file can be printed again."""

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from nengram.infer.plan_rows import FAR, TAUGHT_SHARE, WELL_TOUCHED

TIER_TITLES = {
    "resident": "device",
    "host": "host RAM",
    "tiered": "RAM hot set, disk",
    "mapped": "disk",
}
METHODS = {
    "rows": "every n-gram is hashed",
    "n-grams": "by n-grams: in so large a table few of them share a row",
}
PROXY = "A PROXY: not the tables' own tokenizer; a smaller vocabulary repeats itself more, so these rates flatter"
EXHAUSTED = (
    "+ room for more rows than this text reads: the misses are first meetings, and more text would raise the rate"
)
UNITS = {
    "device_gib_per_s": "device memory, GiB/s",
    "link_gib_per_s": "link, GiB/s",
    "host_rows_per_s": "host gather, rows/s",
    "disk_iops": "disk, 4 KiB reads/s",
}


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """All tables of a plan (`Plan.to_dict()`, or the JSON of it)."""
    sizes, size = plan["sizes"], plan["sizes"]["codecs"][plan["codec"]]
    console.print(
        f"[bold]{escape(plan['name'])}[/]: {sizes['parameters']:,} table parameters in {sizes['rows']:,} rows of "
        f"{sizes['row_width']}; a token reads {sizes['rows_per_token']} rows, {size['bytes_per_token']:,} bytes of {plan['codec']}",
        highlight=False,
    )
    for make in (_layers, _codecs, _placements, _hits, _rates):
        _show(make(plan), console)
    _print_ceilings(plan, console)
    if plan["training"]:
        _print_training(plan, console)


def _show(table: Table, console: Console) -> None:
    """A table, and its caption as lines of their own, which may be wider."""
    notes, table.caption = table.caption, None
    console.print()
    console.print(table)
    if notes:
        console.print(str(notes), highlight=False, markup=False)


def _layers(plan: dict[str, Any]) -> Table:
    names = ["layer", "block", "rows a head", "rows", "size", "bytes/token"]
    table = _table(f"by layer, stored as {plan['codec']}", names)
    for layer in plan["sizes"]["layers"]:
        heads = f"{min(layer['rows_per_head']):,}-{layer['largest_head']:,}"
        block = "-" if layer["block_index"] is None else str(layer["block_index"])
        sizes = (f"{layer['rows']:,}", _size(layer["table_bytes"]), f"{layer['bytes_per_token']:,}")
        table.add_row(str(layer["layer_id"]), block, heads, *sizes)
    return table


def _codecs(plan: dict[str, Any]) -> Table:
    table = _table("by codec", ["codec", "bytes/row", "bytes", "size", "bytes/token", "pages/token"])
    for name, size in plan["sizes"]["codecs"].items():
        numbers = (f"{size['row_bytes']:,}", f"{size['table_bytes']:,}", _size(size["table_bytes"]))
        reads = (f"{size['bytes_per_token']:,}", f"{size['pages_per_token']:.4g}")
        table.add_row(*_marked(name, plan), *numbers, *reads, style=_style(name, plan))
    table.caption = "* planned for below. Pages are of 4 KiB, the rows of a token being far apart"
    return table


def _placements(plan: dict[str, Any]) -> Table:
    names = ["codec", "goes to", "RAM", "hot rows", "hits"]
    table = _table("where the tables go", names, left=(0, 1))
    for one in plan["placements"]:
        hot = ["-", "-"]
        if one["tier"] == "tiered":
            hot = [_share(one["hot_share"]), _share(one["hit_rate"]) + "+" * one["exhausted"]]
        cells = (TIER_TITLES[one["tier"]], _size(one["host_bytes"]), *hot)
        table.add_row(*_marked(one["codec"], plan), *cells, style=_style(one["codec"], plan))
    budget = f"{plan['device_gib']:g} GiB on the device, {plan['host_gib']:g} GiB of host RAM ({plan['host_source']})"
    table.caption = f"for {budget}; hits: share of row reads"
    return table


def _hits(plan: dict[str, Any]) -> Table:
    orders = list(plan["hits"][0]["by_order"])
    row_bytes = plan["sizes"]["codecs"][plan["codec"]]["row_bytes"]
    table = _table(
        "predicted hit rate of a static hot set",
        ["of the table", "rows", "size", *(f"{order}-grams" for order in orders), "all"],
    )
    for hot in plan["hits"]:
        mark, budget = ("+" if hot["exhausted"] else ""), hot["share"] == _placement(plan)["hot_share"]
        shares = [_share(share) + mark for share in (*hot["by_order"].values(), hot["all"])]
        label = _share(hot["share"]) + (" (fits)" if budget else "")
        table.add_row(
            label, f"{hot['rows']:,}", _size(hot["rows"] * row_bytes), *shares, style="bold" if budget else ""
        )
    notes = [f"{plan['text']}; train is ranked, dev asks; {METHODS[plan['method']]}"]
    notes += [PROXY] * plan["proxy"] + [EXHAUSTED] * any(hot["exhausted"] for hot in plan["hits"])
    table.caption = "\n".join(notes)
    return table


def _rates(plan: dict[str, Any]) -> Table:
    tiers = list(plan["rates"][0]["tokens_per_s"])
    where = TIER_TITLES[_placement(plan)["tier"]]
    table = _table(
        f"tokens/s at which each tier becomes the limit: {plan['codec']}, {where}",
        ["chunk", "distinct", "cold/token", *tiers],
    )
    cold = _placement(plan)["tier"] in ("tiered", "mapped")
    for chunk, rates in zip(plan["chunks"], plan["rates"], strict=True):
        shorter = f" ({chunk['tokens']:,} here)" if chunk["tokens"] < chunk["wanted"] else ""
        cells = [chunk["name"] + shorter, _share(chunk["distinct_share"])]
        cells.append(f"{chunk['cold_rows_per_token']:.3g}" if cold else "-")
        table.add_row(*cells, *(_limit(rates["tokens_per_s"][tier], tier == rates["binding"]) for tier in tiers))
    table.caption = (
        "< binds first. Of the rows a chunk asks for, distinct ones are read once; those outside the hot set, from disk"
    )
    return table


def _limit(rate: float | None, binds: bool) -> Text:
    text = "no reads" if rate is None else f"{_rounded(rate):,}"
    return Text(f"{text} <", "bold") if binds else Text(text)


def _print_ceilings(plan: dict[str, Any], console: Console) -> None:
    used = {f"{tier}_" for rates in plan["rates"] for tier in rates["tokens_per_s"]}
    for name, ceiling in plan["ceilings"].items():
        if any(name.startswith(tier) for tier in used):
            about = f" ({ceiling['about']})" if ceiling["about"] else ""
            console.print(
                f"{UNITS[name]}: {_rounded(ceiling['value']):,} {ceiling['source']}{escape(about)}", highlight=False
            )


def _print_training(plan: dict[str, Any], console: Console) -> None:
    training = plan["training"]
    names = ["rows", "order", "rows a head", "touched", f"read {WELL_TOUCHED}+", "n-grams", "a row", "lookups"]
    table = _table(f"rows that {training['tokens']:,} tokens can teach", names)
    for size, orders in training["per_order"].items():
        for one in orders:
            shares = (_share(one["touched"]), _share(one["taught"]), f"{one['distinct_ngrams']:,}")
            ratios = (_ratio(one["ngrams_per_row"]), _ratio(one["lookups_per_row"]))
            style = "bold" if size == "x1" else ""
            table.add_row(size, str(one["order"]), f"{one['rows']:,}", *shares, *ratios, style=style)
    beyond = training["beyond_corpus"]
    counted = "n-grams: distinct ones, and per row; lookups: per row. "
    how = f"extrapolated to {_ratio(beyond)} times this text" if beyond else "counted on this text"
    proxy = "; the tokens are the proxy's" if plan["proxy"] else ""
    table.caption = f"{counted}{how[0].upper()}{how[1:]}{'; so far beyond it, a guess' if beyond > FAR else ''}{proxy}"
    _show(table, console)
    console.print(
        f"recommended: memory.rows_per_head={list(training['recommended'])}, {training['parameters']:,} table parameters.\n"
        f"The most rows of which {TAUGHT_SHARE:.0%} are read {WELL_TOUCHED} times or more, in one pass over fresh text: an upper end, "
        "not an optimum. Rows beyond it cost memory and stay near what they were initialised to.",
        highlight=False,
        markup=False,
    )


def _marked(codec: str, plan: dict[str, Any]) -> list[str]:
    return [f"{codec} *" if codec == plan["codec"] else codec]


def _style(codec: str, plan: dict[str, Any]) -> str:
    return "bold" if codec == plan["codec"] else ""


def _placement(plan: dict[str, Any]) -> dict[str, Any]:
    return next(one for one in plan["placements"] if one["codec"] == plan["codec"])


def _table(title: str, names: Iterable[str], left: tuple[int, ...] = (0,)) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        collapse_padding=True,
    )
    for place, name in enumerate(names):
        table.add_column(name, justify="left" if place in left else "right", overflow="fold")
    return table


def _size(count: int) -> str:
    """Bytes in the largest unit that leaves a number above 1."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if count else "-"
        count /= 1024
    return f"{count:,.2f} GiB"


def _share(share: float) -> str:
    return f"{share:.1%}" if share >= 0.0005 or not share else "<0.1%"


def _ratio(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"


def _rounded(rate: float) -> int:
    """Three digits: no ceiling is known better."""
    return int(float(f"{rate:.3g}"))
