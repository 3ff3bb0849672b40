"""The front of a safetensors file, read as what it is: bytes from a stranger.

    | 8 bytes: N, little endian | N bytes: JSON header | tensor bytes, every one claimed by exactly one tensor |

Tables are read by byte range, so their reader needs offsets, not tensors, and it needs them from files of a terabyte and from files
that somebody made to do harm. A general JSON parser would first build whatever it is told to (nested lists at thirty times their
text, integers of a million digits, the last of two equal keys) and be asked afterwards whether it was wanted. The grammar of a header
is small and flat, so this parser walks it with five patterns and builds nothing else: no recursion, no number above 19 digits, memory
within a small multiple of a header that the file must really hold. What it accepts the safetensors library accepts, and the other way
round but for headers no writer makes: space before the first brace (which the format forbids), fields nobody defined, keys that
repeat, more than 32 dimensions, metadata of null.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from typing import NamedTuple

from nengram.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the library's own limit
MAX_DIMENSIONS = 32
DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}

SPACE = r"[ \t\r\n]*"
PUNCTUATION = re.compile(rf"{SPACE}([{{}}:,]){SPACE}")
STRING = re.compile(r'"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+"')
INTEGERS = re.compile(
    rf"\[{SPACE}((?:0|[1-9][0-9]{{0,18}})(?:{SPACE},{SPACE}(?:0|[1-9][0-9]{{0,18}})){{0,{MAX_DIMENSIONS - 1}}})?{SPACE}\]"
)
BLANK = re.compile(rf"{SPACE}\Z")
METADATA = "__metadata__"
FIELDS = ("dtype", "shape", "data_offsets")


class Entry(NamedTuple):
    """One tensor: where its bytes are in the file, from `begin` to before `end`, both absolute."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """What a safetensors file says of itself. `tensors` in the order of their bytes; `data_begin` and `file_bytes` absolute."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]
    data_begin: int
    file_bytes: int


class _Refused(Exception):
    """What is wrong with a header; the caller adds the file's name."""


def read_header(source: str | os.PathLike | int, name: object = None) -> Header:
    """The header of any safetensors file.

    source: a path, or an open descriptor (which stays open), whose `name` then appears in errors.
    Raises: CheckpointError, naming the file, unless every byte of it is accounted for; nothing but the header is read.
    """
    if isinstance(source, int):
        return _read(source, name or f"file descriptor {source}")
    descriptor = open_file(source)
    try:
        return _read(descriptor, name or source)
    finally:
        os.close(descriptor)


def open_file(path: str | os.PathLike) -> int:
    """A descriptor for reading a regular file; whatever else lies there (a folder, a pipe) is refused. Raises CheckpointError."""
    try:
        # non-blocking: a pipe that nobody fills would wait for ever
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: not a file but a folder or device; give the path of a safetensors file")
    return descriptor


def read_exactly(descriptor: int, buffer: memoryview, offset: int) -> bool:
    """Fill `buffer` from `offset` on; False when the file ends before. Raises OSError."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            return False
        done += count
    return True


def shown(text: str) -> str:
    """A name out of a file, fit for one line of an error message."""
    return json.dumps(text if len(text) <= 60 else text[:57] + "...")


def one_line(error: Exception) -> str:
    """The text of an error that quotes a file, fit for one line."""
    text = " ".join(str(error).split())
    return "".join(letter if letter.isprintable() else "?" for letter in text[:200])


def _read(descriptor: int, name: object) -> Header:
    try:
        file_bytes = os.fstat(descriptor).st_size
        text = _header_text(descriptor, file_bytes)
        data_begin = 8 + len(text)
        tensors, metadata = _parse(text.decode("utf-8"))
        return Header(_placed(tensors, data_begin, file_bytes), metadata, data_begin, file_bytes)
    except UnicodeDecodeError as error:
        reason = f"its header is not UTF-8 at byte {8 + error.start}"
    except OSError as error:
        reason = f"its header cannot be read: {error.strerror}"
    except _Refused as error:
        reason = str(error)
    raise CheckpointError(f"{name}: not a whole safetensors file: {reason}; make or copy it again") from None


def _header_text(descriptor: int, file_bytes: int) -> bytearray:
    if file_bytes < 10:
        raise _Refused(f"{file_bytes} bytes are too few for a header")
    size = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size > file_bytes - 8:
        raise _Refused(f"a header of {size:,} bytes does not fit into {file_bytes:,}")
    if size > MAX_HEADER_BYTES:
        raise _Refused(f"a header of {size:,} bytes is beyond the {MAX_HEADER_BYTES:,} that are allowed")
    text = bytearray(size)
    if not read_exactly(descriptor, memoryview(text), 8):
        raise _Refused("it was cut short while it was read")
    return text


def _parse(text: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensors with offsets as written, and metadata."""
    if not text.startswith("{"):
        raise _Refused("its header does not begin with {")
    found: dict = {}
    members = _Members(text)
    for name in members.of_object(0, taken=found):
        found[name] = members.strings() if name == METADATA else _entry(members, name)
    if not BLANK.match(text, members.place):
        raise _Refused(f"its header goes on after its end, at character {members.place}")
    metadata = found.pop(METADATA, {})
    return found, metadata


