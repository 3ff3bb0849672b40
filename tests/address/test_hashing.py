"""Fast paths equal the reference for any spec, any barriers and any cut of the text."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nengram.address import Addresser, AddressSpec, LayerSpec, reference
from nengram.errors import AddressError

BACKENDS = ("numba", "torch")
SPEC = AddressSpec.engram(compressed_vocab_size=50, rows_per_head=[37, 41], heads=2, layer_ids=[3, 1], pad_cid=7)


@st.composite
def derived_specs(draw):
    vocab = draw(st.sampled_from([1, 2, 5, 1000, 2**31 - 1]))
    return AddressSpec.engram(
        compressed_vocab_size=vocab,
        rows_per_head=draw(st.lists(st.integers(1, 500) | st.integers(2**30, 2**40), min_size=1, max_size=4)),
        heads=draw(st.integers(1, 3)),
        layer_ids=draw(st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True)),
        pad_cid=draw(st.integers(0, vocab - 1)),
        seed=draw(st.integers(0, 2**40)),
    )


@st.composite
def handmade_specs(draw):
    """Any numbers a spec admits: even multipliers, composite moduli, the largest of both, padding rows."""
    vocab = draw(st.sampled_from([1, 2, 3, 1000]))
    max_order, heads = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    largest = (2**63 - 1) // max(1, vocab - 1)
    layers = []
    for layer_id in range(draw(st.integers(1, 2))):
        multipliers = draw(st.tuples(*[st.integers(1, largest) | st.integers(largest - 5, largest)] * max_order))
        modulus = st.integers(1, 50) | st.integers(1, 2**44)
        moduli = draw(st.tuples(*[st.tuples(*[modulus] * heads)] * (max_order - 1)))
        padding_rows = draw(st.integers(0, 100))
        layers.append(LayerSpec(layer_id, None, multipliers, moduli, sum(map(sum, moduli)) + padding_rows))
    return AddressSpec(1, "engram", vocab, max_order, heads, draw(st.integers(0, vocab - 1)), "sequence", tuple(layers))


@st.composite
def texts(draw):
    """A spec, ids [B, T] with anything where blocked, and both flags."""
    spec = draw(derived_specs() | handmade_specs())
    shape = draw(st.tuples(st.integers(0, 3), st.integers(0, 12)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    high = min(spec.compressed_vocab_size, draw(st.sampled_from([2, 2**31])))
    cids_BT = rng.integers(0, high, shape)
    cids_BT[rng.random(shape) < 0.2] = spec.compressed_vocab_size - 1
    start_BT = rng.random(shape) < draw(st.sampled_from([0, 0.2, 0.5]))
    blocked_BT = rng.random(shape) < draw(st.sampled_from([0, 0.2, 0.5]))
    cids_BT[blocked_BT] = rng.choice([-1, 0, spec.compressed_vocab_size, 2**62, -(2**63)], blocked_BT.sum())
    return spec, cids_BT, start_BT, blocked_BT


def by_reference(spec, cids_BT, start_BT, blocked_BT):
    expected = {}
    for layer in spec.layers:
        rows_BTS = np.empty((*cids_BT.shape, spec.slots), dtype=np.int64)
        for b, cids in enumerate(cids_BT.tolist()):
            rows = reference.table_rows(
                cids,
                multipliers=layer.multipliers,
                moduli=layer.moduli,
                pad_cid=spec.pad_cid,
                starts=start_BT[b].tolist(),
                blocked=blocked_BT[b].tolist(),
            )
            rows_BTS[b] = np.array(rows).reshape(rows_BTS[b].shape)
        expected[layer.layer_id] = rows_BTS
    return expected


def in_chunks(address, cids_BT, start_BT, blocked_BT, cuts, state):
    edges = [0, *sorted(cuts), cids_BT.shape[1]]
    parts = []
    for first, last in zip(edges, edges[1:], strict=False):
        at = np.s_[:, first:last]
        parts.append(address(cids_BT[at], start_BT=start_BT[at], blocked_BT=blocked_BT[at], state=state))
    return {layer_id: np.concatenate([part[layer_id] for part in parts], axis=1) for layer_id in parts[0]}


def assert_equal_rows(found, expected):
    assert list(found) == list(expected)
    for layer_id, rows_BTS in expected.items():
        np.testing.assert_array_equal(found[layer_id], rows_BTS)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(texts())
def test_every_backend_equals_the_reference(backend, text):
    spec, cids_BT, start_BT, blocked_BT = text
    expected = by_reference(spec, cids_BT, start_BT, blocked_BT)
    rows = Addresser(spec, backend=backend)(cids_BT, start_BT=start_BT, blocked_BT=blocked_BT)
    assert_equal_rows(rows, expected)
    for layer_id, rows_BTS in rows.items():
        assert rows_BTS.dtype == np.int64
        assert ((rows_BTS >= 0) & (rows_BTS < spec.num_rows(layer_id))).all()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30, deadline=None)
@given(texts(), st.data())
def test_a_text_may_be_cut_anywhere(backend, text, data):
    spec, cids_BT, start_BT, blocked_BT = text
    address = Addresser(spec, backend=backend)
    whole = address(cids_BT, start_BT=start_BT, blocked_BT=blocked_BT)
    cuts = data.draw(st.lists(st.integers(0, cids_BT.shape[1]), max_size=4))
    for places in (cuts, range(1, cids_BT.shape[1])):
        state = address.new_state(len(cids_BT))
        assert_equal_rows(in_chunks(address, cids_BT, start_BT, blocked_BT, places, state), whole)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30, deadline=None)
@given(texts(), st.data())
def test_restore_and_reorder_continue_the_right_sequences(backend, text, data):
    spec, cids_BT, start_BT, blocked_BT = text
    address = Addresser(spec, backend=backend)
    cut = data.draw(st.integers(0, cids_BT.shape[1]))
    order = data.draw(st.lists(st.integers(0, len(cids_BT) - 1), max_size=4) if len(cids_BT) else st.just([]))
    left, right = np.s_[:, :cut], np.s_[:, cut:]
    state = address.new_state(len(cids_BT))
    address(cids_BT[left], start_BT=start_BT[left], blocked_BT=blocked_BT[left], state=state)
    snapshot = state.snapshot()
    first = address(cids_BT[right], start_BT=start_BT[right], blocked_BT=blocked_BT[right], state=state)

    state.restore(snapshot)
    again = address(cids_BT[right], start_BT=start_BT[right], blocked_BT=blocked_BT[right], state=state)
    assert_equal_rows(again, first)

    state.restore(snapshot)
    state.reorder(order)
    at = np.array(order, dtype=int)
    moved = address(cids_BT[at][right], start_BT=start_BT[at][right], blocked_BT=blocked_BT[at][right], state=state)
    assert_equal_rows(moved, {layer_id: rows_BTS[at] for layer_id, rows_BTS in first.items()})


def test_backends_can_continue_each_other():
    cids_BT = np.random.default_rng(0).integers(0, 50, (2, 9))
    addresses = [Addresser(SPEC, backend=backend) for backend in BACKENDS]
    state = addresses[0].new_state(2)
    parts = [addresses[t % 2](cids_BT[:, t : t + 1], state=state)[3] for t in range(9)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), addresses[0](cids_BT)[3])


def test_a_snapshot_is_not_changed_by_what_follows():
    address = Addresser(SPEC)
    state = address.new_state(1)
    snapshot = state.snapshot()
    address(np.array([[1, 2, 3]]), state=state)
    assert snapshot.tolist() == [[7, 7]]
    assert state.snapshot().tolist() == [[3, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_state_holds_what_a_later_position_would_see(backend):
    address = Addresser(SPEC, backend=backend)
    flags = np.array([[False, False, True], [False, True, False], [False, False, True]])
    state = address.new_state(3)
    start_BT, blocked_BT = flags & [[True], [False], [False]], flags & [[False], [True], [True]]
    address(np.array([[1, 2, 3]] * 3), start_BT=start_BT, blocked_BT=blocked_BT, state=state)
    assert state.snapshot().tolist() == [[3, 7], [3, 7], [7, 7]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0)])
def test_empty_batches_and_chunks_work(backend, shape):
    address = Addresser(SPEC, backend=backend)
    state = address.new_state(shape[0])
    before = state.snapshot()
    rows = address(np.zeros(shape, dtype=np.int64), state=state)
    assert {layer_id: rows_BTS.shape for layer_id, rows_BTS in rows.items()} == dict.fromkeys((3, 1), (*shape, 4))
    np.testing.assert_array_equal(state.snapshot(), before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", ">i4"])
def test_any_integer_type_gives_the_same_rows(backend, dtype):
    address = Addresser(SPEC, backend=backend)
    cids_BT = np.random.default_rng(1).integers(0, 50, (2, 6))
    cids_BT.flags.writeable = False
    assert_equal_rows(address(cids_BT.astype(dtype)), address(cids_BT))
    assert_equal_rows(address(cids_BT.T.copy().T[:, ::2]), address(cids_BT[:, ::2].copy()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_id_is_named_and_the_state_kept(backend):
    address = Addresser(SPEC, backend=backend)
    state = address.new_state(2)
    address(np.array([[1, 2], [3, 4]]), state=state)
    before = state.snapshot()
    for bad in (-1, 50, 2**40):
        for kind in (np.array, torch.tensor):
            cids_BT = kind([[1, 2, 3], [4, bad, bad]])
            with pytest.raises(AddressError, match=rf"id {bad} at sequence 1, position 1 is outside 0\.\.49"):
                address(cids_BT, state=state)
    np.testing.assert_array_equal(state.snapshot(), before)


IDS = np.zeros((2, 3), dtype=np.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cids_BT": [[1, 2]]}, r"ids must be a NumPy array or torch tensor \[B, T\], got list"),
        ({"cids_BT": IDS.astype(float)}, "ids must be integers, got float64"),
        ({"cids_BT": torch.zeros(2, 3)}, "ids must be integers, got float32"),
        ({"cids_BT": IDS.astype(bool)}, "ids must be integers, got bool"),
        ({"cids_BT": IDS[0]}, r"ids must be \[B, T\], got shape \[3\]"),
        ({"cids_BT": IDS, "start_BT": IDS}, "start_BT must be bool, got int64"),
        (
            {"cids_BT": IDS, "start_BT": [True]},
            "start_BT must be a NumPy array or torch tensor of bool, got list",
        ),
        ({"cids_BT": IDS, "blocked_BT": IDS[:1] > 0}, r"blocked_BT has shape \[1, 3\], the ids \[2, 3\]"),
        ({"cids_BT": IDS, "state": Addresser(SPEC).new_state(3)}, "the state holds 3 sequences, the ids 2"),
        ({"cids_BT": IDS, "state": IDS}, "state must come from Addresser.new_state, got ndarray"),
    ],
)
def test_a_wrong_argument_is_one_clear_line(arguments, message):
    with pytest.raises(AddressError, match=message) as caught:
        Addresser(SPEC)(**arguments)
    assert "\n" not in str(caught.value)


def test_a_state_of_another_spec_is_refused():
    other = AddressSpec.engram(compressed_vocab_size=50, rows_per_head=[37, 41], heads=2, layer_ids=[1, 3], pad_cid=7)
    with pytest.raises(AddressError, match=f"{other.word_code}, this is {SPEC.word_code}"):
        Addresser(SPEC)(IDS, state=Addresser(other).new_state(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda state: state.restore(np.zeros((2, 3), int)), r"a snapshot of this spec is integers \[B, 2\]"),
        (
            lambda state: state.restore(np.zeros((2, 2))),
            r"a snapshot of this spec is integers \[B, 2\], got float64",
        ),
        (lambda state: state.restore(np.full((2, 2), 50)), r"the snapshot holds ids outside 0\.\.49"),
        (lambda state: state.reorder([0, 2]), r"reorder names a sequence outside 0\.\.1: \[0, 2\]"),
        (lambda state: state.reorder([-1]), r"reorder names a sequence outside 0\.\.1"),
        (lambda state: state.reorder([0.5]), r"reorder needs sequence numbers \[B\], got float64"),
    ],
)
def test_a_wrong_snapshot_or_order_is_refused(call, message):
    with pytest.raises(AddressError, match=message):
        call(Addresser(SPEC).new_state(2))


def test_an_unknown_backend_names_the_nearest():
    with pytest.raises(AddressError, match=r'unknown backend \'numbo\' \(did you mean "numba"\?\)'):
        Addresser(SPEC, backend="numbo")


def test_the_compiled_loop_refuses_ids_on_another_device():
    with pytest.raises(AddressError, match='backend "numba" reads ids on the CPU, these are on meta'):
        Addresser(SPEC, backend="numba")(torch.zeros(1, 1, dtype=torch.int64, device="meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@settings(max_examples=30, deadline=None)
@given(texts())
def test_ids_on_an_accelerator_give_the_same_rows_there(text):
    spec, *arrays = text
    cids_BT, start_BT, blocked_BT = (torch.from_numpy(array).cuda() for array in arrays)
    address = Addresser(spec)
    state = address.new_state(len(cids_BT))
    rows = address(cids_BT, start_BT=start_BT, blocked_BT=blocked_BT, state=state)
    assert all(rows_BTS.is_cuda for rows_BTS in rows.values())
    assert_equal_rows({layer_id: rows_BTS.cpu() for layer_id, rows_BTS in rows.items()}, by_reference(spec, *arrays))
