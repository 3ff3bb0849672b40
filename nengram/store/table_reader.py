"""A table on disk, read by rows: one file, or a folder of shards that behaves like one.

Opening reads the header and checks the seal (32 bytes per chunk); it never reads a row, so a terabyte opens as fast as a megabyte.
Reads are plain positioned reads of exactly the rows asked for. Who wants speed maps `fd` from `rows_offset` on; this reader is what
such a mapping is checked against. The descriptor is held: a table that is replaced while open goes on being read as it was.
"""

import bisect
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import numpy as np
import torch

from nengram.errors import CheckpointError, StoreError
from nengram.store.codecs import Codec
from nengram.store.safetensors_header import Entry, open_file, read_exactly, read_header
from nengram.store.table_chunks import Progress, first_bad_chunk, recomputed_seal, written_bytes
from nengram.store.table_index import read_index
from nengram.store.table_layout import OPEN_SEAL, TORCH_DTYPES, Layout, check_layout
from nengram.store.table_place import find


class TableFile:
    """One table file, open for reading: rows `first_row` to `first_row + num_rows` of a table of `table_rows`.

    `metadata` are the caller's own; `rows_offset` is the byte of its first row; `seal` stands for every byte of the file.
    """

    def __init__(self, path: Path, fd: int, layout: Layout, seal: str) -> None:
        self.path, self.fd, self.layout, self.seal = path, fd, layout, seal

    @classmethod
    def open(cls, path: str | os.PathLike) -> Self:
        """Raises: CheckpointError, naming the file, unless it is a whole table file whose header and digests fit its seal."""
        path = Path(path)
        fd = open_file(path)
        try:
            layout = check_layout(path, read_header(fd, path))
            return cls(path, fd, layout, _checked_seal(path, fd, layout))
        except BaseException:
            os.close(fd)
            raise

    @property
    def codec(self) -> Codec:
        return self.layout.codec

    @property
    def num_rows(self) -> int:
        return self.layout.num_rows

    @property
    def first_row(self) -> int:
        return self.layout.first_row

    @property
    def table_rows(self) -> int:
        return self.layout.table_rows

    @property
    def metadata(self) -> dict[str, str]:
        return dict(self.layout.metadata)

    @property
    def rows_offset(self) -> int:
        return self.layout.rows_offset

    @property
    def chunk_bytes(self) -> int:
        return self.layout.chunk_bytes

    @property
    def extra_entries(self) -> dict[str, Entry]:
        """Where the tensors beside the rows lie in the file."""
        return dict(self.layout.extras)

    def __repr__(self) -> str:
        return f"TableFile({str(self.path)!r}, {self.num_rows:,} rows from {self.first_row:,}, {self.codec!r})"

    def read_rows(self, first: int, count: int) -> np.ndarray:
        """Bytes of rows, uint8 `[count, row_bytes]`; `first` counts from this file's first row. Not checked against checksums.

        Raises: StoreError for rows outside the file, CheckpointError when it can no longer be read.
        """
        _require_rows(first, count, self.num_rows)
        bytes_NB = np.empty((count, self.codec.row_bytes), np.uint8)
        self._read_into(bytes_NB, self.rows_offset + first * self.codec.row_bytes)
        return bytes_NB

    def verify(self, progress: Progress | None = None) -> None:
        """Recompute every checksum; holes are right without being read. `progress(bytes_done, bytes_in_all)`.

        Raises: CheckpointError that names the file and the first rows that are not what was written.
        """
        self._guard(lambda: _checked_seal(self.path, self.fd, self.layout))
        self._verify_chunks(range(self.layout.chunks), progress)

    def verify_rows(self, first: int, count: int) -> None:
        """`verify` for the chunks that hold these rows (counted from this file's first row) alone."""
        _require_rows(first, count, self.num_rows)
        begin, end = first * self.codec.row_bytes, (first + count) * self.codec.row_bytes
        if count:
            self._verify_chunks(range(begin // self.chunk_bytes, -(-end // self.chunk_bytes)))

    def written_bytes(self) -> int:
        """Bytes of rows that were ever written: the rest are holes, or zeros that no one need store."""
        return self._guard(lambda: written_bytes(self.fd, self.layout))

    def extras(self) -> dict[str, torch.Tensor]:
        """The tensors beside the rows (`step`, optimiser state), in memory."""
        return {name: self._tensor(entry) for name, entry in self.layout.extras.items()}

    def close(self) -> None:
        """Give the descriptor back; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tensor(self, entry: Entry) -> torch.Tensor:
        tensor = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
        self._read_into(tensor.reshape(-1).view(torch.uint8).numpy(), entry.begin)
        return tensor

    def _read_into(self, array: np.ndarray, offset: int) -> None:
        if not self._guard(lambda: read_exactly(self.fd, memoryview(array.reshape(-1)), offset)):
            raise CheckpointError(f"{self.path}: was cut short while it was open; restore it and open it again")

    def _verify_chunks(self, chunks: range, progress: Progress | None = None) -> None:
        report = progress or (lambda done, total: None)
        bad = self._guard(lambda: first_bad_chunk(self.fd, self.layout, chunks, report))
        if bad is not None:
            raise CheckpointError(
                f"{self.path}: damaged: {self._contents(bad)} are not what was written; restore it from a copy"
            )

    def _contents(self, chunk: int) -> str:
        begin = chunk * self.chunk_bytes
        first = begin // self.codec.row_bytes
        last = -(-(begin + self.chunk_bytes) // self.codec.row_bytes)
        if first >= self.num_rows:
            return f"chunk {chunk}, tensors beside the rows,"
        if last > self.num_rows:
            return f"chunk {chunk}, rows {first:,} to {self.num_rows - 1:,} and the tensors after them,"
        return f"chunk {chunk}, rows {first:,} to {last - 1:,},"

    def _guard(self, read):
        try:
            return read()
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}; check the disk") from None


class TableReader:
    """A whole table, whichever way it is stored; rows are counted through all its files.

    `digest` (hex) stands for every byte: of a file its seal, of a folder the digest of its index.
    """

    def __init__(self, path: Path, files: list[TableFile], digest: str) -> None:
        self.path, self.files, self.digest = path, files, digest
        first, last = files[0], files[-1]
        self.codec, self.table_rows, self.metadata = first.codec, first.table_rows, first.metadata
        self.first_row, self.num_rows = first.first_row, last.first_row + last.num_rows - first.first_row
        self._borders = [file.first_row - first.first_row for file in files]

    def __repr__(self) -> str:
        return f"TableReader({str(self.path)!r}, {self.num_rows:,} rows in {len(self.files)} files, {self.codec!r})"

    def read_rows(self, first: int, count: int) -> np.ndarray:
        """Bytes of rows, uint8 `[count, row_bytes]`, across the borders of files; as `TableFile.read_rows`."""
        _require_rows(first, count, self.num_rows)
        parts = [file.read_rows(*part) for file, *part in self._parts(first, count)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty((0, self.codec.row_bytes), np.uint8)])

    def blocks(self, block_bytes: int = 4 << 20) -> Iterator[np.ndarray]:
        """All rows in order, uint8 `[n, row_bytes]` of about `block_bytes` at a time."""
        step = max(1, block_bytes // self.codec.row_bytes)
        for first in range(0, self.num_rows, step):
            yield self.read_rows(first, min(step, self.num_rows - first))

    def verify(self, progress: Progress | None = None) -> None:
        """As `TableFile.verify`, file after file."""
        sizes = [file.layout.chunks * file.chunk_bytes for file in self.files]
        for number, file in enumerate(self.files):
            before = sum(sizes[:number])
            file.verify(progress and (lambda done, _, before=before: progress(before + done, sum(sizes))))

    def verify_rows(self, first: int, count: int) -> None:
        """As `TableFile.verify_rows`, across the borders of files."""
        _require_rows(first, count, self.num_rows)
        for file, *part in self._parts(first, count):
            file.verify_rows(*part)

    def written_bytes(self) -> int:
        """As `TableFile.written_bytes`, of all files."""
        return sum(file.written_bytes() for file in self.files)

    def extras(self) -> dict[str, torch.Tensor]:
        """The tensors beside the rows: `state.*` of all files one after the other, the others of the first."""
        found = [file.extras() for file in self.files]
        return {
            name: torch.cat([extras[name] for extras in found]) if is_by_row(name) and len(found) > 1 else tensor
            for name, tensor in found[0].items()
        }

    def close(self) -> None:
        """Close every file."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _parts(self, first: int, count: int) -> Iterator[tuple[TableFile, int, int]]:
        """(file, its own first row, count) of each file that holds some of the rows."""
        number = bisect.bisect_right(self._borders, first) - 1
        while count:
            file = self.files[number]
            begin = first - self._borders[number]
            part = min(count, file.num_rows - begin)
            yield file, begin, part
            first, count, number = first + part, count - part, number + 1


def open_table(path: str | os.PathLike, *, whole: bool = True) -> TableReader:
    """A table file, or the folder of a sharded table.

    whole: refuse a file that holds only some of a table's rows (`read_rows` would count from its first row, not the table's).
    Raises: CheckpointError, naming the file, unless every file is sealed and all of them belong together.
    """
    path = find(path)
    if path.is_dir():
        return _open_folder(path)
    file = TableFile.open(path)
    if whole and file.num_rows != file.table_rows:
        file.close()
        raise CheckpointError(
            f"{path}: holds rows {file.first_row:,} to {file.first_row + file.num_rows - 1:,} of a table of "
            f"{file.table_rows:,}; open the whole table"
        )
    return TableReader(path, [file], file.seal)


def is_by_row(name: str) -> bool:
    """Whether a tensor beside the rows has one entry per row, and is cut with them."""
    return name.startswith("state.")


def _open_folder(folder: Path) -> TableReader:
    index = read_index(folder)
    with ExitStack() as stack:
        files: list[TableFile] = []
        for shard in index.shards:
            file = stack.enter_context(TableFile.open(folder / shard.file))
            found = file.codec, file.table_rows, file.first_row, file.num_rows, file.seal
            if found != (index.codec, index.table_rows, *shard[1:]):
                raise CheckpointError(
                    f"{file.path}: not the shard that the index tells of; restore it, or write the table again"
                )
            if files and (file.metadata, file.extra_entries.keys()) != (
                files[0].metadata,
                files[0].extra_entries.keys(),
            ):
                raise CheckpointError(
                    f"{file.path}: its metadata differ from those of {files[0].path.name}; write the table again"
                )
            files.append(file)
        stack.pop_all()
    return TableReader(folder, files, index.digest)


def _checked_seal(path: Path, fd: int, layout: Layout) -> str:
    stored = os.pread(fd, len(OPEN_SEAL), layout.seal_offset)
    if stored == OPEN_SEAL:
        raise CheckpointError(f"{path}: its writer did not finish; write the table again")
    if recomputed_seal(fd, layout) != stored:
        raise CheckpointError(f"{path}: damaged: header and checksums do not match its seal; restore it from a copy")
    return stored.hex()


def _require_rows(first: int, count: int, num_rows: int) -> None:
    if not 0 <= first <= first + count <= num_rows:
        raise StoreError(f"rows {first:,} to {first + count - 1:,} are outside a table of {num_rows:,} rows")
