"""Generation with a grafted memory says what whole passes say, however its cache is cut, copied, reordered or padded."""

import pytest
import torch
from tokenizers import decoders, pre_tokenizers

from nengram.errors import ConfigError

pytest.importorskip("transformers")
from transformers import DynamicCache, PreTrainedTokenizerFast, StaticCache, pipeline

from nengram.hf.hooks import SLACK
from nengram.hf.lookback import NOTHING, MemoryStates
from tests.hf.grafts import FAMILIES, greedy_by_whole_passes, logits_of, model_of, some_ids, strong
from tests.hf.test_graft import words

NEW = 8
QUIET = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False, "max_new_tokens": NEW}
ATTENDING = [family for family in FAMILIES if not family.startswith("mamba")]


@pytest.fixture(scope="module")
def llama():
    model = model_of("llama")
    strong(model)
    return model


def lost_look_back(memory) -> None:
    """What a hook without a past would do: every chunk begins a text of its own."""
    lookback = memory.adapter().lookback
    behind, lookback.conv_state = lookback._behind, lambda *_: None

    def lost(whole, *rest, **how):
        past, chunk = whole.split([lookback.past, whole.shape[1] - lookback.past], 1)
        return behind(torch.cat((torch.full_like(past, NOTHING), chunk), 1), *rest, **how)

    lookback._behind = lost


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_says_what_whole_passes_say_and_a_lost_look_back_would_not(family):
    model, prompt = model_of(family), some_ids(length=9)
    memory = strong(model, std=2.0)
    wanted = greedy_by_whole_passes(model, prompt, NEW)
    assert torch.equal(model.generate(prompt, **QUIET), wanted)
    lost_look_back(memory)
    assert not torch.equal(model.generate(prompt, **QUIET), wanted)


@pytest.mark.parametrize(
    "family", [*ATTENDING, "mamba2"]
)  # transformers' own Mamba forgets its state between longer chunks
def test_logits_are_those_of_the_whole_pass_in_chunks_of_any_size(family):
    model, ids_BT = model_of(family), some_ids(length=20)
    strong(model)
    with torch.no_grad():
        first = model(ids_BT[:, :7], use_cache=True)  # the model makes its cache itself
        parts = [first.logits]
        for begin, end in ((7, 8), (8, 12), (12, 20)):
            parts.append(model(ids_BT[:, begin:end], cache=first.cache, use_cache=True).logits)
    whole = logits_of(model, ids_BT)
    assert (torch.cat(parts, 1) - whole).abs().max() < 2e-5 * whole.abs().max()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mamba2"])
def test_a_left_padded_batch_says_what_its_texts_say_alone(family):
    model = model_of(family)
    strong(model)
    long_BT, short_BT = some_ids(1, 9, seed=1), some_ids(1, 5, seed=2)
    batch = torch.cat([long_BT, torch.nn.functional.pad(short_BT, (4, 0))])
    mask = torch.ones_like(batch)
    mask[1, :4] = 0
    both = model.generate(batch, attention_mask=mask, **QUIET)[:, -NEW:]
    alone = [model.generate(text_BT, **QUIET)[0, -NEW:] for text_BT in (long_BT, short_BT)]
    assert torch.equal(both, torch.stack(alone))


def test_pads_may_be_any_id():
    """What is padding comes from the mask: another id in its place changes nothing."""
    model = model_of("llama")
    strong(model)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    texts = [torch.cat([torch.full((1, 3), pad), some_ids(1, 4)], 1) for pad in (0, 50)]
    ones, others = (model.generate(text_BT, attention_mask=mask, **QUIET)[:, 7:] for text_BT in texts)
    assert torch.equal(ones, others)


def test_beams_find_what_beams_without_a_cache_find(llama):
    beams = QUIET | {"num_beams": 4, "num_return_sequences": 3, "output_scores": True, "return_dict_in_generate": True}
    cached = llama.generate(some_ids(length=9), **beams)
    whole = llama.generate(some_ids(length=9), use_cache=False, **beams)
    assert torch.equal(cached.sequences, whole.sequences)
    assert torch.allclose(cached.sequences_scores, whole.sequences_scores, atol=1e-4)