def _entry(members: "_Members", name: str) -> Entry:
    found: dict = {}
    for field in members.of_object(members.place, taken=found):
        if field not in FIELDS:
            raise _Refused(f"tensor {shown(name)} has a field {shown(field)} that safetensors does not know")
        found[field] = members.string() if field == "dtype" else members.integers(field, name)
    if len(found) != len(FIELDS):
        missing = ", ".join(field for field in FIELDS if field not in found)
        raise _Refused(f"tensor {shown(name)} lacks {missing}")
    if len(found["data_offsets"]) != 2:
        raise _Refused(f"tensor {shown(name)} has {len(found['data_offsets'])} data_offsets, not 2")
    return Entry(found["dtype"], found["shape"], *found["data_offsets"])


class _Members:
    """A walk through the header: `place` is the next character to be read."""

    def __init__(self, text: str) -> None:
        self.text, self.place = text, 0

    def of_object(self, place: int, taken: dict) -> Iterator[str]:
        """The keys of the object that begins at `place`; the caller reads each value into `taken` and asks for the next."""
        self.place = place
        self._mark("{")
        if self._peek() == "}":
            self._mark("}")
            return
        while True:
            key = self.string()
            if key in taken:
                raise _Refused(f"key {shown(key)} occurs twice")
            self._mark(":")
            yield key
            if self._mark(",}") == "}":
                return

    def strings(self) -> dict[str, str]:
        """An object of strings."""
        found: dict[str, str] = {}
        for key in self.of_object(self.place, taken=found):
            found[key] = self.string()
        return found

    def string(self) -> str:
        match = STRING.match(self.text, self.place)
        if not match:
            raise self._unexpected("a string")
        self.place = match.end()
        try:
            string = json.loads(match.group()) if "\\" in match.group() else match.group()[1:-1]
            string.encode("utf-8")  # an escaped half of a surrogate pair is no character
        except ValueError:
            raise _Refused(f"the string at character {match.start()} of its header is not text") from None
        return string

    def integers(self, field: str, name: str) -> tuple[int, ...]:
        match = INTEGERS.match(self.text, self.place)
        if not match:
            raise _Refused(
                f"{field} of tensor {shown(name)} is not a list of at most {MAX_DIMENSIONS} whole numbers below 10^19"
            )
        self.place = match.end()
        return tuple(int(number) for number in match.group(1).split(",")) if match.group(1) else ()

    def _peek(self) -> str:
        return self.text[self.place : self.place + 1]

    def _mark(self, wanted: str) -> str:
        match = PUNCTUATION.match(self.text, self.place)
        if not match or match.group(1) not in wanted:
            raise self._unexpected(" or ".join(wanted))
        self.place = match.end()
        return match.group(1)

    def _unexpected(self, wanted: str) -> _Refused:
        found = shown(self._peek()) if self.place < len(self.text) else "the end"
        return _Refused(f"its header has {found} at character {self.place} where {wanted} belongs")


def _placed(tensors: dict[str, Entry], data_begin: int, file_bytes: int) -> dict[str, Entry]:
    """Entries with absolute offsets in the order of their bytes; together they must cover the rest of the file, once."""
    placed: dict[str, Entry] = {}
    covered = data_begin
    for name, (dtype, shape, begin, end) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if dtype not in DTYPE_BITS:
            raise _Refused(f"tensor {shown(name)} has the dtype {shown(dtype)}, which safetensors does not know")
        bits = math.prod(shape) * DTYPE_BITS[dtype]
        if bits != 8 * (end - begin):
            raise _Refused(f"tensor {shown(name)}, {dtype} {list(shape)[:8]}, cannot be the bytes {begin} to {end}")
        if data_begin + begin != covered:
            what = "shares bytes with another" if data_begin + begin < covered else "leaves a gap before it"
            raise _Refused(f"tensor {shown(name)} {what}")
        covered = data_begin + end
        if covered > file_bytes:
            raise _Refused(f"tensor {shown(name)} ends at byte {covered:,} of a file of {file_bytes:,}")
        placed[name] = Entry(dtype, shape, data_begin + begin, covered)
    if covered != file_bytes:
        raise _Refused(f"{file_bytes - covered:,} bytes at its end belong to no tensor")
    return placed
