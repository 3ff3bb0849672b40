"""Token ids into compressed ids: a surjection V -> C merging the spellings of a word ("The", " the", "THE").

An n-gram address should not depend on case, accents or a leading space, so ids are merged by normalised text
before they are hashed (arXiv 2601.07372, section 2.2; 23.43 % fewer ids on the paper's 128k vocabulary). C
enters the bound of the hash multipliers: one id more or fewer moves every row of every table. The map is
therefore computed once, saved with the model as numbers, and compared by digest; it is never rebuilt from a
tokenizer or from another Unicode version at load.

`compress_reference.py` is the same chain in plain Python; this file runs it through the `tokenizers`
normalisers, which the published tables were made with. The whole 128k vocabulary takes about two seconds.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tokenizers import Regex, Tokenizer, normalizers

from nengram.errors import DataError
from nengram.files import sha256_bytes, write_atomic
from nengram.text.tokenizer import tokenizer_digest

FORMAT = "nengram-compression-1"
REPLACEMENT, LONE_SPACE = "\ufffd", "\ue000"


class MergeGroup(NamedTuple):
    """The tokens that share one compressed id: their common key, that id, and how many they are."""

    key: str
    compressed_id: int
    count: int


@dataclass(frozen=True)
class MergeReport:
    """What a compression map merged. `reduction` is the share of ids saved, 1 - C/V."""

    vocab_size: int
    compressed_vocab_size: int
    reduction: float
    groups: tuple[MergeGroup, ...]
    single_groups: int
    empty_ids: tuple[int, ...]  # tokens that normalise to nothing and keep their own text as key
    fragment_count: int  # tokens whose text holds U+FFFD and that keep their raw string as key


@dataclass(frozen=True, eq=False)
class CompressionMap:
    """The map as numbers: `cids_V` int64 [V], compressed ids 0..C-1 numbered by first appearance.

    `tokenizer_digest` names the tokenizer that it was built from (empty for a bare identity map).
    Raises DataError when the numbers are no such map.
    """

    cids_V: np.ndarray
    tokenizer_digest: str = ""
    compressed_vocab_size: int = field(init=False)

    def __post_init__(self) -> None:
        cids_V = np.ascontiguousarray(self.cids_V)
        if cids_V.ndim != 1 or not len(cids_V) or cids_V.dtype != np.int64:
            raise DataError(f"a compression map is int64 [V], not {cids_V.dtype} {list(cids_V.shape)}")
        highest_V = np.maximum.accumulate(cids_V)
        if cids_V[0] != 0 or cids_V.min() < 0 or np.diff(highest_V, prepend=-1).max() > 1:
            raise DataError("a compression map numbers its ids 0, 1, 2, … by first appearance")
        cids_V = cids_V.copy()
        cids_V.setflags(write=False)
        object.__setattr__(self, "cids_V", cids_V)
        object.__setattr__(self, "compressed_vocab_size", int(highest_V[-1]) + 1)

    @classmethod
    def build(cls, tokenizer: Tokenizer) -> "CompressionMap":
        """The map of a tokenizer, added tokens included (arXiv 2601.07372, section 2.2, and its code)."""
        return cls(_numbered(token_keys(tokenizer)), tokenizer_digest(tokenizer))

    @classmethod
    def identity(cls, vocab_size: int, tokenizer_digest: str = "") -> "CompressionMap":
        """No compression: every id is its own compressed id."""
        return cls(np.arange(vocab_size, dtype=np.int64), tokenizer_digest)

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the numbers as little-endian int64: what identifies the map, whoever made it."""
        return sha256_bytes(self.cids_V.astype("<i8").tobytes())

    def __call__(self, ids):
        """Compressed ids of `ids` (any shape; NumPy or torch, which comes back on its own device), int64.

        Raises DataError naming the first id outside 0..V-1 and its place, or when `ids` are no integers.
        """
        if isinstance(ids, np.ndarray):
            return self._look_up(ids)
        torch = sys.modules.get("torch")  # whoever holds a tensor has imported it
        if torch is not None and isinstance(ids, torch.Tensor):
            return torch.from_numpy(self._look_up(ids.numpy(force=True))).to(ids.device)
        return self._look_up(np.asarray(ids))

    def _look_up(self, ids: np.ndarray) -> np.ndarray:
        if not np.issubdtype(ids.dtype, np.integer):
            if ids.size:
                raise DataError(f"token ids must be integers, not {ids.dtype}")
            ids = ids.astype(np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= len(self.cids_V)):
            place = tuple(map(int, np.argwhere((ids < 0) | (ids >= len(self.cids_V)))[0]))
            raise DataError(
                f"token id {ids[place]} at position {list(place)} is outside 0..{len(self.cids_V) - 1}, "
                "the ids of the tokenizer this map was built from"
            )
        return self.cids_V[ids]

    def save(self, path: str | os.PathLike) -> None:
        """Write the map as safetensors, whole or not at all. Raises DataError when it cannot be written."""
        about = {"format": FORMAT, "digest": self.digest, "tokenizer_digest": self.tokenizer_digest}
        try:
            # one key only: with several, safetensors writes them in an order that changes from save to save
            write_atomic(path, save({"cids_V": self.cids_V}, {"about": json.dumps(about)}))
        except OSError as error:
            raise DataError(f"compression map {path}: {error.strerror or error}") from None

    @classmethod
    def load(cls, path: str | os.PathLike) -> "CompressionMap":
        """Read a saved map. Raises DataError when it is missing, damaged, or not a compression map."""
        try:
            with safe_open(path, framework="np") as file:
                about = json.loads((file.metadata() or {}).get("about", "{}"))
                if about.get("format") != FORMAT:
                    raise DataError(f"it is not of the format {FORMAT}")
                compression = cls(file.get_tensor("cids_V"), about["tokenizer_digest"])
            if compression.digest != about["digest"]:
                raise DataError("its numbers do not match their digest")
        except FileNotFoundError:
            raise DataError(f"compression map {path}: no such file") from None
        except (OSError, ValueError, KeyError, SafetensorError, DataError) as error:
            raise DataError(f"compression map {path}: unreadable or damaged: {error}") from None
        return compression

    def report(self, tokenizer: Tokenizer, top: int = 20) -> MergeReport:
        """What was merged: the `top` largest groups (ties by compressed id) and the exceptional tokens.

        Raises DataError when `tokenizer` is not the one the map was built from.
        """
        found = tokenizer_digest(tokenizer)
        if found != self.tokenizer_digest:
            raise DataError(f"the map is of tokenizer {self.tokenizer_digest[:12]}, this one is {found[:12]}")
        spellings = list(_spellings(tokenizer))
        first = np.unique(self.cids_V, return_index=True)[1]
        counts = Counter(self.cids_V.tolist())
        largest = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:top]
        return MergeReport(
            vocab_size=len(self.cids_V),
            compressed_vocab_size=self.compressed_vocab_size,
            reduction=1 - self.compressed_vocab_size / len(self.cids_V),
            groups=tuple(MergeGroup(spellings[first[cid]].key, cid, count) for cid, count in largest),
            single_groups=sum(count == 1 for count in counts.values()),
            empty_ids=tuple(i for i, spelling in enumerate(spellings) if spelling.normalised == ""),
            fragment_count=sum(spelling.normalised is None for spelling in spellings),
        )


