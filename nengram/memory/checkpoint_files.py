"""A released checkpoint, seen as byte ranges: which file holds a tensor, where, and nothing read that was not asked for.

Released tables are larger than memory, so no tensor is ever loaded. A table is rows, a layout may keep one row's bytes
in several tensors (values here, scales 98 GB further on), and one tensor may lie in hundreds of pieces; a `Plane` is
one such tensor and its pieces. Reading a block of rows joins the planes side by side, writing one takes them apart, so
that import and export are one description used in two directions.

`config.json` and the index are a stranger's: paths that leave the folder are refused, and so is any size that the
files do not bear out.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from nengram.errors import CheckpointError
from nengram.store.safetensors_header import DTYPE_BITS, Entry, open_file, read_exactly, read_header

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
CONFIG = "config.json"
LARGEST_JSON = 1 << 28  # bytes; the index of a model with a million tensors stays below
LARGEST_SMALL = 1 << 20  # bytes of a tensor that is read whole


class Piece(NamedTuple):
    """Consecutive rows of one tensor: `rows` of them from byte `begin` of `path`."""

    path: Path
    begin: int
    rows: int


class Plane(NamedTuple):
    """One column of bytes of a table: `row_bytes` of every row, its rows in `pieces` one after another."""

    row_bytes: int
    pieces: tuple[Piece, ...]

    @property
    def num_rows(self) -> int:
        return sum(piece.rows for piece in self.pieces)


class Checkpoint:
    """A folder of safetensors files with a config, or one such file with its config beside it.

    config: the content of config.json. tensors: every tensor's name and the file that holds it, headers unread.
    config_path: another place for config.json.
    Raises: CheckpointError, naming the file, for whatever is missing, damaged or outside the folder.
    """

    def __init__(self, path: str | os.PathLike, config_path: str | os.PathLike | None = None) -> None:
        self.path = Path(path)
        self.folder = self.path if self.path.is_dir() else self.path.parent
        self.config = read_json(Path(config_path) if config_path else self.folder / CONFIG)
        self.tensors = self._weight_map()
        self._headers: dict[Path, dict[str, Entry]] = {}

    def matching(self, pattern: re.Pattern) -> dict[str, re.Match]:
        """Tensor names that `pattern` matches whole, with the match."""
        return {name: match for name in self.tensors if (match := pattern.fullmatch(name))}

    def entry(self, name: str) -> tuple[Path, Entry]:
        """The file and the place of a tensor. Raises: CheckpointError when the index promised it in vain."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: has no tensor {name}")
        path = self.tensors[name]
        if path not in self._headers:
            self._headers[path] = read_header(path).tensors
        if name not in self._headers[path]:
            raise CheckpointError(f"{path}: has no tensor {name}, which {INDEX} says it holds")
        return path, self._headers[path][name]

    def plane(self, names: Sequence[str], dtypes: Sequence[str], width: int, rows: int) -> Plane:
        """The matrix `[rows, width]` that the tensors `names`, one below the other, make up.

        Raises: CheckpointError for another dtype, width, or number of rows in all.
        """
        found = [self.entry(name) for name in names]
        for name, (_, entry) in zip(names, found, strict=True):
            if entry.dtype not in dtypes or len(entry.shape) != 2 or entry.shape[1] != width:
                wanted = f"{' or '.join(dtypes)} [rows, {width}]"
                raise CheckpointError(f"{self.path}: {name} is {entry.dtype} {list(entry.shape)}, not {wanted}")
        if len({entry.dtype for _, entry in found}) > 1:
            raise CheckpointError(f"{self.path}: the pieces of {names[0]} differ in dtype")
        total = sum(entry.shape[0] for _, entry in found)
        if total != rows:
            what = names[0] if len(names) == 1 else f"{names[0]} and the {len(names) - 1} pieces after it"
            raise CheckpointError(f"{self.path}: {what} hold {total:,} rows, the addresses in its config make {rows:,}")
        row_bytes = width * DTYPE_BITS[found[0][1].dtype] // 8
        return Plane(row_bytes, tuple(Piece(path, entry.begin, entry.shape[0]) for path, entry in found))

    def small(self, name: str) -> tuple[Entry, bytes]:
        """A tensor of at most a mebibyte, with its bytes. Raises: CheckpointError."""
        path, entry = self.entry(name)
        if entry.end - entry.begin > LARGEST_SMALL:
            raise CheckpointError(
                f"{path}: {name} is {entry.dtype} {list(entry.shape)}, far larger than such a tensor is"
            )
        buffer = bytearray(entry.end - entry.begin)
        with Files() as files:
            files.read(path, memoryview(buffer), entry.begin)
        return entry, bytes(buffer)

    def _weight_map(self) -> dict[str, Path]:
        if not self.path.is_dir():
            return dict.fromkeys(read_header(self.path).tensors, self.path)
        if not (self.path / INDEX).is_file():
            if not (self.path / WHOLE).is_file():
                raise CheckpointError(f"{self.path}: neither {INDEX} nor {WHOLE} is in this folder")
            return dict.fromkeys(read_header(self.path / WHOLE).tensors, self.path / WHOLE)
        index = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise CheckpointError(f"{self.path / INDEX}: has no weight_map")
        return {name: self._inside(file) for name, file in index.items()}

    def _inside(self, file: Any) -> Path:
        """The path of a shard that the index names, by its spelling alone: what lies there may be a link."""
        place = PurePosixPath(file) if isinstance(file, str) else None
        if place is None or not file or place.is_absolute() or ".." in place.parts or "\\" in file or "\0" in file:
            raise CheckpointError(f"{self.path / INDEX}: {shown(file)} is no file inside this folder")
        return self.path / place


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises: CheckpointError."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes are far more than such a file has")
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing; the layout of a table is read from it") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return content


