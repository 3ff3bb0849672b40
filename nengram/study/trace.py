"""From text to table rows, step by step: what a memory layer will look up, known before any float is computed.

    text -> tokens -> compressed ids -> n-grams -> rows

Everything printed is exact and depends on token ids alone, so two people who see the same word codes see the same rows. The n-grams
are written with the keys under which the compression map merged tokens: " The", "the" and "THE" are one key, and one n-gram.

The text is a stranger's: nothing in it is taken for markup, and characters that a terminal would obey are shown as escapes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from nengram.address import Addresser, AddressSpec
from nengram.errors import AddressError, ConfigError, DataError
from nengram.files import word_code
from nengram.infer import encode
from nengram.text import CompressionMap, tokenizer_digest
from nengram.text.compress_reference import REPLACEMENT, token_key

NOTHING = "∅"  # left of where the text begins
SPACE = "␣"
NARROWEST = 6  # cells of token and key; the n-gram has twice as many


@dataclass(frozen=True)
class Position:
    """One token on its way to rows.

    ngrams: by order, the keys of the n-gram that ends here, oldest first; None left of the text's beginning.
    rows: by layer id, the rows it reads: one per slot, order-major then head.
    """

    token: str
    id: int
    cid: int
    key: str
    ngrams: dict[int, tuple[str | None, ...]]
    rows: dict[int, tuple[int, ...]]


@dataclass(frozen=True)
class Trace:
    """A text, what it was addressed with, and its T positions."""

    text: str
    spec: AddressSpec
    tokenizer_digest: str
    vocab_size: int
    positions: tuple[Position, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: n-grams by order, rows by layer and order, a row per head; null stands left of the beginning."""
        spec = self.spec
        return {
            "text": self.text,
            "addresses": {
                "word_code": spec.word_code,
                "digest": spec.digest,
                "dialect": spec.dialect,
                "max_order": spec.max_order,
                "heads": spec.heads,
                "num_rows": {str(layer_id): spec.num_rows(layer_id) for layer_id in spec.layer_ids},
            },
            "tokenizer": {"word_code": word_code(self.tokenizer_digest), "digest": self.tokenizer_digest},
            "vocab_size": self.vocab_size,
            "compressed_vocab_size": spec.compressed_vocab_size,
            "positions": [
                {
                    "token": position.token,
                    "id": position.id,
                    "cid": position.cid,
                    "key": position.key,
                    "ngrams": {str(order): list(keys) for order, keys in position.ngrams.items()},
                    "rows": {
                        str(layer_id): {
                            str(order): list(self.rows_of(position, layer_id, order)) for order in position.ngrams
                        }
                        for layer_id in spec.layer_ids
                    },
                }
                for position in self.positions
            ],
        }

    def rows_of(self, position: Position, layer_id: int, order: int) -> tuple[int, ...]:
        """The rows of one n-gram in one layer, a row per head."""
        first = (order - 2) * self.spec.heads
        return position.rows[layer_id][first : first + self.spec.heads]


def trace(text: str, tokenizer: Tokenizer, compression: CompressionMap, spec: AddressSpec) -> Trace:
    """Follow a text to the rows of every memory layer. It is read on its own: nothing stands before its first token.

    Raises: DataError for a text without a token, or a tokenizer that is not the compression map's; AddressError when the spec is
    not for this map.
    """
    digest = tokenizer_digest(tokenizer)
    if compression.tokenizer_digest not in ("", digest):
        theirs = word_code(compression.tokenizer_digest)
        raise DataError(f"the compression map is of tokenizer {theirs}, this one is {word_code(digest)}")
    if compression.compressed_vocab_size != spec.compressed_vocab_size:
        raise AddressError(
            f"addresses {spec.word_code} are for {spec.compressed_vocab_size:,} compressed ids, "
            f"the compression map has {compression.compressed_vocab_size:,}"
        )
    ids = encode(tokenizer, text)
    if not ids:
        raise DataError("there is nothing to trace: the text has no token")
    cids_T = compression(np.array(ids))
    rows = {layer_id: rows_BTS[0] for layer_id, rows_BTS in Addresser(spec)(cids_T[None]).items()}
    tokens, keys = zip(*(_spelling(tokenizer, token_id) for token_id in ids), strict=True)
    positions = (
        Position(
            token=tokens[t],
            id=ids[t],
            cid=int(cids_T[t]),
            key=keys[t],
            ngrams={order: _ngram(keys, t, order) for order in range(2, spec.max_order + 1)},
            rows={layer_id: tuple(rows_TS[t].tolist()) for layer_id, rows_TS in rows.items()},
        )
        for t in range(len(ids))
    )
    return Trace(text, spec, digest, len(compression.cids_V), tuple(positions))


