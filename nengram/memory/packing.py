"""One table into another: coded otherwise, in more files, fewer rows, or none written yet.

Everything streams: a few mebibytes of rows are in memory, whatever the table. Rows are checked against their checksums
as they are read, so damage is never sealed anew. A table in the same codec is copied byte for byte. Optimiser state
stays behind: it belongs to training, which goes on from the table that was trained.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from nengram.address import AddressSpec
from nengram.errors import CheckpointError, StoreError, nearest
from nengram.memory.format_1 import OldTable
from nengram.memory.table import AT_ONCE, AnyTable, address_of, check_addresses, open_rows, order_labels, table_metadata
from nengram.store.codecs import CODECS, Codec, Fp8Tensor, make_codec
from nengram.store.table_file import TableWriter, create_zero_table, write_table

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def pack(
    source: str | os.PathLike,
    into: str | os.PathLike,
    *,
    codec: str = "",
    shards: int = 1,
    scale: float | None = None,
    progress: Progress | None = None,
) -> Codec:
    """Write a table again: with another codec, in `shards` files (a folder), or in the newest format.

    codec: a name of `CODECS`; the table's own if not given. scale: of codec fp8_tensor; found in a pass over the table
    if not given.
    Returns the codec written. Raises: CheckpointError for either file, StoreError for a codec or numbers it cannot hold.
    """
    with open_rows(source) as table:
        spec, layer_id = address_of(table)
        check_addresses(table, spec, layer_id, None)
        _require_other(table, into)
        made = table.codec if codec in ("", table.codec.name) and scale is None else _codec(table, codec, scale)
        blocks = checked_blocks(table)
        if made != table.codec:
            blocks = (_encoded(table, made, first, block_NB) for first, block_NB in _numbered(blocks))
        metadata = dict(table.metadata) if made == table.codec else table_metadata(spec, layer_id)
        write_table(into, made, table.table_rows, metadata, blocks, shards=shards, progress=progress)
        return made


def slice_table(
    source: str | os.PathLike,
    into: str | os.PathLike,
    *,
    rows: tuple[int, int] | None = None,
    order: int | None = None,
    progress: Progress | None = None,
) -> tuple[int, int]:
    """Cut rows [first, end) out of a table, or the rows of one n-gram order, into a file that says which they are.

    The file has the table's addresses, so `verify` accepts it; a model refuses it, for it is not a whole table.
    Returns first and end. Raises: CheckpointError, and StoreError for rows or an order that the table does not have.
    """
    if (rows is None) == (order is None):
        raise StoreError("a slice is rows or one n-gram order: give one of them")
    with open_rows(source) as table:
        spec, layer_id = address_of(table)
        check_addresses(table, spec, layer_id, None)
        _require_other(table, into)
        first, end = _rows_of_order(spec, layer_id, order) if rows is None else rows
        if not 0 <= first < end <= table.num_rows:
            raise StoreError(
                f"rows {first:,} to {end:,} (not included) are no part of a table of {table.num_rows:,} rows"
            )
        total = (end - first) * table.codec.row_bytes
        with TableWriter(
            into, table.codec, table.table_rows, table.metadata, first_row=first, num_rows=end - first
        ) as writer:
            for block_NB in checked_blocks(table, first, end):
                writer.write(block_NB)
                if progress:
                    progress(writer.rows_written * table.codec.row_bytes, total)
        return first, end


def create(path: str | os.PathLike, spec: AddressSpec, layer_id: int, codec: Codec) -> None:
    """A table of zeros for one memory layer: a sparse file of any size, at once.

    Raises: AddressError for a layer the spec does not have, CheckpointError when it cannot be written.
    """
    create_zero_table(path, codec, spec.num_rows(layer_id), table_metadata(spec, layer_id))


def checked_blocks(table: AnyTable, first: int = 0, end: int | None = None) -> Iterator[np.ndarray]:
    """Rows [first, end) in order, uint8 `[n, row_bytes]`, each block after its checksums. Raises: CheckpointError."""
    if isinstance(table, OldTable):
        table.verify()
    end = table.num_rows if end is None else end
    step = max(1, AT_ONCE // table.codec.row_bytes)
    for begin in range(first, end, step):
        count = min(step, end - begin)
        if not isinstance(table, OldTable):
            table.verify_rows(begin, count)
        yield table.read_rows(begin, count)


def codec_named(name: str, row_width: int, scale: float | None = None) -> Codec:
    """A codec by name, for rows not yet seen. Raises: StoreError."""
    if scale is not None and name != "fp8_tensor":
        raise StoreError(f"a scale belongs to codec fp8_tensor, not to {name}")
    parameters: dict[str, Any] = {"scale": 1.0 if scale is None else scale} if name == "fp8_tensor" else {}
    return make_codec(name, row_width, **parameters)


def _codec(table: AnyTable, name: str, scale: float | None) -> Codec:
    name = name or table.codec.name
    if name not in CODECS:
        raise StoreError(f'unknown codec "{name}"{nearest(name, CODECS)}; there are {", ".join(CODECS)}')
    if name == "fp8_tensor" and scale is None:
        scale = Fp8Tensor.scale_for(_largest(table))
    return codec_named(name, table.codec.row_width, scale)


def _largest(table: AnyTable) -> float:
    """The largest magnitude in a table."""
    return max(float(_vectors(table, block_NB).float().abs().amax()) for block_NB in checked_blocks(table))


def _vectors(table: AnyTable, block_NB: np.ndarray) -> torch.Tensor:
    return table.codec.decode(torch.from_numpy(block_NB))


def _encoded(table: AnyTable, codec: Codec, first: int, block_NB: np.ndarray) -> np.ndarray:
    try:
        return codec.encode(_vectors(table, block_NB)).numpy()
    except StoreError as error:
        raise StoreError(f"{table.path}: rows from {first:,} on: {error}") from None


def _numbered(blocks: Iterator[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    first = 0
    for block_NB in blocks:
        yield first, block_NB
        first += len(block_NB)


def _rows_of_order(spec: AddressSpec, layer_id: int, order: int) -> tuple[int, int]:
    labels = order_labels(spec, layer_id)
    if not 2 <= order < len(labels) + 2:
        raise StoreError(f"this table has the n-gram orders 2 to {len(labels) + 1}, not {order}")
    return labels[order - 2][1:]


def _require_other(table: AnyTable, into: str | os.PathLike) -> None:
    """Refuse to write a table over the one that is being read."""
    if os.path.exists(into) and os.path.samefile(table.path, into):
        raise CheckpointError(f"{into}: is the table that is read; name another place")
