"""Strings into token ids and compressed ids: tokenizers, the compression map, corpora, splits, batches.

Everything here is integers on the CPU and is imported without torch. Nothing here knows of tables or models.
"""

from nengram.text.batches import NO_TARGET, Batch, Batches, eval_windows
from nengram.text.compress import CompressionMap, MergeGroup, MergeReport
from nengram.text.corpus import BUNDLED, SPLITS, Entry, bundled_folder, read_corpus, split_of
from nengram.text.pack import Context, Packed
from nengram.text.prepared import Prepared, prepare
from nengram.text.tokenizer import DOC, PAD, doc_id, load_tokenizer, tokenizer_digest, train_bpe

__all__ = [
    "BUNDLED",
    "DOC",
    "NO_TARGET",
    "PAD",
    "SPLITS",
    "Batch",
    "Batches",
    "CompressionMap",
    "Context",
    "Entry",
    "MergeGroup",
    "MergeReport",
    "Packed",
    "Prepared",
    "bundled_folder",
    "doc_id",
    "eval_windows",
    "load_tokenizer",
    "prepare",
    "read_corpus",
    "split_of",
    "tokenizer_digest",
    "train_bpe",
]
