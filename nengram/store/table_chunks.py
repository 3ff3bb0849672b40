"""Checksums of a table file, by chunk: made while rows stream through, checked without reading what was never written.

A chunk of zeros has the digest zero instead of a hash. So a table that is still empty costs nothing to seal, a hole of the file system
is known to be right without being read, and a terabyte that holds a gigabyte is verified in the time of the gigabyte. The seal hashes
the digests, not the rows: it is cheap enough to be checked at every open, and a chunk can be changed in place at the price of hashing
that chunk and 32 bytes per chunk of the file.

Memory is one buffer per thread, whatever the size of chunk or file.
"""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from nengram.store.safetensors_header import read_exactly
from nengram.store.table_layout import DIGEST_BYTES, Layout

ZEROS = bytes(1 << 20)
DIGESTS_AT_ONCE = 8192
CHUNKS_AT_ONCE = 64  # per thread, between two reports of progress
THREADS = min(4, os.cpu_count() or 1)
SEEK_DATA, SEEK_HOLE = getattr(os, "SEEK_DATA", None), getattr(os, "SEEK_HOLE", None)

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class ChunkHasher:
    """Digests of a stream of bytes, chunk by chunk, and the seal over them.

    put: called with a chunk's number and its digest when that chunk is complete and not all zeros.
    """

    def __init__(self, header: bytes, chunk_bytes: int, put: Callable[[int, bytes], None]) -> None:
        self._chunk_bytes, self._put = chunk_bytes, put
        self._seal = hashlib.sha256(header)
        self._position = 0
        self._hash = None  # of the current chunk; None while it holds zeros only

    def room(self) -> int:
        """Bytes until the current chunk is complete."""
        return self._chunk_bytes - self._position % self._chunk_bytes

    def add(self, piece: np.ndarray) -> bool:
        """Take the next bytes, at most `room()` of them; False when they are zeros that may stay a hole."""
        is_hole = self._hash is None and not (piece[:64].any() or piece.any())
        if not is_hole:
            self._begin().update(piece)
        self._advance(len(piece))
        return not is_hole

    def add_zeros(self, count: int) -> None:
        """Take `count` zero bytes, as fast as a hole deserves."""
        while count:
            piece = min(count, self.room())
            if self._hash is None and piece == self._chunk_bytes:
                chunks = count // self._chunk_bytes
                _hash_zeros(self._seal, chunks * DIGEST_BYTES)
                self._position += chunks * self._chunk_bytes
                count -= chunks * self._chunk_bytes
                continue
            if self._hash is not None:
                _hash_zeros(self._hash, piece)
            self._advance(piece)
            count -= piece

    def seal(self) -> bytes:
        """Complete the last chunk; the seal."""
        if self._position % self._chunk_bytes:
            self._complete()
        return self._seal.digest()

    def _begin(self) -> "hashlib._Hash":
        if self._hash is None:
            self._hash = hashlib.sha256()
            _hash_zeros(self._hash, self._position % self._chunk_bytes)
        return self._hash

    def _advance(self, count: int) -> None:
        self._position += count
        if self._position % self._chunk_bytes == 0:
            self._complete()

    def _complete(self) -> None:
        if self._hash is None:
            self._seal.update(bytes(DIGEST_BYTES))
            return
        digest = self._hash.digest()
        self._seal.update(digest)
        self._put((self._position - 1) // self._chunk_bytes, digest)
        self._hash = None


def recomputed_seal(descriptor: int, layout: Layout) -> bytes | None:
    """The seal that a file's header and digests ask for; None when the file has become shorter. Raises OSError."""
    seal = hashlib.sha256()
    buffer = memoryview(bytearray(min(len(ZEROS), layout.seal_offset)))
    for begin, end in ((0, layout.rows_offset), (layout.digests_offset, layout.seal_offset)):
        for offset in range(begin, end, len(buffer)):
            piece = buffer[: min(len(buffer), end - offset)]
            if not read_exactly(descriptor, piece, offset):
                return None
            seal.update(piece)
    return seal.digest()


def first_bad_chunk(
    descriptor: int, layout: Layout, chunks: range, progress: Progress = lambda done, total: None
) -> int | None:
    """The first of `chunks` whose bytes are not those its digest was made of, or None. Raises OSError."""
    total = chunks.stop - chunks.start
    with ThreadPoolExecutor(THREADS) as pool:
        for block in _blocks(chunks, DIGESTS_AT_ONCE):
            digests = _read_digests(descriptor, layout, block)
            if digests is None:
                return block.start
            due = np.flatnonzero(digests.any(axis=1) | _allocated(descriptor, layout, block))
            for begin in range(0, len(due), CHUNKS_AT_ONCE * THREADS):
                batch = due[begin : begin + CHUNKS_AT_ONCE * THREADS]
                shares = [batch[thread::THREADS] for thread in range(min(THREADS, len(batch)))]
                check = partial(_first_bad_share, descriptor, layout, block.start, digests)
                found = [check(shares[0])] if len(shares) == 1 else list(pool.map(check, shares))
                bad = [chunk for chunk in found if chunk is not None]
                if bad:
                    return min(bad)
                done = block.start + int(batch[-1]) + 1 - chunks.start
                progress(done * layout.chunk_bytes, total * layout.chunk_bytes)
    progress(total * layout.chunk_bytes, total * layout.chunk_bytes)
    return None


def written_bytes(descriptor: int, layout: Layout) -> int:
    """Bytes of rows that were ever written: in chunks that have a digest, and not in a hole. Raises OSError."""
    written = 0
    rows = layout.rows_offset, layout.rows_end
    for begin, end in data_extents(descriptor, *rows):
        first = (begin - layout.rows_offset) // layout.chunk_bytes
        last = -(-(end - layout.rows_offset) // layout.chunk_bytes)
        for block in _blocks(range(first, last), DIGESTS_AT_ONCE):
            digests = _read_digests(descriptor, layout, block)
            for chunk in [] if digests is None else np.flatnonzero(digests.any(axis=1)):
                chunk_begin = layout.rows_offset + (block.start + int(chunk)) * layout.chunk_bytes
                written += min(end, chunk_begin + layout.chunk_bytes) - max(begin, chunk_begin)
    return written


def data_extents(descriptor: int, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of [begin, end) that are not holes; all of it where the file system does not tell."""
    while begin < end:
        try:
            data = os.lseek(descriptor, begin, SEEK_DATA) if SEEK_DATA is not None else begin
            hole = os.lseek(descriptor, data, SEEK_HOLE) if SEEK_HOLE is not None else end
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: nothing but a hole up to the file's end
                yield begin, end
            return
        if data < end:
            yield data, min(hole, end)
        begin = hole


def _first_bad_share(descriptor: int, layout: Layout, first: int, digests: np.ndarray, share: np.ndarray) -> int | None:
    """The first bad chunk of those that stand at `share` of `digests`, which begin with chunk `first`."""
    buffer = memoryview(bytearray(min(len(ZEROS), layout.chunk_bytes)))
    for place in share.tolist():
        if not _is_right(descriptor, layout, first + place, digests[place].tobytes(), buffer):
            return first + place
    return None


def _is_right(descriptor: int, layout: Layout, chunk: int, digest: bytes, buffer: memoryview) -> bool:
    begin = layout.rows_offset + chunk * layout.chunk_bytes
    end = min(begin + layout.chunk_bytes, layout.digests_offset)
    hash, is_zero = hashlib.sha256(), not any(digest)
    for offset in range(begin, end, len(buffer)):
        piece = buffer[: min(len(buffer), end - offset)]
        if not read_exactly(descriptor, piece, offset):
            return False
        if not is_zero:
            hash.update(piece)
        elif np.frombuffer(piece, np.uint8).any():
            return False
    return is_zero or hash.digest() == digest


def _allocated(descriptor: int, layout: Layout, chunks: range) -> np.ndarray:
    """Whether each chunk has any byte outside a hole, bool `[chunks]`."""
    allocated = np.zeros(len(chunks), bool)
    begin = layout.rows_offset + chunks.start * layout.chunk_bytes
    end = min(begin + len(chunks) * layout.chunk_bytes, layout.digests_offset)
    for data, hole in data_extents(descriptor, begin, end):
        allocated[(data - begin) // layout.chunk_bytes : -(-(hole - begin) // layout.chunk_bytes)] = True
    return allocated


def _read_digests(descriptor: int, layout: Layout, chunks: range) -> np.ndarray | None:
    """uint8 `[chunks, 32]`; None when the file has become shorter."""
    digests = np.empty((len(chunks), DIGEST_BYTES), np.uint8)
    offset = layout.digests_offset + chunks.start * DIGEST_BYTES
    return digests if read_exactly(descriptor, memoryview(digests).cast("B"), offset) else None


def _blocks(whole: range, size: int) -> Iterator[range]:
    for begin in range(whole.start, whole.stop, size):
        yield range(begin, min(begin + size, whole.stop))


def _hash_zeros(hash: "hashlib._Hash", count: int) -> None:
    for begin in range(0, count, len(ZEROS)):
        hash.update(memoryview(ZEROS)[: min(len(ZEROS), count - begin)])
