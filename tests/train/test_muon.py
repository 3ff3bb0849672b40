"""Muon: torch's own on matrices, a loop over matrices on stacks, and what its update is good for."""

import copy

import pytest
import torch
from torch import Tensor, nn

from nengram.errors import ConfigError
from nengram.train.muon import Muon, orthogonal

SHAPES = [(16, 16), (8, 40), (40, 8), (1, 12), (12, 1)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], steps: int = 4) -> list[Tensor]:
    """The weights after some steps along gradients that depend on shape and step alone."""
    for step in range(steps):
        for weight in weights:
            weight.grad = random(*weight.shape, seed=step)
        optimizer.step()
    return [weight.detach().clone() for weight in weights]


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(random(*shape, seed=100)) for shape in shapes]


@pytest.fixture
def torch_in_float32(monkeypatch):
    """torch's Muon with its Newton-Schulz in float32: it asks for bfloat16 by the method's name."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.float().clone())


def by_torch(weights: list[nn.Parameter], **options: float) -> torch.optim.Optimizer:
    return torch.optim.Muon(weights, adjust_lr_fn="match_rms_adamw", momentum=0.95, nesterov=True, **options)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_on_matrices_it_is_torchs_muon_in_float32(torch_in_float32, weight_decay):
    options = {"lr": 0.02, "weight_decay": weight_decay}
    theirs = parameters(*SHAPES)
    mine = copy.deepcopy(theirs)
    for a, b in zip(moved(Muon(mine, **options), mine), moved(by_torch(theirs, **options), theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_on_matrices_it_is_torchs_muon_in_bfloat16():
    theirs, start = parameters(*SHAPES), parameters(*SHAPES)
    mine = copy.deepcopy(theirs)
    after = moved(Muon(mine, 0.02, weight_decay=0.1, dtype=torch.bfloat16), mine)
    expected = moved(by_torch(theirs, lr=0.02, weight_decay=0.1), theirs)
    for a, b, before in zip(after, expected, start, strict=True):
        assert (a - b).norm() <= 0.02 * (b - before).norm()


@pytest.mark.parametrize("shape", [(5, 8, 12), (5, 12, 8), (1, 6, 6)])
def test_every_matrix_of_a_stack_moves_as_if_it_were_alone(shape):
    (stack,) = parameters(shape)
    alone = [nn.Parameter(matrix.detach().clone()) for matrix in stack]
    one, many = Muon([stack], 0.02), Muon(alone, 0.02)
    for step in range(4):
        stack.grad = random(*shape, seed=step) * 10.0 ** torch.arange(shape[0]).view(-1, 1, 1)
        for matrix, grad in zip(alone, stack.grad, strict=True):
            matrix.grad = grad.clone()
        one.step()
        many.step()
    torch.testing.assert_close(stack.detach(), torch.stack([m.detach() for m in alone]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16), (3, 16, 32), (1, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_is_nearly_orthogonal_in_the_gradients_own_directions(shape, dtype):
    grad = random(*shape)
    update = orthogonal(grad, dtype=dtype)
    left, values, right = torch.linalg.svd(grad, full_matrices=False)
    along = torch.einsum("...rk,...rc,...kc->...k", left, update, right)
    assert update.shape == grad.shape and update.dtype == grad.dtype
    learned = values > 0.02 * values.amax(-1, keepdim=True)
    assert learned.float().mean() > 0.9, "else nothing was tested"
    assert along[learned].min() > 0.6 and torch.linalg.svdvals(update).max() < 1.3


def test_how_large_a_gradient_is_does_not_matter():
    grad = random(8, 12)
    torch.testing.assert_close(orthogonal(grad * 1e4), orthogonal(grad), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(orthogonal(grad * 1e-4), orthogonal(grad), rtol=1e-4, atol=1e-5)


def test_a_transposed_weight_moves_by_the_transposed_update():
    (weight,) = parameters((10, 24))
    transposed = nn.Parameter(weight.detach().T.contiguous())
    one, other = Muon([weight], 0.02), Muon([transposed], 0.02)
    for step in range(3):
        weight.grad = random(10, 24, seed=step)
        transposed.grad = weight.grad.T.contiguous()
        one.step()
        other.step()
    torch.testing.assert_close(weight.detach().T, transposed.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32), (4, 32, 64)])
def test_the_size_of_an_update_is_adamws_at_any_shape(shape):
    (weight,) = parameters(shape)
    before = weight.detach().clone()
    (after,) = moved(Muon([weight], 1.0, weight_decay=0.0), [weight], steps=1)
    assert (after - before).square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


def test_an_expert_that_no_token_chose_only_decays():
    (stack,) = parameters((3, 8, 12))
    before = stack.detach().clone()
    stack.grad = random(3, 8, 12)
    stack.grad[1] = 0
    Muon([stack], 0.1, weight_decay=0.5).step()
    assert torch.equal(stack[1].detach(), before[1] * (1 - 0.1 * 0.5))
    assert torch.isfinite(stack).all() and not torch.equal(stack[0].detach(), before[0] * (1 - 0.1 * 0.5))


def test_a_weight_without_a_gradient_stays_and_has_no_state():
    used, unused = parameters((4, 4), (4, 6))
    before = unused.detach().clone()
    optimizer = Muon([used, unused], 0.1)
    used.grad = random(4, 4)
    optimizer.step()
    assert torch.equal(unused.detach(), before) and list(optimizer.state) == [used]


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4, 5)])
def test_what_is_no_matrix_is_refused(shape):
    with pytest.raises(ConfigError, match="matrices and stacks"):
        Muon([nn.Parameter(torch.zeros(shape))], 0.1)
