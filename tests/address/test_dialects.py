"""The released dialects: their published numbers, and rows that are right however a text is cut."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nengram.address import Addresser, AddressSpec, reference, take_census
from nengram.address.primes import is_prime
from nengram.errors import AddressError

BACKENDS = ("numba", "torch")


def test_deepseek_v41_has_the_released_numbers():
    spec = AddressSpec.deepseek_v41()
    assert [spec.num_rows(layer_id) for layer_id in (1, 14)] == [384_006_168, 384_016_682]
    assert spec.multipliers(1).tolist() == [76632096046245, 4839876093313, 35959672319349, 73987337458391]
    assert spec.multipliers(14).tolist() == [67716810739261, 51510806800915, 30921347202721, 82619226485591]
    assert spec.moduli(1)[[0, -1]].tolist() == [16_000_057, 16_000_463]
    assert spec.moduli(14)[[0, -1]].tolist() == [16_000_477, 16_000_889]
    assert (spec.max_order, spec.slots, spec.boundary, spec.pad_cid) == (4, 24, "sequence", 2)
    assert [(layer.layer_id, layer.block_index) for layer in spec.layers] == [(1, 1), (14, 14)]
    assert AddressSpec.from_json(spec.to_json()) == spec


def test_deepseek_v41_hashes_as_the_paper_and_only_its_name_differs():
    sizes = {"heads": 3, "layer_ids": [1, 6], "pad_cid": 2, "compressed_vocab_size": 1000, "seed": 5}
    ours = AddressSpec.deepseek_v41(rows_per_head=500, max_order=4, **sizes)
    paper = AddressSpec.engram(rows_per_head=[500] * 3, block_indices=[1, 6], **sizes)
    assert ours.layers == paper.layers
    assert ours.digest != paper.digest


def test_qwen_ple_has_the_released_numbers():
    spec = AddressSpec.qwen_ple(ple_layer_ids=[2])
    assert spec.multipliers(0).tolist() == [23703573157769, 20109073645365, 8052911324071]
    assert (spec.moduli(0).sum(), spec.num_rows(0)) == (320_001_446, 320_001_536)
    assert (spec.slots, spec.max_order, spec.compressed_vocab_size) == (16, 3, 248_320)
    assert (spec.boundary, spec.pad_cid, spec.end_cid) == ("eos", 248_044, 248_044)
    assert AddressSpec.from_json(spec.to_json()) == spec


def test_qwen_ple_counts_layers_by_place_and_primes_in_one_row():
    spec = AddressSpec.qwen_ple(
        vocab_size=1000, eos_id=7, ple_layer_ids=[3, 4, 9], rows_per_head=100, heads=2, divisible_by=64, max_order=4
    )
    assert [(layer.layer_id, layer.block_index) for layer in spec.layers] == [(0, 2), (1, 3), (2, 8)]
    primes = [n for n in range(100, 1000) if is_prime(n)]
    assert np.concatenate([spec.moduli(layer_id) for layer_id in range(3)]).tolist() == primes[:18]
    for layer_id in range(3):
        padding = spec.num_rows(layer_id) - spec.moduli(layer_id).sum()
        assert 0 <= padding < 64 and spec.num_rows(layer_id) % 64 == 0
    alone = AddressSpec.qwen_ple(vocab_size=1000, eos_id=7, ple_layer_ids=[4], rows_per_head=100, heads=2, max_order=4)
    assert alone.multipliers(0).tolist() == spec.multipliers(0).tolist() != spec.multipliers(1).tolist()


def qwen_spec(vocab: int, eos_id: int, max_order: int = 3) -> AddressSpec:
    return AddressSpec.qwen_ple(
        vocab_size=vocab, eos_id=eos_id, ple_layer_ids=[1, 3], rows_per_head=90, heads=2, max_order=max_order
    )


def by_definition(spec, ids_BT):
    """Rows by Qwen's own rule: replace what an earlier end of text hides by the EOS id, then hash."""
    eos_id, rows = spec.pad_cid, {layer_id: [] for layer_id in spec.layer_ids}
    for ids in ids_BT.tolist():
        for t in range(len(ids)):
            segment = t
            while segment > 0 and ids[segment - 1] != eos_id:
                segment -= 1
            window = [ids[t - lag] if t - lag >= segment else eos_id for lag in range(spec.max_order)]
            for layer in spec.layers:
                slots = reference.slot_ids(window, layer.multipliers, layer.moduli)
                rows[layer.layer_id].append(np.add(slots, reference.slot_offsets(layer.moduli)))
    shape = (*ids_BT.shape, spec.slots)
    return {layer_id: np.array(found, dtype=np.int64).reshape(shape) for layer_id, found in rows.items()}


