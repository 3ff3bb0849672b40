"""Mixture of experts: the grouped matmul against a loop over tokens, weights, and balance without a loss."""

import pytest
import torch

from nengram.model.init import Draws
from nengram.model.moe import MoE, moe_reference, one_by_one

WIDTH, EXPERTS, PER_TOKEN = 12, 7, 2


def layer(experts: int = EXPERTS, per_token: int = PER_TOKEN) -> MoE:
    moe = MoE(WIDTH, experts, per_token, expert_width=20, shared_width=5)
    moe.init_weights(Draws(0), out_share=0.7)
    return moe


def hidden(batch: int, length: int) -> torch.Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(batch * 100 + length))


def output_and_gradients(run, moe: MoE, hidden_BTD: torch.Tensor) -> dict[str, torch.Tensor]:
    leaf = hidden_BTD.clone().requires_grad_()
    out = run(moe, leaf)
    inside = {"hidden": leaf, **dict(moe.named_parameters())}
    weigh = torch.linspace(-1, 1, out.numel()).view_as(out)
    grads = torch.autograd.grad((out * weigh).sum(), list(inside.values()))
    return {"out": out.detach(), **dict(zip(inside, grads, strict=True))}


def assert_equal_to_the_loop(moe: MoE, hidden_BTD: torch.Tensor) -> dict[str, torch.Tensor]:
    fast = output_and_gradients(lambda moe, x: moe(x), moe, hidden_BTD)
    slow = output_and_gradients(moe_reference, moe, hidden_BTD)
    for name in slow:
        torch.testing.assert_close(
            fast[name], slow[name], atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    return fast


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 2), (1, 63), (3, 5)])
@pytest.mark.parametrize("per_token", [1, 2, EXPERTS])
def test_outputs_and_gradients_are_those_of_the_loop(batch, length, per_token):
    assert_equal_to_the_loop(layer(per_token=per_token), hidden(batch, length))


def test_an_expert_without_a_token_has_no_gradient_and_changes_nothing():
    moe = layer()
    moe.bias_X[3] = -10
    found = assert_equal_to_the_loop(moe, hidden(1, 63))
    _, chosen_NK = moe.route(hidden(1, 63)[0])
    assert 3 not in chosen_NK and len(chosen_NK.unique()) == EXPERTS - 1
    assert not found["gate_up_XDF"][3].any() and not found["down_XFD"][3].any()
    assert found["down_XFD"][2].any()


def test_all_tokens_in_the_same_two_experts_equal_the_loop():
    moe = layer()
    moe.bias_X[[1, 5]] = 10
    assert_equal_to_the_loop(moe, hidden(2, 31))
    moe(hidden(2, 31))
    assert moe.load_X.tolist() == [0, 2 * 62, 0, 0, 0, 2 * 62, 0]


def test_weights_sum_to_one_and_know_nothing_of_the_bias():
    moe, x_ND = layer(), hidden(1, 63)[0]
    moe.bias_X[[0, 4]] = 10
    weights_NK, chosen_NK = moe.route(x_ND)
    assert set(chosen_NK.unique().tolist()) == {0, 4}
    torch.testing.assert_close(weights_NK.sum(-1), torch.ones(63))
    scores_NK = torch.sigmoid(x_ND @ moe.router.weight.T).gather(1, chosen_NK)
    torch.testing.assert_close(weights_NK, scores_NK / scores_NK.sum(-1, keepdim=True))


def test_balancing_moves_loads_towards_even():
    moe, x = layer(experts=8), hidden(4, 63)
    x = x + 1.5 * moe.router.weight[0]  # everybody likes expert 0
    spread = []
    for _ in range(120):
        moe(x)
        spread.append(float(moe.load_X.max() / moe.load_X.mean()))
        moe.rebalance(0.01)
    assert spread[0] > 2.5
    assert sum(spread[-10:]) / 10 < 1.25


def test_one_step_lowers_the_overloaded_and_lifts_the_idle():
    moe = layer(experts=3, per_token=1)
    moe.load_X.copy_(torch.tensor([9.0, 3.0, 6.0]))
    moe.rebalance(0.5)
    assert moe.bias_X.tolist() == [-0.5, 0.5, 0.0]
    assert moe.load_X.tolist() == [0, 0, 0]


def test_only_training_counts_loads():
    moe = layer()
    moe.eval()
    moe(hidden(1, 9))
    assert moe.load_X.sum() == 0
    moe.train()
    moe(hidden(1, 9))
    assert moe.load_X.sum() == 9 * PER_TOKEN
    assert "load_X" not in moe.state_dict() and "bias_X" in moe.state_dict()


def test_a_product_per_expert_equals_the_grouped_matmul_in_outputs_and_gradients():
    generator = torch.Generator().manual_seed(0)
    ends_X = torch.tensor([3, 3, 10, 11], dtype=torch.int32)  # the second expert has no row
    results = []
    x, weights, grad = (torch.randn(shape, generator=generator) for shape in ((11, 8), (4, 8, 12), (11, 12)))
    for product in (one_by_one, lambda x, w, ends: torch.nn.functional.grouped_mm(x, w, offs=ends)):
        x_ND, weights_XDF = x.clone().requires_grad_(), weights.clone().requires_grad_()
        out = product(x_ND, weights_XDF, ends_X)
        out.backward(grad)
        results.append((out.detach(), x_ND.grad, weights_XDF.grad))
    for mine, grouped in zip(*results, strict=True):
        torch.testing.assert_close(mine, grouped)
