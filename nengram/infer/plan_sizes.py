"""How large tables are and what a token reads of them: arithmetic on an address spec, exact, no text needed.

Every slot of every memory layer reads one row for every token, always. So all that is needed are the spec's row counts, the width of
a row and the bytes that a codec makes of it (`nengram.store.codecs`). docs/plan.md has each formula.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from nengram.address import AddressSpec
from nengram.errors import ConfigError
from nengram.store.codecs import CODECS, Codec, make_codec

PAGE_BYTES = 4096
GIB = 2**30


@dataclass(frozen=True)
class PlannedTables:
    """The tables to plan for: all layers of `spec`, or those of `layer_ids`. `codec`: how their rows are stored.

    Raises: StoreError for an unknown codec (nearest named) or a row width out of range; ConfigError without a layer.
    """

    name: str
    spec: AddressSpec
    layer_ids: tuple[int, ...]
    row_width: int
    codec: str

    def __post_init__(self) -> None:
        codec_of(self.codec, self.row_width)
        if not self.layer_ids:
            raise ConfigError(f"{self.name}: no memory layer to plan for")

    @property
    def num_rows(self) -> int:
        """Rows of all tables."""
        return sum(self.spec.num_rows(layer_id) for layer_id in self.layer_ids)

    @property
    def rows_per_token(self) -> int:
        """Rows that one token reads: a row for every slot of every layer."""
        return self.spec.slots * len(self.layer_ids)


@dataclass(frozen=True)
class CodecSize:
    """What one codec makes of the tables. pages_per_token: expected 4 KiB pages, rows being far apart."""

    row_bytes: int
    table_bytes: int
    bytes_per_token: int
    pages_per_row: float
    pages_per_token: float


@dataclass(frozen=True)
class LayerSize:
    """One memory layer; rows_per_head: the smallest modulus of each order. Bytes are of the codec planned for."""

    layer_id: int
    block_index: int | None
    rows: int
    rows_per_head: tuple[int, ...]
    largest_head: int
    parameters: int
    table_bytes: int
    rows_per_token: int
    bytes_per_token: int


@dataclass(frozen=True)
class Sizes:
    """Sizes of all tables together, by layer, and by codec."""

    parameters: int
    rows: int
    row_width: int
    rows_per_token: int
    layers: tuple[LayerSize, ...]
    codecs: dict[str, CodecSize]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def sizes_of(tables: PlannedTables) -> Sizes:
    """Every size that follows from the spec."""
    codecs = {name: _codec_size(tables, codec_of(name, tables.row_width)) for name in CODECS}
    row_bytes = codecs[tables.codec].row_bytes
    return Sizes(
        parameters=tables.num_rows * tables.row_width,
        rows=tables.num_rows,
        row_width=tables.row_width,
        rows_per_token=tables.rows_per_token,
        layers=tuple(_layer_size(tables, layer_id, row_bytes) for layer_id in tables.layer_ids),
        codecs=codecs,
    )


def codec_of(name: str, row_width: int) -> Codec:
    """A codec for its sizes alone: one that needs the scale of a table gets 1. Raises: StoreError."""
    return make_codec(name, row_width, **({"scale": 1.0} if name == "fp8_tensor" else {}))


def pages_per_row(row_bytes: int) -> float:
    """Expected 4 KiB pages of one row, exact for a table that begins on a page: 1 + (B - gcd(B, 4096)) / 4096.

    Rows begin at every multiple of the gcd alike, so the part of them that runs over a page's end is counted, not estimated.
    """
    return 1 + (row_bytes - math.gcd(row_bytes, PAGE_BYTES)) / PAGE_BYTES


def _codec_size(tables: PlannedTables, codec: Codec) -> CodecSize:
    pages = pages_per_row(codec.row_bytes)
    return CodecSize(
        row_bytes=codec.row_bytes,
        table_bytes=tables.num_rows * codec.row_bytes,
        bytes_per_token=tables.rows_per_token * codec.row_bytes,
        pages_per_row=pages,
        pages_per_token=tables.rows_per_token * pages,
    )


def _layer_size(tables: PlannedTables, layer_id: int, row_bytes: int) -> LayerSize:
    layer, slots = tables.spec.layer(layer_id), tables.spec.slots
    return LayerSize(
        layer_id=layer_id,
        block_index=layer.block_index,
        rows=layer.num_rows,
        rows_per_head=tuple(min(heads) for heads in layer.moduli),
        largest_head=max(map(max, layer.moduli)),
        parameters=layer.num_rows * tables.row_width,
        table_bytes=layer.num_rows * row_bytes,
        rows_per_token=slots,
        bytes_per_token=slots * row_bytes,
    )
