"""`nengram graft`: an adapter from a local model and text, the same one after an interruption, and numbers that can be read."""

import re

import pytest
import torch

from nengram.errors import ConfigError
from tests.conftest import run_command, small_corpus

pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="accelerate is not installed: pip install nengram[hf]")
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from nengram.hf import load_adapter
from nengram.hf.graft_arms import GraftPlan, LoraArm, MemoryArm
from nengram.hf.graft_run import held_out_nats, train
from nengram.text import prepare, train_bpe

SIZES = {"blocks": (1,), "rows_per_head": (500, 500), "heads": 2, "row_width": 8}
OPTIONS = ("--rows", 500, "--heads", 2, "--row-width", 8, "--batch", 4, "--context", 32, "--steps", 12)
OPTIONS += ("--checkpoint-every", 5, "--eval-tokens", 2000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A local model with a tokenizer of its own, as `save_pretrained` leaves them."""
    place = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe([entry.text for entry in small_corpus()], 400)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|doc|>").save_pretrained(place)
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        **sizes, intermediate_size=48, attention_dropout=0.1, pad_token_id=0, eos_token_id=1, bos_token_id=1
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def data(folder, tmp_path_factory):
    return prepare(
        small_corpus(), tokenizer_path=folder / "tokenizer.json", cache_folder=tmp_path_factory.mktemp("cache")
    )


def opened(folder):
    return AutoModelForCausalLM.from_pretrained(folder), folder / "tokenizer.json"


def test_the_verb_leaves_an_adapter_and_says_what_the_lookup_is_worth(
    folder, corpus_file, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "memory"
    code, said, _ = run_command(monkeypatch, capsys, "graft", folder, "--text", corpus_file, "--out", out, *OPTIONS)
    assert code == 0, said
    assert re.search(r"graft: step 10/12  loss \d.\d+  [\d,]+ tokens/s  \d+ s left", said)
    lines = r"(before|with the memory|memory switched off|one-row control|LoRA)(?:, ([\d,]+) parameters)?"
    told = re.findall(lines + r"\W+(\d\.\d{4})", said)
    found, parameters = {name: nats for name, _, nats in told}, {name: count for name, count, _ in told}
    sizes = 2 * (4 * 8) * 32 + 3 * 32 + 4 * 32 + 8 * (503 + 509 + 521 + 523)  # projections; gains; convolution; rows
    assert parameters["with the memory"] == f"{sizes:,}"
    assert sizes - 64 < int(parameters["LoRA"].replace(",", "")) <= sizes
    assert set(found) == {"before", "with the memory", "memory switched off", "one-row control", "LoRA"}
    assert found["LoRA"] < found["before"] and re.search(r"\d nats (better|worse) than LoRA", said)
    assert found["memory switched off"] == found["before"] > found["with the memory"]
    assert re.search(r"keeps -?\d+% of the gain", said)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != corpus_file.name) == ["memory"]
    model, _ = opened(folder)
    load_adapter(model, out)
    again = run_command(monkeypatch, capsys, "graft", folder, "--text", corpus_file, "--out", out, *OPTIONS)
    assert again[0] == 2 and "holds an adapter already" in again[2]


@pytest.mark.parametrize(("schedule", "rival"), [("memory", False), ("first", False), ("memory", True)])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(folder, data, tmp_path, schedule, rival):
    plan = GraftPlan(SIZES, steps=8, batch=2, context=16, checkpoint_every=3, schedule=schedule)
    ends = []

    def arm():
        model, tokenizer = opened(folder)
        return LoraArm(model, plan, 4000) if rival else MemoryArm(model, tokenizer, plan)

    def judged(one) -> float:
        return held_out_nats(one.model, data.splits["dev"], batch=2, context=16, tokens=500)

    before = judged(arm())
    for stop in (None, 7):
        one = arm()
        run = train(one, data, plan, tmp_path / f"run {stop}")
        for record in run:
            if record.step == stop:
                run.close()
        if stop:
            one = arm()
            again = train(one, data, plan, tmp_path / f"run {stop}", resume=True)
            assert [record.step for record in again] == [7, 8]
        ends.append(judged(one))
    learnt = "lora.safetensors" if rival else "memory.safetensors"
    files = [(tmp_path / f"run {stop}" / "done" / learnt).read_bytes() for stop in (None, 7)]
    assert files[0] == files[1] and ends[0] == ends[1] != before
    one = arm()
    assert list(train(one, data, plan, tmp_path / "run 7", resume=True)) == []  # finished: only put on
    assert judged(one) == ends[0]


def test_another_run_is_not_gone_on_with(folder, data, tmp_path):
    plan = GraftPlan(SIZES, steps=4, batch=2, context=16, checkpoint_every=2)
    model, tokenizer = opened(folder)
    list(zip(range(3), train(MemoryArm(model, tokenizer, plan), data, plan, tmp_path / "run"), strict=False))
    model, tokenizer = opened(folder)
    other = GraftPlan(SIZES, steps=4, batch=2, context=16, lr=0.5)
    with pytest.raises(Exception, match="another settings"):
        next(train(MemoryArm(model, tokenizer, other), data, other, tmp_path / "run", resume=True))


def test_mistakes_are_one_line(folder, corpus_file, tmp_path, monkeypatch, capsys):
    nowhere = run_command(monkeypatch, capsys, "graft", tmp_path / "no", "--text", corpus_file, "--out", tmp_path / "a")
    assert nowhere[0] == 2 and nowhere[2].count("\n") == 1 and "tokenizer.json" in nowhere[2]
    (tmp_path / "b-training" / "graft").mkdir(parents=True)
    begun = run_command(monkeypatch, capsys, "graft", folder, "--text", corpus_file, "--out", tmp_path / "b", *OPTIONS)
    assert begun[0] == 2 and "--resume" in begun[2] and begun[2].count("\n") == 1
    deep = ("--out", tmp_path / "c", "--blocks", "7", *OPTIONS)
    wrong = run_command(monkeypatch, capsys, "graft", folder, "--text", corpus_file, *deep)
    assert wrong[0] == 2 and "must be blocks of 0..1" in wrong[2]


def test_a_wrong_row_control_is_refused(folder, data, tmp_path):
    model, tokenizer = opened(folder)
    plan = GraftPlan(SIZES, steps=2)
    with pytest.raises(ConfigError, match='did you mean "one_row"'):
        next(train(MemoryArm(model, tokenizer, plan, "one_rows"), data, plan, tmp_path / "run"))
