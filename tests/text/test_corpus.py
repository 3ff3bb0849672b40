"""Corpora: every kind of place gives its entries, splits never move, and each bad input is one clear line."""

import json
from collections import Counter

import pytest

from nengram.errors import DataError
from nengram.text import BUNDLED, Entry, read_corpus, split_of


def lines(path, *records):
    """Write records, one a line; a string is written as it stands."""
    texts = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("\n".join(texts))
    return path


def test_splits_are_these_for_ever():
    found = [split_of("wordnet", f"key {i}") for i in range(40)]
    places = {split: [i for i, name in enumerate(found) if name == split] for split in ("dev", "test")}
    assert places == {"dev": [31, 39], "test": [11, 30]}


def test_splits_are_nine_tenths_one_twentieth_one_twentieth():
    counts = Counter(split_of("source", str(i)) for i in range(20_000))
    assert counts["train"] == pytest.approx(18_000, abs=200)
    assert counts["dev"] == pytest.approx(1_000, abs=150)
    assert counts["test"] == pytest.approx(1_000, abs=150)


def test_source_and_key_are_hashed_apart():
    pairs = [(split_of("ab", f"c{i}"), split_of("a", f"bc{i}")) for i in range(400)]
    assert any(left != right for left, right in pairs)


def test_records_keep_their_key_and_source_or_get_a_digest_and_the_file_name(tmp_path):
    path = lines(
        tmp_path / "facts.jsonl",
        {"text": "one", "key": "k", "source": "s"},
        {"text": "two", "id": 7},
        "",
        {"text": "three"},
    )
    first, second, third = read_corpus(path)
    assert (first, second) == (Entry("k", "s", "one"), Entry("7", "facts", "two"))
    assert third.source == "facts" and len(third.key) == 16


def test_exact_duplicates_are_dropped_and_the_first_kept(tmp_path):
    path = lines(tmp_path / "x.jsonl", *({"text": text, "key": str(i)} for i, text in enumerate("aba")))
    assert [(entry.key, entry.text) for entry in read_corpus(path)] == [("0", "a"), ("1", "b")]


def test_a_text_file_is_cut_at_paragraphs_into_blocks_that_lose_nothing(tmp_path):
    paragraphs = [f"Paragraph {i}. " + "word " * (i % 90) for i in range(200)]
    long_one = " ".join(f"w{i}" for i in range(5_000))
    unbroken = "".join(f"x{i}" for i in range(4_000))
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join([*paragraphs, long_one, unbroken, "the end"]))
    blocks = list(read_corpus(path))
    assert {entry.source for entry in blocks} == {"book"}
    assert max(len(entry.text) for entry in blocks) <= 8_400
    assert sum(len(entry.text) >= 2_000 for entry in blocks) >= len(blocks) - 3
    joined = "".join("".join(entry.text.split()) for entry in blocks)
    assert joined == "".join(path.read_text().split())


def test_the_key_of_a_block_is_its_content_alone(tmp_path):
    text = "\n\n".join(f"{i} " + "abc " * 600 for i in range(6))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("A new beginning. " * 200 + "\n\n" + text)
    first, second = ({entry.key for entry in read_corpus(tmp_path / name)} for name in ("a.txt", "b.txt"))
    assert first < second


def test_windows_line_ends_and_byte_order_mark_make_no_difference(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo")
    assert [entry.text for entry in read_corpus(tmp_path / "a.txt")] == ["one\n\ntwo"]


def test_a_folder_is_read_in_order_with_one_source_for_each_sub_folder(tmp_path):
    root = tmp_path / "mine"
    for name, text in [
        ("z.txt", "top"), ("code/a.py", "import os"), ("code/deep/b.md", "# Title"), ("code/__init__.py", ""),
        ("image.png", "no text"), (".hidden/c.txt", "hidden"), ("code/.d.txt", "hidden"),
    ]:  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    lines(root / "facts.jsonl", {"text": "fact", "key": "k"})
    assert list(read_corpus(root)) == [
        Entry("k", "facts", "fact"),
        Entry("z.txt", "mine", "top"),
        Entry("code/a.py", "code", "import os"),
        Entry("code/deep/b.md", "code", "# Title"),
    ]


def test_a_long_file_in_a_folder_is_cut_into_blocks(tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "long.txt").write_text("\n\n".join(f"{i} " + "word " * 500 for i in range(40)))
    found = list(read_corpus(tmp_path))
    assert len(found) == 40 and {entry.source for entry in found} == {"books"}


def test_the_bundled_text_is_there_with_both_its_sources():
    found = list(read_corpus(BUNDLED))
    assert {entry.source for entry in found} == {"factbook", "wordnet"}
    assert 1_500_000 < sum(len(entry.text) for entry in found) < 4_000_000


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ('{"text": ', "line 2: not JSON"),
        ("[1]", 'line 2: expected an object with a "text"'),
        ('{"body": "x"}', 'line 2: expected an object with a "text"'),
        ('{"text": 3}', 'line 2: expected an object with a "text"'),
        ('{"text": " "}', "line 2: the text is empty"),
        ('{"text": "x", "key": [1]}', "line 2: key and source must be strings"),
        ('{"text": "x", "source": 1}', "line 2: key and source must be strings"),
        ('{"text": "\\ud800"}', "line 2: holds half of a surrogate pair"),
        ("[" * 100_000, "line 2: not JSON"),
    ],
)
def test_a_bad_record_is_refused_with_its_line(tmp_path, record, says):
    path = lines(tmp_path / "x.jsonl", {"text": "fine"}, record)
    with pytest.raises(DataError, match=says) as caught:
        list(read_corpus(path))
    assert "\n" not in str(caught.value) and "x.jsonl" in str(caught.value)


def test_text_that_is_not_utf8_is_refused_with_the_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc \xe9t\xe9")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 \(byte 4\)"):
        list(read_corpus(tmp_path / "a.txt"))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "x"}\n{"text": "\xe9"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl, line 2: not UTF-8"):
        list(read_corpus(tmp_path / "b.jsonl"))


def test_missing_and_empty_places_are_refused(tmp_path):
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "blank.jsonl").write_text("\n")
    (tmp_path / "folder").mkdir()
    for name, says in [
        ("nowhere.txt", r"nowhere\.txt: no such file"),
        ("blank.txt", "empty, there is no text"),
        ("blank.jsonl", "no text in it"),
        ("folder", "no text in it"),
    ]:
        with pytest.raises(DataError, match=says):
            list(read_corpus(tmp_path / name))