@st.composite
def texts(draw):
    """A Qwen-like spec and ids [B, T] that are rich in ends of text."""
    vocab = draw(st.sampled_from([2, 3, 50]))
    spec = qwen_spec(vocab, draw(st.integers(0, vocab - 1)), draw(st.integers(2, 5)))
    shape = draw(st.tuples(st.integers(1, 3), st.integers(0, 12)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids_BT = rng.integers(0, vocab, shape)
    ids_BT[rng.random(shape) < 0.2] = spec.pad_cid
    return spec, ids_BT


def assert_equal_rows(found, expected):
    assert list(found) == list(expected)
    for layer_id, rows_BTS in expected.items():
        np.testing.assert_array_equal(found[layer_id], rows_BTS)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(texts(), st.data())
def test_an_end_of_text_hides_what_came_before_however_the_text_is_cut(backend, text, data):
    spec, ids_BT = text
    expected = by_definition(spec, ids_BT)
    address = Addresser(spec, backend=backend)
    assert_equal_rows(address(ids_BT), expected)
    cuts = data.draw(st.lists(st.integers(0, ids_BT.shape[1]), max_size=4))
    for places in (cuts, range(1, ids_BT.shape[1])):
        state = address.new_state(len(ids_BT))
        edges = [0, *sorted(places), ids_BT.shape[1]]
        parts = [address(ids_BT[:, a:b], state=state) for a, b in zip(edges, edges[1:], strict=False)]
        whole = {layer_id: np.concatenate([part[layer_id] for part in parts], axis=1) for layer_id in spec.layer_ids}
        assert_equal_rows(whole, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(texts(), st.data())
def test_starts_and_blocks_keep_their_meaning_beside_ends(backend, text, data):
    spec, ids_BT = text
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    start_BT, blocked_BT = (rng.random(ids_BT.shape) < 0.2 for _ in range(2))
    rows = Addresser(spec, backend=backend)(ids_BT, start_BT=start_BT, blocked_BT=blocked_BT)
    for layer in spec.layers:
        for b, ids in enumerate(ids_BT.tolist()):
            expected = reference.table_rows(
                ids,
                multipliers=layer.multipliers,
                moduli=layer.moduli,
                pad_cid=spec.pad_cid,
                starts=start_BT[b].tolist(),
                blocked=blocked_BT[b].tolist(),
                end_cid=spec.end_cid,
            )
            np.testing.assert_array_equal(rows[layer.layer_id][b], np.array(expected).reshape(-1, spec.slots))


def test_the_end_itself_still_sees_its_text_and_the_state_forgets_it():
    spec = qwen_spec(50, eos_id=7)
    address = Addresser(spec)
    state = address.new_state(1)
    address(np.array([[3, 4, 7]]), state=state)
    assert state.snapshot().tolist() == [[7, 7]]
    after = address(np.array([[5]]), state=state)[0]
    np.testing.assert_array_equal(after, address(np.array([[5]]))[0])
    assert not np.array_equal(address(np.array([[3, 7]]))[0][:, 1], address(np.array([[4, 7]]))[0][:, 1])


def test_a_tensor_stays_a_tensor():
    rows = Addresser(qwen_spec(50, 7), backend="torch")(torch.tensor([[1, 7, 2]]))
    assert all(isinstance(rows_BTS, torch.Tensor) for rows_BTS in rows.values())


def test_a_census_does_not_count_across_an_end_of_text():
    spec = qwen_spec(50, eos_id=7)
    joined = take_census(spec, np.array([1, 2, 7, 3, 4, 7]))
    apart = take_census(spec, [(np.array([1, 2, 7]), None), (np.array([3, 4, 7]), None)])
    assert joined == apart


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AddressSpec.qwen_ple(ple_layer_ids=[3, 2]), r"distinct and ascending, got \[3, 2\]"),
        (lambda: AddressSpec.qwen_ple(ple_layer_ids=[2, 2]), "distinct and ascending"),
        (lambda: AddressSpec.qwen_ple(ple_layer_ids=[0]), r"ple_layer_ids\[0\] must be an integer in 1\.\."),
        (lambda: AddressSpec.qwen_ple(ple_layer_ids=[]), "ple_layer_ids is empty"),
        (lambda: AddressSpec.qwen_ple(ple_layer_ids=[1], divisible_by=0), "divisible_by must be an integer in 1"),
        (lambda: AddressSpec.qwen_ple(ple_layer_ids=[1], eos_id=248_320), "eos_id must be an integer in 0"),
        (lambda: AddressSpec.deepseek_v41(max_order=1), r"max_order must be an integer in 2\.\."),
        (lambda: AddressSpec.deepseek_v41(pad_cid=99_092), "pad_cid must be an integer in 0"),
        (lambda: AddressSpec.deepseek_v41(layer_ids=[1, 1]), "layer_ids: 1 appears twice"),
    ],
)
def test_a_bad_argument_is_one_clear_line(make, message):
    with pytest.raises(AddressError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
