"""Rotary positions and their stretching: transformers' YaRN frequencies, what stays and what slows, and where scores sharpen."""

import dataclasses
import math

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nengram.config import MemoryConfig, ModelConfig
from nengram.model import Transformer
from nengram.model.attention import Attention
from nengram.model.init import Draws
from nengram.model.rope import Rope

PAPER = Rope(theta=10000.0, scale=10.0, original_context=4096, alpha=1.0, beta=32.0, mscale=0.707)
CASES = {
    "paper": (PAPER, 64),
    "scale 40": (dataclasses.replace(PAPER, scale=40.0), 64),
    "another theta": (dataclasses.replace(PAPER, theta=500000.0), 128),
    "other bounds": (dataclasses.replace(PAPER, alpha=2.0, beta=16.0), 64),
    "tiny": (dataclasses.replace(PAPER, original_context=16), 6),
    "shorter than a turn": (dataclasses.replace(PAPER, original_context=4), 8),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_sharpening_are_those_of_transformers(name):
    rope, width = CASES[name]
    config = DeepseekV3Config(
        qk_rope_head_dim=width,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": rope.theta,
            "factor": rope.scale,
            "beta_fast": rope.beta,
            "beta_slow": rope.alpha,
            "mscale": rope.mscale,
            "mscale_all_dim": rope.mscale,
            "original_max_position_embeddings": rope.original_context,
        },
    )
    theirs, on_the_rotation = ROPE_INIT_FUNCTIONS["yarn"](config)
    assert len(theirs) == width // 2 and on_the_rotation == 1  # so that only scores are sharpened
    torch.testing.assert_close(rope.inverse(width), theirs, rtol=2e-6, atol=0)
    assert rope.sharpening == pytest.approx((0.1 * rope.mscale * math.log(rope.scale) + 1) ** 2)


def test_pairs_that_turned_often_stay_and_pairs_that_never_turned_slow_by_the_scale():
    plain, long = Rope().inverse(64), PAPER.inverse(64)
    turns = plain * 4096 / (2 * math.pi)
    kept, slowed = turns > 40, turns < 0.7
    assert kept.any() and slowed.any()
    assert torch.equal(long[kept], plain[kept])
    torch.testing.assert_close(long[slowed], plain[slowed] / 10)
    between = (long / plain)[~kept & ~slowed]
    assert len(between) > 5 and (between.diff() <= 0).all()


def test_scale_one_is_plain_whatever_else_is_set():
    assert torch.equal(dataclasses.replace(PAPER, scale=1.0).inverse(64), Rope().inverse(64))
    assert dataclasses.replace(PAPER, scale=1.0).sharpening == 1


def test_sharpened_scores_are_larger_by_the_square():
    """One pair of keys, one query at position 1: the log-odds between them grow by the factor, rotation being kept."""
    rope = dataclasses.replace(PAPER, original_context=10**9)  # every pair stays: only scores differ
    plain, sharp = (Attention(8, 1, 1, each) for each in (Rope(), rope))
    for attention in (plain, sharp):
        attention.init_weights(Draws(0), 1.0)
        attention.out.weight.data.copy_(torch.eye(8))
    hidden = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(0))
    _, values = plain.key_value(hidden).view(1, 2, 2, 8).unbind(2)
    odds = [
        torch.linalg.lstsq(values[0].T, attention(hidden)[0, 1, :, None]).solution.flatten().log().diff()
        for attention in (plain, sharp)
    ]
    torch.testing.assert_close(odds[1], rope.sharpening * odds[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [{}, {"attention": "mla", "kv_rank": 12, "rope_width": 8}])
def test_a_model_takes_its_positions_from_the_config(sizes):
    config = ModelConfig(vocab_size=60, width=32, blocks=2, expert_width=16, shared_width=16, **sizes)
    changes = {"rope_scale": 4.0, "rope_original_context": 16, "rope_alpha": 0.5, "rope_beta": 20.0, "rope_mscale": 0.7}
    stretched = Transformer(dataclasses.replace(config, **changes), MemoryConfig())
    expected = Rope(scale=4.0, original_context=16, alpha=0.5, beta=20.0, mscale=0.7)
    assert {block.attention.rope for block in stretched.blocks} == {expected}
    assert {block.attention.rope for block in Transformer(config, MemoryConfig()).blocks} == {Rope(mscale=1.0)}
