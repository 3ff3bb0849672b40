"""Where everything lies in a table file, and what has to fit what: the rules of docs/format.md, once for writer and reader.

0            header        8 bytes of length, JSON, spaces up to a multiple of 4096
rows_offset  weight        row r at rows_offset + r * row_bytes
             extras        step, state.<rule>.<name>: each at a multiple of 64, behind `padding.<n>` where it takes one
             chunk_sha256  one SHA-256 for each chunk of everything between rows_offset and here; zeros: never written
             seal          SHA-256 of the header's bytes and all of chunk_sha256; zeros: a writer has not finished
"""

import json
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch

from nengram.errors import CheckpointError, StoreError
from nengram.store.codecs import Codec, codec_from_dict
from nengram.store.safetensors_header import DTYPE_BITS, MAX_HEADER_BYTES, METADATA, Entry, Header, one_line, shown

FORMAT = "nengram-table-2"
PAGE = 4096
ALIGNMENT = 64
CHUNK_BYTES = 1 << 20
CHUNK_LIMITS = PAGE, 1 << 30
DIGEST_BYTES = 32
OPEN_SEAL = bytes(DIGEST_BYTES)
RESERVED = ("format", "codec", "num_rows", "first_row", "table_rows", "chunk_bytes")
WEIGHT, CHUNKS, SEAL, PADDING = "weight", "chunk_sha256", "seal", "padding."
WHOLE = re.compile(r"0|[1-9][0-9]{0,17}")
TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class Layout(NamedTuple):
    """One table file, described. Offsets are absolute; `extras` and `metadata` are the caller's own."""

    codec: Codec
    num_rows: int
    first_row: int
    table_rows: int
    chunk_bytes: int
    metadata: dict[str, str]
    extras: dict[str, Entry]
    rows_offset: int
    digests_offset: int
    chunks: int

    @property
    def rows_end(self) -> int:
        return self.rows_offset + self.num_rows * self.codec.row_bytes

    @property
    def seal_offset(self) -> int:
        return self.digests_offset + self.chunks * DIGEST_BYTES

    @property
    def file_bytes(self) -> int:
        return self.seal_offset + DIGEST_BYTES


