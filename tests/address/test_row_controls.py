"""Each control takes away what it claims to, and nothing else."""

import numpy as np
import pytest
import torch

from nengram.address import CONTROLS, Addresser, AddressSpec, LayerSpec, misaligned, one_row, permuted
from nengram.errors import AddressError

SPEC = AddressSpec.engram(compressed_vocab_size=50, rows_per_head=[37, 41], heads=2, layer_ids=[3, 1], pad_cid=7)
ROWS_BTS = Addresser(SPEC)(np.random.default_rng(0).integers(0, 50, (4, 30)))[1]
KINDS = pytest.mark.parametrize("kind", [np.array, torch.tensor], ids=["numpy", "torch"])
CALLS = {
    "one_row": lambda rows_BTS: one_row(rows_BTS, SPEC, 1),
    "misaligned": misaligned,
    "permuted": lambda rows_BTS: permuted(rows_BTS, SPEC, 1, seed=5),
}


def all_rows(spec, layer_id):
    """Every row of every slot: [1, largest modulus, S], cyclic."""
    moduli_S = spec.moduli(layer_id)
    return (np.arange(moduli_S.max())[None, :, None] % moduli_S) + spec.offsets(layer_id)


def test_the_controls_are_listed_by_name():
    assert list(CONTROLS.items()) == [
        ("one_row", one_row),
        ("misaligned", misaligned),
        ("permuted", permuted),
    ]


@KINDS
@pytest.mark.parametrize("name", CONTROLS)
def test_kind_shape_and_type_are_kept_and_the_input_is_not_written(name, kind):
    rows_BTS = kind(ROWS_BTS)
    found = CALLS[name](rows_BTS)
    assert type(found) is type(rows_BTS)
    assert (found.shape, found.dtype) == (rows_BTS.shape, rows_BTS.dtype)
    np.testing.assert_array_equal(np.asarray(rows_BTS), ROWS_BTS)
    np.testing.assert_array_equal(np.asarray(found), CALLS[name](ROWS_BTS))


def test_one_row_sends_every_address_of_a_slot_to_its_first_row():
    found = one_row(ROWS_BTS, SPEC, 1)
    np.testing.assert_array_equal(found, np.broadcast_to(SPEC.offsets(1), ROWS_BTS.shape))


def test_misaligned_gives_another_sequences_rows_at_the_same_position():
    found = misaligned(ROWS_BTS)
    for b in range(4):
        np.testing.assert_array_equal(found[b], ROWS_BTS[b - 1])


@pytest.mark.parametrize("batch", [0, 1])
def test_misaligned_needs_two_sequences(batch):
    with pytest.raises(AddressError, match=f"another sequence: the batch has {batch}"):
        misaligned(ROWS_BTS[:batch])


@pytest.mark.parametrize("seed", range(5))
def test_permuted_is_a_permutation_of_each_slot_that_leaves_at_most_one_row(seed):
    for layer_id in SPEC.layer_ids:
        rows = all_rows(SPEC, layer_id)
        found = permuted(rows, SPEC, layer_id, seed)
        for slot, modulus in enumerate(SPEC.moduli(layer_id)):
            before, after = rows[0, :modulus, slot], found[0, :modulus, slot]
            assert sorted(after) == sorted(before)
            assert (after == before).sum() <= 1


def test_permuted_is_fixed_by_seed_and_layer():
    rows_BTS = ROWS_BTS[:, :, :1] % 37 * np.ones(4, dtype=np.int64)
    rows_BTS = rows_BTS + SPEC.offsets(1)
    np.testing.assert_array_equal(permuted(rows_BTS, SPEC, 1, 5), permuted(rows_BTS, SPEC, 1, 5))
    assert (permuted(rows_BTS, SPEC, 1, 5) != permuted(rows_BTS, SPEC, 1, 6)).any()


def handmade(moduli):
    layer = LayerSpec(0, None, (1, 1), (moduli,), sum(moduli))
    return AddressSpec(1, "engram", 50, 2, len(moduli), 0, "sequence", (layer,))


def test_permuted_handles_composite_and_tiny_slots():
    spec = handmade((1, 2, 12, 36))
    rows = all_rows(spec, 0)
    for seed in range(20):
        found = permuted(rows, spec, 0, seed)
        for slot, modulus in enumerate(spec.moduli(0)):
            assert sorted(found[0, :modulus, slot]) == sorted(rows[0, :modulus, slot])


def test_permuted_does_not_overflow_in_the_largest_slot_it_takes():
    spec = handmade((2**31 - 1,))
    rows = np.array([[[0], [1], [2**31 - 2]]])
    found = permuted(rows, spec, 0, 0).ravel().tolist()
    factor = (found[1] - found[0]) % (2**31 - 1)
    assert found[2] == ((2**31 - 2) * factor + found[0]) % (2**31 - 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: permuted(np.zeros((1, 1, 1), int), handmade((2**31,)), 0, 0), r"slots below 2\*\*31 rows"),
        (lambda: permuted(ROWS_BTS, SPEC, 1, -1), "seed must be an integer"),
        (lambda: permuted(ROWS_BTS[..., :3], SPEC, 1, 0), "rows have 3 slots, the address spec 4"),
        (lambda: one_row(ROWS_BTS[..., :3], SPEC, 1), "rows have 3 slots, the address spec 4"),
        (lambda: one_row(ROWS_BTS.astype(np.int32), SPEC, 1), "rows must be int64, got int32"),
        (lambda: one_row(ROWS_BTS, SPEC, 2), "no memory layer has layer_id 2"),
        (lambda: misaligned(ROWS_BTS[0]), r"rows must be \[B, T, S\]"),
    ],
)
def test_wrong_rows_are_refused(call, message):
    with pytest.raises(AddressError, match=message):
        call()
