"""Whatever generate does, it writes what the whole-pass argmax of our own model says, and never what a lost look-back would."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    pipeline,
)

from nengram.errors import AddressError, ConfigError
from nengram.hf.lookback import MemoryStates
from nengram.infer import generate
from tests.hf.strong import PROMPTS, SAID

TOKENS = 12


@pytest.fixture(scope="module")
def loaded(any_strong):
    """A variant, and its folder as the Auto class loads it."""
    return any_strong, AutoModelForCausalLM.from_pretrained(any_strong.folder)


@pytest.fixture(scope="module")
def model(strong):
    return AutoModelForCausalLM.from_pretrained(strong.folder)


def padded(strong, prompts=PROMPTS) -> dict[str, torch.Tensor]:
    return dict(strong.tokenizer(list(prompts), padding=True, return_tensors="pt"))


def written(strong, prompts=PROMPTS, tokens: int = TOKENS) -> list[list[int]]:
    return [strong.right(strong.ids(prompt), tokens) for prompt in prompts]


def greedy(model, inputs, tokens: int = TOKENS, **options) -> list[list[int]]:
    made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **options)
    return made[:, inputs["input_ids"].shape[1] :].tolist()


def test_a_lost_look_back_would_show_within_five_tokens(any_strong):
    for prompt in PROMPTS:
        ids = any_strong.ids(prompt)
        right, lost = any_strong.right(ids, 5), any_strong.lost(ids, 5)
        assert right[0] == lost[0] and right != lost


@pytest.mark.parametrize("cache", [None, "static"])
def test_left_padded_batches_are_the_whole_pass(loaded, cache):
    strong, model = loaded
    assert greedy(model, padded(strong), cache_implementation=cache) == written(strong)


def test_a_static_cache_compiles_nothing(model, strong, monkeypatch):
    """Where transformers would compile a forward by itself: rows are hashed on the way."""
    monkeypatch.setattr(type(model), "get_compiled_call", lambda *_: pytest.fail("compiled"))
    everywhere = CompileConfig()
    everywhere._compile_all_devices = True
    assert greedy(model, padded(strong), cache_implementation="static", compile_config=everywhere) == written(strong)


def test_without_a_cache(loaded):
    strong, model = loaded
    assert greedy(model, padded(strong), use_cache=False) == written(strong)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(7, marks=pytest.mark.slow)])
def test_chunked_prefill(loaded, cache, chunk):
    strong, model = loaded
    assert greedy(model, padded(strong), prefill_chunk_size=chunk, cache_implementation=cache) == written(strong)


def test_right_side_of_a_pad_id_in_the_text_is_text(model, strong):
    """A pad id that the mask shows is read like any other."""
    ids = strong.ids(PROMPTS[0])[:5] + [0, 0] + strong.ids(PROMPTS[2])
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    assert greedy(model, inputs) == [strong.right(ids, TOKENS)]


@torch.no_grad()
def beams_of_the_whole(strong, ids: list[int], beams: int, tokens: int) -> list[int]:
    """Beam search without a cache, an end or a length penalty: the best `beams` texts by summed log-probability, step by step."""
    found = [(0.0, [])]
    for _ in range(tokens):
        grown = []
        for score, made in found:
            log_V = strong.logits(ids + made)[-1].log_softmax(-1)
            best = log_V.topk(2 * beams)
            grown += [(score + float(value), [*made, int(at)]) for value, at in zip(*best, strict=True)]
        found = sorted(grown, key=lambda one: -one[0])[:beams]
    return found[0][1]


@pytest.mark.parametrize("cache", [None, "static"])
def test_beams_keep_each_its_own_past(loaded, cache):
    strong, model = loaded
    made = greedy(model, padded(strong, PROMPTS[:2]), 6, num_beams=3, cache_implementation=cache)
    assert made == [beams_of_the_whole(strong, strong.ids(prompt), 3, 6) for prompt in PROMPTS[:2]]


def test_drafted_tokens_are_taken_back_without_a_trace(loaded, draft):
    strong, model = loaded
    drafter = AutoModelForCausalLM.from_pretrained(draft.folder)
    ids = strong.ids(PROMPTS[0])
    assert greedy(model, {"input_ids": torch.tensor([ids])}, assistant_model=drafter) == [strong.right(ids, TOKENS)]


def test_a_model_drafting_for_itself_is_always_right(model, strong):
    ids = strong.ids(PROMPTS[0])
    made = greedy(
        model, {"input_ids": torch.tensor([ids])}, assistant_model=AutoModelForCausalLM.from_pretrained(strong.folder)
    )
    assert made == [strong.right(ids, TOKENS)]


def test_prompt_look_up_decoding(model, strong):
    ids = strong.ids(PROMPTS[3]) * 2
    assert greedy(model, {"input_ids": torch.tensor([ids])}, prompt_lookup_num_tokens=3) == [strong.right(ids, TOKENS)]


def test_sampling_follows_the_probabilities_of_the_whole(model, strong):
    """The same seed over the same probabilities draws the same tokens."""
    ids = strong.ids(PROMPTS[0])
    torch.manual_seed(3)
    made = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=True, top_k=0, temperature=2.0)[
        0, len(ids) :
    ]
    torch.manual_seed(3)
    whole = list(ids)
    for _ in range(TOKENS):
        whole.append(int(torch.multinomial((strong.logits(whole)[-1:] / 2.0).softmax(-1), 1)))
    assert made.tolist() == whole[len(ids) :]


def test_a_conversation_goes_on_from_its_cache(model, strong):
    first, more = strong.ids(PROMPTS[0]), strong.ids(PROMPTS[2])[1:]
    cache = DynamicCache(config=model.config)
    said = model.generate(torch.tensor([first]), max_new_tokens=6, do_sample=False, cache=cache)[0].tolist()
    assert said == first + strong.right(first, 6)
    ids = said + more
    assert model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, cache=cache)[
        0
    ].tolist() == ids + strong.right(ids, 6)


def test_several_texts_of_one_prompt(model, strong):
    ids = torch.tensor([strong.ids(PROMPTS[1])])
    torch.manual_seed(0)
    made = model.generate(ids, max_new_tokens=6, do_sample=True, num_return_sequences=3)
    with torch.no_grad():
        logits_BTV = model(made[:, :-1]).logits
    for text, logits_TV in zip(made, logits_BTV, strict=True):
        torch.testing.assert_close(logits_TV, strong.logits(text[:-1].tolist()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_documents_in_a_prompt_are_kept_apart_as_in_training(model, strong, chunk):
    """The separator stands inside the prompt; our own engine begins n-grams anew there, and so does every cut of the prompt."""
    ids = strong.ids(PROMPTS[0]) + strong.ids(PROMPTS[3]) + strong.ids(PROMPTS[1])
    own = list(generate(strong.own, ids, max_tokens=TOKENS, doc_id=strong.run.doc_id))
    assert greedy(model, {"input_ids": torch.tensor([ids])}, prefill_chunk_size=chunk) == [own]
    assert own != strong.right(ids, TOKENS)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_cached_logits_equal_the_whole_wherever_the_text_is_cut(loaded, kind):
    strong, model = loaded
    ids = strong.ids(PROMPTS[3])
    cache = kind(config=model.config) if kind is DynamicCache else kind(config=model.config, max_cache_len=64)
    parts, at = [], 0
    for length in (5, 1, 1, 4, len(ids) - 11):
        parts.append(model(torch.tensor([ids[at : at + length]]), cache=cache).logits[0])
        at += length
    torch.testing.assert_close(torch.cat(parts), strong.logits(ids), atol=1e-4, rtol=1e-4)


def test_the_past_of_the_memory_is_a_layer_of_the_cache(model, strong):
    cache = DynamicCache(config=model.config)
    model(torch.tensor([strong.ids(PROMPTS[0])]), cache=cache)
    assert [type(layer) for layer in cache.layers].count(MemoryStates) == 1 and len(cache.layers) == 4


def test_the_pipeline_writes_the_same(model, strong):
    say = pipeline("text-generation", model=model, tokenizer=strong.tokenizer)
    text = say(PROMPTS[0], max_new_tokens=TOKENS, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert text == strong.tokenizer.decode(strong.right(strong.ids(PROMPTS[0]), TOKENS))
    both = say(list(PROMPTS), max_new_tokens=TOKENS, do_sample=False, return_full_text=False, batch_size=4)
    assert [one[0]["generated_text"] for one in both] == [strong.tokenizer.decode(made) for made in written(strong)]
    chat = strong.tokenizer.apply_chat_template(SAID, add_generation_prompt=True)["input_ids"]
    answer = say([SAID], max_new_tokens=TOKENS, do_sample=False)[0][0]["generated_text"][-1]["content"]
    assert answer == strong.tokenizer.decode(strong.right(chat, TOKENS))


def test_continuous_batching_is_refused_in_one_line(model, strong):
    """It packs the texts of all requests into one row; each request fails with our reason instead of a wrong text."""
    flat = torch.tensor([strong.ids(PROMPTS[0]) + strong.ids(PROMPTS[1])])
    positions = torch.cat([torch.arange(len(strong.ids(prompt))) for prompt in PROMPTS[:2]])[None]
    with pytest.raises(ConfigError, match=r"rows that hold several texts .*: one text a row, or pass start_BT"):
        model(flat, position_ids=positions)
    with pytest.raises(ConfigError, match="cu_seq_lens_q"):
        model(flat, cu_seq_lens_q=torch.tensor([0, 14, 16]))
    with pytest.raises(ConfigError, match=r"a PagedAttentionCache keeps no order of tokens .*: serve in plain mode"):
        model(flat, cache=type("PagedAttentionCache", (), {})())
    with pytest.raises(ConfigError, match="position_ids begin at 14 and no cache holds what came before"):
        model(flat[:, -1:], position_ids=torch.tensor([[14]]), use_cache=False)


def test_a_real_batching_server_fails_each_request_with_our_reason(strong):
    model = AutoModelForCausalLM.from_pretrained(strong.folder)
    batching = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64)
    settings = GenerationConfig(max_new_tokens=4, do_sample=False)
    texts = [strong.ids(prompt) for prompt in PROMPTS[:2]]
    made = model.generate_batch(texts, generation_config=settings, continuous_batching_config=batching)
    assert len(made) == 2
    for request in made.values():
        assert request.generated_tokens == [] and "serve in plain mode" in request.error


def test_embeddings_without_ids_are_refused(model):
    with pytest.raises(AddressError, match="memory needs token ids"):
        model(inputs_embeds=torch.zeros(1, 3, 48))
    with pytest.raises(AddressError, match="memory needs token ids"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 48), max_new_tokens=2)


def test_packed_rows_that_say_where_texts_begin_are_read(model, strong):
    ids, others = strong.ids(PROMPTS[0]), strong.ids(PROMPTS[3])
    others[0] = 2  # no separator: it is the argument that says it
    start_BT = torch.arange(len(ids + others))[None] == len(ids)
    logits_BTV = model(torch.tensor([ids + others]), start_BT=start_BT).logits
    assert torch.equal(logits_BTV, strong.own(torch.tensor([ids + others]), start_BT=start_BT))
