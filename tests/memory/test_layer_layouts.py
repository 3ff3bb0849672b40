"""Families of layers: fused or not they compute the same, and published weights come in and go back."""

import math

import pytest
import torch

from nengram.errors import CheckpointError, ConfigError
from nengram.memory import FAMILIES, Engram
from nengram.memory.layer_layouts import (
    from_deepseek_v41,
    from_qwen_ple,
    fuse,
    separate,
    to_deepseek_v41,
    to_qwen_ple,
)
from nengram.memory.reference import engram_reference

BATCH, MEMORY_WIDTH, WIDTH = 2, 12, 6


def randomised(layer: Engram, dtype: torch.dtype = torch.float64) -> Engram:
    generator = torch.Generator().manual_seed(0)
    layer = layer.to(dtype)
    with torch.no_grad():
        for _, parameter in sorted(layer.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.7)
    return layer


def inputs(length: int, branches: int) -> tuple[torch.Tensor, torch.Tensor]:
    make = {"generator": torch.Generator().manual_seed(1), "dtype": torch.float64}
    vecs_BTM = torch.randn(BATCH, length, MEMORY_WIDTH, **make)
    return vecs_BTM, torch.randn(BATCH, length, branches, WIDTH, **make)


def pair(**options) -> tuple[Engram, Engram]:
    """The same layer with separate and with fused projections."""
    apart = randomised(Engram(MEMORY_WIDTH, WIDTH, **options))
    together = Engram(MEMORY_WIDTH, WIDTH, fused=True, **options).double()
    together.load_state_dict(fuse(apart.state_dict()))
    return apart, together


def outputs_and_gradients(layer: Engram, vecs, hidden, blocked_BT=None) -> dict[str, torch.Tensor]:
    vecs, hidden = vecs.clone().requires_grad_(), hidden.clone().requires_grad_()
    delta_BTGD = layer(vecs, hidden, blocked_BT=blocked_BT)
    weigh = torch.linspace(-1, 1, delta_BTGD.numel(), dtype=delta_BTGD.dtype).view(delta_BTGD.shape)
    inside = {"vecs": vecs, "hidden": hidden, **dict(layer.named_parameters())}
    grads = torch.autograd.grad((delta_BTGD * weigh).sum(), list(inside.values()))
    return {"delta": delta_BTGD.detach(), **dict(zip(inside, grads, strict=True))}


