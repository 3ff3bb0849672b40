"""One split as flat arrays: a run of ids, and where each document in it starts and came from.

A document is the separator followed by its text's tokens, so every word of the text has a predecessor and is
a target once. Text is encoded with special tokens read as plain text: a corpus that happens to contain
"<|doc|>" cannot forge a boundary.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from nengram.errors import DataError
from nengram.files import sha256_bytes
from nengram.text.corpus import Entry

ARRAYS = ("ids_N", "doc_starts_D", "doc_sources_D", "doc_bytes_D")
ENCODE_AT_ONCE = 1024  # entries


class Context(NamedTuple):
    """A token and its surroundings as text, for reports."""

    before: str
    token: str
    after: str


@dataclass(frozen=True, eq=False)
class Packed:
    """One split, its documents laid end to end.

    ids_N           uint16 or int32 [N], each document a separator followed by its text
    doc_starts_D    int64 [D], the position in ids_N of each document's separator
    doc_sources_D   int32 [D], index into `sources`
    doc_bytes_D     int64 [D], UTF-8 bytes of the document's text (the separator has none)
    """

    ids_N: np.ndarray
    doc_starts_D: np.ndarray
    doc_sources_D: np.ndarray
    doc_bytes_D: np.ndarray
    sources: tuple[str, ...]

    def __len__(self) -> int:
        """Tokens, separators included."""
        return len(self.ids_N)

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 over every array and the names of the sources."""
        parts = [sha256_bytes(getattr(self, name).tobytes()) for name in ARRAYS]
        return sha256_bytes(json.dumps([parts, self.sources]).encode())

    @property
    def bytes_by_source(self) -> dict[str, int]:
        """UTF-8 bytes of text per source: the denominator of bits per byte."""
        return self._by_source(self.doc_bytes_D)

    @property
    def tokens_by_source(self) -> dict[str, int]:
        """Tokens per source, separators included."""
        return self._by_source(np.diff(self.doc_starts_D, append=len(self)))

    def _by_source(self, amounts_D: np.ndarray) -> dict[str, int]:
        sums = np.bincount(self.doc_sources_D, amounts_D, minlength=len(self.sources))
        return {name: int(amount) for name, amount in zip(self.sources, sums, strict=True)}

    def document_of(self, positions: np.ndarray) -> np.ndarray:
        """Which document, 0..D-1, each position of ids_N (any shape) is in: int64. Raises DataError."""
        positions = np.asarray(positions)
        if positions.size and (positions.min() < 0 or positions.max() >= len(self)):
            found = f"{positions.min()}..{positions.max()}"
            raise DataError(f"positions {found} reach outside the split's 0..{len(self) - 1}")
        return np.searchsorted(self.doc_starts_D, positions, side="right") - 1

    def source_of(self, positions: np.ndarray) -> np.ndarray:
        """The index into `sources` of each position of ids_N (any shape). Raises DataError."""
        return self.doc_sources_D[self.document_of(positions)]

    def text_around(self, position: int, tokenizer: Tokenizer, before: int = 12, after: int = 4) -> Context:
        """The token at `position` with `before` tokens before and `after` after it, none of another document.

        Raises DataError when `position` is outside the split.
        """
        document = int(self.document_of(np.asarray([position]))[0])
        start = int(self.doc_starts_D[document])
        end = int(np.append(self.doc_starts_D, len(self))[document + 1])
        bounds = (max(start, position - before), position, position + 1, min(end, position + 1 + after))
        parts = (self.ids_N[low:high].tolist() for low, high in pairwise(bounds))
        return Context(*(tokenizer.decode(part, skip_special_tokens=False) for part in parts))


def pack(entries: list[Entry], tokenizer: Tokenizer, separator: int, sources: tuple[str, ...]) -> Packed:
    """Encode entries in their order, each behind the id `separator`; `sources` holds every entry's source."""
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.int32
    number = {name: index for index, name in enumerate(sources)}
    texts = [entry.text for entry in entries]
    documents = [np.array([separator, *ids], dtype) for ids in _encoded(texts, tokenizer)]
    lengths_D = np.array([len(document) for document in documents], np.int64)
    return Packed(
        ids_N=np.concatenate(documents),
        doc_starts_D=np.cumsum(lengths_D) - lengths_D,
        doc_sources_D=np.array([number[entry.source] for entry in entries], np.int32),
        doc_bytes_D=np.array([len(text.encode()) for text in texts], np.int64),
        sources=sources,
    )


def _encoded(texts: list[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    as_found = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        for first in range(0, len(texts), ENCODE_AT_ONCE):
            some = texts[first : first + ENCODE_AT_ONCE]
            yield from (found.ids for found in tokenizer.encode_batch_fast(some, add_special_tokens=False))
    finally:
        tokenizer.encode_special_tokens = as_found
