"""Where text comes from, and which split each entry falls in.

A corpus is a stream of entries (key, source, text). An entry stands wholly in train, dev or test, by a hash
of its source and key: adding, removing or reordering other entries never moves it, and no machine, seed or
library version does either. A hashed n-gram memory rewards verbatim repetition above all, so text that stands
twice would leak from train into test; exact duplicates are dropped before splitting, the first one kept.

    "bundled"        the slice that comes with the package
    book.txt         blocks of whole paragraphs, about 2-8 kB each; key = digest of the block
    entries.jsonl    one object a line: text, and optionally key (or id; else a digest of the text) and source
    folder/          every text and .jsonl file below it; a text file is one entry (key = its path inside), or
                     is cut into blocks like book.txt when it is longer than 64 kB

Sources: a record's own; else the stem of its file; for a text file inside a folder the name of the sub-folder
directly under it, or the folder's own where there is none (a folder of a thousand files is one source).
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from nengram.config import shipped
from nengram.errors import DataError
from nengram.files import sha256_bytes

BUNDLED = "bundled"
SPLITS = ("train", "dev", "test")
RECORD_SUFFIXES = (".jsonl", ".json")
TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".org"),
    *(".py", ".c", ".h", ".cpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".rb", ".sh", ".sql", ".lua"),
)
SMALLEST_BLOCK, LARGEST_BLOCK = 2_000, 8_000  # characters: prose in context, yet a book splits 90/5/5
LONGEST_WHOLE_FILE = 64_000  # characters


class Entry(NamedTuple):
    """One article, definition, file or block: `key` names it within its `source`."""

    key: str
    source: str
    text: str


def read_corpus(where: str | os.PathLike) -> Iterator[Entry]:
    """The entries of `where` (see the top of this file) without exact duplicates, always in the same order.

    Raises DataError, at the latest when the entry in question is reached: a missing path, empty text, bytes
    that are not UTF-8, a line that is no JSON object with a text (with its number), nothing to read at all.
    """
    found = False
    for entry in distinct(_entries(where)):
        found = True
        yield entry
    if not found:
        raise DataError(f"{where}: no text in it (a folder is searched for .jsonl {' '.join(TEXT_SUFFIXES)})")


def distinct(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The entries whose exact text has not come before."""
    seen: set[bytes] = set()
    for entry in entries:
        digest = hashlib.sha256(entry.text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            yield entry


def split_of(source: str, key: str) -> str:
    """Which of train, dev and test an entry is in: 90/5/5 by 64 bits of SHA-256 of source and key."""
    bits = int.from_bytes(hashlib.sha256(f"{source}\0{key}".encode()).digest()[:8], "big")
    twentieth = bits * 20 >> 64
    return "train" if twentieth < 18 else "dev" if twentieth == 18 else "test"


def bundled_folder() -> Path:
    """The folder of the bundled slice: inside an installed package, else in a source checkout.

    Raises DataError if in neither.
    """
    folder = shipped("data") / "bundled"
    if not folder.is_dir():
        raise DataError("the bundled text is not installed; name a text file, a .jsonl file or a folder instead")
    return folder


def _entries(where: str | os.PathLike) -> Iterator[Entry]:
    path = bundled_folder() if str(where) == BUNDLED else Path(where)
    if path.is_dir():
        yield from _folder(path)
    elif not path.exists():
        raise DataError(f'{where}: no such file or folder (the text that comes along is called "{BUNDLED}")')
    elif path.suffix.lower() in RECORD_SUFFIXES:
        yield from _records(path)
    else:
        text = _text(path)
        if not text.strip():
            raise DataError(f"{where}: empty, there is no text to read")
        yield from _blocks(text, path.stem)


def _folder(folder: Path) -> Iterator[Entry]:
    for path in _files_below(folder):
        inside = path.relative_to(folder)
        if path.suffix.lower() == ".jsonl":
            yield from _records(path)
            continue
        text = _text(path)
        source = inside.parts[0] if len(inside.parts) > 1 else folder.resolve().name
        if len(text) > LONGEST_WHOLE_FILE:
            yield from _blocks(text, source)
        elif text.strip():  # empty files are ordinary in a folder of code
            yield Entry(inside.as_posix(), source, text)


def _files_below(folder: Path) -> Iterator[Path]:
    """Text and .jsonl files, hidden ones left out, links to folders not followed, sorted by path."""
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(here, name)
            if not name.startswith(".") and path.suffix.lower() in (*TEXT_SUFFIXES, ".jsonl"):
                yield path


def _text(path: Path) -> str:
    """A whole file as text, a byte-order mark dropped, line ends as newlines."""
    try:
        return _decoded(path.read_bytes(), str(path)).replace("\r\n", "\n")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def _decoded(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 (byte {error.start}); convert it, as with iconv") from None


def _records(path: Path) -> Iterator[Entry]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    place = f"{path}, line {number}"
                    yield _record(_decoded(line, place), path.stem, place)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def _record(line: str, stem: str, place: str) -> Entry:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error}); expected one object a line") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise DataError(f'{place}: expected an object with a "text", as in {{"text": "…", "key": "…"}}')
    text = record["text"]
    if not text.strip():
        raise DataError(f"{place}: the text is empty")
    key, source = record.get("key", record.get("id")), record.get("source", stem)
    if not isinstance(source, str) or not isinstance(key, str | int | None):
        raise DataError(f"{place}: key and source must be strings")
    try:
        "".join((text, source, str(key))).encode()
    except UnicodeEncodeError:
        raise DataError(f"{place}: holds half of a surrogate pair, which is not text") from None
    return Entry(_digest_key(text) if key is None else str(key), source, text)


def _blocks(text: str, source: str) -> Iterator[Entry]:
    """Paragraphs gathered until a block is long enough; one too long for a block is cut at white space."""
    block: list[str] = []
    size = 0
    for paragraph in re.split(r"\n[ \t]*\n\s*", text.strip()):
        for piece in _cut(paragraph):
            if size + len(piece) > LARGEST_BLOCK and block:
                yield _block(block, source)
                block, size = [], 0
            block.append(piece)
            size += len(piece)
            if size >= SMALLEST_BLOCK:
                yield _block(block, source)
                block, size = [], 0
    if block:
        yield _block(block, source)


def _cut(paragraph: str) -> Iterator[str]:
    while len(paragraph) > LARGEST_BLOCK:
        ends = (paragraph.rfind(white, SMALLEST_BLOCK, LARGEST_BLOCK) for white in "\n ")
        at = next((end for end in ends if end > 0), LARGEST_BLOCK)
        yield paragraph[:at]
        paragraph = paragraph[at:]
    yield paragraph


def _block(pieces: list[str], source: str) -> Entry:
    text = "\n\n".join(pieces)
    return Entry(_digest_key(text), source, text)


def _digest_key(text: str) -> str:
    return sha256_bytes(text.encode())[:16]