@pytest.mark.parametrize(
    "options", [{}, {"bias": True}, {"conv": False, "gate": "copysign"}, {"gate": "plain"}], ids=str
)
@pytest.mark.parametrize("branches", [1, 4])
@pytest.mark.parametrize("length", [1, 2, 11])
def test_one_fused_projection_gives_the_values_and_gradients_of_two(options, branches, length):
    apart, together = pair(branches=branches, **options)
    vecs, hidden = inputs(length, branches)
    blocked_BT = torch.zeros(BATCH, length, dtype=torch.bool)
    blocked_BT[0, length // 2] = True
    found = outputs_and_gradients(together, vecs, hidden, blocked_BT)
    expected = fuse(outputs_and_gradients(apart, vecs, hidden, blocked_BT))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(together.gates(vecs, hidden), apart.gates(vecs, hidden), rtol=0, atol=1e-14)
    assert together.cost() == apart.cost()


@pytest.mark.parametrize("bias", [False, True])
def test_fusing_and_separating_lose_nothing(bias):
    apart, together = pair(branches=3, bias=bias)
    for state, there_and_back in (
        (apart.state_dict(), separate(fuse(apart.state_dict()))),
        (together.state_dict(), fuse(separate(together.state_dict()))),
    ):
        assert set(state) == set(there_and_back)
        assert all(torch.equal(state[name], tensor) for name, tensor in there_and_back.items())


def test_a_generator_draws_the_same_layer_fused_or_not():
    apart, together = (Engram(64, 32, branches=2, fused=fused) for fused in (False, True))
    for layer in (apart, together):
        layer.init_weights(torch.Generator().manual_seed(7))
    expected = fuse(apart.state_dict())
    assert all(torch.equal(expected[name], tensor) for name, tensor in together.state_dict().items())


def test_a_fused_layer_has_the_loops_outputs_and_groups_its_matrix():
    layer = randomised(Engram(MEMORY_WIDTH, WIDTH, branches=2, fused=True, bias=True))
    vecs, hidden = inputs(7, 2)
    torch.testing.assert_close(layer(vecs, hidden), engram_reference(layer, vecs, hidden)[0], rtol=1e-10, atol=1e-11)
    matrices = [group["params"] for group in layer.param_groups() if group["kind"] == "matrix"]
    assert [list(one.shape) for one in matrices[0]] == [[3 * WIDTH, MEMORY_WIDTH]]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_its_published_form(name):
    layer = Engram.family(name, MEMORY_WIDTH, WIDTH, branches=4)
    names = {parameter for parameter, _ in layer.named_parameters()}
    gains, conv = {"query_gain", "key_gain"}, {"conv_gain", "conv_weight"}
    projections = {"kv_proj.weight"} if name == "deepseek_v41" else {"key_proj.weight", "value_proj.weight"}
    assert names == projections | gains | (set() if name == "deepseek_v41" else conv)
    assert (layer.gate, layer.gate_eps) == {
        "engram": ("sign", None),
        "deepseek_v41": ("copysign", 1e-20),
        "qwen_ple": ("sign", 1e-6),
    }[name]
    assert (layer.kernel, layer.dilation) == (4, 3)


def test_options_go_over_a_family_and_mistakes_are_named():
    demo = Engram.family("engram", MEMORY_WIDTH, WIDTH, bias=True)
    assert demo.value_proj.bias is not None
    assert Engram.family("qwen_ple", MEMORY_WIDTH, WIDTH, dilation=4, conv_eps=1e-5).conv_eps == 1e-5
    with pytest.raises(ConfigError, match='unknown family "qwen_pel" .did you mean "qwen_ple"'):
        Engram.family("qwen_pel", MEMORY_WIDTH, WIDTH)
    with pytest.raises(ConfigError, match="has no keys to fuse"):
        Engram(MEMORY_WIDTH, WIDTH, gate="open", fused=True)


def deepseek_tensors(branches: int) -> dict[str, torch.Tensor]:
    make = {"generator": torch.Generator().manual_seed(3), "dtype": torch.float64}
    return {
        "layers.1.engram.wkv.weight": torch.randn((branches + 1) * WIDTH, MEMORY_WIDTH, **make),
        "layers.1.engram.q_weight": torch.randn(branches, WIDTH, **make),
        "layers.1.engram.k_weight": torch.randn(branches, WIDTH, **make),
    }


def by_published_arithmetic(tensors, vecs_BTM, hidden_BTGD, blocked_BT):
    """DeepSeek-V4.1's fusion as it was published: numbers one at a time, the projection whole, no gain apart."""
    batch, length, branches, width = hidden_BTGD.shape
    wkv, q, k = (tensors[f"layers.1.engram.{name}"] for name in ("wkv.weight", "q_weight", "k_weight"))
    update = []
    for b in range(batch):
        for t in range(length):
            kv = wkv @ vecs_BTM[b, t]
            for g in range(branches):
                h, key = hidden_BTGD[b, t, g], kv[g * width : (g + 1) * width]
                dot = sum(h[d] * q[g, d] * k[g, d] * key[d] for d in range(width))
                dot = dot * ((h * h).mean() + 1e-20) ** -0.5 * ((key * key).mean() + 1e-20) ** -0.5 * width**-0.5
                root = torch.sqrt(torch.clamp(dot.abs(), min=1e-6)) * math.copysign(1.0, dot.item())
                gate = torch.zeros_like(dot) if blocked_BT[b, t] else 1 / (1 + torch.exp(-root))
                update.append(gate * kv[branches * width :])
    return torch.stack(update).view(hidden_BTGD.shape)


@pytest.mark.parametrize("branches", [1, 4])
@pytest.mark.parametrize("length", [1, 5])
def test_deepseeks_layer_is_its_published_arithmetic(branches, length):
    tensors = {name: tensor.requires_grad_() for name, tensor in deepseek_tensors(branches).items()}
    layer = Engram.family("deepseek_v41", MEMORY_WIDTH, WIDTH, branches=branches).double()
    layer.load_state_dict(from_deepseek_v41({name: t.detach() for name, t in tensors.items()}, "layers.1."))
    vecs, hidden = inputs(length, branches)
    blocked_BT = torch.zeros(BATCH, length, dtype=torch.bool)
    blocked_BT[1, length - 1] = True
    found = outputs_and_gradients(layer, vecs, hidden, blocked_BT)
    vecs, hidden = vecs.requires_grad_(), hidden.requires_grad_()
    delta_BTGD = by_published_arithmetic(tensors, vecs, hidden, blocked_BT)
    weigh = torch.linspace(-1, 1, delta_BTGD.numel(), dtype=torch.float64).view(delta_BTGD.shape)
    leaves = {"vecs": vecs, "hidden": hidden, **tensors}
    grads = dict(zip(leaves, torch.autograd.grad((delta_BTGD * weigh).sum(), list(leaves.values())), strict=True))
    expected = {"delta": delta_BTGD, "vecs": grads["vecs"], "hidden": grads["hidden"]}
    expected |= from_deepseek_v41(grads, "layers.1.")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_deepseeks_gate_at_zero_is_a_little_above_one_half_and_qwens_is_one_half():
    vecs, hidden = inputs(1, 1)
    for name, argument in (("deepseek_v41", 1e-3), ("qwen_ple", 0.0)):
        layer = randomised(Engram.family(name, MEMORY_WIDTH, WIDTH))
        gates = layer.gates(vecs, torch.zeros_like(hidden))
        torch.testing.assert_close(gates, torch.full_like(gates, argument).sigmoid(), rtol=0, atol=1e-15)


def test_an_epsilon_of_1e_20_survives_float32_on_a_table_of_zeros():
    layer = Engram.family("deepseek_v41", MEMORY_WIDTH, WIDTH, branches=2)
    vecs = torch.zeros(1, 3, MEMORY_WIDTH, requires_grad=True)
    hidden = torch.randn(1, 3, 2, WIDTH, requires_grad=True)
    layer(vecs, hidden).sum().backward()
    assert vecs.grad.isfinite().all() and vecs.grad.any()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_deepseeks_tensors_come_back_as_they_were():
    tensors = deepseek_tensors(4)
    back = to_deepseek_v41(from_deepseek_v41(tensors, "layers.1."), "layers.1.")
    assert set(back) == set(tensors) and all(torch.equal(back[name], tensors[name]) for name in tensors)
    apart = separate(from_deepseek_v41(tensors, "layers.1."))
    assert all(torch.equal(to_deepseek_v41(apart, "layers.1.")[name], tensors[name]) for name in tensors)


def test_deepseeks_blocks_of_32_are_scaled():
    branches, width, memory_width = 1, 48, 64
    values = torch.randn(96, memory_width, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0], [4.0, 0.5], [0.25, 8.0]])
    gains = {f"engram.{name}": torch.ones(branches, width) for name in ("q_weight", "k_weight")}
    tensors = gains | {"engram.wkv.weight": values, "engram.wkv.scale": scale.to(torch.float8_e8m0fnu)}
    found = from_deepseek_v41(tensors)["kv_proj.weight"]
    for row, column in ((0, 0), (31, 32), (32, 31), (95, 63)):
        assert found[row, column] == values[row, column].float() * scale[row // 32, column // 32]
    with pytest.raises(CheckpointError, match=r"not a scale for each 32 x 32 of \[96, 64\]"):
        from_deepseek_v41(tensors | {"engram.wkv.scale": scale[:2]})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_qwens_weights_come_back_as_what_multiplies_the_same(dtype):
    make = {"generator": torch.Generator().manual_seed(2)}
    branches, kernel = 3, 4
    tensors = {
        "ple.key_proj.weight": torch.randn(branches * WIDTH, MEMORY_WIDTH, **make),
        "ple.value_proj.weight": torch.randn(WIDTH, MEMORY_WIDTH, **make),
        "ple.conv1d.weight": torch.randn(branches * WIDTH, 1, kernel, **make),
    }
    tensors |= {
        f"ple.norm_{name}.weight": torch.randn(branches * WIDTH, **make) * 1e-3 for name in ("key", "query", "conv")
    }
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    state = from_qwen_ple(tensors | {"ple.ple_embedding.ngram_embedding.weight": torch.zeros(1)}, "ple.")
    Engram.family("qwen_ple", MEMORY_WIDTH, WIDTH, branches=branches).load_state_dict(state)
    back = to_qwen_ple(state, "ple.")
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        if "norm" in name:
            assert torch.equal(1.0 + back[name], 1.0 + tensor.float())
            assert (back[name] - tensor.float()).abs().max() <= 6e-8
        else:
            assert torch.equal(back[name], tensor)
    again = from_qwen_ple(back, "ple.")
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("convert", "change", "message"),
    [
        (from_deepseek_v41, {"layers.1.engram.q_weight": None}, r"no tensor layers.1.engram.q_weight .did you mean"),
        (from_deepseek_v41, {"layers.1.engram.q_weight": torch.ones(3, WIDTH)}, r"not \[\(G \+ 1\) D, M\]"),
        (from_deepseek_v41, {"layers.1.engram.k_weight": torch.ones(WIDTH)}, "should have 2 axes"),
    ],
)
def test_what_is_no_layer_is_refused_by_name(convert, change, message):
    tensors = deepseek_tensors(4) | change
    with pytest.raises(CheckpointError, match=message):
        convert({name: tensor for name, tensor in tensors.items() if tensor is not None}, "layers.1.")


def test_a_layer_that_a_family_cannot_hold_is_refused():
    with pytest.raises(CheckpointError, match="conv_gain, conv_weight, for which the family has no place"):
        to_deepseek_v41(Engram(MEMORY_WIDTH, WIDTH).state_dict())
    with pytest.raises(CheckpointError, match="key_proj.bias, value_proj.bias"):
        to_qwen_ple(Engram(MEMORY_WIDTH, WIDTH, bias=True).state_dict())
    with pytest.raises(CheckpointError, match="no tensor conv_gain"):
        to_qwen_ple(Engram(MEMORY_WIDTH, WIDTH, conv=False).state_dict())
