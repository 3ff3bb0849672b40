"""Preparing: no text in two splits, a BPE that saw train only, a cache that is exact or rebuilt."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nengram.errors import ConfigError, DataError
from nengram.text import SPLITS, CompressionMap, Entry, prepare, split_of, tokenizer_digest, train_bpe
from nengram.text import prepared as module


def assert_equal(left, right):
    assert (left.digest, left.doc_id, left.sources) == (right.digest, right.doc_id, right.sources)
    assert tokenizer_digest(left.tokenizer) == tokenizer_digest(right.tokenizer)
    assert left.compression.digest == right.compression.digest
    for split in SPLITS:
        assert left.splits[split].digest == right.splits[split].digest


def test_no_text_stands_in_two_splits_even_if_the_corpus_repeats_it(entries, tmp_path):
    repeated = [*entries, *(Entry(f"copy of {e.key}", e.source, e.text) for e in entries)]
    splits = prepare(repeated, vocab_size=400, cache_folder=tmp_path).splits
    texts = []
    for packed in splits.values():
        bounds = [*packed.doc_starts_D.tolist(), len(packed)]
        texts += [tuple(packed.ids_N[low:high]) for low, high in zip(bounds[:-1], bounds[1:], strict=True)]
    assert len(texts) == len(set(texts)) == len(entries)


def test_the_tokenizer_has_seen_train_entries_only(entries, tmp_path):
    def spoilt(split):
        hit = [split_of(entry.source, entry.key) in split for entry in entries]
        more = " zzzzqqqq" * 50
        return [e._replace(text=e.text + more) if yes else e for e, yes in zip(entries, hit, strict=True)]

    clean = tokenizer_digest(prepare(entries, vocab_size=400, cache_folder=tmp_path).tokenizer)
    held_out = prepare(spoilt(("dev", "test")), vocab_size=400, cache_folder=tmp_path)
    train = prepare(spoilt(("train",)), vocab_size=400, cache_folder=tmp_path)
    assert tokenizer_digest(held_out.tokenizer) == clean
    assert tokenizer_digest(train.tokenizer) != clean


def test_a_large_corpus_is_sampled_evenly_for_the_tokenizer(entries, monkeypatch):
    total = sum(len(entry.text) for entry in entries)
    monkeypatch.setattr(module, "BPE_SAMPLE_CHARACTERS", total // 3)
    sample = list(module._sample(entries))
    assert sample == [entry.text for entry in entries[::4]]
    monkeypatch.setattr(module, "BPE_SAMPLE_CHARACTERS", total)
    assert list(module._sample(entries)) == [entry.text for entry in entries]


def test_a_given_tokenizer_is_used_as_it_is(entries, tmp_path):
    tokenizer = train_bpe((entry.text for entry in entries), 350)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    prepared = prepare(entries, tokenizer_path=tmp_path / "tokenizer.json", cache_folder=tmp_path / "cache")
    assert tokenizer_digest(prepared.tokenizer) == tokenizer_digest(tokenizer)
    assert prepared.vocab_size == 350
    assert prepared.compression.digest == CompressionMap.build(tokenizer).digest


def test_the_second_time_comes_from_the_cache_and_is_the_same(entries, tmp_path, monkeypatch):
    first = prepare(entries, vocab_size=400, cache_folder=tmp_path)
    monkeypatch.setattr(module, "_build", lambda *_: pytest.fail("built again"))
    assert_equal(prepare(iter(entries), vocab_size=400, cache_folder=tmp_path), first)
    assert len(list(tmp_path.iterdir())) == 1


def test_anything_that_changes_the_result_changes_the_digest(entries, tmp_path):
    moved = [entries[0]._replace(key="other"), *entries[1:]]
    renamed = [entries[0]._replace(source="other"), *entries[1:]]
    shifted = [entries[0]._replace(text=entries[0].text + "!"), *entries[1:]]
    corpora = (entries, moved, renamed, shifted, entries[::-1])
    digests = {prepare(each, vocab_size=400, cache_folder=tmp_path).digest for each in corpora}
    digests.add(prepare(entries, vocab_size=401, cache_folder=tmp_path).digest)
    assert len(digests) == len(corpora) + 1


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "header"])
def test_a_damaged_cache_is_built_again_with_a_warning(entries, prepared, tmp_path, damage):
    prepare(entries, vocab_size=400, cache_folder=tmp_path)
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    at = whole.index(b"even") if damage == "header" else len(whole) - 1000
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    path.write_bytes({"truncated": whole[:-10], "empty": b""}.get(damage, flipped))
    with pytest.warns(UserWarning, match="damaged and will be built again"):
        assert_equal(prepare(entries, vocab_size=400, cache_folder=tmp_path), prepared)
    assert path.read_bytes() == whole


def test_a_corpus_too_small_to_split_is_refused_with_the_numbers(tmp_path):
    few = [Entry(str(i), "s", f"text number {i}") for i in range(3)]
    with pytest.raises(DataError, match=r"its 3 entries fall into 0 train, 2 dev, 1 test"):
        prepare(few, vocab_size=300, cache_folder=tmp_path)


def test_a_corpus_too_small_for_its_vocabulary_is_refused_with_the_numbers(entries, tmp_path):
    with pytest.raises(DataError, match=r"only \d+ of the 60000 asked for"):
        prepare(entries, vocab_size=60_000, cache_folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_exactly_one_of_vocabulary_size_and_tokenizer_must_be_given(entries, tmp_path):
    for both in ({}, {"vocab_size": 300, "tokenizer_path": "x.json"}):
        with pytest.raises(ConfigError, match="either vocab_size"):
            prepare(entries, cache_folder=tmp_path, **both)


def test_a_cache_folder_that_cannot_be_written_is_one_clear_line(entries, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the prepared corpus"):
        prepare(entries, vocab_size=400, cache_folder=tmp_path / "file" / "below")


def test_another_process_prepares_the_same_arrays(entries, prepared, tmp_path):
    script = (
        "import sys, conftest; from nengram.text import prepare;"
        "p = prepare(conftest.made_up_entries(300), vocab_size=400, cache_folder=sys.argv[1]);"
        "print(p.digest, *(packed.digest for packed in p.splits.values()))"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [prepared.digest, *(packed.digest for packed in prepared.splits.values())]


def test_importing_the_room_does_not_import_torch():
    code = "import sys, nengram.text; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
