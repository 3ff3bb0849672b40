"""The past of a memory inside transformers' cache: whatever is done to the cache, the rows are those of the whole text."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nengram.address import Addresser, AddressSpec
from nengram.errors import AddressError, ConfigError
from nengram.store import ResidentStore

transformers = pytest.importorskip("transformers")
from transformers import DynamicCache, LlamaConfig, StaticCache  # noqa: E402
from transformers.masking_utils import create_causal_mask  # noqa: E402

from nengram.hf.lookback import Lookback, MemoryStates, blocked_by  # noqa: E402
from nengram.memory import Engram  # noqa: E402

V, BLOCKS = 40, 2
SPECS = {
    "engram": AddressSpec.engram(
        compressed_vocab_size=V,
        rows_per_head=[50, 60],
        layer_ids=[0, 1],
        block_indices=[0, 1],
        pad_cid=0,
        heads=2,
        seed=0,
    ),
    "qwen_ple": AddressSpec.qwen_ple(
        vocab_size=V, eos_id=3, ple_layer_ids=[1, 2], heads=2, seed=0, rows_per_head=50, max_order=3
    ),
}
CONFIG = LlamaConfig(hidden_size=8, num_hidden_layers=BLOCKS, num_attention_heads=2, vocab_size=V, intermediate_size=8)


def lookback_of(dialect: str = "engram") -> tuple[Lookback, dict]:
    spec = SPECS[dialect]
    stores = {layer: ResidentStore(spec.num_rows(layer), 4, init_std=0.02, seed=0) for layer in spec.layer_ids}
    return Lookback(Addresser(spec), torch.arange(V), BLOCKS), stores


def rows_of(lookback: Lookback, stores: dict, ids_BT: torch.Tensor, **how) -> torch.Tensor:
    with lookback.begin(stores, ids_BT, **how) as step:
        return torch.stack([step.rows[layer] for layer in lookback.addresser.spec.layer_ids])


def fill(cache, batch: int, length: int) -> None:
    """What the model's attention would do to the cache."""
    for block in range(BLOCKS):
        cache.update(torch.zeros(batch, 2, length, 4), torch.zeros(batch, 2, length, 4), block)


CACHES = {
    "lazy": lambda: DynamicCache(),
    "dynamic": lambda: DynamicCache(config=CONFIG),
    "static": lambda: StaticCache(config=CONFIG, max_cache_len=64),
}


@pytest.mark.parametrize("dialect", SPECS)
@pytest.mark.parametrize("kind", CACHES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_chunks_with_a_cache_read_the_rows_of_the_whole_text(dialect: str, kind: str, data):
    lookback, stores = lookback_of(dialect)
    cuts = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    pads = data.draw(st.integers(0, 3))
    ids_BT = torch.randint(0, V, (2, sum(cuts)), generator=torch.Generator().manual_seed(sum(cuts)))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, : min(pads, sum(cuts) - 1)] = 0
    whole = rows_of(lookback, stores, ids_BT, attention_mask=mask_BT)
    cache, done, parts = CACHES[kind](), 0, []
    for cut in cuts:
        chunk = ids_BT[:, done : done + cut]
        parts.append(rows_of(lookback, stores, chunk, attention_mask=mask_BT[:, : done + cut], cache=cache))
        fill(cache, 2, cut)
        done += cut
    assert torch.equal(torch.cat(parts, 2), whole)


def test_a_left_pad_is_no_text_whatever_its_id():
    lookback, stores = lookback_of()
    text = torch.tensor([[7, 8, 9]])
    alone = rows_of(lookback, stores, text)
    for pad in (0, 5, 39):
        padded = torch.cat((torch.full((1, 2), pad), text), 1)
        rows = rows_of(lookback, stores, padded, attention_mask=torch.tensor([[0, 0, 1, 1, 1]]))
        assert torch.equal(rows[:, :, 2:], alone)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("static", [False, True])
def test_every_form_of_attention_mask_blocks_the_same_positions(implementation: str, static: bool):
    config = copy.deepcopy(CONFIG)
    config._attn_implementation = implementation
    cache = StaticCache(config=config, max_cache_len=16) if static else DynamicCache(config=config)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    seen = 0
    for length in (4, 2):
        embeds = torch.zeros(2, length, 8)
        positions = torch.arange(seen, seen + length)[None]
        given_mask = mask[:, : seen + length]
        four = create_causal_mask(
            config=config,
            inputs_embeds=embeds,
            attention_mask=given_mask,
            cache=cache,
            position_ids=positions,
        )
        flat, full = blocked_by(given_mask, length, seen), blocked_by({"full_attention": four}, length, seen)
        assert (flat is None and full is None) or torch.equal(flat, full)
        fill(cache, 2, length)
        seen += length
    assert blocked_by({"full_attention": None}, 2, 4) is None


