"""lm-eval scores what whole passes say, whatever the tier, and our own tasks ask what no training text answers word for word."""

import json
import math
import os
import shutil

os.environ["HF_DATASETS_OFFLINE"] = "1"  # before datasets is imported

import pytest
import torch

from nengram.errors import ConfigError
from nengram.hf.facts import CHOICES, bundled_entries, choice_questions, date_questions, facts_of
from nengram.text import split_of
from tests.conftest import run_command
from tests.hf.strong import PROMPTS
from tests.hf.test_loading import adapter, base, greedy  # noqa: F401 - fixtures

lm_eval = pytest.importorskip("lm_eval")
LIMIT = 6


@pytest.fixture(scope="module")
def facts():
    return {split: facts_of(bundled_entries(), split) for split in ("train", "test")}


@pytest.fixture(scope="module")
def results(strong, tmp_path_factory):
    """Of the strong model, by the command line's own function, read from disk."""
    from nengram.config import TableOptions
    from nengram.hf.harness import run_tasks

    out = tmp_path_factory.mktemp("results")
    tasks = ["nengram_facts", "nengram_text"]
    how = {"out": out, "as_json": False, "limit": LIMIT, "tables": TableOptions(table_tier="mapped")}
    run_tasks(strong.folder, tasks, console=Recorder(), **how)
    return json.loads((out / "results.json").read_text())


class Recorder:
    """A console that keeps nothing."""

    def print(self, *_, **__):
        pass


def nats(strong, context, continuation):
    """Of a continuation that is tokenised behind its context, as lm-eval does it."""
    before = strong.tokenizer(context)["input_ids"]
    whole = strong.tokenizer(context + continuation)["input_ids"]
    logprobs = strong.logits(whole).log_softmax(-1)
    return -sum(float(logprobs[at - 1, whole[at]]) for at in range(len(before), len(whole)))


def test_questions_are_of_the_split_they_name(facts):
    shown, never = ({fact.names for fact in facts[split]} for split in ("train", "test"))
    assert len(shown) > 4000 and len(never) > 200
    text = {
        split: "\n".join(e.text for e in bundled_entries() if split_of(e.source, e.key) == split) for split in facts
    }
    for split in facts:
        choices, dates = list(choice_questions(facts[split])), list(date_questions(facts[split]))
        assert len(choices) > 190 and len(dates) > 80
        for question in choices:
            assert len(set(question["choices"])) == CHOICES
            right = question["choices"][question["answer"]]
            assert right in text[split]
            assert f"{question['question']} {right}" not in text["train"]
        for question in dates:
            assert f"({question['answer']})" in text[split] and question["question"] not in text["train"]
        places = [question["answer"] for question in choices]
        assert all(0.15 < places.count(place) / len(places) < 0.35 for place in range(CHOICES))
        assert choices == list(choice_questions(facts[split]))


def test_wrong_answers_are_of_the_same_kind_and_length(facts):
    glosses = {fact.gloss: fact for fact in facts["train"]}
    for question in choice_questions(facts["train"]):
        kinds = {glosses[choice].dates is None for choice in question["choices"]}
        lengths = [len(choice) for choice in question["choices"]]
        assert len(kinds) == 1 and max(lengths) - min(lengths) < 40