@pytest.mark.parametrize("how", ["another model", "prompt look-up"])
def test_assisted_decoding_says_what_the_model_says(llama, how):
    prompt = some_ids(1, 9)
    draft = model_of("llama", seed=1)
    assistant = {"assistant_model": draft} if how == "another model" else {"prompt_lookup_num_tokens": 3}
    assert torch.equal(llama.generate(prompt, **QUIET, **assistant), greedy_by_whole_passes(llama, prompt, NEW))


def test_a_grafted_model_drafts_for_another_and_for_itself(llama):
    prompt = some_ids(1, 9)
    plain = model_of("llama", seed=1)
    wanted = greedy_by_whole_passes(plain, prompt, NEW)
    assert torch.equal(plain.generate(prompt, **QUIET, assistant_model=llama), wanted)


def test_a_static_cache_serves_as_well(llama):
    prompt = some_ids(length=9)
    wanted = greedy_by_whole_passes(llama, prompt, NEW)
    assert torch.equal(llama.generate(prompt, **QUIET, cache_implementation="static", disable_compile=True), wanted)
    cache = StaticCache(config=llama.config, max_cache_len=32)
    assert torch.equal(llama.generate(prompt, **QUIET, cache=cache), wanted)


def test_steps_are_not_compiled_as_long_as_there_is_a_graft():
    model = model_of("llama")
    assert not model.generation_config.disable_compile
    memory = strong(model)
    assert model.generation_config.disable_compile
    memory.remove()
    assert not model.generation_config.disable_compile


def test_a_prompt_prefilled_in_chunks_goes_on_the_same(llama):
    prompt = some_ids(length=13)
    wanted = greedy_by_whole_passes(llama, prompt, NEW)
    assert torch.equal(llama.generate(prompt, **QUIET, prefill_chunk_size=4), wanted)


def test_sampling_repeats_with_its_seed_and_returns_several(llama):
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        how = QUIET | {"do_sample": True, "num_return_sequences": 3, "use_cache": use_cache}
        drawn.append(llama.generate(some_ids(1, 9), **how))
    assert torch.equal(*drawn)


def test_a_cache_filled_with_the_memory_off_is_refused_with_it_on():
    model, ids_BT = model_of("llama"), some_ids()
    memory = strong(model)
    with torch.no_grad(), memory.disabled():
        cache = model(ids_BT, use_cache=True).cache
    with pytest.raises(ConfigError, match="begin with an empty cache"):
        model(ids_BT[:, :1], cache=cache, use_cache=True)


def test_caches_and_rows_without_an_order_of_tokens_are_refused(llama):
    """What continuous batching passes: one flat row of many texts, and a cache of its own."""
    with pytest.raises(ConfigError, match="continuous batching"):
        llama(some_ids(), cache=object())
    with pytest.raises(ConfigError, match="one text a row") as error:
        llama(some_ids(1), use_cache=False, cu_seq_lens_q=torch.tensor([0, 9, 20]))
    assert "\n" not in str(error.value)


def test_a_text_pipeline_takes_the_model(llama):
    own = words(96)
    own.pre_tokenizer, own.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(prefix="##")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, pad_token="word0")
    said = pipeline("text-generation", model=llama, tokenizer=tokenizer)("word5 word6 WORD7", **QUIET)
    ids_BT = torch.tensor([tokenizer("word5 word6 WORD7").input_ids])
    wanted = tokenizer.decode(greedy_by_whole_passes(llama, ids_BT, NEW)[0])
    assert said[0]["generated_text"].replace(" ", "") == wanted.replace(" ", "")


def test_what_a_cache_remembers_does_not_grow_with_the_text(llama):
    cache = DynamicCache(config=llama.config)
    llama.generate(some_ids(1, 60), **QUIET | {"max_new_tokens": 60}, cache=cache)
    states = next(layer for layer in cache.layers if isinstance(layer, MemoryStates))
    assert states.seen == 119 and max(state.shape[1] for state in states.states.values()) <= 9 + 2 * SLACK
