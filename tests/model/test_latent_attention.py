"""Latent attention: transformers' DeepSeek-V3 on random weights, the same in chunks, and a cache without heads."""

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from nengram.errors import ConfigError
from nengram.model.init import Draws
from nengram.model.latent_attention import LatentAttention
from nengram.model.rope import Rope

WIDTH, HEADS, HEAD_WIDTH, ROPE_WIDTH, KV_RANK = 40, 3, 8, 6, 20
YARN = Rope(theta=10000.0, scale=10.0, original_context=16, mscale=0.707)


def layer(query_rank: int = 0, rope: Rope | None = None) -> LatentAttention:
    attention = LatentAttention(WIDTH, HEADS, HEAD_WIDTH, ROPE_WIDTH, KV_RANK, query_rank=query_rank, rope=rope)
    attention.init_weights(Draws(0), out_share=1.0)
    for norm in (attention.latent_norm, attention.query_norm):
        if norm is not None:
            torch.nn.init.normal_(norm.weight, 1.0, 0.3, generator=torch.Generator().manual_seed(1))
    return attention


def hidden(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(length))


def theirs(attention: LatentAttention, interleave: bool) -> tuple[DeepseekV3Attention, DeepseekV3RotaryEmbedding]:
    """transformers' layer with the same weights; interleaved, its rotated rows are ours dealt out in pairs."""
    rope = {"rope_type": "default", "rope_theta": attention.rope.theta}
    if attention.rope.scale != 1:
        rope |= {"rope_type": "yarn", "factor": attention.rope.scale, "beta_fast": 32, "beta_slow": 1}
        rope |= {"mscale": attention.rope.mscale, "mscale_all_dim": attention.rope.mscale}
        rope |= {"original_max_position_embeddings": attention.rope.original_context}
    config = DeepseekV3Config(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        kv_lora_rank=KV_RANK,
        q_lora_rank=attention.query.in_features if attention.query_down is not None else None,
        qk_rope_head_dim=ROPE_WIDTH,
        qk_nope_head_dim=HEAD_WIDTH,
        v_head_dim=HEAD_WIDTH,
        rope_interleave=interleave,
        rope_parameters=rope,
        attn_implementation="eager",
    )
    other = DeepseekV3Attention(config, layer_idx=0)
    names = {"kv_a_proj_with_mqa": "down", "kv_a_layernorm": "latent_norm", "kv_b_proj": "key_value", "o_proj": "out"}
    names |= {"q_a_proj": "query_down", "q_a_layernorm": "query_norm"}
    names["q_proj" if attention.query_down is None else "q_b_proj"] = "query"
    for name, part in other.named_children():
        part.weight.data = dealt(names[name], getattr(attention, names[name]).weight.detach().clone(), interleave)
    other.names = names
    return other, DeepseekV3RotaryEmbedding(config)


def dealt(name: str, weight: torch.Tensor, interleave: bool) -> torch.Tensor:
    """A weight as transformers orders its rows: of each rotated part, first halves and second halves in turn."""
    if not interleave or name not in ("query", "down"):
        return weight
    parts = weight.unflatten(0, (HEADS if name == "query" else 1, -1)).clone()
    parts[:, -ROPE_WIDTH:] = parts[:, -ROPE_WIDTH:].unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return parts.flatten(0, 1)


def run_theirs(other: DeepseekV3Attention, rotary: DeepseekV3RotaryEmbedding, hidden_BTD: torch.Tensor) -> torch.Tensor:
    length = hidden_BTD.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1)
    return other(hidden_BTD, rotary(hidden_BTD, torch.arange(length)[None]), mask)[0]


@pytest.mark.parametrize("length", [1, 2, 63])
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("query_rank", [0, 12])
@pytest.mark.parametrize("rope", [None, YARN], ids=["plain", "yarn"])
def test_outputs_and_gradients_are_those_of_transformers(length, interleave, query_rank, rope):
    attention = layer(query_rank, rope)
    other, rotary = theirs(attention, interleave)
    mine_BTD, theirs_BTD = hidden(length).requires_grad_(), hidden(length).requires_grad_()
    mine, reference = attention(mine_BTD), run_theirs(other, rotary, theirs_BTD)
    torch.testing.assert_close(mine, reference, atol=2e-6, rtol=1e-5)
    weigh = torch.linspace(-1, 1, mine.numel()).view_as(mine)
    (mine * weigh).sum().backward()
    (reference * weigh).sum().backward()
    torch.testing.assert_close(mine_BTD.grad, theirs_BTD.grad, atol=5e-6, rtol=1e-4)
    for name, part in other.named_children():
        own = other.names[name]
        grad = dealt(own, getattr(attention, own).weight.grad, interleave)
        torch.testing.assert_close(
            grad, part.weight.grad, atol=2e-5, rtol=1e-4, msg=lambda text, own=own: f"{own}: {text}"
        )


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 62, 63])
@pytest.mark.parametrize("query_rank", [0, 12])
def test_chunks_through_a_cache_equal_the_whole(chunk, query_rank):
    attention, hidden_BTD = layer(query_rank), hidden(63)
    cache = attention.new_cache(2, 63)
    cache.both.fill_(float("nan"))  # what was never written must never be read
    parts = [attention(hidden_BTD[:, at : at + chunk], cache) for at in range(0, 63, chunk)]
    torch.testing.assert_close(torch.cat(parts, dim=1), attention(hidden_BTD), atol=2e-6, rtol=1e-5)


def test_the_cache_holds_the_normed_latent_and_the_rotated_key_and_nothing_by_head():
    attention, hidden_BTD = layer(), hidden(5)
    cache = attention.new_cache(2, 9)
    attention(hidden_BTD, cache)
    assert cache.both.shape == (2, 9, KV_RANK + ROPE_WIDTH)
    latent_BTR, key_BTP = attention.down(hidden_BTD).split((KV_RANK, ROPE_WIDTH), dim=-1)
    torch.testing.assert_close(cache.both[:, :5, :KV_RANK], attention.latent_norm(latent_BTR))
    torch.testing.assert_close(cache.both[:, 0, KV_RANK:], key_BTP[:, 0])  # position 0 is not turned
    torch.testing.assert_close(cache.both[:, :5, KV_RANK:].norm(dim=-1), key_BTP.norm(dim=-1))
    assert not torch.allclose(cache.both[:, 4, KV_RANK:], key_BTP[:, 4], atol=1e-3)


def test_a_full_cache_is_refused_in_one_line():
    attention = layer()
    cache = attention.new_cache(2, 4)
    attention(hidden(3), cache)
    with pytest.raises(ConfigError, match="the cache holds 4 tokens, 5 are needed"):
        attention(hidden(2), cache)


@pytest.mark.parametrize("length", [2, 63])
def test_a_later_token_changes_nothing_before_it(length):
    attention, one = layer(), hidden(length)
    for t in {1, length // 2, length - 1}:
        other = one.clone()
        other[:, t] += torch.linspace(-1, 1, WIDTH)
        changed_T = (attention(one) - attention(other)).abs().amax((0, 2)) > 1e-6
        assert not changed_T[:t].any() and changed_T[t]


def test_cost_counts_what_was_built_and_pairs_of_positions():
    attention = layer(query_rank=12)
    cost, matrices = attention.cost(7), [p.numel() for p in attention.parameters() if p.ndim == 2]
    assert cost.active == sum(p.numel() for p in attention.parameters())
    scores, mixing = 2 * HEADS * (HEAD_WIDTH + ROPE_WIDTH) * 4, 2 * HEADS * HEAD_WIDTH * 4
    assert cost.flops == 2 * sum(matrices) + scores + mixing
