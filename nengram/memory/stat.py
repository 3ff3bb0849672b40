"""What a table file is, and whether it is that: `stat` reads a header, `verify` reads everything.

Checksums say that the bytes are those that were written. They cannot say that the right thing was written; the row
counts can, for they are sums of primes that the spec's dialect hands out in a fixed order (`nengram.address.self_test`).
A table whose size is not that sum would be read, without any error, under other n-grams than it was trained with.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nengram.address import AddressSpec
from nengram.address.self_test import self_test
from nengram.errors import AddressError, CheckpointError
from nengram.memory.format_1 import FORMAT as FORMAT_1
from nengram.memory.format_1 import OldTable
from nengram.memory.table import AnyTable, address_of, check_addresses, open_rows, order_labels
from nengram.store.table_file import FORMAT

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class TableStat:
    """A table, or a part of one, described. Bytes are of rows; headers, checksums and optimiser state are not counted.

    codec: as `Codec.to_dict`. num_rows: held here, from `first_row` on, of `table_rows` in the whole table.
    written_bytes: what was ever written; the rest are holes, zeros that take no space.
    orders: (name, first row, row after the last) of each n-gram order. padding_rows: rows that no n-gram reads.
    extras: tensors beside the rows. origin: the layout the table was imported from, or "".
    digest: hex, stands for every byte.
    """

    path: str
    format: str
    codec: dict[str, Any]
    num_rows: int
    first_row: int
    table_rows: int
    row_bytes: int
    table_bytes: int
    written_bytes: int
    files: int
    digest: str
    dialect: str
    addresses: str
    layer_id: int
    block_index: int | None
    orders: tuple[tuple[str, int, int], ...]
    padding_rows: int
    extras: tuple[str, ...]
    origin: str

    @property
    def is_part(self) -> bool:
        """Whether this holds only some of a table's rows."""
        return self.num_rows != self.table_rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def stat(path: str | os.PathLike) -> TableStat:
    """Describe a table file, a part, or the folder of a sharded table; no row is read.

    Raises: CheckpointError when it is none, is damaged in its header, or has no address spec.
    """
    with open_rows(path, whole=False) as table:
        return _stat(table)


def verify(
    path: str | os.PathLike, *, expect_spec: AddressSpec | None = None, progress: Progress | None = None
) -> TableStat:
    """Recompute every checksum, and the row counts from the spec's own primes; memory does not grow with the table.

    expect_spec: refuse a table of other addresses. progress: `(bytes_done, bytes_in_all)`.
    Raises: CheckpointError with the file and what is wrong in it.
    """
    with open_rows(path, whole=False) as table:
        spec, layer_id = address_of(table)
        check_addresses(table, spec, layer_id, expect_spec)
        try:
            self_test(spec)
        except AddressError as error:
            raise CheckpointError(f"{table.path}: {error}") from None
        table.verify(progress)
        return _stat(table)


def _stat(table: AnyTable) -> TableStat:
    spec, layer_id = address_of(table)
    check_addresses(table, spec, layer_id, None)
    layer, codec = spec.layer(layer_id), table.codec
    orders = tuple(order_labels(spec, layer_id))
    old = isinstance(table, OldTable)
    return TableStat(
        path=str(Path(table.path)),
        format=FORMAT_1 if old else FORMAT,
        codec=codec.to_dict(),
        num_rows=table.num_rows,
        first_row=table.first_row,
        table_rows=table.table_rows,
        row_bytes=codec.row_bytes,
        table_bytes=table.num_rows * codec.row_bytes,
        written_bytes=table.written_bytes(),
        files=len(table.files),
        digest=table.digest,
        dialect=spec.dialect,
        addresses=spec.word_code,
        layer_id=layer_id,
        block_index=layer.block_index,
        orders=orders,
        padding_rows=layer.num_rows - orders[-1][2],
        extras=tuple(table.extra_names() if old else table.files[0].extra_entries),
        origin=_origin(table.metadata.get("origin", "")),
    )


def _origin(text: str) -> str:
    try:
        layout = json.loads(text)["layout"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return ""
    return layout if isinstance(layout, str) and layout.isidentifier() else ""
