"""A spec is numbers: it survives a round trip, has one digest, and nothing malformed gets past it."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nengram.address import AddressSpec
from nengram.errors import AddressError

ARGUMENTS = {
    "compressed_vocab_size": 1000,
    "rows_per_head": [100, 107],
    "heads": 2,
    "layer_ids": [1, 4],
    "pad_cid": 2,
    "block_indices": [0, 3],
}
SPEC = AddressSpec.engram(**ARGUMENTS)


def edited(*path, value):
    """The spec's JSON with one field replaced (or removed, by `value=...`)."""
    content = json.loads(SPEC.to_json())
    at = content
    for step in path[:-1]:
        at = at[step]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return json.dumps(content)


def test_views_agree_with_the_numbers():
    assert SPEC.layer_ids == (1, 4)
    assert (SPEC.slots, SPEC.slot_orders.tolist()) == (4, [2, 2, 3, 3])
    assert SPEC.moduli(1).tolist() == [101, 103, 107, 109]
    assert SPEC.moduli(4).tolist() == [113, 127, 131, 137]
    assert SPEC.offsets(4).tolist() == [0, 113, 240, 371]
    assert SPEC.num_rows(4) == 508
    assert {SPEC.moduli(1).dtype, SPEC.offsets(1).dtype, SPEC.multipliers(1).dtype} == {np.dtype(np.int64)}
    assert [layer.block_index for layer in SPEC.layers] == [0, 3]


def test_layer_order_changes_primes_and_not_multipliers():
    turned = AddressSpec.engram(**ARGUMENTS | {"layer_ids": [4, 1]})
    assert turned.multipliers(1).tolist() == SPEC.multipliers(1).tolist()
    assert turned.moduli(4).tolist() == SPEC.moduli(1).tolist()
    assert turned.digest != SPEC.digest


def test_the_digest_is_the_committed_one():
    assert SPEC.digest == "c4bc40a08b292ba72e65b86eb65c05c68755a78ca328d710658a2e1e3c7ba4f9"
    assert SPEC.word_code == "sifus-hafob-moson"


def test_every_number_enters_the_digest():
    layer = SPEC.layers[0]
    changed = [
        dataclasses.replace(SPEC, compressed_vocab_size=999),
        dataclasses.replace(SPEC, pad_cid=3),
        dataclasses.replace(SPEC, layers=SPEC.layers[::-1]),
    ] + [
        dataclasses.replace(SPEC, layers=(dataclasses.replace(layer, **{field: value}), SPEC.layers[1]))
        for field, value in {
            "layer_id": 2,
            "block_index": None,
            "multipliers": (1, *layer.multipliers[1:]),
            "moduli": ((101, 103), (107, 108)),
            "num_rows": 421,
        }.items()
    ]
    assert len({spec.digest for spec in [SPEC, *changed]}) == len(changed) + 1


@settings(max_examples=50, deadline=None)
@given(
    st.builds(
        AddressSpec.engram,
        compressed_vocab_size=st.integers(10, 2**31 - 1),
        rows_per_head=st.lists(st.integers(1, 10_000), min_size=1, max_size=4),
        heads=st.integers(1, 4),
        layer_ids=st.lists(st.integers(0, 2**20), min_size=1, max_size=4, unique=True),
        pad_cid=st.integers(0, 9),
        seed=st.integers(0, 2**40),
    )
)
def test_json_round_trips_and_no_slot_shares_a_modulus(spec):
    again = AddressSpec.from_json(spec.to_json())
    assert again == spec
    assert again.digest == spec.digest
    moduli = [modulus for layer in spec.layers for heads in layer.moduli for modulus in heads]
    assert len(set(moduli)) == len(moduli)


def test_padding_rows_are_allowed():
    spec = AddressSpec.from_json(edited("layers", 0, "num_rows", value=512))
    assert spec.num_rows(1) == 512
    assert spec.offsets(1).tolist() == SPEC.offsets(1).tolist()


