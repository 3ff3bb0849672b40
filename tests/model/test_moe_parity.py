"""Our experts are transformers' DeepSeek-V3 experts: same weights, same choices, same outputs and gradients."""

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from nengram.model.init import Draws
from nengram.model.moe import MoE

WIDTH, EXPERTS, PER_TOKEN, EXPERT_WIDTH, SHARED = 24, 7, 3, 12, 2


def pair(routed_scale: float) -> tuple[MoE, DeepseekV3MoE]:
    """The same layer twice. transformers keeps experts as [X, out, in], and a shared expert's gate and up apart."""
    mine = MoE(WIDTH, EXPERTS, PER_TOKEN, EXPERT_WIDTH, SHARED * EXPERT_WIDTH, routed_scale=routed_scale)
    mine.init_weights(Draws(0), out_share=1.0)
    mine.bias_X.copy_(torch.linspace(-0.3, 0.3, EXPERTS))
    config = DeepseekV3Config(
        hidden_size=WIDTH,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=PER_TOKEN,
        moe_intermediate_size=EXPERT_WIDTH,
        n_shared_experts=SHARED,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=routed_scale,
        experts_implementation="eager",
    )
    other = DeepseekV3MoE(config)
    other.gate.e_score_correction_bias.copy_(mine.bias_X)
    for name, tensor in as_theirs({name: p.detach() for name, p in mine.named_parameters()}).items():
        other.get_parameter(name).data = tensor.clone()
    return mine, other


def as_theirs(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    gate, up = tensors["shared.gate_up.weight"].chunk(2)
    return {
        "gate.weight": tensors["router.weight"],
        "experts.gate_up_proj": tensors["gate_up_XDF"].transpose(1, 2),
        "experts.down_proj": tensors["down_XFD"].transpose(1, 2),
        "shared_experts.gate_proj.weight": gate,
        "shared_experts.up_proj.weight": up,
        "shared_experts.down_proj.weight": tensors["shared.down.weight"],
    }


@pytest.mark.parametrize("length", [1, 2, 63])
@pytest.mark.parametrize("routed_scale", [1.0, 2.5])
def test_outputs_and_gradients_are_those_of_transformers(length, routed_scale):
    mine, other = pair(routed_scale)
    generator = torch.Generator().manual_seed(length)
    hidden = torch.randn(2, length, WIDTH, generator=generator)
    mine_BTD, theirs_BTD = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    out, reference = mine(mine_BTD), other(theirs_BTD)
    torch.testing.assert_close(out, reference, atol=2e-6, rtol=1e-5)
    weigh = torch.linspace(-1, 1, out.numel()).view_as(out)
    (out * weigh).sum().backward()
    (reference * weigh).sum().backward()
    torch.testing.assert_close(mine_BTD.grad, theirs_BTD.grad, atol=2e-6, rtol=1e-4)
    for name, grad in as_theirs({name: p.grad for name, p in mine.named_parameters()}).items():
        theirs = other.get_parameter(name).grad
        torch.testing.assert_close(grad, theirs, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