def plan_layout(
    codec: Codec,
    table_rows: int,
    metadata: Mapping[str, str],
    *,
    first_row: int = 0,
    num_rows: int | None = None,
    extras: Mapping[str, torch.Tensor] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Layout, bytes]:
    """The layout of a file to be written, and its header's bytes (length and padding included).

    Raises: StoreError for numbers, names or metadata that no table file can have.
    """
    num_rows = table_rows - first_row if num_rows is None else num_rows
    reason = _misfit(codec, num_rows, first_row, table_rows, chunk_bytes)
    reason = reason or _bad_metadata(metadata) or _bad_extras(extras or {})
    if reason:
        raise StoreError(reason)
    entries, end = {WEIGHT: _weight(codec, num_rows)}, num_rows * codec.row_bytes
    for name, tensor in (extras or {}).items():
        end = _pad(entries, end)
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = Entry(SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape), begin, end)
    digests = _pad(entries, end)
    chunks = -(-digests // chunk_bytes)
    entries[CHUNKS] = Entry("U8", (chunks, DIGEST_BYTES), digests, digests + chunks * DIGEST_BYTES)
    entries[SEAL] = Entry("U8", (DIGEST_BYTES,), entries[CHUNKS].end, entries[CHUNKS].end + DIGEST_BYTES)
    numbers = {"num_rows": num_rows, "first_row": first_row, "table_rows": table_rows, "chunk_bytes": chunk_bytes}
    own = {"format": FORMAT, "codec": codec_text(codec), **{name: str(number) for name, number in numbers.items()}}
    header = _header_bytes(entries, own | dict(metadata))
    placed = {
        name: Entry(entry.dtype, entry.shape, entry.begin + len(header), entry.end + len(header))
        for name, entry in entries.items()
        if name in (extras or {})
    }
    numbers = num_rows, first_row, table_rows, chunk_bytes
    return Layout(codec, *numbers, dict(metadata), placed, len(header), len(header) + digests, chunks), header


def check_layout(path: object, header: Header) -> Layout:
    """The layout that a file's header describes. Raises: CheckpointError, naming the file, when a rule is broken."""
    try:
        return _layout_of(header)
    except StoreError as error:
        raise CheckpointError(f"{path}: {one_line(error)}; write the table again") from None


def codec_text(codec: Codec) -> str:
    """The codec as the one JSON text that the metadata and an index hold."""
    return json.dumps(codec.to_dict(), sort_keys=True, separators=(",", ":"))


def codec_from_text(text: str) -> Codec:
    """Inverse of `codec_text`, for text that cannot be trusted. Raises: StoreError."""
    try:
        described = json.loads(text)
    except (ValueError, RecursionError):
        raise StoreError("its codec is not JSON") from None
    if not isinstance(described, dict):
        raise StoreError("its codec is not a JSON object")
    return codec_from_dict(described)


def _layout_of(header: Header) -> Layout:
    own = header.metadata
    if own.get("format") != FORMAT:
        raise StoreError(f"not a table file: its format is {shown(own.get('format', 'not given'))}, not {FORMAT!r}")
    missing = [name for name in RESERVED if name not in own]
    if missing:
        raise StoreError(f"its metadata lack {', '.join(missing)}")
    codec = codec_from_text(own["codec"])
    numbers = {name: own[name] for name in RESERVED[2:]}
    for name, text in numbers.items():
        if not WHOLE.fullmatch(text):
            raise StoreError(f"its {name} is {shown(text)}, not a whole number")
    num_rows, first_row, table_rows, chunk_bytes = (int(text) for text in numbers.values())
    reason = _misfit(codec, num_rows, first_row, table_rows, chunk_bytes) or _misplaced(header, codec, num_rows)
    if reason:
        raise StoreError(reason)
    digests = header.tensors[CHUNKS]
    chunks = -(-(digests.begin - header.data_begin) // chunk_bytes)
    if digests.shape != (chunks, DIGEST_BYTES) or digests.dtype != "U8":
        raise StoreError(f"its {CHUNKS} is {digests.dtype} {list(digests.shape)}, not U8 [{chunks}, {DIGEST_BYTES}]")
    extras = {name: entry for name, entry in header.tensors.items() if _is_extra(name)}
    metadata = {name: text for name, text in own.items() if name not in RESERVED}
    rows_offset = header.data_begin
    return Layout(
        codec, num_rows, first_row, table_rows, chunk_bytes, metadata, extras, rows_offset, digests.begin, chunks
    )


def _misfit(codec: Codec, num_rows: int, first_row: int, table_rows: int, chunk_bytes: int) -> str | None:
    if not 0 <= first_row < first_row + num_rows <= table_rows:
        return f"rows {first_row:,} to {first_row + num_rows:,} are no part of a table of {table_rows:,} rows"
    if table_rows * codec.row_bytes >= 1 << 62:
        return f"{table_rows:,} rows of {codec.row_bytes:,} bytes are more than a file can hold"
    if chunk_bytes % PAGE or not CHUNK_LIMITS[0] <= chunk_bytes <= CHUNK_LIMITS[1]:
        return (
            f"chunk_bytes is {chunk_bytes:,}, not a multiple of {PAGE} from {CHUNK_LIMITS[0]:,} to {CHUNK_LIMITS[1]:,}"
        )
    return None


def _misplaced(header: Header, codec: Codec, num_rows: int) -> str | None:
    names = list(header.tensors)
    if names[:1] != [WEIGHT] or names[-2:] != [CHUNKS, SEAL]:
        return f"its tensors do not run from {WEIGHT} to {CHUNKS} and {SEAL}"
    if header.data_begin % PAGE:
        return f"its rows begin at byte {header.data_begin:,}, not at a multiple of {PAGE}"
    wanted, weight = _weight(codec, num_rows), header.tensors[WEIGHT]
    if weight[:2] != wanted[:2]:
        return f"its rows are {weight.dtype} {list(weight.shape)}, codec {codec.name} needs {wanted.dtype} {list(wanted.shape)}"
    if header.tensors[SEAL][:2] != ("U8", (DIGEST_BYTES,)):
        return f"its {SEAL} is not U8 [{DIGEST_BYTES}]"
    for name, entry in header.tensors.items():
        if _is_extra(name) and entry.dtype not in TORCH_DTYPES:
            return f"its tensor {shown(name)} is {entry.dtype}, which no table file holds"
        if (_is_extra(name) or name == CHUNKS) and entry.begin % ALIGNMENT:
            return f"its tensor {shown(name)} begins at byte {entry.begin:,}, not at a multiple of {ALIGNMENT}"
    return None


def _weight(codec: Codec, num_rows: int) -> Entry:
    width = 8 * codec.row_bytes // DTYPE_BITS[codec.tensor_dtype]
    return Entry(codec.tensor_dtype, (num_rows, width), 0, num_rows * codec.row_bytes)


def _pad(entries: dict[str, Entry], end: int) -> int:
    """The next multiple of 64, after a padding tensor where there is a gap."""
    aligned = -(-end // ALIGNMENT) * ALIGNMENT
    if aligned > end:
        number = sum(name.startswith(PADDING) for name in entries)
        entries[f"{PADDING}{number}"] = Entry("U8", (aligned - end,), end, aligned)
    return aligned


def _is_extra(name: str) -> bool:
    return name not in (WEIGHT, CHUNKS, SEAL) and not name.startswith(PADDING)


def _bad_metadata(metadata: Mapping[str, str]) -> str | None:
    for name, text in metadata.items():
        if not isinstance(name, str) or not isinstance(text, str):
            return f"metadata are strings, {name!r} is not"
        if not text.isprintable() and text.encode("utf-8", "replace").decode() != text:
            return f"metadata {name!r} is not text that UTF-8 can hold"
        if name in RESERVED:
            return f'metadata "{name}" is written by the table file itself; give it another name'
    return None


def _bad_extras(extras: Mapping[str, torch.Tensor]) -> str | None:
    for name, tensor in extras.items():
        if not _is_extra(name) or name == METADATA:
            return f'a tensor beside the rows cannot be called "{name}"'
        if tensor.dtype not in SAFETENSORS_DTYPES:
            return f'"{name}" is {tensor.dtype}, which a table file does not hold'
    return None


def _header_bytes(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """Length, JSON and spaces; what follows begins at a multiple of 4096."""
    described: dict = {METADATA: dict(metadata)}
    for name, entry in entries.items():
        described[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    padded = -(-(8 + len(text)) // PAGE) * PAGE - 8
    if padded > MAX_HEADER_BYTES:
        raise StoreError(f"a header of {padded:,} bytes is beyond the {MAX_HEADER_BYTES:,} that safetensors allows")
    return padded.to_bytes(8, "little") + text.ljust(padded)
