"""Batches: every token once a pass, exact resume from any state, evaluation that covers every target once."""

import json
import warnings

import numpy as np
import pytest

from nengram.errors import ConfigError, DataError
from nengram.text import NO_TARGET, Batches, Entry, eval_windows, train_bpe
from nengram.text.pack import pack


@pytest.fixture(scope="module")
def train(prepared):
    return prepared.splits["train"]


def equal(left, right):
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def exact():
    """A split of 1 + 12 x 10 tokens: one pass at context 10 leaves nothing over."""
    tokenizer = train_bpe(["a"], 258)
    lengths = enumerate([1, 30, 2, 17, 40, 25, 6])
    return pack([Entry(str(i), "s", chr(97 + i) * (n - 1)) for i, n in lengths], tokenizer, 1, ("s",))


@pytest.mark.parametrize(("batch", "context"), [(1, 10), (3, 10), (2, 20), (12, 10), (1, 120), (120, 1)])
def test_one_pass_reads_every_token_once_and_predicts_every_other_once(exact, batch, context):
    found = [item for item, _ in Batches(exact, batch=batch, context=context, seed=5)]
    targets = np.sort(np.concatenate([b.positions_BT.ravel() for b in found]))
    assert len(targets) == len(np.unique(targets)) == 120
    assert all(np.array_equal(exact.ids_N[b.positions_BT], b.targets_BT) for b in found)
    inputs = np.bincount(np.concatenate([b.ids_BT.ravel() for b in found]), minlength=258)
    unread = np.bincount(exact.ids_N, minlength=258) - inputs
    assert unread.sum() == 1 and unread.min() == 0, "all but the very last token are inputs"


def test_a_pass_leaves_less_than_one_batch_unread(train):
    batches = Batches(train, batch=4, context=33, seed=0)
    positions = np.concatenate([b.positions_BT.ravel() for b, _ in batches])
    assert len(np.unique(positions)) == len(positions) == batches.tokens_in_one_pass
    assert 0 <= len(train) - 1 - len(positions) < 4 * 33


def test_targets_are_the_next_inputs_and_text_is_cut_at_separators_alone(prepared, train):
    for item, _ in Batches(train, batch=4, context=32, seed=1):
        assert np.array_equal(item.ids_BT[:, 1:], item.targets_BT[:, :-1])
        jumps_BT = np.diff(item.positions_BT, axis=1) != 1
        assert (item.targets_BT[:, 1:][jumps_BT] == prepared.doc_id).all()


def test_starts_mark_exactly_the_separators(prepared, train):
    for items in ((b for b, _ in Batches(train, batch=4, context=32, seed=1)), eval_windows(train, 4, 32)):
        for item in items:
            real_BT = item.targets_BT != NO_TARGET
            assert np.array_equal(item.start_BT[real_BT], (item.ids_BT == prepared.doc_id)[real_BT])


def test_resuming_at_every_state_gives_the_same_batches(train):
    settings = {"batch": 8, "context": 64, "seed": 3, "passes": 3, "on_repeat": lambda _: None}
    whole = list(Batches(train, **settings))
    assert len(whole) == 3 * Batches(train, **settings).steps_in_one_pass > 30
    for done, (_, state) in enumerate(whole, 1):
        resumed = Batches(train, **settings, state=json.loads(json.dumps(state)))
        for (left, left_state), (right, right_state) in zip(whole[done : done + 4], resumed, strict=False):
            assert equal(left, right) and left_state == right_state
    rest = list(Batches(train, **settings, state=whole[10][1]))
    assert all(equal(left[0], right[0]) for left, right in zip(whole[11:], rest, strict=True))


def test_the_state_before_the_first_batch_starts_at_the_first_batch(train):
    fresh = Batches(train, batch=2, context=16, seed=0)
    again = Batches(train, batch=2, context=16, seed=0, state=fresh.state)
    assert equal(next(iter(fresh))[0], next(iter(again))[0])


def test_the_order_of_batches_is_this_for_ever(exact):
    found = [item.positions_BT[:, [0, 9]].tolist() for item, _ in Batches(exact, batch=2, context=10, seed=7)]
    assert found == [
        [[78, 87], [68, 77]],
        [[58, 67], [88, 94]],
        [[48, 57], [95, 104]],
        [[105, 114], [21, 30]],
        [[11, 20], [38, 47]],
        [[116, 37], [1, 10]],
    ]


def test_seed_and_pass_change_the_order_and_not_the_content(train):
    def order(seed, pass_index):
        batches = Batches(train, batch=1, context=16, seed=seed, passes=2, on_repeat=lambda _: None)
        return np.concatenate([b.positions_BT.ravel() for b, _ in batches if b.pass_index == pass_index])

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    for i, left in enumerate(orders):
        for right in orders[i + 1 :]:
            assert len(left) == len(right) and (left == right).mean() < 0.1


