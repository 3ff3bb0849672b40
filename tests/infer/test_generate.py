"""Generation: the same ids as the long way round, sampling that a seed fixes, and a window that restarts as documented."""

import itertools
import warnings

import pytest
import torch

from nengram.config import MemoryConfig, ModelConfig
from nengram.errors import ConfigError, DataError
from nengram.infer import Sampler, generate
from nengram.memory import MemoryStep
from nengram.model import Transformer

CONTEXT, VOCAB_SIZE, DOC = 16, 50, 1


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        vocab_size=VOCAB_SIZE, width=32, blocks=2, context=CONTEXT, experts=4, expert_width=8, shared_width=8
    )
    tables = MemoryConfig(kind="engram", blocks=(0, 1), heads=2, rows_per_head=(101, 103), table_std=0.5)
    model = Transformer(config, tables)
    model.init_weights(4)
    return model.eval()


@torch.no_grad()
def long_way_round(model, ids: list[int], count: int) -> list[int]:
    """Greedy, one whole forward pass per token, over the window that the docstring of the engine promises."""
    window, made = list(ids), []
    for _ in range(count):
        if len(window) > CONTEXT:
            window = window[-(CONTEXT // 2) :]
        ids_BT = torch.tensor([window])
        made.append(int(model(ids_BT, start_BT=ids_BT == DOC)[0, -1].argmax()))
        window.append(made[-1])
    return made


@pytest.mark.parametrize("prompt", [[5], [1, 7, 9], [1, 7, 1, 9], list(range(2, 2 + CONTEXT))], ids=len)
def test_greedy_tokens_are_those_of_whole_forward_passes_also_beyond_the_context(model, prompt):
    with pytest.warns(UserWarning, match="more than the 16 the model was trained on"):
        found = list(generate(model, prompt, max_tokens=40, doc_id=DOC))
    assert found == long_way_round(model, prompt, 40)


def test_what_fits_the_context_gives_no_warning(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(generate(model, [5, 6, 7], max_tokens=CONTEXT - 2))) == CONTEXT - 2
    with pytest.warns(UserWarning):
        generate(model, [5, 6, 7], max_tokens=CONTEXT - 1)


def test_tokens_stream_one_forward_pass_at_a_time(model, monkeypatch):
    lengths, forward = [], model.embed.forward
    monkeypatch.setattr(model.embed, "forward", lambda ids_BT: lengths.append(ids_BT.shape[1]) or forward(ids_BT))
    tokens = generate(model, [5, 6, 7], max_tokens=9)
    assert lengths == []
    next(tokens)
    assert lengths == [3]
    next(tokens)
    assert lengths == [3, 1]
    assert torch.is_grad_enabled()


def test_a_separator_in_the_prompt_reads_the_rows_that_training_reads(model, monkeypatch):
    seen, begin = [], MemoryStep.begin.__func__
    monkeypatch.setattr(
        MemoryStep, "begin", classmethod(lambda cls, *a, **k: seen.append(begin(cls, *a, **k)) or seen[-1])
    )
    prompt = [DOC, 5, 6, DOC, 7, 5, 6]
    made = list(itertools.islice(generate(model, prompt, max_tokens=4, doc_id=DOC), 4))
    ids_BT = torch.tensor([[*prompt, *made]])
    in_training = model.begin(ids_BT, start_BT=ids_BT == DOC).rows
    for layer_id, rows_BTS in in_training.items():
        read = torch.cat([step.rows[layer_id] for step in seen[:-1]], dim=1)
        assert torch.equal(read, rows_BTS[:, :-1])  # the last token is given out and never read


def test_generation_ends_before_the_stop_id(model):
    whole = list(generate(model, [5, 6], max_tokens=12))
    stop = whole[5]
    assert list(generate(model, [5, 6], max_tokens=12, stop_id=stop)) == whole[: whole.index(stop)]


def test_a_seed_fixes_the_text_and_nothing_else_does(model):
    def sample(seed):
        return list(generate(model, [5, 6], max_tokens=14, temperature=1.0, seed=seed))

    first = sample(7)
    torch.manual_seed(0)
    torch.rand(3)
    assert sample(7) == first
    assert any(sample(seed) != first for seed in (8, 9))
    interleaved = zip(*(generate(model, [5, 6], max_tokens=14, temperature=1.0, seed=7) for _ in "ab"), strict=True)
    assert all(a == b == c for (a, b), c in zip(interleaved, first, strict=True))


@pytest.mark.parametrize(
    ("ids", "line"),
    [
        ([], "the prompt is empty"),
        ([5] * 17, "the prompt is 17 tokens long, the model reads at most 16"),
        ([5, 50], "token id 50 at position 1 of the prompt is outside 0..49"),
        ([-1], "token id -1 at position 0 of the prompt is outside 0..49"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused_at_the_call(model, ids, line):
    with pytest.raises(DataError, match=line):
        generate(model, ids, max_tokens=3)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temperature": -0.5}, "temperature must be a number from 0 up, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be a number from 0 up, got nan"),
        ({"temperature": float("inf")}, "temperature must be a number from 0 up, got inf"),
        ({"top_k": -1}, "top_k must be at least 1, or 0 for all tokens, got -1"),
        ({"seed": -1}, r"the seed must lie in 0..2\*\*63 - 1, got -1"),
    ],
)
def test_settings_out_of_range_are_refused_at_the_call(model, settings, line):
    with pytest.raises(ConfigError, match=line):
        generate(model, [5], **{"max_tokens": 3} | settings)


def test_samples_follow_the_softmax_at_the_temperature():
    logits_V = torch.tensor([2.0, 0.0, 1.0, -30.0])
    sampler = Sampler(temperature=2.0, seed=0)
    counts_V = torch.bincount(torch.tensor([sampler(logits_V) for _ in range(6000)]), minlength=4)
    torch.testing.assert_close(counts_V / 6000, (logits_V / 2).softmax(0), atol=0.02, rtol=0)


def test_top_k_draws_among_the_k_likeliest_only():
    logits_V = torch.tensor([1.0, 3.0, 2.9, 2.8, 0.0])
    sampler = Sampler(temperature=5.0, top_k=3, seed=0)
    assert {sampler(logits_V) for _ in range(300)} == {1, 2, 3}
    assert {Sampler(temperature=9.0, top_k=1, seed=seed)(logits_V) for seed in range(20)} == {1}
    assert {Sampler(temperature=50.0, top_k=99, seed=seed)(logits_V) for seed in range(99)} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1.1e-6, 1e300])
def test_no_temperature_overflows(temperature):
    drawn = {Sampler(temperature=temperature, seed=seed)(torch.tensor([500.0, -500.0, 499.0])) for seed in range(40)}
    assert drawn == ({0} if temperature < 1 else {0, 1, 2})
