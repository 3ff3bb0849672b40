"""Packed splits: what went in can be read back, and every position knows its document and source."""

import numpy as np
import pytest

from nengram.errors import DataError
from nengram.text import DOC, Entry, split_of, train_bpe
from nengram.text.pack import pack


def test_documents_decode_to_their_texts_in_order(entries, prepared):
    expected = [entry for entry in entries if split_of(entry.source, entry.key) == "train"]
    packed = prepared.splits["train"]
    bounds = [*packed.doc_starts_D.tolist(), len(packed)]
    assert len(packed.doc_starts_D) == len(expected)
    for entry, low, high in zip(expected, bounds[:-1], bounds[1:], strict=True):
        assert packed.ids_N[low] == prepared.doc_id
        assert prepared.tokenizer.decode(packed.ids_N[low + 1 : high].tolist()) == entry.text


def test_bytes_and_tokens_add_up_per_source(entries, prepared):
    for split, packed in prepared.splits.items():
        for source in prepared.sources:
            texts = [e.text for e in entries if e.source == source and split_of(e.source, e.key) == split]
            tokens = sum(len(ids.ids) + 1 for ids in prepared.tokenizer.encode_batch(texts))
            assert packed.bytes_by_source[source] == sum(len(text.encode()) for text in texts)
            assert packed.tokens_by_source[source] == tokens
        assert sum(packed.tokens_by_source.values()) == len(packed)


def test_every_position_knows_its_document_and_source(prepared):
    packed = prepared.splits["train"]
    document, expected = -1, []
    for position in range(len(packed)):
        document += position in set(packed.doc_starts_D[document + 1 : document + 2].tolist())
        expected.append(document)
    positions = np.arange(len(packed))
    assert packed.document_of(positions).tolist() == expected
    assert np.array_equal(packed.source_of(positions), packed.doc_sources_D[expected])
    assert packed.source_of(positions[:6].reshape(2, 3)).shape == (2, 3)


@pytest.mark.parametrize("bad", [-1, 10**9])
def test_positions_outside_the_split_are_refused(prepared, bad):
    with pytest.raises(DataError, match="outside the split"):
        prepared.splits["dev"].source_of(np.array([0, bad]))


def test_text_around_a_position_stays_inside_its_document(entries, prepared):
    packed, tokenizer = prepared.splits["train"], prepared.tokenizer
    start, end = packed.doc_starts_D[3:5].tolist()
    whole = DOC + [e.text for e in entries if split_of(e.source, e.key) == "train"][3]
    for position in (start, start + 1, (start + end) // 2, end - 1):
        assert "".join(packed.text_around(position, tokenizer, before=10**6, after=10**6)) == whole
    context = packed.text_around(start + 20, tokenizer, before=3, after=2)
    assert context.token == tokenizer.decode([int(packed.ids_N[start + 20])])
    assert len(tokenizer.encode(context.before).ids) <= 6 and "".join(context) in whole


def test_special_tokens_spelt_out_in_the_text_forge_no_boundary():
    tokenizer = train_bpe(["some text to learn"] * 9, 270)
    text = f"before {DOC} after"
    packed = pack([Entry("k", "s", text)], tokenizer, 1, ("s",))
    assert np.flatnonzero(packed.ids_N == 1).tolist() == [0]
    assert tokenizer.decode(packed.ids_N[1:].tolist()) == text
    assert tokenizer.encode(DOC).ids == [1], "the caller's tokenizer is left as it was"


def test_ids_of_a_large_vocabulary_fit(deepseek):
    packed = pack([Entry("k", "s", "Bucephalus")], deepseek, 128_000, ("s",))
    assert packed.ids_N.tolist() == [128_000, *deepseek.encode("Bucephalus", add_special_tokens=False).ids]


def test_the_digest_sees_ids_borders_and_sources(prepared):
    def digest(*texts, second_source="s", sources=("s", "t")):
        entries = [Entry("k", second_source if i else "s", text) for i, text in enumerate(texts)]
        return pack(entries, prepared.tokenizer, 1, sources).digest

    assert digest("abc", "def") == digest("abc", "def")
    others = [("abc", "deg"), ("abcd", "ef")]
    assert digest("abc", "def") not in [digest(*texts) for texts in others]
    assert digest("abc", "def") != digest("abc", "def", second_source="t")
    assert digest("abc", "def") != digest("abc", "def", sources=("s", "u"))
