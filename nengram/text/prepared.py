"""A corpus prepared for training: read, split, tokenized, packed, and kept.

Preparing is pure: the same entries and the same tokenizer give the same arrays, so the result is cached under
a digest of all that went in. The cache is one safetensors file, written whole or not at all and checked
against its own digests when it is read; a damaged one is built again.

The BPE is trained on train entries alone, on at most about 5 MB of them: every k-th entry, which keeps the
proportions of the sources. More text would cost time and hardly change the merges.
"""

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.numpy import save
from tokenizers import Tokenizer

from nengram.errors import ConfigError, DataError
from nengram.files import sha256_bytes, write_atomic
from nengram.text.compress import CompressionMap
from nengram.text.corpus import SPLITS, Entry, distinct, read_corpus, split_of
from nengram.text.pack import ARRAYS, Packed, pack
from nengram.text.tokenizer import doc_id, load_tokenizer, tokenizer_digest, train_bpe

FORMAT = "nengram-prepared-1"
BPE_SAMPLE_CHARACTERS = 5_000_000


@dataclass(frozen=True, eq=False)
class Prepared:
    """A corpus ready to train on: `splits` by name (train, dev, test); `digest` is of all that went in."""

    tokenizer: Tokenizer
    doc_id: int
    compression: CompressionMap
    splits: dict[str, Packed]
    sources: tuple[str, ...]
    digest: str

    @property
    def vocab_size(self) -> int:
        """V: ids of the tokenizer, added tokens included."""
        return len(self.compression.cids_V)


def prepare(
    corpus: str | os.PathLike | Iterable[Entry],
    *,
    vocab_size: int | None = None,
    tokenizer_path: str | os.PathLike | None = None,
    doc_token: str | None = None,
    cache_folder: str | os.PathLike,
) -> Prepared:
    """Read, split, tokenize and pack a corpus: a place that `read_corpus` knows, or entries.

    Give `vocab_size` to train a BPE on the train split, or `tokenizer_path` to use a tokenizer.json;
    `doc_token` names the separator of a foreign tokenizer whose own cannot be guessed.

    Raises ConfigError unless exactly one of the two is given; DataError for a bad corpus or tokenizer, or
    when a split would be empty or the text too small for the vocabulary (with the numbers).
    """
    if (vocab_size is None) == (tokenizer_path is None):
        raise ConfigError("give either vocab_size, to train a tokenizer, or tokenizer_path, to load one")
    tokenizer = None if tokenizer_path is None else load_tokenizer(tokenizer_path)
    entries = list(read_corpus(corpus) if isinstance(corpus, str | os.PathLike) else distinct(corpus))
    by_split = _by_split(entries)
    asked_for = vocab_size if tokenizer is None else tokenizer_digest(tokenizer)
    digest = _inputs_digest(entries, asked_for, doc_token)
    path = Path(cache_folder) / f"{digest[:24]}.safetensors"
    cached = _read_cache(path, digest, doc_token)
    if cached is not None:
        return cached
    if tokenizer is None:
        tokenizer = train_bpe(_sample(by_split["train"]), vocab_size)
    prepared = _build(by_split, tokenizer, doc_id(tokenizer, doc_token), digest)
    _write_cache(path, prepared)
    return prepared


def _by_split(entries: list[Entry]) -> dict[str, list[Entry]]:
    by_split: dict[str, list[Entry]] = {split: [] for split in SPLITS}
    for entry in entries:
        by_split[split_of(entry.source, entry.key)].append(entry)
    if not all(by_split.values()):
        counts = ", ".join(f"{len(by_split[split])} {split}" for split in SPLITS)
        raise DataError(
            f"the corpus is too small to split 90/5/5: its {len(entries)} entries fall into {counts}; "
            "give about 100 or more (300 kB of plain text)"
        )
    return by_split


def _sample(entries: list[Entry]) -> Iterator[str]:
    """Every k-th text, k the smallest that keeps the sample near BPE_SAMPLE_CHARACTERS."""
    total = sum(len(entry.text) for entry in entries)
    return (entry.text for entry in entries[:: max(1, -(-total // BPE_SAMPLE_CHARACTERS))])


def _build(by_split: dict[str, list[Entry]], tokenizer: Tokenizer, separator: int, digest: str) -> Prepared:
    sources = tuple(sorted({entry.source for entries in by_split.values() for entry in entries}))
    return Prepared(
        tokenizer=tokenizer,
        doc_id=separator,
        compression=CompressionMap.build(tokenizer),
        splits={split: pack(by_split[split], tokenizer, separator, sources) for split in SPLITS},
        sources=sources,
        digest=digest,
    )


def _inputs_digest(entries: list[Entry], vocabulary: int | str, doc_token: str | None) -> str:
    """Of everything the result depends on. JSON keeps the borders between entries."""
    parts = [FORMAT, vocabulary, doc_token, *entries]
    return sha256_bytes(b"\n".join(json.dumps(part).encode() for part in parts))


def _write_cache(path: Path, prepared: Prepared) -> None:
    splits = prepared.splits
    tensors = {f"{split}.{name}": getattr(splits[split], name) for split in SPLITS for name in ARRAYS}
    tensors["cids_V"] = prepared.compression.cids_V
    about = {
        "format": FORMAT,
        "digest": prepared.digest,
        "sources": prepared.sources,
        "splits": {split: packed.digest for split, packed in splits.items()},
        "compression": prepared.compression.digest,
        "tokenizer_digest": prepared.compression.tokenizer_digest,
        "tokenizer": prepared.tokenizer.to_str(),
    }
    try:
        write_atomic(path, save(tensors, {"about": json.dumps(about)}))
    except OSError as error:
        raise DataError(f"cannot write the prepared corpus to {path}: {error.strerror or error}") from None


def _read_cache(path: Path, digest: str, doc_token: str | None) -> Prepared | None:
    """The cached corpus, or None when there is none or it is damaged."""
    if not path.exists():
        return None
    try:
        return _checked(path, digest, doc_token)
    except Exception as error:  # whatever is wrong with a cache, the remedy is the same
        warnings.warn(f"prepared corpus {path} is damaged and will be built again ({error})", stacklevel=3)
        return None


def _checked(path: Path, digest: str, doc_token: str | None) -> Prepared:
    with safe_open(path, framework="np") as file:
        about = json.loads(file.metadata()["about"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    sources = tuple(about["sources"])
    tokenizer = Tokenizer.from_str(about["tokenizer"])
    compression = CompressionMap(tensors["cids_V"], tokenizer_digest(tokenizer))
    splits = {split: Packed(*(tensors[f"{split}.{name}"] for name in ARRAYS), sources) for split in SPLITS}
    digests = {split: packed.digest for split, packed in splits.items()}
    found = (digest, compression.digest, compression.tokenizer_digest, digests)
    if found != (about["digest"], about["compression"], about["tokenizer_digest"], about["splits"]):
        raise DataError("its contents do not give the digests it was saved with")
    return Prepared(tokenizer, doc_id(tokenizer, doc_token), compression, splits, sources, digest)
