"""The resident store: what is lent stays intact, what is wrong is named, what is saved goes on exactly."""

import subprocess
import sys

import pytest
import torch

from nengram.errors import StoreError
from nengram.store import RULES, ResidentStore, RowwiseAdagrad, SparseAdam, coalesce, make_rule


def train(store: ResidentStore, rule, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        rows_N = torch.randint(0, store.num_rows, (40,), generator=generator)
        store.update(*coalesce(rows_N, torch.randn(40, store.row_width, generator=generator)), rule, 0.01)


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), (2, 63, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_are_the_rows(shape, dtype):
    store = ResidentStore(50, 6, dtype=dtype)
    rows = torch.randint(0, 50, shape)
    with store.prefetch(rows) as ticket:
        assert ticket.vectors().shape == (*shape, 6)
        assert torch.equal(ticket.vectors(), store.weight[rows])


def test_a_held_ticket_survives_whatever_happens_to_others():
    store = ResidentStore(40, 8, poison_released=True)
    held = store.prefetch(torch.arange(12))
    expected = store.weight[:12].clone()
    for size in (12, 3, 30, 12, 1, 12):
        others = [store.prefetch(torch.randint(0, 40, (size,))) for _ in range(6)]
        assert len({ticket.vectors().data_ptr() for ticket in [held, *others]}) == 7
        for ticket in others:
            ticket.release()
    assert torch.equal(held.vectors(), expected)


def test_released_buffers_are_poisoned_and_used_again():
    store = ResidentStore(40, 8, poison_released=True)
    ticket = store.prefetch(torch.arange(12))
    kept = ticket.vectors()
    ticket.release()
    assert kept.isnan().all()
    assert store.prefetch(torch.arange(12)).vectors().data_ptr() == kept.data_ptr()


def test_use_after_release_raises():
    store = ResidentStore(4, 2)
    ticket = store.prefetch(torch.tensor([1]))
    ticket.release()
    with pytest.raises(StoreError, match="released"):
        ticket.vectors()
    with pytest.raises(StoreError, match="released"):
        ticket.release()


def test_backward_through_a_buffer_lent_again_is_refused():
    store = ResidentStore(4, 2)
    ticket = store.prefetch(torch.tensor([1, 2]))
    vectors = ticket.vectors().detach().requires_grad_()
    loss = vectors.square().sum()
    ticket.release()
    store.prefetch(torch.tensor([0, 3]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_buffer_first_lent_under_inference_mode_serves_training():
    store = ResidentStore(4, 2)
    with torch.inference_mode():
        store.prefetch(torch.tensor([1, 2])).release()
    with store.prefetch(torch.tensor([1, 2])) as ticket:
        vectors = ticket.vectors().detach().requires_grad_()
        vectors.square().sum().backward()
        assert torch.equal(vectors.grad, 2 * store.weight[1:3])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (torch.tensor([[0, 3], [9, 10]]), r"row 10 at position \[1, 1\] is outside a table of 10 rows"),
        (torch.tensor([0, -1]), r"row -1 at position \[1\]"),
        (torch.tensor([0], dtype=torch.int32), "must be int64, not int32"),
    ],
)
def test_bad_rows_are_named(rows, words):
    with pytest.raises(StoreError, match=words):
        ResidentStore(10, 2).prefetch(rows)


def test_bad_updates_are_refused_and_change_nothing():
    store = ResidentStore(10, 2)
    before = store.weight.clone()
    for rows, grads, words in (
        ([1, 1], torch.ones(2, 2), "distinct and ascending"),
        ([2, 1], torch.ones(2, 2), "distinct and ascending"),
        ([1, 10], torch.ones(2, 2), "row 10"),
        ([1, 2], torch.ones(2, 3), "gradients"),
    ):
        with pytest.raises(StoreError, match=words):
            store.update(torch.tensor(rows), grads, SparseAdam(), 0.1)
    assert torch.equal(store.weight, before)
    assert store.step == 0
    assert store.state == {}


@pytest.mark.parametrize("name", RULES)
def test_resume_is_exact(name):
    whole, first = ResidentStore(30, 4), ResidentStore(30, 4)
    train(whole, make_rule(name), 0, 10)
    train(first, make_rule(name), 0, 6)
    saved = {key: tensor.clone() for key, tensor in first.tensors().items()}
    second = ResidentStore(30, 4, seed=99)
    second.load_tensors(saved)
    train(second, make_rule(name), 6, 10)
    assert second.tensors().keys() == whole.tensors().keys()
    for key, tensor in whole.tensors().items():
        assert torch.equal(second.tensors()[key], tensor), key


def test_resume_with_another_rule_is_refused():
    store, fresh = ResidentStore(30, 4), ResidentStore(30, 4)
    train(store, SparseAdam(), 0, 2)
    fresh.load_tensors(store.tensors())
    with pytest.raises(StoreError, match="state is sparse_adam, not rowwise_adagrad"):
        train(fresh, RowwiseAdagrad(), 2, 3)
    fresh.load_tensors({"weight": store.weight})
    train(fresh, RowwiseAdagrad(), 2, 3)
    assert set(fresh.tensors()) == {"weight", "step", "state.rowwise_adagrad.sum_sq"}


def test_loading_copies():
    store, other = ResidentStore(30, 4), ResidentStore(30, 4)
    train(store, SparseAdam(), 0, 2)
    other.load_tensors(store.tensors())
    saved = {key: tensor.clone() for key, tensor in other.tensors().items()}
    train(store, SparseAdam(), 2, 3)
    assert all(torch.equal(other.tensors()[key], tensor) for key, tensor in saved.items())


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "weight is missing"),
        ({"weight": torch.zeros(3, 4)}, r"weight is \(3, 4\), this table is \(30, 4\)"),
        ({"weight": torch.zeros(30, 4).bfloat16()}, "bfloat16"),
        ({"weight": torch.zeros(30, 4), "step": torch.zeros(2)}, "step is one number"),
        ({"weight": torch.zeros(30, 4), "moment": torch.zeros(30)}, 'no entry "moment"'),
        ({"weight": torch.zeros(30, 4), "state.sparse_adam.exp_avg": torch.zeros(3, 4)}, "exp_avg has shape"),
        ({"weight": torch.zeros(30, 4), "state.a.x": torch.zeros(30), "state.b.x": torch.zeros(30)}, "a, b"),
    ],
)
def test_bad_tensors_are_refused_and_change_nothing(tensors, words):
    store = ResidentStore(30, 4)
    before = store.weight.clone()
    with pytest.raises(StoreError, match=words):
        store.load_tensors(tensors)
    assert torch.equal(store.weight, before)


