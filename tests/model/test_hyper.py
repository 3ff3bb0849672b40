"""Hyper-connections: equal to their equations, unable to grow or fade, and at first the plain residual model."""

import dataclasses

import pytest
import torch

from nengram.config import MemoryConfig, ModelConfig
from nengram.model import Transformer
from nengram.model.hyper import SINKHORN_STEPS, HyperConnection, PlainResidual, hyper_reference, sinkhorn
from nengram.model.init import Draws

WIDTH, STREAMS = 6, 4
MODEL = ModelConfig(
    vocab_size=60, width=32, blocks=3, heads=4, kv_heads=2, context=24, experts=6, expert_width=16, shared_width=16
)
ENGRAM = MemoryConfig(kind="engram", blocks=(1,), heads=2, row_width=4, rows_per_head=(101, 103))


def unit(streams: int = STREAMS, *, lively: bool = True) -> HyperConnection:
    """lively: with maps far from where they start, so that every part of the equations is heard."""
    made = HyperConnection(WIDTH, streams).double()
    made.init_weights(Draws(0))
    if lively:
        generator = torch.Generator().manual_seed(1)
        for parameter in (made.token_share, made.bias, made.norm.weight):
            torch.nn.init.normal_(parameter, 0.5, 1.0, generator=generator)
    return made


def some(length: int, streams: int = STREAMS, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, streams * WIDTH, generator=generator, dtype=torch.float64)


def layer(hidden_BTD: torch.Tensor) -> torch.Tensor:
    return torch.tanh(hidden_BTD * torch.linspace(0.5, 2, WIDTH, dtype=torch.float64))


@pytest.mark.parametrize("length", [1, 2, 63])
@pytest.mark.parametrize("streams", [2, 4])
@pytest.mark.parametrize("lively", [True, False])
def test_outputs_and_gradients_are_those_of_the_loops(length, streams, lively):
    made, found = unit(streams, lively=lively), []
    for run in (made.forward, lambda *given: hyper_reference(made, *given)):
        leaf = some(length, streams).requires_grad_()
        out = run(leaf, layer)
        inside = [leaf, *made.parameters()]
        weigh = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        found.append([out.detach(), *torch.autograd.grad((out * weigh).sum(), inside)])
    names = ["out", "streams", *(name for name, _ in made.named_parameters())]
    for name, fast, slow in zip(names, *found, strict=True):
        assert slow.any(), name
        torch.testing.assert_close(fast, slow, msg=lambda text, name=name: f"{name}: {text}", atol=1e-11, rtol=1e-9)


def test_mixing_is_doubly_stochastic():
    _, _, mix_NGG = unit().connections(some(63).flatten(0, 1))
    assert (mix_NGG > 0).all()
    torch.testing.assert_close(mix_NGG.sum(-1), torch.ones(126, 4, dtype=torch.float64))
    torch.testing.assert_close(mix_NGG.sum(-2), torch.ones(126, 4, dtype=torch.float64), atol=1e-3, rtol=0)
    assert mix_NGG.std(dim=0).min() > 0.01  # and is not one matrix for all tokens


def test_the_mean_of_the_streams_goes_through_a_silent_layer_untouched():
    """Twenty steps end with rows; near the identity columns, hence the mean, converge slowly from a start that is nearly right."""
    made, streams_BTH = unit(lively=False), some(63)
    out_BTH = made(streams_BTH, lambda hidden_BTD: 0 * hidden_BTD)
    means = (x.unflatten(2, (STREAMS, WIDTH)).mean(2) for x in (out_BTH, streams_BTH))
    torch.testing.assert_close(*means, atol=1e-4, rtol=0)
    assert (out_BTH - streams_BTH).abs().max() > 1e-3


