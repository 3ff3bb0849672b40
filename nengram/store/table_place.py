"""One writer at a time, beside the place, and then into it at once: how a table of any size appears whole or not at all.

A table is written as `.<name>.part` next to where it shall stand. The name is fixed and the part is locked (flock): a second writer is
refused while the first lives, and what a killed one left is taken over by the next instead of filling the disk under a new random name
each time. `nengram.files.atomic_path`, for small files, does without the lock.

The last step is one rename. Where a folder takes part (a sharded table) the two places are exchanged in one system call; where the
system has none, two renames, between which the old table lies at `.<name>.old`, where `find` looks.
"""

import ctypes
import errno
import fcntl
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nengram.errors import CheckpointError
from nengram.files import sync_folder
from nengram.store.table_index import table_files

ATTEMPTS = 100  # to lock a part that others go on renaming away
AT_FDCWD = -100 if sys.platform == "linux" else -2
RENAME_EXCHANGE = 2  # RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS alike


class Claim:
    """The right to write `path`: an open, locked, empty `part` (a file, or a folder) until `publish` or `discard`."""

    def __init__(self, path: str | os.PathLike, folder: bool = False) -> None:
        self.path = Path(os.path.abspath(path))
        if not self.path.name:
            raise CheckpointError(f"{path}: not a place for a table; give the path of a file or folder")
        self.part = self.path.with_name(f".{self.path.name}.part")
        self._is_folder = folder
        self._target: int | None = None
        with refusals(path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._require_replaceable()
            self.descriptor = self._locked()
            self._empty()

    def publish(self) -> None:
        """Put the part, whose files the caller has synced, in the place of whatever stands at `path`. Raises OSError."""
        try:
            if self._is_folder:
                sync_folder(self.part)
            if self._is_folder or self.path.is_dir():
                self._swap()
            else:
                os.replace(self.part, self.path)
            sync_folder(self.path.parent)
            self._remove_replaced()
        finally:
            self._unlock()

    def discard(self) -> None:
        """Remove the part; `path` stays as it was."""
        with suppress(OSError):
            remove(self.part)
        self._unlock()

    def _require_replaceable(self) -> None:
        if self.path.is_symlink() or not self.path.is_dir():
            return
        foreign = sorted({entry.name for entry in self.path.iterdir()} - table_files(self.path))
        if foreign:
            raise CheckpointError(
                f"{self.path}: a folder that holds something else ({foreign[0]}) would be replaced; choose another path"
            )

    def _locked(self) -> int:
        for _ in range(ATTEMPTS):
            descriptor = self._open()
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_still_part(descriptor):
                    if stat.S_ISDIR(os.fstat(descriptor).st_mode) == self._is_folder:
                        return descriptor
                    remove(self.part)  # left by a writer of the other kind
            except BlockingIOError:
                os.close(descriptor)
                break
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        raise CheckpointError(f"{self.path}: another process is writing it; wait until that one ends")

    def _open(self) -> int:
        shut = os.O_CLOEXEC | os.O_NOFOLLOW
        if self._is_folder:
            with suppress(FileExistsError):
                self.part.mkdir()
        elif not self.part.is_dir():
            return os.open(self.part, os.O_RDWR | os.O_CREAT | shut, 0o666)
        return os.open(self.part, os.O_RDONLY | os.O_NONBLOCK | shut)

    def _is_still_part(self, descriptor: int) -> bool:
        """Whether nobody renamed the part away between opening and locking it."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(descriptor), os.lstat(self.part))
        return False

    def _empty(self) -> None:
        if self._is_folder:
            for entry in self.part.iterdir():
                remove(entry)
        else:
            os.ftruncate(self.descriptor, 0)

    def _swap(self) -> None:
        if not os.path.lexists(self.path):
            os.rename(self.part, self.path)
            return
        self._target = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)  # locked, for soon it will be the part
        fcntl.flock(self._target, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not exchange(self.part, self.path):
            old = old_place(self.path)
            remove(old)
            os.rename(self.path, old)
            os.rename(self.part, self.path)

    def _remove_replaced(self) -> None:
        for place in (self.part, old_place(self.path)):
            with suppress(OSError):
                remove(place)

    def _unlock(self) -> None:
        for descriptor in {self.descriptor, self._target} - {None}:
            os.close(descriptor)
        self.descriptor = self._target = None


def find(path: str | os.PathLike) -> Path:
    """Where the table of `path` lies: there, or where a crash between two renames left it."""
    path, old = Path(path), old_place(path)
    return old if not os.path.lexists(path) and os.path.lexists(old) else path


def old_place(path: str | os.PathLike) -> Path:
    """Where the table that stood at `path` lies between two renames."""
    return Path(path).with_name(f".{Path(path).name}.old")


def remove(path: Path) -> None:
    """Remove a file or folder, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def exchange(one: Path, other: Path) -> bool:
    """Swap two places in one step; False where the system or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        rename = libc.renameat2 if sys.platform == "linux" else libc.renameatx_np
    except AttributeError:
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


@contextmanager
def refusals(path: object) -> Iterator[None]:
    """What the system refuses inside becomes one line that says what is left: `path` as it was. Raises CheckpointError."""
    try:
        yield
    except OSError as error:
        elsewhere, room = "choose a place that you may write to", "make room and run it again"
        advice = {errno.ENOSPC: room, errno.EDQUOT: room, errno.EFBIG: "write it in more shards"} | dict.fromkeys(
            (errno.EACCES, errno.EPERM, errno.EROFS), elsewhere
        )
        todo = advice.get(error.errno, "mend that and run it again")
        reason = error.strerror or str(error)
        raise CheckpointError(f"{path}: cannot be written: {reason}; nothing there was changed, {todo}") from error
