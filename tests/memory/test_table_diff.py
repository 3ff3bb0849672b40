"""A diff names the n-gram that was edited, tells it from those that share its rows, and counts what it cannot name."""

import json

import numpy as np
import pytest
import torch

from nengram.address import Addresser, AddressSpec
from nengram.errors import AddressError, CheckpointError, StoreError
from nengram.memory import save_table
from nengram.memory.packing import pack
from nengram.memory.table_diff import diff_tables
from nengram.store import ResidentStore

SPEC = AddressSpec.engram(compressed_vocab_size=60, rows_per_head=[300, 700], heads=4, layer_ids=[2, 5], pad_cid=0)
WIDTH = 8
TEXT_T = np.random.default_rng(0).integers(1, 60, 400)
START_T = np.arange(400) % 50 == 0


def saved(path, weight):
    store = ResidentStore(len(weight), WIDTH)
    store.load_tensors({"weight": weight})
    save_table(path, store, SPEC, 5)
    return path


@pytest.fixture
def weight():
    return torch.randn(SPEC.num_rows(5), WIDTH, generator=torch.Generator().manual_seed(0))


def rows_of(ngram, order):
    rows_S = Addresser(SPEC)(np.array([ngram]))[5][0, -1]
    return rows_S[SPEC.slot_orders == order]


def test_an_edited_ngram_comes_first_with_all_its_heads(tmp_path, weight):
    ngram = TEXT_T[101:104]
    edited = weight.clone()
    edited[torch.from_numpy(rows_of(ngram, 3))] += 0.5
    one, other = saved(tmp_path / "a", weight), saved(tmp_path / "b", edited)
    diff = diff_tables(one, other, TEXT_T, START_T, text_of=lambda cids: "-".join(map(str, cids)))
    first = diff.ngrams[0]
    assert (first.cids, first.order, first.heads_changed, first.heads) == (tuple(ngram), 3, 4, 4)
    assert first.text == "-".join(map(str, ngram))
    assert first.largest == pytest.approx(0.5, abs=1e-6)
    assert first.count == sum(
        (TEXT_T[t : t + 3] == ngram).all() for t in range(398) if not START_T[t + 1 : t + 3].any()
    )
    assert all(after.heads_changed < 4 and after.order == 3 for after in diff.ngrams[1:])
    assert (diff.changed, diff.unread) == (4, 0)
    assert diff.by_order == (("2-gram", 0, sum(SPEC.layers[1].moduli[0])), ("3-gram", 4, sum(SPEC.layers[1].moduli[1])))
    assert json.loads(json.dumps(diff.to_dict()))["ngrams"][0]["cids"] == ngram.tolist()


def by_definition(changed_rows, cids_T, start_T):
    """{n-gram: (heads changed, count)} position by position; -1 before a start."""
    found = {}
    rows_TS = Addresser(SPEC)(cids_T[None], start_BT=start_T[None])[5][0]
    for t in range(len(cids_T)):
        for order in (2, 3):
            start = max(s for s in range(t + 1) if start_T[s] or s == 0)
            ngram = tuple(int(cids_T[s]) if s >= start else -1 for s in range(t - order + 1, t + 1))
            heads = sum(row in changed_rows for row in rows_TS[t, SPEC.slot_orders == order].tolist())
            if heads:
                found[ngram] = (heads, found.get(ngram, (0, 0))[1] + 1)
    return found


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_every_affected_ngram_of_the_text_is_found(tmp_path, weight, share):
    edited = weight.clone()
    rows = np.random.default_rng(1).choice(len(weight), int(share * len(weight)), replace=False)
    edited[torch.from_numpy(rows)] *= 2
    one, other = saved(tmp_path / "a", weight), saved(tmp_path / "b", edited)
    diff = diff_tables(one, other, TEXT_T, START_T, most=10_000)
    expected = by_definition(set(rows.tolist()), TEXT_T, START_T)
    assert {ngram.cids: (ngram.heads_changed, ngram.count) for ngram in diff.ngrams} == expected
    assert diff.ngrams_changed == len(expected)
    read = set(Addresser(SPEC)(TEXT_T[None], start_BT=START_T[None])[5].ravel().tolist())
    assert diff.unread == len(set(rows.tolist()) - read)
    heads = [ngram.heads_changed for ngram in diff.ngrams]
    assert heads == sorted(heads, reverse=True)


def test_equal_tables_and_other_codecs(tmp_path, weight):
    one = saved(tmp_path / "a", weight)
    assert diff_tables(one, saved(tmp_path / "b", weight), TEXT_T).changed == 0
    pack(one, tmp_path / "int8", codec="int8", shards=3)
    coded = diff_tables(one, tmp_path / "int8", TEXT_T)
    assert coded.changed > 0 and 0 < coded.largest < 0.05
    assert diff_tables(one, tmp_path / "int8", TEXT_T, tolerance=coded.largest).changed == 0
    pack(one, tmp_path / "copy", shards=2)
    assert diff_tables(tmp_path / "copy", one).changed == 0


def test_a_nan_is_infinitely_far_from_a_number_and_near_itself(tmp_path, weight):
    edited = weight.clone()
    edited[7, 3] = torch.nan
    one, other = saved(tmp_path / "a", weight), saved(tmp_path / "b", edited)
    diff = diff_tables(one, other)
    assert (diff.changed, diff.largest, diff.unread) == (1, float("inf"), None)
    assert json.loads(json.dumps(diff.to_dict()))["largest"] is None
    edited[7, 2] = 5.0
    assert diff_tables(other, saved(tmp_path / "c", edited)).largest == pytest.approx(5 - float(weight[7, 2]))


def test_rows_that_no_ngram_reads_are_counted_as_such(tmp_path):
    spec = AddressSpec.qwen_ple(vocab_size=60, eos_id=3, ple_layer_ids=[1], rows_per_head=50, heads=2)
    store = ResidentStore(spec.num_rows(0), WIDTH, init_std=0)
    save_table(tmp_path / "a", store, spec, 0)
    store.weight[-1] = 1
    save_table(tmp_path / "b", store, spec, 0)
    diff = diff_tables(tmp_path / "a", tmp_path / "b", np.array([1, 3, 2, 3, 2]))
    assert (diff.changed, diff.unread, diff.ngrams) == (1, 1, ())
    assert diff.ngrams_read == len({(-1, 1), (1, 3), (-1, 2), (2, 3)}) + len(
        {(-1, -1, 1), (-1, 1, 3), (-1, -1, 2), (-1, 2, 3)}
    )


def test_what_cannot_be_compared_is_one_line(tmp_path, weight):
    one = saved(tmp_path / "a", weight)
    store = ResidentStore(SPEC.num_rows(2), WIDTH)
    save_table(tmp_path / "layer", store, SPEC, 2)
    save_table(tmp_path / "wide", ResidentStore(SPEC.num_rows(5), WIDTH + 1), SPEC, 5)
    for other, words in (("layer", f"is layer 2 of addresses {SPEC.word_code}"), ("wide", "9 numbers")):
        with pytest.raises(CheckpointError, match=words) as caught:
            diff_tables(one, tmp_path / other)
        assert "\n" not in str(caught.value)
    with pytest.raises(AddressError, match=r"compressed ids 60\.\.60"):
        diff_tables(one, one, np.array([60]))
    with pytest.raises(AddressError, match="no token"):
        diff_tables(one, one, np.zeros(0, int))
    with pytest.raises(StoreError, match="tolerance is 0 or more, not -1"):
        diff_tables(one, one, tolerance=-1)
