"""Tables that were written before there was a table format: plain safetensors, one SHA-256 over all tensor bytes.

They are read by rows like any other table, so whatever takes a table takes them too; nothing writes them. The digest
covers the whole file and can only be checked as a whole.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np
import torch

from nengram.errors import CheckpointError, StoreError
from nengram.store.codecs import CODECS, Codec, make_codec
from nengram.store.safetensors_header import Entry, Header, open_file, read_exactly, read_header
from nengram.store.table_layout import TORCH_DTYPES

FORMAT = "nengram-table-1"
BLOCK_BYTES = 4 << 20
CODEC_OF = {kind.tensor_dtype: name for name, kind in CODECS.items() if kind.plain}


class OldTable:
    """A table file of format 1, with the reading side of `TableReader`. It is always one whole file.

    digest: hex, of all tensor bytes, as the file says it; `verify` recomputes it.
    """

    def __init__(self, path: Path, fd: int, header: Header) -> None:
        self.path, self.fd, self._header = path, fd, header
        weight = header.tensors.get("weight")
        if weight is None or len(weight.shape) != 2 or 0 in weight.shape:
            raise CheckpointError(f"{path} holds no table: a two-dimensional tensor named weight is needed")
        if weight.dtype not in CODEC_OF:
            raise CheckpointError(f"{path}: its weight is {weight.dtype}, not {', '.join(CODEC_OF)}")
        self.codec: Codec = make_codec(CODEC_OF[weight.dtype], weight.shape[1])
        self.num_rows = self.table_rows = weight.shape[0]
        self.first_row, self.rows_offset = 0, weight.begin
        self.metadata = {name: text for name, text in header.metadata.items() if name not in ("format", "sha256")}
        self.digest = header.metadata.get("sha256", "")
        self.files = [self]

    @classmethod
    def open(cls, path: str | os.PathLike) -> Self:
        """Raises: CheckpointError, naming the file."""
        fd = open_file(path)
        try:
            return cls(Path(path), fd, read_header(fd, path))
        except BaseException:
            os.close(fd)
            raise

    def read_rows(self, first: int, count: int) -> np.ndarray:
        """Bytes of rows, uint8 `[count, row_bytes]`. Raises: StoreError outside the table, CheckpointError."""
        if not 0 <= first <= first + count <= self.num_rows:
            raise StoreError(f"rows {first:,} to {first + count - 1:,} are outside a table of {self.num_rows:,} rows")
        bytes_NB = np.empty((count, self.codec.row_bytes), np.uint8)
        self._fill(bytes_NB.reshape(-1), self.rows_offset + first * self.codec.row_bytes)
        return bytes_NB

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Recompute the digest; `progress(bytes_done, bytes_in_all)`. Raises: CheckpointError."""
        digest, done = hashlib.sha256(), 0
        total = self._header.file_bytes - self._header.data_begin
        for name in sorted(self._header.tensors):
            entry = self._header.tensors[name]
            for begin in range(entry.begin, entry.end, BLOCK_BYTES):
                block_N = np.empty(min(BLOCK_BYTES, entry.end - begin), np.uint8)
                self._fill(block_N, begin)
                digest.update(block_N)
                done += len(block_N)
                if progress:
                    progress(done, total)
        if digest.hexdigest() != self.digest:
            raise CheckpointError(f"{self.path} is damaged: its bytes do not match its sha256")

    def extras(self) -> dict[str, torch.Tensor]:
        """The tensors beside the rows: `step` and optimiser state, in memory. Raises: CheckpointError."""
        return {name: self._tensor(name, entry) for name, entry in self._header.tensors.items() if name != "weight"}

    def extra_names(self) -> list[str]:
        """Names of the tensors beside the rows."""
        return [name for name in self._header.tensors if name != "weight"]

    def written_bytes(self) -> int:
        """All of it: this format knows no holes."""
        return self.num_rows * self.codec.row_bytes

    def close(self) -> None:
        """Give the descriptor back; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tensor(self, name: str, entry: Entry) -> torch.Tensor:
        if entry.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{self.path}: its {name} is {entry.dtype}, which no table has")
        bytes_N = np.empty(entry.end - entry.begin, np.uint8)
        self._fill(bytes_N, entry.begin)
        return torch.from_numpy(bytes_N).view(TORCH_DTYPES[entry.dtype]).view(entry.shape)

    def _fill(self, bytes_N: np.ndarray, offset: int) -> None:
        try:
            whole = read_exactly(self.fd, memoryview(bytes_N), offset)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}; check the disk") from None
        if not whole:
            raise CheckpointError(f"{self.path}: was cut short while it was open")