class Files:
    """Descriptors opened for reading at the first use of a path; a context manager."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def read(self, path: Path, buffer: memoryview, offset: int) -> None:
        """Fill `buffer`. Raises: CheckpointError when the file ends before or cannot be read."""
        if path not in self._open:
            self._open[path] = open_file(path)
        try:
            whole = read_exactly(self._open[path], buffer, offset)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read at byte {offset:,}: {error.strerror}") from None
        if not whole:
            raise CheckpointError(f"{path}: ends before byte {offset + len(buffer):,}, it was cut short")

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._open:
            with suppress(OSError):
                os.close(self._open.popitem()[1])


def read_rows(planes: Sequence[Plane], block_rows: int) -> Iterator[np.ndarray]:
    """All rows of a table in blocks uint8 `[n, sum of row_bytes]`, planes side by side.

    A block is lent: the next one overwrites it. Raises: CheckpointError.
    """
    row_bytes = sum(plane.row_bytes for plane in planes)
    joined_NB = np.empty((block_rows, row_bytes), np.uint8)
    parts = [joined_NB if len(planes) == 1 else np.empty((block_rows, plane.row_bytes), np.uint8) for plane in planes]
    with Files() as files:
        for first in range(0, planes[0].num_rows, block_rows):
            count = min(block_rows, planes[0].num_rows - first)
            column = 0
            for plane, part_NB in zip(planes, parts, strict=True):
                for piece, begin, rows, at in _spans(plane, first, count):
                    files.read(piece.path, memoryview(part_NB[at : at + rows]).cast("B"), begin)
                if part_NB is not joined_NB:
                    joined_NB[:count, column : column + plane.row_bytes] = part_NB[:count]
                column += plane.row_bytes
            yield joined_NB[:count]


def write_rows(planes: Sequence[Plane], blocks: Iterable[np.ndarray], descriptors: Mapping[Path, int]) -> None:
    """Take blocks `[n, sum of row_bytes]` apart and write every plane's bytes to its place. Raises OSError."""
    first = 0
    for block_NB in blocks:
        column = 0
        for plane in planes:
            part_NB = np.ascontiguousarray(block_NB[:, column : column + plane.row_bytes])
            for piece, begin, rows, at in _spans(plane, first, len(block_NB)):
                write_at(descriptors[piece.path], memoryview(part_NB[at : at + rows]).cast("B"), begin)
            column += plane.row_bytes
        first += len(block_NB)


def write_at(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Write the whole buffer at an offset. Raises OSError."""
    done = 0
    while done < len(buffer):
        done += os.pwrite(descriptor, buffer[done:], offset + done)


def _spans(plane: Plane, first: int, count: int) -> Iterator[tuple[Piece, int, int, int]]:
    """Where the rows [first, first + count) lie: (piece, byte offset, rows, place within the block)."""
    at = 0
    for piece in plane.pieces:
        begin, end = max(first, at), min(first + count, at + piece.rows)
        if begin < end:
            yield piece, piece.begin + (begin - at) * plane.row_bytes, end - begin, begin - first
        at += piece.rows


class TensorPlan(NamedTuple):
    """A tensor of a file to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def safetensors_header(plans: Sequence[TensorPlan]) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file of these tensors, in this order, and each one's absolute offset."""
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for plan in plans:
        described[plan.name] = {"dtype": plan.dtype, "shape": list(plan.shape), "data_offsets": [end, end + plan.size]}
        end += plan.size
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    offsets = {name: begin + entry["data_offsets"][0] for name, entry in described.items() if name != "__metadata__"}
    return len(text).to_bytes(8, "little") + text, offsets


def shown(value: Any) -> str:
    """A value out of a file, fit for one line."""
    text = json.dumps(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def one_line(error: BaseException) -> str:
    """An exception's text on one line; its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
