"""A released table as a store, read where it lies: no copy of 95 GiB before the first token.

A released checkpoint keeps a table as plain matrices in safetensors files, so a row is at a place that its header tells,
and the mapped store reads it as it reads a table file of ours. Qwen cuts its matrix into hundreds of pieces; DeepSeek
keeps values and scales in two matrices, so that a row is two reads. What a conversion (`nengram table convert`) adds
are checksums, one read a row, and a file that says its own addresses.
"""

import bisect
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nengram.address import AddressSpec
from nengram.errors import AddressError, CheckpointError
from nengram.memory.checkpoint_files import CONFIG, Checkpoint, Plane, read_rows
from nengram.memory.layout import Found, Layout
from nengram.memory.layouts import detect
from nengram.memory.table import AT_ONCE, Table, check_tier, filled, hot_name, hot_set
from nengram.store import HotSet, MappedStore, TieredStore
from nengram.store.codecs import Codec
from nengram.store.page_reader import PageReader, Reading
from nengram.store.safetensors_header import open_file, read_exactly

THREADS = 4


def open_released(
    path: str | os.PathLike,
    layer_id: int,
    tier: str = "mapped",
    *,
    device: str | torch.device = "cpu",
    hot: HotSet | str | os.PathLike | None = None,
    threads: int = THREADS,
    scale: float | None = None,
    pad_cid: int | None = None,
    config: str | os.PathLike | None = None,
) -> Table:
    """The table of one memory layer of a released checkpoint as a store of any tier, with its addresses.

    path: a folder, or a single safetensors file, as `import_checkpoint` takes it; so are scale, pad_cid and config.
    tier, device, hot, threads: as `open_store`. "mapped" and "tiered" read rows where they lie; nothing was ever
    checksummed there, so a damaged byte is read as it is.
    Raises: CheckpointError, AddressError, naming file, field or tensor; StoreError for a tier or hot set.
    """
    check_tier(tier, hot)
    checkpoint = Checkpoint(path, config)
    layout = detect(checkpoint)
    spec = spec_of(checkpoint, layout, pad_cid)
    if layer_id not in spec.layer_ids:
        raise CheckpointError(f"{path}: there is no memory layer {layer_id} in it, only {list(spec.layer_ids)}")
    found = layout.find(checkpoint, spec, layer_id, scale)
    if found is None:
        raise CheckpointError(f"{path}: has no tensor of memory layer {layer_id}, which its config lists")
    if tier in ("resident", "host"):
        blocks = read_rows(found.planes, max(1, AT_ONCE // found.codec.row_bytes))
        return Table(filled(blocks, found.planes[0].num_rows, found.codec, tier, device), spec, layer_id)
    below = _mapped(checkpoint.path, found, device, threads)
    if tier == "mapped":
        return Table(below, spec, layer_id)
    try:
        return Table(TieredStore(below, hot_set(hot, hot_name(spec, layer_id))), spec, layer_id)
    except BaseException:
        below.close()
        raise


def spec_of(checkpoint: Checkpoint, layout: Layout, pad_cid: int | None = None) -> AddressSpec:
    """The addresses that a checkpoint's config describes. Raises: CheckpointError, naming the file and the field."""
    try:
        return layout.spec_of(checkpoint.config, pad_cid)
    except (AddressError, CheckpointError) as error:
        raise CheckpointError(f"{checkpoint.folder / CONFIG}: {error}") from None


@dataclass(frozen=True)
class PieceFile:
    """Consecutive rows inside a file, as `PageReader` reads them: from byte `rows_offset` on."""

    path: Path
    fd: int
    rows_offset: int
    num_rows: int


class PlaneReader:
    """One matrix and its pieces. Closing it closes the descriptors, one a file."""

    def __init__(self, path: Path, plane: Plane, codec: Codec) -> None:
        self.path, self.codec, self.num_rows, self._row_bytes = path, codec, plane.num_rows, plane.row_bytes
        self._fds: dict[Path, int] = {}
        self.files: list[PieceFile] = []
        try:
            for piece in plane.pieces:
                if piece.path not in self._fds:
                    self._fds[piece.path] = open_file(piece.path)
                self.files.append(PieceFile(piece.path, self._fds[piece.path], piece.begin, piece.rows))
        except BaseException:
            self.close()
            raise
        self._firsts = [0, *np.cumsum([piece.rows for piece in plane.pieces]).tolist()]

    def read_rows(self, first: int, count: int) -> np.ndarray:
        """Bytes of rows, uint8 `[count, row_bytes]` of this matrix. Raises: CheckpointError when they are not there."""
        bytes_NB = np.empty((count, self._row_bytes), np.uint8)
        for at, row in enumerate(range(first, first + count)):
            number = bisect.bisect_right(self._firsts, row) - 1
            file = self.files[number]
            begin = file.rows_offset + (row - self._firsts[number]) * self._row_bytes
            if not read_exactly(file.fd, memoryview(bytes_NB[at]), begin):
                raise CheckpointError(f"{file.path}: ends before byte {begin + self._row_bytes:,}, it was cut short")
        return bytes_NB

    def close(self) -> None:
        """Give the descriptors back; a second call does nothing."""
        while self._fds:
            os.close(self._fds.popitem()[1])


class SideBySide:
    """Requests for rows whose bytes lie in several matrices: one request to each, joined when they are waited for."""

    tells_cached = False  # a row is in memory only if all its parts are

    def __init__(self, parts: Sequence[PageReader], widths: Sequence[int]) -> None:
        self._parts, self._ends = parts, np.cumsum(widths).tolist()

    def begin(self, rows_U: np.ndarray, out_UB: np.ndarray) -> "JoinedReading":
        """Start reading the parts of `rows_U`. Raises: StoreError, as `PageReader.begin`."""
        begun: list[tuple[Reading, np.ndarray, int]] = []
        try:
            for part, first, end in zip(self._parts, [0, *self._ends], self._ends, strict=False):
                bytes_UB = np.empty((rows_U.size, end - first), np.uint8)
                begun.append((part.begin(rows_U, bytes_UB), bytes_UB, first))
        except BaseException:
            for reading, _, _ in begun:
                reading.drain()
            raise
        return JoinedReading(begun, out_UB)

    def close(self) -> None:
        """Close every part."""
        for part in self._parts:
            part.close()


class JoinedReading:
    """One request under way, of several parts."""

    def __init__(self, begun: list[tuple[Reading, np.ndarray, int]], out_UB: np.ndarray) -> None:
        self._begun, self._out_UB = begun, out_UB

    def wait(self) -> None:
        """Until every part is there, and in its columns. Raises: StoreError."""
        for reading, bytes_UB, first in self._begun:
            reading.wait()
            self._out_UB[:, first : first + bytes_UB.shape[1]] = bytes_UB

    def drain(self) -> None:
        """Until nobody writes any more."""
        for reading, _, _ in self._begun:
            reading.drain()

    def missed(self) -> np.ndarray:
        """Places of the rows of which some part had to be fetched, ascending."""
        return np.unique(np.concatenate([reading.missed() for reading, _, _ in self._begun]))


def _mapped(path: Path, found: Found, device: str | torch.device, threads: int) -> MappedStore:
    with ExitStack() as opened:
        parts = []
        for plane in found.planes:
            reader = PlaneReader(path, plane, found.codec)
            opened.callback(reader.close)
            parts.append(PageReader(reader, threads=threads))
        widths = [plane.row_bytes for plane in found.planes]
        pages = parts[0] if len(parts) == 1 else SideBySide(parts, widths)
        opened.pop_all()
    return MappedStore.over(parts[0].reader, pages, device=device)
