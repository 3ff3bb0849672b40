"""The index of a sharded table: which file of the folder holds which rows, and the seal each had when the table was made.

The seals bind the shards together: a shard of another table, or of another day, is refused, and the digest over the index stands for
every byte of every shard.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nengram.errors import CheckpointError, StoreError
from nengram.files import write_atomic
from nengram.store.codecs import Codec, codec_from_dict
from nengram.store.safetensors_header import one_line, open_file, shown
from nengram.store.table_layout import FORMAT

INDEX = "index.json"
MAX_INDEX_BYTES = 16 << 20
FIELDS = {"format": str, "codec": dict, "table_rows": int, "shards": list, "digest": str}
SHARD_FIELDS = {"file": str, "first_row": int, "num_rows": int, "seal": str}


class Shard(NamedTuple):
    """One line of the index. seal: hex."""

    file: str
    first_row: int
    num_rows: int
    seal: str


class Index(NamedTuple):
    """What the index of a sharded table says; `digest` (hex) is over all the rest."""

    codec: Codec
    table_rows: int
    shards: tuple[Shard, ...]
    digest: str


def shard_name(number: int, shards: int) -> str:
    """`table-00001-of-00004.safetensors`, counted from 0."""
    return f"table-{number + 1:05d}-of-{shards:05d}.safetensors"


def write_index(folder: Path, codec: Codec, table_rows: int, shards: Sequence[Shard]) -> str:
    """Write `folder/index.json`; its digest. Raises OSError."""
    described = {
        "format": FORMAT,
        "codec": codec.to_dict(),
        "table_rows": table_rows,
        "shards": [shard._asdict() for shard in shards],
    }
    digest = _digest(described)
    write_atomic(folder / INDEX, json.dumps(described | {"digest": digest}, indent=1) + "\n")
    return digest


def read_index(folder: Path) -> Index:
    """The index of a sharded table. Raises CheckpointError unless its shards are all of the table, in order, and digest fits."""
    path = folder / INDEX
    described = _read(path)
    try:
        codec = codec_from_dict(described["codec"])
    except StoreError as error:
        raise CheckpointError(f"{path}: {one_line(error)}; write the table again") from None
    shards = tuple(_shard(path, entry) for entry in described["shards"])
    next_row = 0
    for shard in shards:
        if shard.first_row != next_row or shard.num_rows < 1:
            raise CheckpointError(
                f"{path}: {shown(shard.file)} does not begin at row {next_row:,}; write the table again"
            )
        next_row += shard.num_rows
    if next_row != described["table_rows"] or not shards:
        raise CheckpointError(
            f"{path}: its shards hold {next_row:,} of {described['table_rows']:,} rows; write it again"
        )
    return Index(codec, next_row, shards, described["digest"])


def table_files(folder: Path) -> set[str]:
    """Names of the files that make up the sharded table in `folder`; none when there is no table."""
    try:
        return {INDEX, *(shard.file for shard in read_index(folder).shards)}
    except CheckpointError:
        return set()


def _read(path: Path) -> dict:
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: a folder without {INDEX} is no table; check the path")
    descriptor = open_file(path)
    with os.fdopen(descriptor, "rb") as file:
        text = file.read(MAX_INDEX_BYTES + 1)
    try:
        if len(text) > MAX_INDEX_BYTES:
            raise ValueError(f"more than {MAX_INDEX_BYTES:,} bytes")
        described = json.loads(text, parse_float=_no_number, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not an index: {one_line(error)}; write the table again") from None
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not the index of a table of format {FORMAT!r}; check the path")
    _require(path, described, FIELDS)
    if described["digest"] != _digest({name: value for name, value in described.items() if name != "digest"}):
        raise CheckpointError(f"{path}: damaged: it does not match its digest; restore it, or write the table again")
    return described


def _shard(path: Path, entry: object) -> Shard:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{path}: a shard is described by an object; write the table again")
    _require(path, entry, SHARD_FIELDS)
    name = entry["file"]
    if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
        raise CheckpointError(f"{path}: {shown(name)} is no file name in its folder; write the table again")
    return Shard(*(entry[field] for field in SHARD_FIELDS))


def _require(path: Path, found: dict, fields: dict[str, type]) -> None:
    if found.keys() != fields.keys():
        name = min(found.keys() ^ fields.keys())
        raise CheckpointError(f"{path}: field {shown(name)} is missing or unknown; write the table again")
    for name, kind in fields.items():
        if type(found[name]) is not kind:
            raise CheckpointError(f"{path}: {name} is no {kind.__name__}; write the table again")


def _digest(described: dict) -> str:
    text = json.dumps(described, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not a whole number")
