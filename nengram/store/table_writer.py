"""Rows to disk, in order, once through: hashed on the way, in memory that does not depend on the table.

Hashing is the slowest step (about 1 GB/s and core), so it runs behind the caller: `write` copies a block into one of a few buffers and
returns, a helper thread hashes and writes it while the caller reads or encodes the next. Chunks of zeros are not written at all; the
file is as long as its rows from the beginning and simply has a hole there.

The file stands at its place, whole and synced, when the `with` block ends well, and not at all otherwise.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch

from nengram.errors import CheckpointError, StoreError
from nengram.store.codecs import Codec
from nengram.store.table_chunks import ChunkHasher, Progress
from nengram.store.table_index import Shard, shard_name, write_index
from nengram.store.table_layout import CHUNK_BYTES, DIGEST_BYTES, plan_layout
from nengram.store.table_place import Claim, refusals
from nengram.store.table_reader import is_by_row

BUFFER_BYTES = 4 << 20
BUFFERS = 3


class TableWriter:
    """Writes one table file, rows in order; a context manager.

        with TableWriter(path, codec, table_rows, metadata) as writer:
            for bytes_NB in blocks:
                writer.write(bytes_NB)

    metadata: strings of the caller's own. first_row, num_rows: for a file that holds only some rows of a table.
    extras: tensors to stand beside the rows, written when the block ends; one on the meta device stands for zeros, and
        is a hole. `seal` (hex) is there after the block.
    shown_as: what errors call the file.
    Raises: StoreError for numbers that fit no table; CheckpointError when another writer is at work, the disk refuses, or the block
    ends before all rows were written. What stood at `path` is then as it was.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        codec: Codec,
        table_rows: int,
        metadata: Mapping[str, str],
        *,
        first_row: int = 0,
        num_rows: int | None = None,
        extras: Mapping[str, torch.Tensor] | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        shown_as: object = None,
    ) -> None:
        self.path, self._shown_as = Path(path), shown_as or path
        self.layout, header = plan_layout(
            codec, table_rows, metadata, first_row=first_row, num_rows=num_rows, extras=extras, chunk_bytes=chunk_bytes
        )
        self.seal = ""
        self.rows_written = 0
        self._header, self._extras = header, dict(extras or {})
        self._hasher = ChunkHasher(header, chunk_bytes, self._put_digest)
        self._offset = self.layout.rows_offset
        self._pending: deque[Future] = deque()
        self._buffers: list[np.ndarray] = []

    def write(self, bytes_NB: np.ndarray) -> None:
        """The next rows: uint8 `[n, row_bytes]`; the array is the caller's again at once."""
        row_bytes = self.layout.codec.row_bytes
        if bytes_NB.dtype != np.uint8 or bytes_NB.ndim != 2 or bytes_NB.shape[1] != row_bytes:
            raise StoreError(f"rows are uint8 [n, {row_bytes}], not {bytes_NB.dtype} {list(bytes_NB.shape)}")
        self._count(len(bytes_NB))
        self._stream(np.ascontiguousarray(bytes_NB).reshape(-1))

    def write_zeros(self, rows: int) -> None:
        """The next rows are zeros: they take no time and no space."""
        self._count(rows)
        self._run(partial(self._take_zeros, rows * self.layout.codec.row_bytes))

    def __enter__(self) -> Self:
        self._claim = Claim(self.path)
        self._pool = ThreadPoolExecutor(1)
        try:
            with refusals(self._shown_as):
                os.truncate(self._claim.descriptor, self.layout.file_bytes)
                self._put(memoryview(self._header), 0)
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            self._finish()
        except BaseException:
            self._discard()
            raise

    def _finish(self) -> None:
        if self.rows_written != self.layout.num_rows:
            raise CheckpointError(
                f"{self._shown_as}: only {self.rows_written:,} of {self.layout.num_rows:,} rows came; nothing was written"
            )
        end = self.layout.rows_end
        for name, tensor in self._extras.items():
            entry = self.layout.extras[name]
            self._run(partial(self._take_zeros, entry.begin - end))
            if tensor.is_meta:
                self._run(partial(self._take_zeros, entry.end - entry.begin))
            else:
                self._stream(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy())
            end = entry.end
        self._run(partial(self._take_zeros, self.layout.digests_offset - end))
        self._wait(0)
        with refusals(self._shown_as):
            seal = self._hasher.seal()
            self._put(memoryview(seal), self.layout.seal_offset)
            os.fsync(self._claim.descriptor)
            self._claim.publish()
        self._pool.shutdown()
        self.seal = seal.hex()

    def _discard(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._claim.discard()

    def _count(self, rows: int) -> None:
        if rows < 0 or self.rows_written + rows > self.layout.num_rows:
            raise StoreError(
                f"{self._shown_as}: {self.rows_written + rows:,} rows for a file of {self.layout.num_rows:,}"
            )
        self.rows_written += rows

    def _stream(self, bytes_N: np.ndarray) -> None:
        """Hand bytes to the helper thread through buffers of our own."""
        for begin in range(0, len(bytes_N), BUFFER_BYTES):
            piece = bytes_N[begin : begin + BUFFER_BYTES]
            self._wait(BUFFERS - 1)
            buffer = self._buffers.pop() if self._buffers else np.empty(BUFFER_BYTES, np.uint8)
            buffer[: len(piece)] = piece
            self._run(partial(self._take, buffer, len(piece)))

    def _run(self, job: Callable[[], None]) -> None:
        self._wait(BUFFERS)
        self._pending.append(self._pool.submit(job))

    def _wait(self, left: int) -> None:
        """Wait until at most `left` jobs are under way; what failed in one is raised here."""
        with refusals(self._shown_as):
            while len(self._pending) > left:
                self._pending.popleft().result()

    def _take(self, buffer: np.ndarray, size: int) -> None:
        begin = 0
        while begin < size:
            piece = buffer[begin : min(size, begin + self._hasher.room())]
            if self._hasher.add(piece):
                self._put(memoryview(piece), self._offset)
            self._offset += len(piece)
            begin += len(piece)
        self._buffers.append(buffer)

    def _take_zeros(self, count: int) -> None:
        self._hasher.add_zeros(count)
        self._offset += count

    def _put_digest(self, chunk: int, digest: bytes) -> None:
        self._put(memoryview(digest), self.layout.digests_offset + chunk * DIGEST_BYTES)

    def _put(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._claim.descriptor, data[done:], offset + done)


def create_zero_table(
    path: str | os.PathLike,
    codec: Codec,
    table_rows: int,
    metadata: Mapping[str, str],
    *,
    extras: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """A table of zeros: a sparse file of any size, at once. extras and Raises: as TableWriter."""
    with TableWriter(path, codec, table_rows, metadata, extras=extras) as writer:
        writer.write_zeros(table_rows)


def write_table(
    path: str | os.PathLike,
    codec: Codec,
    table_rows: int,
    metadata: Mapping[str, str],
    blocks: Iterable[np.ndarray],
    *,
    shards: int = 1,
    extras: Mapping[str, torch.Tensor] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Progress | None = None,
) -> str:
    """A whole table from blocks of rows in order, as one file or, with `shards` above 1, as a folder of files of like size.

    blocks: uint8 `[n, row_bytes]` each, any n. progress: `(bytes_done, bytes_in_all)` of rows.
    Returns the table's digest (hex). Raises: as TableWriter; whatever `blocks` raises is passed on. Nothing is then changed.
    """
    if not 1 <= shards <= table_rows:
        raise StoreError(f"a table of {table_rows:,} rows can be 1 to {table_rows:,} shards, not {shards}")
    rows = _Rows(blocks, codec.row_bytes, table_rows * codec.row_bytes, progress)
    options = {"extras": extras, "chunk_bytes": chunk_bytes}
    if shards > 1:
        return _write_shards(path, codec, table_rows, metadata, rows, shards, options)
    with TableWriter(path, codec, table_rows, metadata, **options) as writer:
        rows.into(writer, table_rows)
        rows.require_end(path)
    return writer.seal


def _write_shards(path, codec: Codec, table_rows: int, metadata, rows: "_Rows", shards: int, options: dict) -> str:
    claim = Claim(path, folder=True)
    try:
        written = []
        for number in range(shards):
            first, end = table_rows * number // shards, table_rows * (number + 1) // shards
            mine = options | {
                "extras": _cut(options["extras"] or {}, first, end),
                "first_row": first,
                "num_rows": end - first,
            }
            name = shard_name(number, shards)
            with TableWriter(claim.part / name, codec, table_rows, metadata, **mine, shown_as=path) as writer:
                rows.into(writer, end - first)
            written.append(Shard(name, first, end - first, writer.seal))
        rows.require_end(path)
        with refusals(path):
            digest = write_index(claim.part, codec, table_rows, written)
            claim.publish()
    except BaseException:
        claim.discard()
        raise
    return digest


def _cut(extras: Mapping[str, torch.Tensor], first: int, end: int) -> dict[str, torch.Tensor]:
    return {name: tensor[first:end] if is_by_row(name) else tensor for name, tensor in extras.items()}


class _Rows:
    """Blocks as they come, cut to what each file takes."""

    def __init__(self, blocks: Iterable[np.ndarray], row_bytes: int, total: int, progress: Progress | None) -> None:
        self._blocks, self._row_bytes, self._total, self._progress = iter(blocks), row_bytes, total, progress
        self._rest = np.empty((0, row_bytes), np.uint8)
        self._done = 0

    def into(self, writer: TableWriter, count: int) -> None:
        while count:
            if not len(self._rest):
                self._rest = next(self._blocks, None)
                if self._rest is None:
                    self._rest = np.empty((0, self._row_bytes), np.uint8)
                    return
            piece, self._rest = self._rest[:count], self._rest[count:]
            writer.write(piece)
            count -= len(piece)
            self._done += piece.nbytes
            if self._progress:
                self._progress(self._done, self._total)

    def require_end(self, path: object) -> None:
        if len(self._rest) or any(len(block) for block in self._blocks):
            raise StoreError(f"{path}: more rows came than the table has")