def test_held_out_text_is_scored_as_whole_passes_score_it(results, strong):
    entries = [e for e in bundled_entries() if e.source == "wordnet" and split_of(e.source, e.key) == "test"][:LIMIT]
    bits = sum(nats(strong, "", entry.text) for entry in entries) / math.log(2)
    expected = bits / sum(len(entry.text.encode()) for entry in entries)
    assert results["tasks"]["nengram_text_wordnet"]["questions"] == LIMIT
    assert results["tasks"]["nengram_text_wordnet"]["scores"]["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("part", "split"), [("shown", "train"), ("never", "test")])
def test_choices_are_scored_as_whole_passes_score_them(results, strong, facts, part, split):
    right = 0
    for question in list(choice_questions(facts[split]))[:LIMIT]:
        scores = [nats(strong, question["question"], f" {choice}") for choice in question["choices"]]
        right += scores.index(min(scores)) == question["answer"]
    assert results["tasks"][f"nengram_facts_choice_{part}"]["scores"]["acc"] == pytest.approx(right / LIMIT)


def test_results_say_what_they_were_made_with(results, strong):
    assert (results["model"], results["table_tier"], results["limit"]) == (str(strong.folder), "mapped", LIMIT)
    assert results["made_with"]["lm_eval"] == lm_eval.__version__
    assert set(results["recall"]) == {"choice", "dates"}
    assert len(results["tasks"]) == 6
    shown, never = (results["tasks"][f"nengram_facts_choice_{part}"]["scores"] for part in ("shown", "never"))
    gain, error = results["recall"]["choice"]
    assert gain == pytest.approx(shown["acc"] - never["acc"])
    assert error == pytest.approx(math.hypot(shown["acc ±"], never["acc ±"])) and error > 0


def test_generation_in_padded_batches_looks_back(strong):
    from lm_eval.api.instance import Instance

    from nengram.hf.harness import NengramLM

    model = NengramLM(str(strong.folder), table_tier="mapped", batch_size=4)
    until = {"until": [], "max_gen_toks": 10, "do_sample": False}
    asked = [Instance("generate_until", {}, (prompt, dict(until)), at) for at, prompt in enumerate(PROMPTS)]
    found = model.generate_until(asked, disable_tqdm=True)
    for prompt, text in zip(PROMPTS, found, strict=True):
        ids = strong.ids(prompt)
        right, lost = (
            strong.tokenizer.decode(ids, skip_special_tokens=True)
            for ids in (strong.right(ids, 10), strong.lost(ids, 10))
        )
        assert text == right != lost
    model.close()
    model.close()


def test_lm_eval_finds_the_class_by_its_name(strong):
    from nengram.hf import harness
    from nengram.hf.tasks import local_tasks

    manager = harness.Tasks(["nengram_facts_choice_never"])
    arguments = {"pretrained": str(strong.folder), "table_tier": "host"}
    tasks = [dict(local_tasks()["nengram_facts_choice_never"][0])]
    found = lm_eval.simple_evaluate("nengram", arguments, tasks, limit=LIMIT, task_manager=manager, bootstrap_iters=0)
    assert 0 <= found["results"]["nengram_facts_choice_never"]["acc,none"] <= 1


def test_the_command_prints_json_of_a_memory_on_another_model(base, adapter, strong, monkeypatch, capsys, tmp_path):  # noqa: F811
    asked = ("--tasks", "nengram_text_wordnet", "--limit", 3, "--json", "--out", tmp_path, "--table-tier", "mapped")
    code, alone, _ = run_command(monkeypatch, capsys, "eval", base, *asked)
    assert code == 0
    code, both, _ = run_command(monkeypatch, capsys, "eval", base, "--adapter", adapter[0], *asked)
    assert code == 0
    bits = [json.loads(text)["tasks"]["nengram_text_wordnet"]["scores"]["bits_per_byte"] for text in (alone, both)]
    assert bits[0] != bits[1]
    entries = [e for e in bundled_entries() if e.source == "wordnet" and split_of(e.source, e.key) == "test"][:3]
    nats_in_all = 0.0
    for entry in entries:
        ids = torch.tensor([strong.tokenizer(entry.text)["input_ids"]])
        with torch.no_grad():
            logprobs = adapter[1](ids, use_cache=False).logits[0].log_softmax(-1)
        nats_in_all -= float(logprobs[:-1].gather(1, ids[0, 1:, None]).sum())
    total_bytes = sum(len(entry.text.encode()) for entry in entries)
    assert bits[1] == pytest.approx(nats_in_all / math.log(2) / total_bytes, rel=1e-5)
    assert json.loads((tmp_path / "results.json").read_text())["adapters"] == [str(adapter[0])]


GROUP = """
group: parity
task: [even, odd]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""
TASK = """
task: NAME
custom_dataset: !function numbers_asked.documents
test_split: test
output_type: multiple_choice
doc_to_text: "{{number}} is"
doc_to_choice: [even, odd]
doc_to_target: "{{number % 2}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
DOCUMENTS = """
from datasets import Dataset, DatasetDict

def documents(**_):
    return DatasetDict({"test": Dataset.from_list([{"number": number} for number in range(5)])})
"""


def test_a_group_of_lm_evals_is_told_with_its_tasks(base, tmp_path, monkeypatch):  # noqa: F811
    from lm_eval.tasks import TaskManager

    from nengram.hf.harness import evaluate

    files = {"parity.yaml": GROUP, "numbers_asked.py": DOCUMENTS}
    files |= {f"{name}.yaml": TASK.replace("NAME", name) for name in ("even", "odd")}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    begin = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, **_: begin(self, include_path=str(tmp_path), include_defaults=False)
    )
    tasks = evaluate(base, ["parity", "nengram_text_wordnet"], limit=LIMIT)["tasks"]
    assert {name: found["questions"] for name, found in tasks.items()} == {
        "parity": None,
        "even": 5,
        "odd": 5,
        "nengram_text_wordnet": LIMIT,
    }
    assert tasks["parity"]["scores"]["acc"] == tasks["even"]["scores"]["acc"] == tasks["odd"]["scores"]["acc"]


def test_a_tokenizer_without_a_token_to_begin_with_is_refused(strong, tmp_path):
    from transformers import AutoTokenizer

    from nengram.hf.harness import NengramLM

    shutil.copytree(strong.folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(strong.folder)
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="neither a bos nor an eos token"):
        NengramLM(str(tmp_path / "model"))


def test_options_that_would_not_be_heard_are_refused(strong, monkeypatch, capsys):
    code, _, err = run_command(
        monkeypatch, capsys, "eval", strong.folder, "--tasks", "nengram_text", "--corpus", "x.txt"
    )
    assert (code, err) == (2, "nengram: --corpus has no part in --tasks: leave it out\n")
    code, _, err = run_command(monkeypatch, capsys, "eval", "no/such/folder", "--tasks", "hellaswag")
    assert (code, err) == (2, "nengram: no/such/folder: no such folder\n")
    code, _, err = run_command(monkeypatch, capsys, "eval", strong.folder, "--limit", 3)
    assert (code, err) == (2, "nengram: --limit has no part in an evaluation without --tasks: leave it out\n")


@pytest.mark.slow  # lm-eval reads 14,000 files to know its own names
def test_names_that_do_not_exist_or_have_no_data_here_are_one_line(base, monkeypatch, capsys):  # noqa: F811
    code, _, err = run_command(monkeypatch, capsys, "eval", base, "--tasks", "nengram_fact")
    assert (code, err.count("\n")) == (2, 1)
    assert 'there is no task "nengram_fact" (did you mean "nengram_facts"?)' in err
    code, _, err = run_command(monkeypatch, capsys, "eval", base, "--tasks", "nengram_text,hellaswag")
    assert code == 2
    assert err.splitlines()[-1].startswith('nengram: task "hellaswag": its data cannot be had here')
