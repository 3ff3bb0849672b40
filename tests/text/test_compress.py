"""The compression map: the published table to the last number, its plain twin, and files that cannot lie."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from nengram.errors import DataError
from nengram.files import sha256_file
from nengram.text import CompressionMap, compress, tokenizer_digest, train_bpe
from nengram.text import compress_reference as reference
from nengram.text.compress import token_keys

GOLDEN = json.loads((Path(__file__).parents[1] / "golden_vectors.json").read_text())
PUBLISHED = GOLDEN["compression"]["v3"]
TEXTS = ["The the THE café cafe CAFÉ Ångström 中国 চাকা 한국어 ﬁne ① \x0b\x0c\u2003 \u00a0 \t\r\n İı ΣΑΣ"] * 20


@pytest.fixture(scope="module", autouse=True)
def spelt_once():
    """Spell out each vocabulary once for all tests of this file: 128k normalisations take two seconds."""
    spell, spelt = compress._spellings, {}

    def once(tokenizer):
        if id(tokenizer) not in spelt:
            spelt[id(tokenizer)] = (tokenizer, list(spell(tokenizer)))  # kept alive: ids are given again
        return spelt[id(tokenizer)][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress, "_spellings", once)
        yield


@pytest.fixture(scope="module")
def published(deepseek) -> CompressionMap:
    return CompressionMap.build(deepseek)


@pytest.fixture(scope="module")
def small():
    tokenizer = train_bpe(TEXTS, 300)
    return tokenizer, CompressionMap.build(tokenizer)


def test_the_tokenizer_is_the_published_one(deepseek_path):
    assert sha256_file(deepseek_path) == GOLDEN["tokenizers"]["v3"]["sha256"]


def test_the_128k_vocabulary_compresses_to_the_published_table(published):
    cids_V = published.cids_V
    assert (len(cids_V), published.compressed_vocab_size) == (128_815, 98_627)
    assert published.digest == PUBLISHED["lookup_sha256_int64_le"]
    int32_V = cids_V.astype("<i4").tobytes()
    assert hashlib.sha256(int32_V).hexdigest() == PUBLISHED["lookup_sha256_int32_le"]
    assert int(cids_V.sum()) == PUBLISHED["lookup_sum"]
    weighted = sum((i + 1) * cid for i, cid in enumerate(cids_V.tolist())) % (2**61 - 1)
    assert weighted == PUBLISHED["lookup_weighted_sum_mod_2_61_minus_1"]


def test_every_published_sample_has_its_text_key_and_compressed_id(published, deepseek):
    keys = token_keys(deepseek)
    for sample in PUBLISHED["samples"]:
        i = sample["raw_id"]
        assert deepseek.decode([i], skip_special_tokens=False) == sample["decoded"]
        assert (keys[i], int(published.cids_V[i])) == (sample["key"], sample["compressed_id"])


def test_the_report_gives_the_published_merges_and_exceptions(published, deepseek):
    report = published.report(deepseek)
    assert [group._asdict() for group in report.groups] == PUBLISHED["top_merge_groups"]
    assert report.reduction == pytest.approx(PUBLISHED["reduction_fraction"], abs=1e-12)
    assert report.single_groups == PUBLISHED["n_groups_of_size_1"]
    assert list(report.empty_ids) == PUBLISHED["raw_ids_normalising_to_empty"]
    assert report.fragment_count == PUBLISHED["n_raw_tokens_with_replacement_char"]


@pytest.mark.parametrize("case", GOLDEN["hash"]["demo_default_v3tok"]["cases"], ids=lambda case: case["kind"])
def test_published_texts_become_the_published_compressed_ids(published, deepseek, case):
    ids_BT = case["input_ids"]
    if case["kind"] == "text":
        assert [deepseek.encode(case["desc"], add_special_tokens=False).ids] == ids_BT
    assert published(np.array(ids_BT)).tolist() == case["compressed_ids"]


def assert_twins_agree(tokenizer, compression):
    ids = range(tokenizer.get_vocab_size())
    texts = [tokenizer.decode([i], skip_special_tokens=False) for i in ids]
    keys = [reference.token_key(text, tokenizer.id_to_token(i)) for i, text in zip(ids, texts, strict=True)]
    assert keys == token_keys(tokenizer)
    assert reference.number_by_first_appearance(keys) == compression.cids_V.tolist()


def test_the_plain_twin_agrees_on_the_whole_128k_vocabulary(published, deepseek):
    assert_twins_agree(deepseek, published)


def test_the_plain_twin_agrees_on_a_trained_vocabulary(small):
    assert_twins_agree(*small)


def test_the_plain_twin_agrees_on_controls_spaces_and_marks_in_every_place():
    normalise = compress._normaliser().normalize_str
    for code in [
        *range(0x780),
        *range(0x1680, 0x1690),
        *range(0x2000, 0x2070),
        *range(0x20D0, 0x2200),
        0x3000,
        0xFEFF,
    ]:
        text = f"{chr(code)} A{chr(code)}é{chr(code)}"
        assert normalise(text) == reference.normalised(text), hex(code)


def test_case_accents_and_a_leading_space_merge_and_words_do_not():
    tokenizer = train_bpe(["The the THE café cafe dog"] * 50, 274)
    compression = CompressionMap.build(tokenizer)
    cid = {tokenizer.decode([i]): int(compression.cids_V[i]) for i in range(274)}
    assert cid[" the"] == cid["The"] and cid[" cafe"] == cid[" café"]
    assert cid[" the"] != cid[" dog"]


def test_numpy_torch_and_lists_of_any_shape_look_up_alike(small):
    compression = small[1]
    ids_BT = np.arange(24).reshape(2, 3, 4) * 11
    expected = compression.cids_V[ids_BT]
    for dtype in (np.int32, np.uint16, np.int64):
        found = compression(ids_BT.astype(dtype))
        assert found.dtype == np.int64 and np.array_equal(found, expected)
    tensor = compression(torch.from_numpy(ids_BT))
    assert tensor.dtype == torch.int64 and np.array_equal(tensor.numpy(), expected)
    assert np.array_equal(compression(ids_BT.tolist()), expected)
    assert compression(np.zeros((2, 0), np.int64)).shape == (2, 0)


@pytest.mark.parametrize("bad", [-1, 300])
def test_the_first_id_out_of_range_is_named_with_its_place_and_bound(small, bad):
    ids_BT = np.zeros((2, 5), np.int64)
    ids_BT[1, 3:] = bad
    for ids in (ids_BT, torch.from_numpy(ids_BT)):
        with pytest.raises(DataError, match=rf"token id {bad} at position \[1, 3\] is outside 0\.\.299"):
            small[1](ids)


def test_ids_that_are_no_integers_are_refused(small):
    with pytest.raises(DataError, match="integers, not float64"):
        small[1](np.array([1.0]))


def test_identity_leaves_ids_alone():
    identity = CompressionMap.identity(7)
    assert identity.compressed_vocab_size == 7
    assert identity(np.array([6, 0])).tolist() == [6, 0]


def test_a_saved_map_comes_back_whole_with_its_digests(small, tmp_path):
    tokenizer, compression = small
    compression.save(tmp_path / "map.safetensors")
    loaded = CompressionMap.load(tmp_path / "map.safetensors")
    assert np.array_equal(loaded.cids_V, compression.cids_V)
    assert loaded.compressed_vocab_size == compression.compressed_vocab_size
    assert (loaded.digest, loaded.tokenizer_digest) == (compression.digest, tokenizer_digest(tokenizer))


def test_a_saved_map_with_any_byte_of_its_numbers_changed_is_refused(small, tmp_path):
    path = tmp_path / "map.safetensors"
    small[1].save(path)
    whole = path.read_bytes()
    for place in (len(whole) - 1, len(whole) - 8, len(whole) - 2400):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DataError, match=r"map\.safetensors: unreadable or damaged"):
            CompressionMap.load(path)


def test_files_that_hold_no_map_are_refused(small, tmp_path):
    path = tmp_path / "map.safetensors"
    with pytest.raises(DataError, match="no such file"):
        CompressionMap.load(path)
    small[1].save(path)
    for content in (b"", path.read_bytes()[:-100], b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(DataError, match="unreadable or damaged"):
            CompressionMap.load(path)
    save_file({"cids_V": np.arange(3)}, path)
    with pytest.raises(DataError, match="not of the format"):
        CompressionMap.load(path)
    with pytest.raises(DataError, match="compression map"):
        CompressionMap.load(tmp_path)


def test_a_map_that_cannot_be_written_is_one_clear_line(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="compression map"):
        small[1].save(tmp_path / "file" / "map.safetensors")


@pytest.mark.parametrize("numbers", [[1, 0], [0, 2], [0, -1], [], [[0]]])
def test_numbers_that_are_no_numbering_by_first_appearance_are_refused(numbers):
    with pytest.raises(DataError, match="compression map"):
        CompressionMap(np.array(numbers, np.int64))


def test_a_report_with_another_tokenizer_is_refused(small):
    with pytest.raises(DataError, match="this one is"):
        small[1].report(train_bpe(TEXTS, 299))


def test_the_numbers_cannot_be_changed_by_accident(small):
    with pytest.raises(ValueError, match="read-only"):
        small[1].cids_V[0] = 5
