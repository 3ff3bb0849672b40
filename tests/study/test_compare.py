"""The head-to-head as a whole, small: fair by construction, resumable, and true to its own files."""

import io
import json
import sys

import numpy as np
import pytest
from rich.console import Console

from nengram.config import as_dict, load_config
from nengram.errors import ConfigError, NengramError
from nengram.study.arm import run_arm
from nengram.study.compare import check, compare, gather, nats_by_source, reference_of
from nengram.study.report import draw, print_results, print_verdict
from nengram.study.tokens import print_gains, token_gains
from nengram.study.tune import tune
from nengram.text import Packed


@pytest.mark.parametrize(
    "change, message",
    [
        ({"compare__arms": ["moe", "engramm"]}, 'did you mean "engram"'),
        ({"compare__lr": {"moo": 0.1}}, 'did you mean "moe"'),
        ({"compare__seeds": []}, "at least one arm and one seed"),
        ({"budget__scale": 0}, "scale is not set"),
    ],
)
def test_an_impossible_comparison_is_refused_before_anything_starts(config, change, message):
    with pytest.raises(ConfigError, match=message):
        check(config.replace(**change))


def test_losses_split_by_source_add_up_to_the_whole():
    packed = Packed(
        ids_N=np.arange(6, dtype=np.uint16),
        doc_starts_D=np.array([0, 4]),
        doc_sources_D=np.array([0, 1], dtype=np.int32),
        doc_bytes_D=np.array([9, 5]),
        sources=("a", "b"),
    )
    nats_N = np.array([np.nan, 1, 2, 3, 4, 5], dtype=np.float32)
    found = nats_by_source(nats_N, packed)
    assert found["all"]["nats"] == pytest.approx(3.0) and found["a"]["nats"] == pytest.approx(2.0)
    assert found["b"]["bits_per_byte"] == pytest.approx(9 / np.log(2) / 5)
    total = sum(found[name]["bits_per_byte"] * size for name, size in (("a", 9), ("b", 5)))
    assert total / 14 == pytest.approx(found["all"]["bits_per_byte"])


def test_the_demo_finds_its_committed_verdict():
    assert reference_of(load_config("demo", ("compare.seeds=[0]",))) is not None


def test_a_committed_verdict_is_not_quoted_beside_another_run(config, tmp_path, monkeypatch):
    config = config.replace(compare__reference="it.json", compare__lr={"moe": 0.004})
    monkeypatch.setattr(sys.modules[compare.__module__], "shipped", lambda _folder: tmp_path)
    assert reference_of(config) is None
    (tmp_path / "it.json").write_text(json.dumps({"config": as_dict(config)}))
    assert reference_of(config.replace(data__cache="elsewhere", compare__seeds=[0])) is not None
    for change in (
        {"data__corpus": "mine.txt"},
        {"train__tokens": 99},
        {"budget__rho": 0.5},
        {"compare__lr": {"moe": 1.0}},
    ):
        assert reference_of(config.replace(**change)) is None
    (tmp_path / "it.json").write_text("{")
    with pytest.raises(NengramError, match="it.json: damaged"):
        reference_of(config)


