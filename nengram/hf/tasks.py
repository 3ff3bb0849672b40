"""Tasks for lm-eval that need no network: factual recall and held-out text, made from the text that comes with the package.

A task is a dict, as lm-eval's YAML files are; its documents are made in memory, so no path can be looked up in the wrong folder.

    nengram_facts   nengram_facts_{choice,dates}_{shown,never}: a name's gloss among four (acc, acc_norm), the years of a
                    life (exact_match); of facts in the train split, and of facts that no training has shown
    nengram_text    nengram_text_{factbook,wordnet}: the test split (bits_per_byte, byte_perplexity, word_perplexity)
"""

from collections.abc import Callable
from typing import Any

from datasets import Dataset, DatasetDict

from nengram.hf.facts import PARTS, bundled_entries, choice_questions, date_questions, facts_of
from nengram.text import split_of

SOURCES = ("factbook", "wordnet")
ASKED = {"choice": choice_questions, "dates": date_questions}
VERSION = 1


def local_tasks() -> dict[str, list[dict[str, Any]]]:
    """Our tasks by the names that `--tasks` takes: each group, and each task alone."""
    facts = [_facts(kind, part) for kind in ASKED for part in PARTS]
    text = [_text(source) for source in SOURCES]
    groups = {"nengram_facts": facts, "nengram_text": text}
    return groups | {task["task"]: [task] for task in (*facts, *text)}


def _facts(kind: str, part: str) -> dict[str, Any]:
    def documents(**_: Any) -> DatasetDict:
        return _split(ASKED[kind](facts_of(bundled_entries(), PARTS[part])))

    task = _task(f"nengram_facts_{kind}_{part}", documents) | {"doc_to_text": "{{question}}"}
    if kind == "choice":
        metrics = [_mean("acc"), _mean("acc_norm")]
        return task | {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": metrics,
        }
    years = {"function": "regex", "regex_pattern": r"(\d{4}-\d{4})"}
    return task | {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 16},
        "filter_list": [{"name": "years", "filter": [years, {"function": "take_first"}]}],
        "metric_list": [_mean("exact_match")],
    }


def _text(source: str) -> dict[str, Any]:
    def documents(**_: Any) -> DatasetDict:
        entries = (entry for entry in bundled_entries() if entry.source == source)
        return _split({"text": entry.text} for entry in entries if split_of(entry.source, entry.key) == "test")

    return _task(f"nengram_text_{source}", documents) | {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("bits_per_byte", "byte_perplexity", "word_perplexity")],
    }


def _task(name: str, documents: Callable[..., DatasetDict]) -> dict[str, Any]:
    return {"task": name, "custom_dataset": documents, "test_split": "test", "metadata": {"version": VERSION}}


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _split(documents: Any) -> DatasetDict:
    return DatasetDict({"test": Dataset.from_list(list(documents))})
