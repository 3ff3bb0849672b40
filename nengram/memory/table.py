"""A table and the addresses that give it meaning: where spec and store meet.

Row 4711 is only "Alexander the Great" under the multipliers and moduli it was trained with, so the AddressSpec travels
in the table file's metadata, as numbers, and a file whose spec differs from the model's is refused. The file itself
(docs/format.md) knows no address: `nengram.store` sees row numbers, this file knows which of them belong to the 2-grams.

Files of the first format are read like the others; whatever is written is of the second.
"""

import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from nengram.address import AddressSpec
from nengram.config import TABLE_TIERS
from nengram.errors import AddressError, CheckpointError, StoreError, nearest
from nengram.memory.format_1 import FORMAT as FORMAT_1
from nengram.memory.format_1 import OldTable
from nengram.store import HostStore, HotSet, MappedStore, ResidentStore, Store, TieredStore, host_zeros
from nengram.store.codecs import CODECS, Codec, make_codec
from nengram.store.safetensors_header import read_header
from nengram.store.table_file import TableReader, open_table, write_table
from nengram.store.table_place import find

AT_ONCE = 4 << 20  # bytes of rows that are in memory while a table streams by
NAME_OF = {kind.vector_dtype: name for name, kind in CODECS.items() if kind.plain}

AnyTable = TableReader | OldTable


class Table(NamedTuple):
    """What a table file holds: the vectors, the addresses, and the memory layer they belong to."""

    store: Store
    spec: AddressSpec
    layer_id: int


