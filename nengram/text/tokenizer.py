"""Strings into token ids, by the `tokenizers` library alone: any tokenizer.json, or a byte-level BPE of ours.

A tokenizer decides every address downstream (ids -> compressed ids -> rows), so it is compared by digest,
never by name or path. The digest covers what can change an id or a string and leaves out what cannot (padding
and truncation settings, the version of the JSON layout, options that are merely absent or off), so that
neither a caller's settings nor a field added by a later version of the library makes a tokenizer a stranger
to its own checkpoint.
"""

import json
import os
import re
import unicodedata
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nengram.errors import DataError, nearest
from nengram.files import sha256_bytes

PAD, DOC = "<|pad|>", "<|doc|>"
SMALLEST_BPE = 256 + 2  # every byte, and the two special tokens
# What published tokenizers call it, once brackets, bars and underscores are gone; end of text comes first.
FOREIGN_SEPARATORS = (
    "endoftext", "/s", "eos", "endofsentence", "eot", "sep",
    "beginoftext", "s", "bos", "beginofsentence", "startoftext", "cls",
)  # fmt: skip
SETTINGS_OF_THE_CALLER = ("version", "truncation", "padding")


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Load a tokenizer.json of any family, its truncation and padding settings (if it has any) switched off.

    Raises DataError naming the file and the reason when it is missing, a folder, not UTF-8, or not a
    tokenizer.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise DataError(f"tokenizer {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DataError(f"tokenizer {path}: not UTF-8 text; expected a tokenizer.json") from None
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for whatever it cannot parse
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"tokenizer {path}: not a tokenizer.json ({reason})") from None
    tokenizer.no_truncation()  # some files carry such settings, which would cut or fill every document
    tokenizer.no_padding()
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of exactly `vocab_size` ids: `<|pad|>` 0, `<|doc|>` 1, 256 bytes, then merges.

    The same texts in the same order give the same tokenizer. Which texts may be seen (the train split only)
    is the caller's affair. Raises DataError when `vocab_size` is below 258 or the texts do not hold that many
    distinct merges.
    """
    if vocab_size < SMALLEST_BPE:
        raise DataError(f"vocab_size {vocab_size} is too small: a byte-level BPE needs {SMALLEST_BPE}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, DOC],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size()
    if reached != vocab_size:
        raise DataError(
            f"the training text supports a vocabulary of only {reached} of the {vocab_size} asked for; "
            "give more text or a smaller vocab_size"
        )
    return tokenizer


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Hex SHA-256 of the tokenizer's JSON: keys sorted, the caller's settings and absent options left out."""
    content = json.loads(tokenizer.to_str())
    for name in SETTINGS_OF_THE_CALLER:
        content.pop(name, None)
    canonical = json.dumps(_without_absent(content), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return sha256_bytes(canonical.encode())


def doc_id(tokenizer: Tokenizer, token: str | None = None) -> int:
    """The id that separates documents: `token` if given, else `<|doc|>`, else an end- or begin-of-text token.

    Raises DataError when `token` is unknown, or when nothing suitable is found (it lists the special tokens).
    """
    added_tokens = sorted(tokenizer.get_added_tokens_decoder().items())
    special = {added.content: i for i, added in added_tokens if added.special}
    if token is not None:
        found = tokenizer.token_to_id(token)
        if found is None:
            raise DataError(f'the tokenizer has no token "{token}"{nearest(token, special)}')
        return found
    if DOC in special:
        return special[DOC]
    by_meaning = {_bare(content): i for content, i in reversed(special.items())}
    for meaning in FOREIGN_SEPARATORS:
        if meaning in by_meaning:
            return by_meaning[meaning]
    choices = ", ".join(list(special)[:8]) or "it has none"
    raise DataError(
        f"no document separator found among the tokenizer's special tokens ({choices}): name one as doc_token"
    )


def _bare(token: str) -> str:
    """`<｜end▁of▁sentence｜>` -> `endofsentence`, `</s>` -> `/s`."""
    return re.sub(r"[^a-z/]", "", unicodedata.normalize("NFKC", token).lower())


def _without_absent(value):
    if isinstance(value, dict):
        return {k: _without_absent(v) for k, v in value.items() if v is not None and v is not False}
    return [_without_absent(v) for v in value] if isinstance(value, list) else value