def test_windows_of_one_batch_do_not_follow_each_other():
    tokenizer = train_bpe(["a"], 258)
    packed = pack([Entry("k", "s", "ab" * 2000)], tokenizer, 1, ("s",))
    item, _ = next(iter(Batches(packed, batch=8, context=16, seed=0)))
    assert (np.diff(item.positions_BT[:, 0]) != 16).sum() >= 6


def test_one_pass_is_the_default_and_ends_without_a_warning(train):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = Batches(train, batch=4, context=64, seed=0)
        assert len(list(batches)) == batches.steps_in_one_pass
        assert list(batches) == []


def test_repeating_warns_once_and_marks_the_batches(train):
    settings = {"batch": 16, "context": 64, "seed": 0}
    with pytest.warns(UserWarning, match="about to repeat") as caught:
        found = [b.pass_index for b, _ in Batches(train, **settings, passes=3)]
    assert len(caught) == 1
    assert found == sorted(found) and set(found) == {0, 1, 2}
    calls = []
    batches = iter(Batches(train, **settings, passes=None, on_repeat=calls.append))
    steps = found.count(0)
    for _ in range(steps):
        next(batches)
    assert calls == []
    for _ in range(2 * steps):
        next(batches)
    assert calls == [1]


def test_a_split_smaller_than_one_batch_is_refused_with_the_numbers(exact):
    Batches(exact, batch=12, context=10, seed=0)
    with pytest.raises(DataError, match=r"holds 121 tokens and one batch of 11 x 11 needs 122"):
        Batches(exact, batch=11, context=11, seed=0)


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch": 3}, {"context": 9}])
def test_a_state_of_another_run_is_refused(exact, change):
    settings = {"batch": 2, "context": 10, "seed": 0}
    state = Batches(exact, **settings).state
    with pytest.raises(DataError, match=f"has {next(iter(change))}"):
        Batches(exact, **(settings | change), state=state)


def test_a_state_of_other_data_or_a_damaged_one_is_refused(exact, train):
    settings = {"batch": 2, "context": 10, "seed": 0}
    state = Batches(exact, **settings).state
    with pytest.raises(DataError, match="has data"):
        Batches(train, **settings, state=state)
    for damage in ({"step": 6}, {"step": -1}, {"step": "2"}, {"pass_index": None}):
        with pytest.raises(DataError, match="damaged"):
            Batches(exact, **settings, state=state | damage)


@pytest.mark.parametrize(("batch", "context", "seed"), [(0, 8, 0), (2, 0, 0), (2, 8, -1)])
def test_impossible_sizes_and_seeds_are_refused(exact, batch, context, seed):
    with pytest.raises(ConfigError):
        Batches(exact, batch=batch, context=context, seed=seed)


@pytest.mark.parametrize(("batch", "context"), [(1, 1), (2, 10), (3, 7), (8, 64), (5, 1000)])
def test_evaluation_covers_every_target_once_at_its_own_place(exact, batch, context):
    found = list(eval_windows(exact, batch, context))
    assert all(b.ids_BT.shape == (batch, context) for b in found)
    positions = np.concatenate([b.positions_BT.ravel() for b in found])
    targets = np.concatenate([b.targets_BT.ravel() for b in found])
    assert np.array_equal(positions < 0, targets == NO_TARGET)
    assert np.sort(positions[positions >= 0]).tolist() == list(range(1, len(exact)))
    assert np.array_equal(exact.ids_N[positions[positions >= 0]], targets[positions >= 0])
    for item in found:
        real_BT = item.positions_BT >= 0
        assert np.array_equal(item.ids_BT[real_BT], exact.ids_N[item.positions_BT[real_BT] - 1])
        assert item.ids_BT.min() >= 0


def test_evaluation_never_varies(train):
    first, second = eval_windows(train, 4, 32), eval_windows(train, 4, 32)
    assert all(equal(left, right) for left, right in zip(first, second, strict=True))


def test_rows_of_an_evaluation_batch_lie_far_apart(train):
    batches = list(eval_windows(train, 4, 16))
    far = len(train) // 5
    assert all((np.diff(b.positions_BT[:, 0]) > far).all() for b in batches[:-1])


def test_evaluating_nothing_is_refused():
    packed = pack([Entry("k", "s", "")], train_bpe(["a"], 258), 1, ("s",))
    with pytest.raises(DataError, match="1 tokens"):
        next(eval_windows(packed, 2, 8))