def test_beams_copies_and_drafts_move_the_past_with_the_keys():
    lookback, stores = lookback_of()
    ids = torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(1))
    cache = DynamicCache(config=CONFIG)
    cache.activate_past_recording()
    rows_of(lookback, stores, ids[:, :5], cache=cache)
    fill(cache, 2, 5)
    assert not cache.activate_past_recording()
    layer = cache.layers[-1]
    assert isinstance(layer, MemoryStates)
    layer.activate_past_recording()
    cache.crop(0)
    fork = copy.deepcopy(cache)
    fork.reorder_cache(torch.tensor([1, 1]))
    swapped = rows_of(lookback, stores, ids[[1, 1], 5:], cache=fork)
    assert torch.equal(swapped, rows_of(lookback, stores, ids[[1, 1]])[:, :, 5:])
    wrong = (ids[:, 5:8] + 1) % V
    rows_of(lookback, stores, wrong, cache=cache)
    fill(cache, 2, 3)
    cache.crop(-3)
    assert torch.equal(rows_of(lookback, stores, ids[:, 5:], cache=cache), rows_of(lookback, stores, ids)[:, :, 5:])
    fill(cache, 2, 4)
    cache.crop(0)
    cache.batch_repeat_interleave(3)
    assert cache.layers[-1].states["ids"].shape == (6, 2)
    cache.batch_select_indices(torch.tensor([5]))
    assert torch.equal(cache.layers[-1].states["ids"], ids[1:, -2:])
    cache.reset()
    assert cache.layers[-1].seen == 0 and not cache.layers[-1].states


def test_what_was_not_recorded_cannot_be_taken_back():
    lookback, stores = lookback_of()
    cache = DynamicCache(config=CONFIG)
    rows_of(lookback, stores, torch.tensor([[1, 2, 3, 4]]), cache=cache)
    with pytest.raises(ConfigError, match="activate_past_recording"):
        cache.layers[-1].crop(-2)


def test_the_convolution_hears_the_same_in_chunks_and_its_gradient_flows():
    torch.manual_seed(0)
    spec = SPECS["engram"]
    lookback, stores = lookback_of()
    memory = Engram(16, 8)
    memory.conv_weight.data.normal_()
    vecs, hidden = torch.randn(2, 11, 16), torch.randn(2, 11, 1, 8)
    whole = memory(vecs, hidden)
    cache, parts, done = DynamicCache(config=CONFIG), [], 0
    for length in (3, 1, 5, 2):
        rows_of(lookback, stores, torch.ones(2, length, dtype=torch.int64), cache=cache)
        state = lookback.conv_state(cache, spec.layer_ids[0], memory)
        parts.append(memory(vecs[:, done : done + length], hidden[:, done : done + length], state=state))
        fill(cache, 2, length)
        done += length
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    parts[-1].sum().backward()
    assert float(memory.value_proj.weight.grad.abs().sum()) > 0
    assert lookback.conv_state(None, 0, memory) is None
    with pytest.raises(ConfigError, match="begin the step"):
        lookback.conv_state(DynamicCache(config=CONFIG), 0, memory)


def test_explicit_history_reads_the_rows_of_the_text():
    lookback, stores = lookback_of()
    ids = torch.randint(0, V, (1, 8), generator=torch.Generator().manual_seed(2))
    padded = torch.cat((torch.full((1, 2), -1), ids), 1)
    history = torch.stack((padded[:, 1:-1], padded[:, :-2]), -1)
    whole = rows_of(lookback, stores, ids)
    shuffled = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    flat = rows_of(lookback, stores, ids[:, shuffled], lookback_ids=history[:, shuffled])
    assert torch.equal(flat[:, :, 0], whole[:, 0, shuffled])


def test_rows_of_several_texts_are_refused_unless_they_say_where_each_begins():
    lookback, stores = lookback_of()
    ids, positions = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0, 1, 0, 1]])
    with pytest.raises(ConfigError, match="position_ids that begin anew.*start_BT"):
        rows_of(lookback, stores, ids, position_ids=positions)
    with pytest.raises(ConfigError, match="cu_seq_lens_q"):
        rows_of(lookback, stores, ids, cu_seq_lens_q=torch.tensor([0, 2, 4]))
    rows = rows_of(lookback, stores, ids, position_ids=positions, start_BT=positions == 0)
    assert torch.equal(rows[:, :, 2:], rows_of(lookback, stores, ids[:, 2:]))
    padded_positions = torch.tensor([[1, 1, 0, 1]])
    rows_of(lookback, stores, ids, position_ids=padded_positions, attention_mask=torch.tensor([[0, 0, 1, 1]]))


def test_a_cache_of_unknown_kind_or_of_unseen_tokens_is_refused():
    lookback, stores = lookback_of()
    ids = torch.tensor([[1, 2, 3]])

    class PagedAttentionCache:
        pass

    with pytest.raises(ConfigError, match="PagedAttentionCache keeps no order"):
        rows_of(lookback, stores, ids, cache=PagedAttentionCache())
    cache = DynamicCache(config=CONFIG)
    fill(cache, 1, 5)
    with pytest.raises(ConfigError, match="holds 5 tokens, of which this memory has seen 0"):
        rows_of(lookback, stores, ids, cache=cache)
    cache = DynamicCache(config=CONFIG)
    rows_of(lookback, stores, ids, cache=cache)
    fill(cache, 1, 3)
    other, other_stores = lookback_of("qwen_ple")
    with pytest.raises(ConfigError, match="belongs to a memory addressed by"):
        rows_of(other, other_stores, ids, cache=cache)
    with pytest.raises(AddressError, match="pass input_ids"):
        lookback.begin(stores, None)


def test_a_refused_chunk_leaves_the_cache_as_it_was():
    lookback, stores = lookback_of()
    cache = DynamicCache(config=CONFIG)
    with pytest.raises(IndexError):
        rows_of(lookback, stores, torch.tensor([[1, V + 5]]), cache=cache)
    assert cache.layers[-1].seen == 0