def test_sinkhorn_bears_scores_whose_exponential_overflows():
    scores = torch.tensor([[900.0, 899.0], [898.0, 900.0]])
    torch.testing.assert_close(sinkhorn(scores), sinkhorn(scores - 898))
    assert torch.isfinite(sinkhorn(scores)).all()


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_the_way_back_through_sinkhorn_is_that_of_its_divisions_recorded(spread):
    draws = torch.Generator().manual_seed(0)
    scores = (torch.randn(3, 3, 7, generator=draws, dtype=torch.float64) * spread).requires_grad_()
    weights = torch.randn(3, 3, 7, generator=draws, dtype=torch.float64)
    recorded = scores.exp()
    for _ in range(SINKHORN_STEPS):
        recorded = recorded / recorded.sum(0, keepdim=True)
        recorded = recorded / recorded.sum(1, keepdim=True)
    wanted = torch.autograd.grad((recorded * weights).sum(), scores)[0]
    found = torch.autograd.grad((sinkhorn(scores) * weights).sum(), scores)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_sinkhorn_keeps_a_quarter_of_what_its_recorded_divisions_would():
    """Bytes a position for the way back, G = 4, float32: those that the class says."""

    def kept(balance) -> float:
        found: dict[int, int] = {}

        def note(tensor):
            found[tensor.data_ptr()] = tensor.nbytes
            return tensor

        scores = torch.zeros(4, 4, 100, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            balanced = balance(scores)
        assert balanced.requires_grad
        return sum(found.values()) / 100

    def recorded(scores):
        positive = (scores - scores.amax((0, 1), keepdim=True).detach()).exp()
        for half in range(2 * SINKHORN_STEPS):
            positive = positive / positive.sum(half % 2, keepdim=True)
        return positive

    assert kept(sinkhorn) < 850 and kept(recorded) > 3200


def test_at_first_a_unit_reads_the_mean_writes_once_to_each_and_moves_no_stream():
    made = unit(lively=False)
    assert made.token_share.tolist() == pytest.approx([0.01] * 3)
    read_NG, write_NG, mix_NGG = made.connections(some(9).flatten(0, 1))
    torch.testing.assert_close(read_NG, torch.full_like(read_NG, 0.25), atol=0.01, rtol=0)
    torch.testing.assert_close(write_NG, torch.ones_like(write_NG), atol=0.03, rtol=0)
    torch.testing.assert_close(mix_NGG, torch.eye(4).expand_as(mix_NGG).double(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", ["none", "engram"])
@pytest.mark.parametrize("streams", [2, 4])
@torch.no_grad()
def test_without_the_token_part_a_fresh_model_is_the_plain_one(kind, streams):
    """An open gate, for keys differ from stream to stream by design."""
    memory = dataclasses.replace(ENGRAM, kind=kind, gate="open")
    plain, wide = (Transformer(dataclasses.replace(MODEL, streams=G), memory) for G in (1, streams))
    for model in (plain, wide):
        model.init_weights(3)
    for module in wide.modules():
        if isinstance(module, HyperConnection):
            module.token_share.zero_()
    ids_BT = torch.randint(0, 60, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(wide(ids_BT), plain(ids_BT), atol=2e-5, rtol=1e-4)


def test_one_stream_has_no_maps():
    model = Transformer(MODEL, ENGRAM)
    assert not any(isinstance(module, HyperConnection) for module in model.modules())
    assert sum(isinstance(module, PlainResidual) for module in model.modules()) == 2 * MODEL.blocks
    assert not [name for name in model.state_dict() if "residual" in name]


def written_out(model: Transformer, ids_BT: torch.Tensor, step) -> torch.Tensor:
    """The plain pre-norm Transformer, without any word of streams."""
    hidden_BTD = model.embed(ids_BT)
    for block in model.blocks:
        if block.memory is not None:
            delta_BTGD = block.memory(step.vectors(block.layer_id), hidden_BTD.unsqueeze(2))
            hidden_BTD = hidden_BTD + delta_BTGD.squeeze(2)
        hidden_BTD = hidden_BTD + block.attention(block.attention_norm(hidden_BTD))
        hidden_BTD = hidden_BTD + block.moe(block.moe_norm(hidden_BTD))
    return model.norm(hidden_BTD) @ model.embed.weight.T


def test_one_stream_is_the_plain_model_to_the_last_bit_in_logits_and_gradients():
    model = Transformer(MODEL, ENGRAM)
    model.init_weights(0)
    ids_BT, found = torch.randint(0, 60, (4, 24), generator=torch.Generator().manual_seed(0)), []
    for run in (lambda step: model(ids_BT, step=step), lambda step: written_out(model, ids_BT, step)):
        with model.begin(ids_BT) as step:
            logits_BTV = run(step)
            logits_BTV.square().mean().backward()
            found.append([logits_BTV.detach(), step.vectors(1).grad, *(p.grad for p in model.parameters())])
        model.zero_grad(set_to_none=True)
    for mine, plain in zip(*found, strict=True):
        assert torch.equal(mine, plain)


def test_every_stream_of_the_memory_and_every_map_learns_and_streams_part():
    model = Transformer(dataclasses.replace(MODEL, streams=4), ENGRAM)
    model.init_weights(0)
    torch.nn.init.normal_(model.blocks[1].memory.conv_weight, generator=torch.Generator().manual_seed(1))
    seen = []
    model.blocks[-1].register_forward_hook(lambda block, given, out: seen.append(out.detach()))
    ids_BT = torch.randint(0, 60, (8, 24), generator=torch.Generator().manual_seed(0))
    step = model.begin(ids_BT)
    model(ids_BT, step=step).square().mean().backward()
    assert model.blocks[1].memory.branches == 4
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    gains_GD = model.blocks[1].memory.query_gain.grad
    assert all(gains_GD[g].any() for g in range(4))
    streams = seen[0].unflatten(2, (4, 32)).unbind(2)
    assert all((streams[0] - other).abs().max() > 1e-3 for other in streams[1:])


@torch.no_grad()
def test_chunks_through_a_cache_equal_the_whole():
    model = Transformer(dataclasses.replace(MODEL, streams=4), ENGRAM).eval()
    model.init_weights(0)
    ids_BT = torch.randint(0, 60, (2, 24), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(2, 24)
    parts = [model(ids_BT[:, at : at + 5], cache=cache) for at in range(0, 24, 5)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids_BT), atol=1e-5, rtol=1e-5)


def test_cost_counts_what_was_built():
    made = unit()
    cost, D, G = made.cost(), WIDTH, STREAMS
    assert (
        cost.active == sum(p.numel() for p in made.parameters()) == G * D * (2 * G + G * G) + G * D + 3 + 2 * G + G * G
    )
    assert cost.flops == 2 * G * D * (2 * G + G * G) + 4 * G * D + 2 * G * G * D + 20 * 4 * G * G
    assert PlainResidual().cost().flops == 0
