"""Each update rule against code that others wrote (torch's optimisers) or a loop one can check by eye."""

import math

import pytest
import torch

from nengram.errors import ConfigError
from nengram.store import (
    RULES,
    ResidentStore,
    RowwiseAdagrad,
    RowwiseRMSprop,
    SparseAdam,
    coalesce,
    kernels,
    make_rule,
)

ROWS, WIDTH, STEPS, LR = 29, 5, 12, 0.05


def lookups(seed: int, row_width: int = WIDTH):
    """Batches in which rows repeat, stay away for a while and come back."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        rows_N = torch.randint(0, ROWS, (14,), generator=generator)
        yield rows_N, torch.randn(14, row_width, generator=generator)


def trained(rule, *, row_width: int = WIDTH, force_torch: bool = False, seed: int = 3) -> ResidentStore:
    store = ResidentStore(ROWS, row_width, init_std=1.0, seed=1)
    if force_torch:
        store._update_compiled = lambda *_: False
    for rows_N, grads_NE in lookups(seed, row_width):
        store.update(*coalesce(rows_N, grads_NE), rule, LR)
    return store


def train_torch(make_optimizer, row_width: int) -> torch.Tensor:
    start = ResidentStore(ROWS, row_width, init_std=1.0, seed=1).weight
    table = torch.nn.Embedding(ROWS, row_width, sparse=True, _weight=start.clone())
    optimizer = make_optimizer(table.parameters())
    for rows_N, grads_NE in lookups(3, row_width):
        optimizer.zero_grad()
        table(rows_N).backward(grads_NE)
        optimizer.step()
    return table.weight.detach()


@pytest.mark.parametrize("force_torch", [False, True])
def test_sparse_adam_is_torchs(force_torch):
    expected = train_torch(lambda p: torch.optim.SparseAdam(p, lr=LR, betas=(0.8, 0.9), eps=1e-6), WIDTH)
    store = trained(SparseAdam(betas=(0.8, 0.9), eps=1e-6), force_torch=force_torch)
    torch.testing.assert_close(store.weight, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("force_torch", [False, True])
def test_rowwise_adagrad_at_width_one_is_torchs_sparse_adagrad(force_torch):
    expected = train_torch(lambda p: torch.optim.Adagrad(p, lr=LR, eps=1e-10), 1)
    store = trained(RowwiseAdagrad(), row_width=1, force_torch=force_torch)
    torch.testing.assert_close(store.weight, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", [RowwiseAdagrad(eps=1e-3), RowwiseRMSprop(beta=0.7, eps=1e-3)])
@pytest.mark.parametrize("force_torch", [False, True])
def test_rowwise_rules_are_this_loop(rule, force_torch):
    weight = ResidentStore(ROWS, WIDTH, init_std=1.0, seed=1).weight.tolist()
    accumulated: dict[int, float] = {}
    for rows_N, grads_NE in lookups(3):
        for row in sorted(set(rows_N.tolist())):
            grad = grads_NE[rows_N == row].sum(0).tolist()
            mean_sq = sum(g * g for g in grad) / WIDTH
            if isinstance(rule, RowwiseAdagrad):
                accumulated[row] = accumulated.get(row, 0.0) + mean_sq
            elif row in accumulated:
                accumulated[row] = 0.7 * accumulated[row] + 0.3 * mean_sq
            else:
                accumulated[row] = mean_sq
            for e in range(WIDTH):
                weight[row][e] -= LR * grad[e] / (math.sqrt(accumulated[row]) + 1e-3)
    store = trained(rule, force_torch=force_torch)
    torch.testing.assert_close(store.weight, torch.tensor(weight), rtol=1e-5, atol=1e-6)


def test_first_rmsprop_step_has_the_length_of_lr():
    store = ResidentStore(3, 4, init_std=0.0)
    store.update(torch.tensor([1]), torch.full((1, 4), 7.0), RowwiseRMSprop(), 0.1)
    torch.testing.assert_close(store.weight[1], torch.full((4,), -0.1))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("row_width", [1, 4, 64])
def test_compiled_and_torch_forms_agree(name, row_width):
    compiled = trained(make_rule(name), row_width=row_width)
    plain = trained(make_rule(name), row_width=row_width, force_torch=True)
    for key, tensor in plain.tensors().items():
        torch.testing.assert_close(compiled.tensors()[key], tensor, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", RULES)
def test_every_named_rule_has_a_compiled_form(name):
    store, rule = ResidentStore(2, 3), make_rule(name)
    state = {key: torch.zeros(shape).numpy() for key, shape in rule.state_shapes(2, 3).items()}
    rows_U, grads_UE = torch.tensor([0]).numpy(), torch.ones(1, 3).numpy()
    assert kernels.update_in_place(store.weight.numpy(), state, rows_U, grads_UE, rule, lr=0.1, step=1)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("force_torch", [False, True])
def test_rows_not_touched_stay_bit_for_bit(name, force_torch):
    store = trained(make_rule(name), force_torch=force_torch)
    before = {key: tensor.clone() for key, tensor in store.tensors().items()}
    touched_U = torch.tensor([2, 7, 28])
    store.update(touched_U, torch.ones(3, WIDTH), make_rule(name), LR)
    rest = torch.ones(ROWS, dtype=torch.bool).index_fill(0, touched_U, False)
    for key, tensor in store.tensors().items():
        if key != "step":
            assert torch.equal(tensor[rest], before[key][rest]), key
            assert not torch.equal(tensor[~rest], before[key][~rest]), key


def test_rules_change_nothing_they_are_given():
    for name in RULES:
        rule = make_rule(name)
        state = {key: torch.rand(shape) for key, shape in rule.state_shapes(3, 2).items()}
        given = [torch.rand(3, 2), torch.rand(3, 2), *state.values()]
        copies = [tensor.clone() for tensor in given]
        rule.apply(given[0], given[1], state, lr=0.1, step=1)
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, copies, strict=True)), name


def test_rowwise_state_is_four_bytes_a_row():
    for rule in (RowwiseAdagrad(), RowwiseRMSprop()):
        store = ResidentStore(ROWS, 64)
        store.update(torch.tensor([0]), torch.ones(1, 64), rule, LR)
        assert sum(tensor.numel() * tensor.element_size() for tensor in store.state.values()) == 4 * ROWS


def test_unknown_rule_or_option_names_the_nearest():
    with pytest.raises(ConfigError, match='did you mean "sparse_adam"'):
        make_rule("sparseadam")
    with pytest.raises(ConfigError, match='sparse_adam has no option "beta".*did you mean "betas"'):
        make_rule("sparse_adam", beta=0.9)
    with pytest.raises(ConfigError, match="beta must be at least 0 and below 1, not 1.5"):
        make_rule("rowwise_rmsprop", beta=1.5)
