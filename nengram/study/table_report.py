"""Tables in words: what a file is, what was checked in it, what changed between two; and how far a long read has come.

Names and texts come out of files that strangers wrote, so whatever is printed has no control characters.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from nengram.memory.stat import TableStat
from nengram.memory.table_diff import TableDiff
from nengram.study.trace import visible

Report = Callable[[int, int], None]  # bytes done, bytes in all


@contextmanager
def streaming(console: Console, title: str) -> Iterator[Report]:
    """A bar with bytes, rate and time left, on a terminal; it is gone when the work is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    on_terminal = Console(stderr=True) if console.is_terminal else console
    with Progress(
        *columns, TimeRemainingColumn(), console=on_terminal, transient=True, disable=not console.is_terminal
    ) as progress:
        bar = progress.add_task(visible(title).replace("␣", " "), total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def described(found: TableStat) -> list[str]:
    """A table's description, a fact a line."""
    codec, share = found.codec, found.written_bytes / max(1, found.table_bytes)
    scale = f", scale {float.fromhex(codec['scale']):g}" if "scale" in codec else ""
    held = f"{found.num_rows:,}"
    if found.is_part:
        end = found.first_row + found.num_rows
        held += f", a part: rows {found.first_row:,} to {end:,} (not included) of {found.table_rows:,}"
    block = "" if found.block_index is None else f", in block {found.block_index} (from 0)"
    lines = {
        "format": found.format + (f", imported from {found.origin}" if found.origin else ""),
        "codec": f"{codec['name']}, {codec['row_width']} numbers in {codec['row_bytes']} bytes{scale}",
        "rows": held,
        "bytes": f"{found.table_bytes:,} ({size(found.table_bytes)})",
        "ever written": f"{found.written_bytes:,} ({share:.1%})",
        "addresses": f"{found.addresses}, {found.dialect}, memory layer {found.layer_id}{block}",
        **{name: f"rows {first:,} to {end:,} (not included)" for name, first, end in found.orders},
        "padding": f"{found.padding_rows:,} rows that no n-gram reads" if found.padding_rows else "",
        "files": f"{found.files}" if found.files > 1 else "",
        "beside the rows": ", ".join(found.extras),
        "digest": found.digest,
    }
    return [found.path, *(f"  {name:16}{text}" for name, text in lines.items() if text)]


def what_was_checked(found: TableStat) -> str:
    """In words, what `verify` found to be right."""
    rows = f"{found.num_rows:,} of {found.table_rows:,}" if found.is_part else f"{found.num_rows:,}"
    return (
        f"{size(found.written_bytes)} match their checksums, and {rows} rows are the primes of {found.dialect} "
        f"({found.addresses}, memory layer {found.layer_id})"
    )


def print_diff(diff: TableDiff, console: Console) -> None:
    """Counts, then the n-grams, most affected first."""
    share = diff.changed / diff.rows
    by_order = ", ".join(f"{name} {changed:,} of {rows:,}" for name, changed, rows in diff.by_order)
    print_line(
        console,
        f"{diff.changed:,} of {diff.rows:,} rows changed ({share:.2%}), by at most {diff.largest:g}: {by_order}",
    )
    if diff.unread is None:
        print_line(console, "name a text with --corpus to see which n-grams they belong to")
        return
    print_line(
        console,
        f"{diff.tokens:,} tokens have {diff.ngrams_read:,} distinct n-grams; {diff.ngrams_changed:,} read a changed row; "
        f"changed rows that none of them reads: {diff.unread:,}",
    )
    if not diff.ngrams:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("n-gram", "order", "heads changed", "in the corpus", "by at most"):
        table.add_column(name, justify="left" if name == "n-gram" else "right", overflow="fold")
    for ngram in diff.ngrams:
        heads = f"{ngram.heads_changed} of {ngram.heads}"
        table.add_row(
            ngram.text.replace("[", r"\["), str(ngram.order), heads, f"{ngram.count:,}", f"{ngram.largest:.3g}"
        )
    console.print(table)
    if diff.ngrams_changed > len(diff.ngrams):
        print_line(console, f"... and {diff.ngrams_changed - len(diff.ngrams):,} more; --most shows more")


def size(count: int) -> str:
    """Bytes in words: `1.5 GiB`."""
    amount, units = float(count), ("bytes", "KiB", "MiB", "GiB", "TiB")
    for unit in units:
        if amount < 1024 or unit == units[-1]:
            return f"{count} bytes" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1024
    raise AssertionError


def print_line(console: Console, text: str) -> None:
    """One line as it is: no markup, no folding."""
    console.print(visible(text).replace("␣", " "), markup=False, highlight=False, soft_wrap=True)
