"""A model's own tokenizer as a compression map over the ids that its embedding has.

An n-gram's address depends on every id, so the tokenizer must be the model's. Its size tells: an embedding has as many rows as the
tokenizer has ids, or a few more, to be a round number (Qwen 271 of 151,936, Phi-2 905 of 51,200). Ids that no text gives keep a
compressed id each, so the map covers whatever the model may be asked for.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from nengram.errors import ConfigError
from nengram.text import CompressionMap, load_tokenizer

ROUNDING = 0.02  # of an embedding's rows may belong to no token


def compression_of(tokenizer: Any, vocab_size: int) -> CompressionMap:
    """The map of `tokenizer`, int64 [vocab_size].

    tokenizer: a fast tokenizer of transformers, a `tokenizers.Tokenizer`, or the path of a tokenizer.json or its folder.
    Raises: ConfigError for a tokenizer of another vocabulary than the model's, or without a tokenizer.json; DataError.
    """
    own = CompressionMap.build(_backend(tokenizer))
    count, compressed = len(own.cids_V), own.compressed_vocab_size
    if not vocab_size * (1 - ROUNDING) <= count <= vocab_size:
        raise ConfigError(
            f"the tokenizer has {count:,} ids, the model's embedding {vocab_size:,}: it is another model's; "
            "pass the model's own, or compress=False to hash ids as they are"
        )
    rest = np.arange(compressed, compressed + vocab_size - count, dtype=np.int64)
    return CompressionMap(np.concatenate([own.cids_V, rest]), own.tokenizer_digest)


def _backend(tokenizer: Any) -> Tokenizer:
    if isinstance(tokenizer, str | os.PathLike):
        path = Path(tokenizer)
        return load_tokenizer(path / "tokenizer.json" if path.is_dir() else path)
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if isinstance(backend, Tokenizer):
        return backend
    if tokenizer is None:
        raise ConfigError("pass the model's tokenizer, or compress=False to hash ids as they are")
    raise ConfigError(
        f"a {type(tokenizer).__name__} has no tokenizer.json behind it: pass a fast tokenizer, the path of a tokenizer.json, "
        "or compress=False to hash ids as they are"
    )
