"""Decoding step by step computes what one pass over the whole text computes, wherever the text is cut."""

import pytest
import torch

from nengram.config import MemoryConfig, ModelConfig
from nengram.model import Transformer

MODEL = ModelConfig(
    vocab_size=60, width=32, blocks=3, heads=4, kv_heads=2, context=40, experts=6, expert_width=16, shared_width=16
)
TABLES = {"heads": 2, "row_width": 4, "rows_per_head": (101, 103), "table_std": 0.5}
MEMORIES = {
    "moe": MemoryConfig(),
    "engram": MemoryConfig(kind="engram", blocks=(0, 2), **TABLES),
    "additive": MemoryConfig(kind="additive", blocks=(1,), **TABLES),
    "open gate": MemoryConfig(kind="engram", blocks=(0, 2), gate="open", **TABLES),
    "shared table": MemoryConfig(kind="engram", blocks=(0, 2), shared_table=True, **TABLES),
}
LENGTH = 37


@pytest.fixture(params=MEMORIES, scope="module")
def model(request):
    model = Transformer(MODEL, MEMORIES[request.param])
    model.init_weights(0)
    for block in model.memory_blocks():  # a fresh convolution is silent: its state would go untested
        if hasattr(block.memory, "conv_weight"):
            torch.nn.init.normal_(block.memory.conv_weight, std=0.5, generator=torch.Generator().manual_seed(1))
    return model.eval()


def text(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and document starts in the middle of them."""
    ids_BT = torch.randint(0, MODEL.vocab_size, (batch, LENGTH), generator=torch.Generator().manual_seed(0))
    start_BT = torch.zeros(batch, LENGTH, dtype=torch.bool)
    start_BT[0, 11], start_BT[-1, 20] = True, True
    return ids_BT, start_BT


def in_chunks(model: Transformer, lengths: list[int]) -> torch.Tensor:
    ids_BT, start_BT = text()
    cache = model.new_cache(2, MODEL.context)
    parts, at = [], 0
    for length in lengths:
        chunk = slice(at, at + length)
        parts.append(model(ids_BT[:, chunk], start_BT=start_BT[:, chunk], cache=cache))
        at += length
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize(
    "lengths",
    [[1] * LENGTH, [LENGTH], [20, *[1] * 17], [1, 2, 3, 5, 8, 13, 5], [36, 1], [11, 1, 25]],
    ids=["token by token", "whole", "prefill, then tokens", "growing chunks", "all but one", "cut at a start"],
)
@torch.no_grad()
def test_cached_logits_equal_those_of_the_whole(model, lengths):
    ids_BT, start_BT = text()
    whole_BTV = model(ids_BT, start_BT=start_BT)
    torch.testing.assert_close(in_chunks(model, lengths), whole_BTV, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_second_cache_knows_nothing_of_the_first(model):
    ids_BT, _ = text()
    used, fresh = model.new_cache(2, MODEL.context), model.new_cache(2, MODEL.context)
    model(ids_BT, cache=used)
    assert torch.equal(model(ids_BT[:, :3], cache=fresh), model(ids_BT[:, :3], cache=model.new_cache(2, 3)))
