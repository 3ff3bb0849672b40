"""How anything reaches the disk: write beside, fsync, rename. A reader sees the old file or the new one, never half of either.

Digests are printed as proquints (five-letter syllables, 16 bits each; Wilkerson, arXiv 0901.4016), so that two people can compare
them by eye and over the phone; the whole hex digest is what the code compares.
"""

import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CONSONANTS, VOWELS = "bdfghjklmnprstvz", "aiou"


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed over `path`, on failure removed.

    Raises: OSError as the system gives it (no space, no permission), and for a device or pipe, which a rename would replace by a
    file; `path` is then as it was.
    """
    path = Path(os.path.realpath(path))  # what a link points to is written, the link stays
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EEXIST, "is no regular file and cannot be replaced by one; name another", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        sync_file(beside)
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
    sync_folder(path.parent)


def sync_file(path: str | os.PathLike) -> None:
    """Bring a finished file to the disk, readable by whom new files are: some writers keep theirs to their owner. Raises OSError."""
    os.chmod(path, 0o666 & ~_umask())
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_atomic(path: str | os.PathLike, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path`, whole or not at all. Raises OSError."""
    with atomic_path(path) as beside:
        beside.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def held(folder: str | os.PathLike) -> Iterator[None]:
    """Hold a folder alone, waiting for whoever holds it now; a process that ends, however it ends, lets go. Raises OSError."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of bytes in memory."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file, read in pieces. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def word_code(hex_digest: str, words: int = 3) -> str:
    """The first 16 x `words` bits of a digest as proquints, e.g. `lusab-babad-gutih`."""
    halves = (int(hex_digest[4 * i : 4 * i + 4], 16) for i in range(words))
    return "-".join(_proquint(half) for half in halves)


def _proquint(bits_16: int) -> str:
    return "".join(
        (VOWELS if is_vowel else CONSONANTS)[(bits_16 >> shift) & (3 if is_vowel else 15)]
        for shift, is_vowel in ((12, False), (10, True), (6, False), (4, True), (0, False))
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    with suppress(OSError):  # some file systems cannot sync a folder; the rename itself has happened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
