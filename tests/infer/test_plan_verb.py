"""`nengram plan` as a user meets it: presets, configs, runs and tables are planned for, mistakes end in one line."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from nengram.config import Config, load_config, to_toml
from nengram.errors import ConfigError
from nengram.infer import measure
from nengram.infer.plan_rates import ASSUMED
from nengram.infer.plan_sizes import GIB
from nengram.model import Transformer
from nengram.study.plan_report import print_plan
from tests.conftest import run_command, small_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Options that name a small corpus, its vocabulary and a cache."""
    folder = tmp_path_factory.mktemp("corpus")
    entries = [json.dumps({"text": entry.text, "key": entry.key}) for entry in small_corpus()]
    (folder / "facts.jsonl").write_text("\n".join(entries))
    place = json.dumps(str(folder / "facts.jsonl"))
    return (f"data.corpus={place}", "data.vocab_size=400", f"data.cache={json.dumps(str(folder / 'cache'))}")


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `nengram plan ARGUMENTS` in this process."""
    return run_command(monkeypatch, capsys, "plan", *arguments)


@pytest.fixture
def planned(monkeypatch, capsys):
    """Run `nengram plan ... --json` and parse what it prints."""

    def plan(*arguments: str) -> dict:
        code, out, error = run(monkeypatch, capsys, *arguments, "--json")
        assert code == 0, error
        return json.loads(out)

    return plan


def test_a_released_model_is_planned_with_a_proxy(planned, corpus):
    plan = planned("deepseek-v41-flash", *corpus, "--host-gib", "64", "--disk-iops", "400000", "--link-gib-per-s", "50")
    assert (plan["sizes"]["rows"], plan["codec"]) == (768_022_850, "fp8")
    assert plan["sizes"]["codecs"]["fp8"]["table_bytes"] == 202_758_032_400
    assert plan["proxy"] and plan["method"] == "n-grams"
    tiers = {one["codec"]: one["tier"] for one in plan["placements"]}
    assert tiers["fp8"] == "tiered" and plan["placements"][3]["host_bytes"] <= 64 * GIB
    assert plan["ceilings"]["disk_iops"] == {"value": 400_000.0, "source": "given", "about": ""}
    assert plan["ceilings"]["host_rows_per_s"]["source"] == "assumed"
    assert [rates["chunk"] for rates in plan["rates"]] == [chunk["name"] for chunk in plan["chunks"]]


def test_a_config_whose_vocabulary_is_its_tokenizers(planned, corpus):
    plan = planned("demo", *corpus, "--host-gib", "1", "--tokens", "5000", "--codec", "int8")
    assert not plan["proxy"] and plan["method"] == "rows" and plan["codec"] == "int8"
    assert {one["tier"] for one in plan["placements"]} == {"host"}
    training = plan["training"]
    assert list(training["per_order"]) == ["x0.5", "x1", "x2", "config"]
    assert [one["rows"] for one in training["per_order"]["x1"]] == training["recommended"]
    same = planned("demo", *corpus, "memory.dialect=qwen_ple", "--host-gib", "1")
    assert same["dialect"] == "qwen_ple" and same["sizes"]["rows"] % 128 == 0


def test_a_run_its_table_and_its_config_agree(planned, corpus, run_folder):
    at = ("--host-gib", "0", "--device-gib", "0", *corpus)
    by_run = planned(run_folder, *at)
    by_table = planned(run_folder / "final" / "table-1.safetensors", *at)
    assert by_run["addresses"] == by_table["addresses"]
    assert not by_run["proxy"] and not by_table["proxy"]
    for name in ("sizes", "placements", "hits", "chunks", "rates", "text"):
        assert by_run[name] == by_table[name], name
    assert by_run["placements"][0]["tier"] == "mapped"


def test_a_table_without_its_tokenizer_is_planned_with_a_proxy(planned, corpus, run_folder, tmp_path):
    there = tmp_path / "alone.safetensors"
    there.write_bytes((run_folder / "final" / "table-1.safetensors").read_bytes())
    other = [option.replace("vocab_size=400", "vocab_size=350") for option in corpus]
    plan = planned(there, *other, "--host-gib", "1")
    assert plan["name"] == "alone.safetensors" and plan["proxy"]


def test_what_is_printed_is_in_the_json(planned, corpus, monkeypatch, capsys):
    options = ("qwen-ple", *corpus, "--host-gib", "8", "--tokens", "100000")
    plan = planned(*options)
    code, out, _ = run(monkeypatch, capsys, *options)
    assert code == 0 and _printed(plan) == out
    for words in ("320,001,536", "A PROXY", "assumed", "recommended: memory.rows_per_head=", "Extrapolated to", " <"):
        assert words in out
    assert max(map(len, out.splitlines())) <= 140


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("demo", "--host-gib", "-3"), "--host-gib must be a number of GiB from 0 up, got -3.0"),
        (("demo", "--device-gib", "nan"), "--device-gib must be a number of GiB from 0 up"),
        (("demo", "--codec", "fp9"), '--codec "fp9" is unknown (did you mean "fp8"?); codecs: fp32'),
        (("demo", "--corpus", "nowhere.txt"), "nowhere.txt: no such file or folder"),
        (("demo", "--tokens", "-5"), "--tokens must be a number of tokens from 1 up, got -5"),
        (("demo", "--disk-iops", "0"), "--disk-iops must be above 0, got 0.0"),
        (("demo", "--link-gib-per-s", "-1"), "--link-gib-per-s must be above 0"),
        (("demo", "--disk-folder", "."), "--disk-folder is where --measure reads"),
        (("qwen-pel",), 'did you mean "qwen-ple"?'),
        (("nowhere.safetensors",), "nowhere.safetensors: no such file"),
        (("demo", "budget.scale=0"), "this model has no memory layer"),
        (("demo", "budget.arm=moe"), "arm moe has no table"),
        (("qwen-ple", "memory.dialect=qwen"), 'memory.dialect "qwen" is unknown (did you mean "qwen_ple"?)'),
        (("qwen-ple", "memory.rows_per_head=[5]"), "needs one number for each order 2..3"),
        (("qwen-ple", "memory.rows_per_head=[5, 7]"), "has one size for all orders"),
        (("qwen-ple", "memory.codec=fp9"), 'unknown codec "fp9" (did you mean "fp8"?)'),
        (("qwen-ple", "memory.row_width=0"), "a row has 1 to"),
    ],
)
def test_mistakes_end_in_one_line(arguments, line, corpus, monkeypatch, capsys):
    code, _, error = run(monkeypatch, capsys, arguments[0], *corpus, *arguments[1:])
    assert code == 2 and error.count("\n") == 1 and error.startswith("nengram: ") and line in error, error


def test_measured_ceilings_are_used_and_named(planned, corpus, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "RAM_BYTES", 1 << 20)
    monkeypatch.setattr(measure, "DISK_BYTES", 8 << 20)
    monkeypatch.setattr(measure, "SECONDS", 0.01)
    plan = planned("demo", *corpus, "--host-gib", "0", "--measure", "--disk-folder", tmp_path)
    for name in ("host_rows_per_s", "disk_iops"):
        assert plan["ceilings"][name]["source"] == "measured" and plan["ceilings"][name]["value"] > 0
    assert set(plan["ceilings"]) == set(ASSUMED) and not list(tmp_path.iterdir())
    given = planned("demo", *corpus, "--host-gib", "0", "--measure", "--disk-iops", "77")
    assert given["ceilings"]["disk_iops"]["value"] == 77


def test_a_scratch_file_needs_a_folder_and_space(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="--disk-folder .*nowhere: No such file or directory"):
        measure.disk_rate(tmp_path / "nowhere")
    monkeypatch.setattr(measure.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1 << 20}))
    with pytest.raises(ConfigError, match="too little space for a scratch file"):
        measure.disk_rate(tmp_path)


def test_no_page_is_read_twice_and_all_are_asked_for(tmp_path, monkeypatch):
    asked = []
    read = measure.os.preadv

    def noted(fd, buffers, offset):
        asked.append(offset)
        return read(fd, buffers, offset)

    monkeypatch.setattr(measure.os, "preadv", noted)
    monkeypatch.setattr(measure, "DISK_BYTES", 4 << 20)
    monkeypatch.setattr(measure, "SECONDS", 60)
    assert measure.disk_rate(tmp_path, threads=4).value > 0
    assert sorted(asked) == list(range(0, 4 << 20, 4096))


def test_models_are_built_with_what_they_can_do_and_no_more():
    model = load_config("demo").replace(budget__scale=0, model__vocab_size=64, memory__kind="engram")
    Transformer(model.model, model.memory)
    for key, value, line in (
        ("memory__dialect", "qwen_ple", 'memory.compress: dialect "qwen_ple" hashes raw ids'),
        ("memory__dialect", "deepseek_v41", 'layers of dialect "deepseek_v41" have no convolution'),
        ("memory__codec", "int8", 'memory.codec "int8": a model is built with "fp32" only'),
        ("memory__compressed_vocab_size", 99, "memory.compressed_vocab_size is 99, this tokenizer gives 64"),
    ):
        wrong = model.replace(**{key: value})
        with pytest.raises(ConfigError, match=line):
            Transformer(wrong.model, wrong.memory, cids_V=np.arange(64))


def test_a_config_saved_before_tables_had_codecs_still_loads(tmp_path):
    lines = to_toml(Config()).splitlines()
    new = ("dialect", "codec", "compressed_vocab_size")
    (tmp_path / "config.toml").write_text("\n".join(line for line in lines if not line.startswith(new)))
    assert load_config(tmp_path) == Config()


@pytest.mark.slow
def test_the_plan_in_the_documents_is_what_the_command_prints(planned, tmp_path):
    options = ("--host-gib", "64", "--disk-iops", "400000", "--tokens", "10000000")
    plan = planned("deepseek-v41-flash", f"data.cache={json.dumps(str(tmp_path))}", *options)
    committed = json.loads((Path(__file__).parents[2] / "docs" / "plan.json").read_text())
    assert _printed(plan) == _printed(committed)


def _printed(plan: dict) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    print_plan(plan, console)
    return console.export_text()