LAYER = ("layers", 0)
TOO_LARGE = str((2**63 - 1) // 999 + 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not valid JSON"),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"version": 1, "version": 1}', "a key appears twice"),
        ("[]", r"address spec must be a JSON object, got \[\]"),
        ("3", "address spec must be a JSON object, got 3"),
        (edited("version", value=2), "version 2 is not known; this program reads version 1"),
        (edited("version", value=True), "version True is not known"),
        (edited("version", value=1.0), r"version 1\.0 is not known"),
        (edited("dialect", value="engramm"), r'unknown dialect .engramm. \(did you mean "engram"\?\)'),
        (edited("dialect", value=None), "unknown dialect None"),
        (
            edited("boundary", value="sequences"),
            r'unknown boundary .sequences. \(did you mean "sequence"\?\)',
        ),
        (edited("compressed_vocab_size", value=0), r"compressed_vocab_size must be an integer in 1\.\."),
        (edited("compressed_vocab_size", value=2**31), r"compressed_vocab_size must be an integer in 1\.\."),
        (edited("max_order", value=1), r"max_order must be an integer in 2\.\."),
        (edited("max_order", value=4), r"layers\[0\]\.multipliers must have 4 entries \(max_order\)"),
        (edited("heads", value=0), r"heads must be an integer in 1\.\."),
        (edited("heads", value=3), r"layers\[0\]\.moduli\[0\] must have 3 entries \(heads\)"),
        (edited("pad_cid", value=1000), r"pad_cid must be an integer in 0\.\.999, got 1000"),
        (edited("pad_cid", value=-1), r"pad_cid must be an integer in 0\.\.999, got -1"),
        (edited("layers", value=[]), "layers is empty"),
        (edited("layers", value={}), r"layers must be a JSON array, got \{\}"),
        (edited(*LAYER, value=7), r"layers\[0\] must be a JSON object, got 7"),
        (edited("pad_cidd", value=1), r'unknown key .pad_cidd. \(did you mean "pad_cid"\?\)'),
        (edited(*LAYER, "seed", value=1), r"layers\[0\] has an unknown key 'seed'"),
        (edited(*LAYER, "layer_id", value=-1), r"layers\[0\]\.layer_id must be an integer in 0\.\."),
        (edited(*LAYER, "layer_id", value=4), "layer_id: 4 appears twice"),
        (edited(*LAYER, "block_index", value=-1), r"layers\[0\]\.block_index must be an integer"),
        (edited(*LAYER, "block_index", value=3), "block_index: 3 appears twice"),
        (edited(*LAYER, "multipliers", value=["1", "1"]), r"multipliers must have 3 entries"),
        (edited(*LAYER, "multipliers", value="111"), r"multipliers must be a JSON array"),
        (edited(*LAYER, "multipliers", 0, value=1), r"multipliers\[0\] must be a decimal string"),
        (edited(*LAYER, "multipliers", 0, value="0"), r"multipliers\[0\] must be a decimal string"),
        (edited(*LAYER, "multipliers", 0, value="-1"), r"multipliers\[0\] must be a decimal string"),
        (edited(*LAYER, "multipliers", 0, value="1_0"), r"multipliers\[0\] must be a decimal string"),
        (edited(*LAYER, "multipliers", 0, value="1\n"), r"multipliers\[0\] must be a decimal string"),
        (edited(*LAYER, "multipliers", 0, value="9" * 5000), r"multipliers\[0\] must be a decimal string"),
        (edited(*LAYER, "multipliers", 0, value=TOO_LARGE), rf"multipliers\[0\] .* got {TOO_LARGE}"),
        (edited(*LAYER, "moduli", value=[[101, 103]]), r"moduli must have 2 entries \(max_order - 1\)"),
        (edited(*LAYER, "moduli", 0, value=101), r"moduli\[0\] must be a JSON array"),
        (edited(*LAYER, "moduli", 0, 0, value=0), r"moduli\[0\]\[0\] must be an integer in 1\.\."),
        (edited(*LAYER, "moduli", 0, 0, value=2**48), r"moduli\[0\]\[0\] must be an integer in 1\.\."),
        (edited(*LAYER, "num_rows", value=419), r"num_rows must be an integer in 420\.\..* got 419"),
        (edited(*LAYER, "num_rows", value=2**48), r"num_rows must be an integer in 420\.\."),
    ]
    + [
        (edited(*path, value=value), rf"{path[-1]} must be an integer .* got")
        for path in (("compressed_vocab_size",), ("max_order",), ("heads",), ("pad_cid",))
        + ((*LAYER, "layer_id"), (*LAYER, "block_index"), (*LAYER, "num_rows"))
        for value in (2.0, "2", True, float("nan"), [2])
    ]
    + [
        (edited(field, value=...), f"address spec lacks the key '{field}'")
        for field in json.loads(SPEC.to_json())
        if field != "version"
    ]
    + [
        (edited(*LAYER, field, value=...), rf"layers\[0\] lacks the key '{field}'")
        for field in json.loads(SPEC.to_json())["layers"][0]
    ]
    + [(edited("version", value=...), "address spec lacks the key 'version'")],
)
def test_malformed_json_is_refused_by_name(text, message):
    with pytest.raises(AddressError, match=message) as caught:
        AddressSpec.from_json(text)
    assert "\n" not in str(caught.value)


def test_the_largest_multiplier_is_accepted():
    largest = str((2**63 - 1) // 999)
    assert AddressSpec.from_json(edited(*LAYER, "multipliers", 0, value=largest)).multipliers(1)[0] == int(largest)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("compressed_vocab_size", 0, r"compressed_vocab_size must be an integer in 1\.\."),
        ("rows_per_head", [], "rows_per_head is empty: give one per order, from 2 up"),
        ("rows_per_head", 100, "rows_per_head must be a list of integers"),
        ("rows_per_head", [100, 0], r"rows_per_head\[1\] must be an integer in 1\.\..*, got 0"),
        ("rows_per_head", [100.0, 100], r"rows_per_head\[0\] must be an integer .* got 100\.0"),
        ("rows_per_head", "100", "rows_per_head must be a list of integers"),
        ("heads", 0, r"heads must be an integer in 1\.\.4095, got 0"),
        ("heads", True, "heads must be an integer .* got True"),
        ("layer_ids", [], "layer_ids is empty"),
        ("layer_ids", [1, 1], "layer_ids: 1 appears twice"),
        ("layer_ids", [1, -4], r"layer_ids\[1\] must be an integer in 0\.\."),
        ("pad_cid", 1000, r"pad_cid must be an integer in 0\.\.999, got 1000"),
        ("seed", -1, r"seed must be an integer in 0\.\."),
        ("block_indices", [0], "block_indices has 1 entries for 2 layer_ids"),
        ("block_indices", [0, 0], "block_index: 0 appears twice"),
    ],
)
def test_a_bad_argument_is_one_clear_line(argument, value, message):
    with pytest.raises(AddressError, match=message) as caught:
        AddressSpec.engram(**ARGUMENTS | {argument: value})
    assert "\n" not in str(caught.value)


def test_numpy_integers_are_welcome():
    arguments = ARGUMENTS | {
        "heads": np.int64(2),
        "rows_per_head": np.array([100, 107]),
        "pad_cid": np.int32(2),
    }
    assert AddressSpec.engram(**arguments).digest == SPEC.digest


def test_an_unknown_layer_is_refused_with_the_known_ones():
    with pytest.raises(AddressError, match="no memory layer has layer_id 2; this spec has 1, 4"):
        SPEC.num_rows(2)