@pytest.mark.slow
def test_a_comparison_runs_resumes_and_reports_what_its_files_say(small, tmp_path):
    out, console = tmp_path / "out", Console(file=io.StringIO(), width=150)
    arms = ["moe", "engram", "one_row", "additive", "no_table"]
    small = small.replace(compare__arms=arms, compare__seeds=[0, 1, 2], compare__lr={"engram": 0.004})
    results = compare(small, out, resume=False, console=console)
    assert list(results["arms"]) == arms
    moe, engram = results["arms"]["moe"], results["arms"]["engram"]
    for arm in ("engram", "one_row", "additive"):
        cost = results["arms"][arm]["cost"]
        assert cost["total"] == pytest.approx(moe["cost"]["total"], rel=0.005)
        assert cost["flops"] == pytest.approx(moe["cost"]["flops"], rel=0.005)
    assert results["arms"]["no_table"]["cost"]["flops"] == pytest.approx(moe["cost"]["flops"], rel=0.005)
    assert engram["lr"] == 0.004 and moe["lr"] == small.train.lr
    assert results["arms"]["one_row"]["reachable_table"] < engram["reachable_table"] / 100
    claim = results["readings"]["claim"]
    assert claim["differences"] == pytest.approx(
        [a - b for a, b in zip(engram["test_nats_by_seed"], moe["test_nats_by_seed"], strict=True)]
    )
    assert claim["verdict"] in ("memory wins", "no difference shown", "memory loses")
    engram_run = json.loads((out / "engram-s0" / "arm.json").read_text())
    assert engram_run["test_nats_permuted"] > engram_run["test_nats"]

    with pytest.raises(ConfigError, match="--resume"):
        compare(small, out, resume=False, console=console)
    with pytest.raises(ConfigError, match="another config"):
        compare(small.replace(train__lr=0.1), out, resume=True, console=console)
    again = compare(small, out, resume=True, console=console)
    assert again["arms"] == results["arms"]

    print_results(results, console)
    print_verdict(results, console, None)
    assert f"verdict: {claim['verdict']}" in console.file.getvalue()
    assert draw(results, out).stat().st_size > 10_000
    from nengram.study.arm import prepare_for

    helped, hurt = token_gains(small, prepare_for(small), out)
    assert len(helped) == len(hurt) == 20
    gains = [gain.gain for gain in helped]
    assert gains == sorted(gains, reverse=True) and helped[0].gain > 0 > hurt[0].gain
    print_gains(helped, hurt, console)

    single = gather(small.replace(compare__seeds=[0]), prepare_for(small), out)
    spoken = Console(file=io.StringIO(), width=400)
    print_verdict(single, spoken, results)
    assert f"verdict of the committed seeds: {claim['verdict']}" in spoken.file.getvalue()


@pytest.mark.slow
def test_tuning_gives_every_arm_the_same_runs_and_ends_inside_the_grid(small, tmp_path):
    small = small.replace(compare__arms=["moe", "engram"], train__lr=0.02, train__tokens=2560)
    found = tune(small, tmp_path / "tune", Console(file=io.StringIO()))
    tried = {arm: list(losses) for arm, losses in found["dev_nats"].items()}
    assert tried["moe"] == tried["engram"] and len(tried["moe"]) >= 3
    for arm, losses in found["dev_nats"].items():
        best = min(losses, key=losses.get)
        assert best not in (tried[arm][0], tried[arm][-1]) and float(best) == pytest.approx(found["lr"][arm], abs=1e-6)
    ratios = [float(b) / float(a) for a, b in zip(tried["moe"], tried["moe"][1:], strict=False)]
    assert ratios == pytest.approx([2**0.5] * len(ratios), rel=1e-3)


@pytest.mark.parametrize("tier", ["host", "mapped", "tiered"])
def test_an_arm_is_the_same_arm_wherever_its_tables_are(small, tmp_path, tier):
    config = small.replace(train__tokens=512, budget__arm="engram")
    here = run_arm(config, tmp_path / "resident")
    there = run_arm(config.replace(train__table_tier=tier), tmp_path / tier)
    for name in ("dev_nats", "test_nats", "test_nats_permuted", "cost", "addresses"):
        assert there[name] == here[name], name
    finals = [(tmp_path / name / "final" / "table-1.safetensors").read_bytes() for name in ("resident", tier)]
    assert finals[0] == finals[1]


def test_a_finished_arm_returns_at_once_with_the_same_facts(small, tmp_path):
    small = small.replace(budget__arm="engram")
    facts = run_arm(small, tmp_path / "arm")
    assert facts["tokens"] == 1536 and np.isfinite(facts["test_nats"]) and 0 < facts["memory_share"] < 1
    assert run_arm(small, tmp_path / "arm") == facts
