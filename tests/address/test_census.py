"""Counts equal what a Counter says, and a good hash meets the balls-in-bins expectation."""

import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nengram.address import AddressSpec, count_of, ngram_counts, ngrams_of, reference, take_census
from nengram.errors import AddressError

PAD = 3
SPEC = AddressSpec.engram(compressed_vocab_size=20, rows_per_head=[31, 53, 60], heads=3, layer_ids=[4, 0], pad_cid=PAD)


def windows(texts, order, pad_cid=PAD):
    """N-grams, oldest id first, of (ids, starts) texts that each begin anew."""
    found = []
    for cids, starts in texts:
        seen = reference.windows(cids.tolist(), max_order=order, pad_cid=pad_cid, starts=starts.tolist())
        found += [tuple(reversed(window)) for window in seen]
    return found


def random_text(seed, length, vocab=20):
    rng = np.random.default_rng(seed)
    return rng.integers(0, rng.integers(1, vocab + 1), length), rng.random(length) < 0.15


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(1, 5),
    st.sampled_from([-1, PAD]),
)
def test_counts_equal_a_counter(seed, length, other_length, order, pad_cid):
    text, other = random_text(seed, length), random_text(seed + 1, other_length)
    expected = Counter(windows([text], order, pad_cid))
    counts = ngram_counts(*text, order, pad_cid=pad_cid)
    assert len(counts) == len(expected)
    found = dict(zip(map(tuple, counts.ngrams_UN.tolist()), counts.counts_U.tolist(), strict=True))
    assert found == expected
    asked = ngrams_of(*other, order, pad_cid=pad_cid)
    assert count_of(counts, asked).tolist() == [expected[ngram] for ngram in map(tuple, asked.tolist())]


def test_counting_is_exact_where_packing_all_ids_into_one_word_would_not_be():
    high = 2**31 - 1
    cids_T = np.array([high, high - 1, high, high, high - 1, high])
    counts = ngram_counts(cids_T, None, 3)
    assert count_of(counts, np.array([[high, high - 1, high], [-1, -1, high], [0, 0, 0]])).tolist() == [
        2,
        1,
        0,
    ]
    assert count_of(counts, np.array([[high, high - 1, high + 2**32], [-2, -1, high]])).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ngram_counts([1, 2], None, 2), "ids must be a NumPy array"),
        (lambda: ngram_counts(np.array([1, 2]), None, 0), r"order must be an integer in 1\.\."),
        (lambda: ngram_counts(np.array([1, -2]), None, 2), r"ids to count must lie in 0\.\."),
        (lambda: ngram_counts(np.array([1, 2]), np.array([True]), 2), "starts has shape"),
        (
            lambda: count_of(ngram_counts(np.array([1, 2]), None, 2), np.array([[1, 2, 3]])),
            "counts are of order 2, the n-grams of order 3",
        ),
    ],
)
def test_wrong_counts_are_refused(call, message):
    with pytest.raises(AddressError, match=message):
        call()


def brute_force(layer_id, order, train, held_out):
    """The census of one order by Counters and loops."""
    ngrams = Counter(windows(train, order))
    layer = SPEC.layer(layer_id)
    shares = defaultdict(list)
    for slot, (slot_order, modulus) in enumerate(zip(SPEC.slot_orders, SPEC.moduli(layer_id), strict=True)):
        if slot_order != order:
            continue
        row_of = {}
        for ngram in ngrams:
            window = [*reversed(ngram), *[PAD] * (SPEC.max_order - order)]
            row_of[ngram] = reference.slot_ids(window, layer.multipliers, layer.moduli)[slot]
        guests = Counter(row_of.values())
        reads = Counter()
        for ngram, count in ngrams.items():
            reads[row_of[ngram]] += count
        shares["rows"].append(modulus)
        shares["occupied"].append(len(guests))
        shares["well_touched"].append(sum(count >= 8 for count in reads.values()))
        shares["shared"].append(sum(guests[row] > 1 for row in row_of.values()))
        shares["empty"].append(modulus * (1 - 1 / modulus) ** len(ngrams))
        shares["alone"].append(len(ngrams) * (1 - 1 / modulus) ** (len(ngrams) - 1))
    rows, cells = sum(shares["rows"]), len(ngrams) * SPEC.heads
    held = windows(held_out, order)
    return {
        "layer_id": layer_id,
        "order": order,
        "distinct_ngrams": len(ngrams),
        "rows": rows,
        "oversubscription": len(ngrams) * SPEC.heads / rows,
        "occupied": sum(shares["occupied"]) / rows,
        "expected_occupied": 1 - sum(shares["empty"]) / rows,
        "shared": sum(shares["shared"]) / cells,
        "expected_shared": 1 - sum(shares["alone"]) / cells,
        "well_touched": sum(shares["well_touched"]) / rows,
        "held_out_unseen": sum(ngram not in ngrams for ngram in held) / len(held),
    }


@pytest.mark.parametrize(("seed", "length"), [(0, 1), (1, 40), (2, 400)])
def test_the_census_equals_a_brute_force_count(seed, length):
    train = [random_text(seed, length), random_text(seed + 10, length)]
    held_out = [random_text(seed + 20, 30)]
    census = take_census(SPEC, iter(train), held_out=held_out)
    assert (census.tokens, census.held_out_tokens, census.spec_digest) == (2 * length, 30, SPEC.digest)
    assert [(one.layer_id, one.order) for one in census.orders] == [(i, n) for i in (4, 0) for n in (2, 3, 4)]
    for one, found in zip(census.orders, census.to_dict()["orders"], strict=True):
        assert found == pytest.approx(brute_force(one.layer_id, one.order, train, held_out))
    assert json.loads(json.dumps(census.to_dict()))["tokens"] == 2 * length


def test_a_batch_is_counted_as_sequences_that_each_begin_anew():
    cids_BT = np.random.default_rng(0).integers(0, 20, (3, 7))
    no_start = np.zeros(7, dtype=bool)
    assert take_census(SPEC, cids_BT) == take_census(SPEC, [(row, no_start) for row in cids_BT])
    assert take_census(SPEC, cids_BT).orders[0].held_out_unseen is None


def test_the_hash_fills_and_shares_rows_as_balls_fill_bins():
    spec = AddressSpec.engram(
        compressed_vocab_size=5000, rows_per_head=[20_000, 20_000], heads=4, layer_ids=[1], pad_cid=0
    )
    for one in take_census(spec, np.random.default_rng(0).integers(0, 5000, 30_000)).orders:
        assert one.oversubscription == pytest.approx(1.5, rel=0.01)
        assert one.occupied == pytest.approx(one.expected_occupied, rel=0.01)
        assert one.shared == pytest.approx(one.expected_shared, rel=0.01)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (np.zeros(0, dtype=int), "a census needs text"),
        ([], "a census needs text"),
        (np.array([1, 2, 20]), r"compressed id 20 at position 2 of the text is outside 0\.\.19"),
        (np.zeros(3), "ids must be integers, got float64"),
        ((np.array([1]), np.array([True])), r"pairs \(ids, starts\), got a ndarray among them"),
        ([(np.zeros(3, dtype=int), np.zeros(2, dtype=bool))], "starts has shape"),
    ],
)
def test_a_wrong_text_is_refused(train, message):
    with pytest.raises(AddressError, match=message):
        take_census(SPEC, train)