def token_keys(tokenizer: Tokenizer) -> list[str]:
    """The string under which each id 0..V-1 is merged; ids with equal keys share a compressed id."""
    return [spelling.key for spelling in _spellings(tokenizer)]


class _Spelling(NamedTuple):
    text: str  # the id decoded alone, special tokens kept
    raw: str  # its string in the vocabulary
    normalised: str | None  # None for a fragment of a UTF-8 sequence, which decodes to U+FFFD

    @property
    def key(self) -> str:
        return self.raw if self.normalised is None else self.normalised or self.text


def _spellings(tokenizer: Tokenizer) -> Iterator[_Spelling]:
    ids = range(tokenizer.get_vocab_size(with_added_tokens=True))
    texts = tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
    normalise = _normaliser().normalize_str
    for i, text in enumerate(texts):
        normalised = None if REPLACEMENT in text else normalise(text)
        yield _Spelling(text, tokenizer.id_to_token(i) or "", normalised)


def _normaliser() -> normalizers.Normalizer:
    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),  # all combining marks, not only Mn
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), LONE_SPACE),
            normalizers.Strip(),
            normalizers.Replace(LONE_SPACE, " "),
        ]
    )


def _numbered(keys: list[str]) -> np.ndarray:
    numbers: dict[str, int] = {}
    return np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), np.int64, len(keys))
