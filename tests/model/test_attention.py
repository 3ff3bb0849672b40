"""Attention: causal, equal to its definition, the same in chunks, and blind to absolute position."""

import math

import pytest
import torch

from nengram.errors import ConfigError
from nengram.model.attention import Attention
from nengram.model.init import Draws
from nengram.model.rope import Rope, rotate

HEADS, HEAD_WIDTH = 4, 6
WIDTH = HEADS * HEAD_WIDTH


def layer(kv_heads: int) -> Attention:
    attention = Attention(WIDTH, HEADS, kv_heads).double()
    attention.init_weights(Draws(0), out_share=1.0)
    return attention


def hidden(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(length), dtype=torch.float64)


def by_loops(attention: Attention, hidden_BTD: torch.Tensor) -> torch.Tensor:
    """Softmax over the past, one sequence, head and position at a time; a pair's rotation as a complex number."""
    kv_heads = attention.kv_heads
    keys, values = attention.key_value.weight.view(2, kv_heads, HEAD_WIDTH, WIDTH)
    queries = attention.query.weight.view(HEADS, HEAD_WIDTH, WIDTH)
    turn = 10000.0 ** (-torch.arange(0, HEAD_WIDTH, 2, dtype=torch.float64) / HEAD_WIDTH)

    def at(vector, position):
        pairs = torch.complex(*vector.chunk(2)) * torch.polar(torch.ones_like(turn), turn * position)
        return torch.cat((pairs.real, pairs.imag))

    out_BTD = torch.zeros_like(hidden_BTD)
    for b, sequence in enumerate(hidden_BTD):
        for t in range(len(sequence)):
            mixed = []
            for head in range(HEADS):
                shared = head * kv_heads // HEADS
                q = at(queries[head] @ sequence[t], t)
                seen = [at(keys[shared] @ sequence[past], past) for past in range(t + 1)]
                scores = torch.stack([q @ key for key in seen]) / math.sqrt(HEAD_WIDTH)
                mixed.append(
                    scores.softmax(0) @ torch.stack([values[shared] @ sequence[past] for past in range(t + 1)])
                )
            out_BTD[b, t] = attention.out.weight @ torch.cat(mixed)
    return out_BTD


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_it_is_softmax_attention_over_the_past(length, kv_heads):
    attention, hidden_BTD = layer(kv_heads), hidden(length)
    torch.testing.assert_close(attention(hidden_BTD), by_loops(attention, hidden_BTD), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_shared_heads_equal_full_heads_with_repeated_weights(kv_heads):
    grouped, full = layer(kv_heads), layer(HEADS)
    full.load_state_dict(
        grouped.state_dict()
        | {
            "key_value.weight": grouped.key_value.weight.view(2, kv_heads, HEAD_WIDTH, WIDTH)
            .repeat_interleave(HEADS // kv_heads, dim=1)
            .reshape(-1, WIDTH)
        }
    )
    torch.testing.assert_close(grouped(hidden(7)), full(hidden(7)))


@pytest.mark.parametrize("length", [2, 63])
def test_a_later_token_changes_nothing_before_it(length):
    attention, one = layer(2), hidden(length)
    for t in {1, length // 2, length - 1}:
        other = one.clone()
        other[:, t] += 1
        changed_T = (attention(one) - attention(other)).abs().amax((0, 2)) > 1e-9
        assert not changed_T[:t].any() and changed_T[t:].all()


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 63])
def test_chunks_through_a_cache_equal_the_whole(chunk):
    attention, hidden_BTD = layer(2).float(), hidden(63).float()
    cache = attention.new_cache(2, 63)
    parts = [attention(hidden_BTD[:, at : at + chunk], cache) for at in range(0, 63, chunk)]
    torch.testing.assert_close(torch.cat(parts, dim=1), attention(hidden_BTD), atol=1e-5, rtol=1e-5)


def test_a_full_cache_is_refused_in_one_line():
    attention = layer(2)
    cache = attention.new_cache(2, 4)
    attention(hidden(3), cache)
    with pytest.raises(ConfigError, match="the cache holds 4 tokens, 5 are needed"):
        attention(hidden(2), cache)


def test_rotated_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, HEAD_WIDTH, dtype=torch.float64)

    def product(at_q: int, at_k: int) -> torch.Tensor:
        cos, sin = Rope().rotations(0, 100, HEAD_WIDTH, q)
        return (rotate(q, cos[at_q], sin[at_q]) * rotate(k, cos[at_k], sin[at_k])).sum()

    near = [product(at + 5, at) for at in (0, 1, 40, 94)]
    torch.testing.assert_close(torch.stack(near), near[0].expand(4), atol=1e-5, rtol=1e-5)
    assert abs(product(5, 0) - product(9, 0)) > 1e-3
    torch.testing.assert_close(product(0, 0), (q * k).sum())


def test_a_chunk_rotates_from_where_the_past_ended():
    like = torch.zeros(1)
    rope = Rope(theta=500.0)
    for later, whole in zip(
        rope.rotations(11, 4, HEAD_WIDTH, like), rope.rotations(0, 15, HEAD_WIDTH, like), strict=True
    ):
        assert torch.equal(later, whole[11:])
