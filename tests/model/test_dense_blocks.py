"""Leading dense blocks: where they stand, a model without any expert, balancing around them, and sizes that disagree."""

import dataclasses

import pytest
import torch

from nengram.config import MemoryConfig, ModelConfig
from nengram.errors import ConfigError
from nengram.model import Transformer
from nengram.model.moe import MoE, SwiGLU

MODEL = ModelConfig(
    vocab_size=60, width=32, blocks=3, heads=4, kv_heads=2, context=24, experts=6, expert_width=16, shared_width=16
)
MLA = dataclasses.replace(MODEL, attention="mla", kv_rank=12, rope_width=4, head_width=8)


def built(dense_blocks: int, dense_width: int = 20) -> Transformer:
    model = Transformer(dataclasses.replace(MODEL, dense_blocks=dense_blocks, dense_width=dense_width), MemoryConfig())
    model.init_weights(0)
    return model


def ids() -> torch.Tensor:
    return torch.randint(0, 60, (8, 24), generator=torch.Generator().manual_seed(0))


def test_the_first_blocks_are_dense_and_the_others_routed():
    kinds = [type(block.feed_forward) for block in built(2).blocks]
    assert kinds == [SwiGLU, SwiGLU, MoE]
    assert built(1).blocks[0].dense.down.in_features == 20


@pytest.mark.parametrize("dense_blocks", [1, 3])
def test_every_parameter_learns_and_cost_is_what_was_built(dense_blocks):
    model = built(dense_blocks)
    model(ids()).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    cost = model.cost()
    assert cost.total_with_vocabulary == sum(parameter.numel() for parameter in model.parameters())
    assert cost.experts_idle == (3 - dense_blocks) * 4 * 3 * 32 * 16


def test_balancing_and_load_see_the_routed_blocks_only():
    model = built(2)
    model.train()(ids())
    load_X = model.blocks[2].moe.load_X
    assert model.expert_load_max() == pytest.approx(float(load_X.max() / load_X.mean()))
    model.rebalance()
    assert model.blocks[2].moe.bias_X.any() and not model.blocks[2].moe.load_X.any()


def test_a_model_without_experts_has_no_load_and_needs_no_size_of_theirs():
    sizes = {"dense_blocks": 3, "dense_width": 20, "experts": 0, "experts_per_token": 0, "expert_width": 0}
    model = Transformer(dataclasses.replace(MODEL, **sizes, shared_width=0), MemoryConfig())
    model.init_weights(0)
    model.train()(ids())
    model.rebalance()
    assert model.expert_load_max() == 0 and model.moes() == []
    assert not [name for name in model.state_dict() if ".moe." in name]


@pytest.mark.parametrize(
    ("base", "changes", "line"),
    [
        (MODEL, {"dense_blocks": 4, "dense_width": 8}, r"model.dense_blocks 4 must lie in 0..3 \(model.blocks\)"),
        (MODEL, {"dense_blocks": 1}, "model.dense_blocks 1 and model.dense_width 0: set both or none"),
        (MODEL, {"dense_width": 8}, "model.dense_blocks 0 and model.dense_width 8: set both or none"),
        (
            MODEL,
            {"attention": "mls"},
            r'model.attention "mls" is unknown \(did you mean "mla"\?\); attentions: gqa, mla',
        ),
        (MODEL, {"kv_rank": 8}, 'model.kv_rank 8 is of model.attention "mla", which is "gqa"'),
        (MODEL, {"streams": 0}, "model.streams must be at least 1, got 0"),
        (MODEL, {"routed_scale": 0.0}, "model.routed_scale must be above 0, got 0"),
        (MODEL, {"rope_scale": 10.0}, "model.rope_scale 10 needs model.rope_original_context"),
        (MODEL, {"rope_scale": 0.5}, "model.rope_scale must be at least 1, got 0.5"),
        (
            MODEL,
            {"rope_scale": 2.0, "rope_original_context": 8, "rope_alpha": 40.0},
            r"model.rope_alpha 40 must be above 0 and below model.rope_beta \(32\)",
        ),
        (MLA, {"kv_rank": 0}, 'model.attention "mla" needs model.kv_rank of at least 1, got 0'),
        (MLA, {"rope_width": 3}, 'model.attention "mla" needs an even model.rope_width, at least 2, got 3'),
        (
            MLA,
            {"head_width": 0, "heads": 5},
            r"model.width 32 is no multiple of model.heads \(5\): set model.head_width",
        ),
    ],
)
def test_sizes_that_disagree_are_refused_in_one_line(base, changes, line):
    with pytest.raises(ConfigError, match=line) as refused:
        Transformer(dataclasses.replace(base, **changes), MemoryConfig())
    assert "\n" not in str(refused.value)