def print_trace(trace: Trace, console: Console, *, heads: int = 2) -> None:
    """Print a trace as one table, a line per n-gram: long texts are cut, with an ellipsis, to what 100 columns leave them.

    heads: rows to show of each n-gram; 0: all, on as many lines as they need. Raises: ConfigError when negative.
    """
    if heads < 0:
        raise ConfigError(f"heads must be at least 1, or 0 for all, got {heads}")
    spec = trace.spec
    shown = min(heads or spec.heads, spec.heads)
    layers = [f"rows in layer {layer_id}" for layer_id in spec.layer_ids]
    lines = [line for t in range(len(trace.positions)) for line in _lines(trace, t, shown)]
    names = ("", "token", "id", "cid", "key", "n-gram", *layers)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", show_edge=False)
    for name in names:
        table.add_column(name, justify="right" if name in ("", "id", "cid") else "left", overflow="fold")
    widths = _text_widths(names, lines, console.width)
    for line in lines:
        table.add_row(*(_cut(cell, width) for cell, width in zip(line, widths, strict=True)))
    console.print(Text(_heading(trace)), soft_wrap=True)
    console.print(table)
    hidden = f"; {shown} of {spec.heads} heads shown, --heads 0 for all" if shown < spec.heads else ""
    console.print(
        Text(f"{NOTHING} nothing before. An n-gram reads one row per head{hidden}.", style="dim"), soft_wrap=True
    )


def visible(text: str) -> str:
    """A text as a terminal may show it: spaces as ␣, whatever it would obey or hide as an escape such as \\x1b."""
    return "".join(
        SPACE if char == " " else char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )


def _heading(trace: Trace) -> str:
    spec, fewer = trace.spec, 1 - trace.spec.compressed_vocab_size / trace.vocab_size
    rows = sum(spec.num_rows(layer_id) for layer_id in spec.layer_ids)
    layers = f"{len(spec.layer_ids)} layer" + ("s" if len(spec.layer_ids) > 1 else "")
    return (
        f"addresses {spec.word_code}: {spec.dialect}, orders 2-{spec.max_order}, {spec.heads} heads, {rows:,} rows in {layers}\n"
        f"tokenizer {word_code(trace.tokenizer_digest)}: {trace.vocab_size:,} ids -> "
        f"{spec.compressed_vocab_size:,} compressed ids ({fewer:.1%} fewer)\n"
    )


def _lines(trace: Trace, t: int, shown: int) -> list[tuple[str, ...]]:
    """The table's lines for one position: one per order, the token's own columns on the first."""
    position, spec = trace.positions[t], trace.spec
    own = (str(t), visible(position.token), str(position.id), str(position.cid), visible(position.key))
    lines = []
    for order, keys in position.ngrams.items():
        ngram = " ".join(NOTHING if key is None else visible(key) for key in keys)
        rows = (
            _numbers(trace.rows_of(position, layer_id, order), shown, spec.num_rows(layer_id))
            for layer_id in spec.layer_ids
        )
        lines.append((*(own if order == 2 else ("",) * len(own)), ngram, *rows))
    return lines


def _numbers(rows: tuple[int, ...], shown: int, num_rows: int) -> str:
    width = len(str(num_rows - 1))
    return " ".join(f"{row:>{width}}" for row in rows[:shown]) + (" …" if shown < len(rows) else "")


def _text_widths(names: tuple[str, ...], lines: list[tuple[str, ...]], width: int) -> list[int | None]:
    """Cells for each column: what numbers need, and of the rest one part each for token and key, two for the n-gram."""
    needed = [max(map(cell_len, column)) for column in zip(names, *lines, strict=True)]
    parts = {names.index("token"): 1, names.index("key"): 1, names.index("n-gram"): 2}
    part = (width - 2 * len(names) - sum(needed[i] for i in range(len(names)) if i not in parts)) // 4
    return [max(NARROWEST, part) * parts[i] if i in parts else None for i in range(len(names))]


def _cut(cell: str, width: int | None) -> Text:
    if width is not None and cell_len(cell) > width:
        cell = set_cell_size(cell, width - 1) + "…"
    return Text(cell)


def _spelling(tokenizer: Tokenizer, token_id: int) -> tuple[str, str]:
    """A token's text and key; a fragment of a character has no text of its own and shows its vocabulary string."""
    text, raw = tokenizer.decode([token_id], skip_special_tokens=False), tokenizer.id_to_token(token_id) or ""
    return raw if REPLACEMENT in text else text, token_key(text, raw)


def _ngram(keys: tuple[str, ...], t: int, order: int) -> tuple[str | None, ...]:
    return tuple(keys[place] if place >= 0 else None for place in range(t - order + 1, t + 1))