def save_table(
    path: str | os.PathLike, store: Store, spec: AddressSpec, layer_id: int, *, optimizer: bool = False
) -> None:
    """Write the table of one memory layer, whole or not at all, coded as the store holds it.

    optimizer: also the update rule's state and step counter, so that training can go on exactly.
    Raises: CheckpointError when the store is not the size the spec asks for, or the file cannot be written;
    StoreError for a store that only reads.
    """
    _check_rows(path, store.num_rows, spec, layer_id)
    tensors = {name: tensor.detach() for name, tensor in store.tensors().items()}
    weight = tensors.pop("weight")
    plain = weight.dtype in NAME_OF
    codec = make_codec(NAME_OF[weight.dtype], weight.shape[1]) if plain else store.codec
    step = max(1, AT_ONCE // codec.row_bytes)
    blocks = (
        weight[first : first + step].to("cpu").contiguous().view(torch.uint8).numpy()
        for first in range(0, len(weight), step)
    )
    extras = tensors if optimizer else None
    write_table(path, codec, store.num_rows, table_metadata(spec, layer_id), blocks, extras=extras)


def load_table(
    path: str | os.PathLike, expect_spec: AddressSpec | None = None, *, device: str | torch.device = "cpu"
) -> Table:
    """Read a table into a resident store, coded as the file is, with optimiser state where it has some.

    Every checksum is recomputed. expect_spec: the model's spec; a table of any other is refused and both word codes
    are shown.
    Raises: CheckpointError, naming the file, when it is missing, damaged, cut short, or of another spec.
    """
    with open_rows(path) as table:
        spec, layer_id = address_of(table)
        check_addresses(table, spec, layer_id, expect_spec)
        return Table(_in_memory(table, "resident", device), spec, layer_id)


def open_store(
    path: str | os.PathLike,
    tier: str = "resident",
    *,
    spec: AddressSpec | None = None,
    layer_id: int | None = None,
    row_width: int | None = None,
    device: str | torch.device = "cpu",
    hot: HotSet | str | os.PathLike | None = None,
    threads: int | None = None,
) -> Store:
    """The table at `path` as a store of any tier; all give the same vectors.

    tier: "resident" (on `device`), "host" (in RAM, lent on `device`), "mapped" (on disk, read by up to `threads`
        threads; the store's own choice if not given) or "tiered" (on disk, with the rows of `hot` in RAM).
    spec, layer_id, row_width: what the caller's model has; a table of anything else is refused.
    hot: a HotSet, or the path of one; `hot_name` is what it should belong to.
    The first two read all rows, and optimiser state where there is some, and check them against the checksums; the
    others read rows as they are asked for.
    Raises: CheckpointError for a table that is damaged, of other addresses, or only a part; StoreError for a tier,
    device or hot set that does not exist or fit.
    """
    check_tier(tier, hot)
    wanted = spec, layer_id, row_width
    if tier in ("resident", "host"):
        with open_rows(path) as table:
            _check_wanted(table, *wanted)
            return _in_memory(table, tier, device)
    below = _mapped(path, device, threads)
    try:
        name = hot_name(*_check_wanted(below.reader, *wanted))
        return below if tier == "mapped" else TieredStore(below, hot_set(hot, name))
    except BaseException:
        below.close()
        raise


def check_tier(tier: str, hot: object) -> None:
    """Raise StoreError for a tier that does not exist, and for a hot set that is missing or has no use."""
    if tier not in TABLE_TIERS:
        raise StoreError(f'unknown tier "{tier}"{nearest(str(tier), TABLE_TIERS)}; there are {", ".join(TABLE_TIERS)}')
    if (tier == "tiered") != (hot is not None):
        raise StoreError(f'tier "tiered" goes with a hot set, and no other tier does; this is "{tier}"')


def order_labels(spec: AddressSpec, layer_id: int) -> list[tuple[str, int, int]]:
    """Which rows belong to which n-gram order: (name, first row, row after the last), for a store's counters.

    Raises: AddressError for a layer the spec does not have.
    """
    ends = spec.moduli(layer_id).reshape(-1, spec.heads).sum(axis=1).cumsum().tolist()
    return [
        (f"{order}-gram", first, end)
        for order, first, end in zip(range(2, spec.max_order + 1), [0, *ends[:-1]], ends, strict=True)
    ]


def hot_name(spec: AddressSpec, layer_id: int) -> str:
    """What a hot set of this table's rows belongs to: addresses and layer, for row numbers mean nothing by themselves."""
    return f"{spec.digest}/{layer_id}"


def open_rows(path: str | os.PathLike, *, whole: bool = True) -> AnyTable:
    """A table of either format, to be read by rows. whole: refuse a file with only some of a table's rows.

    Raises: CheckpointError, naming the file.
    """
    path = find(path)
    if path.is_file() and read_header(path).metadata.get("format") == FORMAT_1:
        return OldTable.open(path)
    return open_table(path, whole=whole)


def address_of(table: AnyTable) -> tuple[AddressSpec, int]:
    """The addresses that a table's metadata hold, and its layer. Raises: CheckpointError."""
    try:
        return AddressSpec.from_json(table.metadata["address_spec"]), int(table.metadata["layer_id"])
    except KeyError as error:
        raise CheckpointError(f"{table.path} has no readable address spec: its metadata lack {error}") from None
    except (ValueError, AddressError) as error:
        raise CheckpointError(f"{table.path} has no readable address spec: {' '.join(str(error).split())}") from None


def table_metadata(spec: AddressSpec, layer_id: int) -> dict[str, str]:
    """What a table file's metadata say of its addresses."""
    return {"address_spec": spec.to_json(), "layer_id": str(layer_id)}


def check_addresses(table: AnyTable, spec: AddressSpec, layer_id: int, expected: AddressSpec | None) -> None:
    """Raise CheckpointError when a table is not the size its own spec asks for, or its spec is not `expected`."""
    if expected is not None and spec.dialect != expected.dialect:
        raise CheckpointError(
            f'{table.path} holds a table of dialect "{spec.dialect}" (addresses {spec.word_code}), this model\'s is '
            f'"{expected.dialect}" ({expected.word_code}): its rows would be read under other n-grams'
        )
    if expected is not None and spec.digest != expected.digest:
        raise CheckpointError(
            f"{table.path} holds a table for addresses {spec.word_code}, this model's are {expected.word_code}: "
            "its rows would be read under other n-grams"
        )
    _check_rows(table.path, table.table_rows, spec, layer_id)


def blocks_of(table: AnyTable, *, at_once: int = AT_ONCE) -> Iterator[np.ndarray]:
    """All rows of a table in order, uint8 `[n, row_bytes]`, about `at_once` bytes at a time. Raises: CheckpointError."""
    step = max(1, at_once // table.codec.row_bytes)
    for first in range(0, table.num_rows, step):
        yield table.read_rows(first, min(step, table.num_rows - first))


def _check_rows(path: str | os.PathLike, num_rows: int, spec: AddressSpec, layer_id: int) -> None:
    if layer_id not in spec.layer_ids:
        raise CheckpointError(f"{path}: the address spec has no memory layer {layer_id}, only {list(spec.layer_ids)}")
    if num_rows != spec.num_rows(layer_id):
        needed = spec.num_rows(layer_id)
        raise CheckpointError(f"{path}: memory layer {layer_id} addresses {needed:,} rows, the table has {num_rows:,}")


def _in_memory(table: AnyTable, tier: str, device: str | torch.device) -> Store:
    """All rows in memory, checked; optimiser state, too, where the table has some. Raises: CheckpointError."""
    table.verify()
    extras = table.extras()
    try:
        store = filled(blocks_of(table), table.num_rows, table.codec, tier, device)
        if extras:
            store.load_tensors({"weight": store.tensors()["weight"], **extras})
        return store
    except StoreError as error:
        raise CheckpointError(f"{table.path}: {error}") from error


def filled(
    blocks: Iterable[np.ndarray], num_rows: int, codec: Codec, tier: str, device: str | torch.device
) -> ResidentStore | HostStore:
    """A store, "resident" or "host", of coded rows that come in blocks, uint8 `[n, row_bytes]`. Raises: StoreError."""
    kind, shape = HostStore if tier == "host" else ResidentStore, (num_rows, codec.row_bytes)
    bytes_RB = host_zeros(shape, torch.uint8) if tier == "host" else torch.empty(shape, dtype=torch.uint8)
    first = 0
    for block_NB in blocks:
        bytes_RB[first : first + len(block_NB)] = torch.from_numpy(block_NB)
        first += len(block_NB)
    return kind.from_bytes(bytes_RB, codec, device=device)


def _mapped(path: str | os.PathLike, device: str | torch.device, threads: int | None) -> MappedStore:
    with open_rows(path) as table:
        if isinstance(table, OldTable):
            raise CheckpointError(
                f"{path}: is of the first format, which is read whole: `nengram table pack` renews it"
            )
    return MappedStore(path, device=device, **({} if threads is None else {"threads": threads}))


def hot_set(hot: HotSet | str | os.PathLike, name: str) -> HotSet:
    """A hot set, read if it is a path. Raises: CheckpointError, StoreError when it was made for another table."""
    if isinstance(hot, HotSet) and hot.belongs_to not in ("", name):
        raise StoreError(
            "the hot set is of another table: it would keep other rows hot; make one from this table's counts"
        )
    return hot if isinstance(hot, HotSet) else HotSet.load(hot, belongs_to=name)


def _check_wanted(
    table: AnyTable, spec: AddressSpec | None, layer_id: int | None, row_width: int | None
) -> tuple[AddressSpec, int]:
    """A table's own addresses and layer, after what the caller wants of them. Raises: CheckpointError."""
    own_spec, own_layer_id = address_of(table)
    check_addresses(table, own_spec, own_layer_id, spec)
    if layer_id is not None and layer_id != own_layer_id:
        raise CheckpointError(f"{table.path}: holds the table of memory layer {own_layer_id}, not of {layer_id}")
    if row_width is not None and row_width != table.codec.row_width:
        raise CheckpointError(f"{table.path}: its rows have {table.codec.row_width} numbers, the model's {row_width}")
    return own_spec, own_layer_id