def test_state_that_does_not_fit_the_rule_is_refused_at_the_update():
    store = ResidentStore(30, 4)
    store.load_tensors({"weight": torch.zeros(30, 4), "state.sparse_adam.exp_avg": torch.zeros(30, 3)})
    with pytest.raises(StoreError, match="does not fit"):
        train(store, SparseAdam(), 0, 1)


def test_rows_start_at_the_asked_scale_and_depend_on_the_seed_alone():
    store = ResidentStore(2000, 16, init_std=0.02, seed=5)
    assert store.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert torch.equal(store.weight, ResidentStore(2000, 16, init_std=0.02, seed=5).weight)
    assert not torch.equal(store.weight, ResidentStore(2000, 16, init_std=0.02, seed=6).weight)
    assert not ResidentStore(20, 4, init_std=0.0).weight.any()
    half = ResidentStore(2000, 16, init_std=0.02, seed=5, dtype=torch.bfloat16)
    assert torch.equal(half.weight, store.weight.bfloat16())


def test_a_bfloat16_table_is_updated_in_float32_and_rounded_to_nearest():
    store, twin = ResidentStore(30, 4, dtype=torch.bfloat16), ResidentStore(30, 4)
    twin._update_compiled = lambda *_: False
    rows_U = torch.tensor([3, 7])
    for seed in range(3):
        twin.weight.copy_(store.weight)
        grads_UE = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
        for table in (store, twin):
            table.update(rows_U, grads_UE, SparseAdam(), 0.01)
        assert torch.equal(store.weight, twin.weight.bfloat16())
        assert torch.equal(store.state["exp_avg"], twin.state["exp_avg"])


def test_a_rule_of_the_users_own_needs_only_the_protocol():
    class Plain:
        name = "plain_sgd"

        def state_shapes(self, num_rows, row_width):
            return {}

        def apply(self, weight_UE, grads_UE, state, *, lr, step):
            return weight_UE - lr * grads_UE, {}

    store = ResidentStore(5, 2, init_std=0.0)
    store.update(torch.tensor([1, 3]), torch.ones(2, 2), Plain(), 0.5)
    assert store.weight.tolist() == [[0, 0], [-0.5, -0.5], [0, 0], [-0.5, -0.5], [0, 0]]


def test_importing_the_store_compiles_nothing():
    code = "import sys, nengram.store; assert not {'numba', 'transformers', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
