"""A sweep says what is impossible before it starts, never runs a point twice, and is the same however often it is stopped."""

import io
import json
import subprocess
import sys
import time

import pytest
from rich.console import Console

from nengram.config import RateConfig, load_config, to_toml, with_grid
from nengram.errors import ConfigError, DataError, NengramError
from nengram.files import held
from nengram.study import sweep
from nengram.study.processes import run_jobs
from nengram.study.sweep import Corpora, expand, facts_of, load_rows, rows_of, run_sweep, same_run
from nengram.study.sweep_check import run_check
from nengram.study.sweep_rates import Node, load_found, nodes_of, print_search, rate_at
from nengram.study.sweep_report import differences, to_csv
from nengram.study.sweep_verb import ran_on, run_dry, run_report, run_sweep_verb, run_tune
from nengram.study.tune import search
from tests.conftest import run_command


@pytest.fixture
def small(small):
    return small.replace(sweep__seeds=[0])


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


def swept(config, **grid):
    return config.replace(sweep__grids=[{key.replace("__", "."): values for key, values in grid.items()}])


def test_every_combination_is_a_point_and_pure_moe_is_one_run_whoever_asks_for_it(small):
    grids = [{"budget.rho": [1.0, 0.6], "train.tokens": [1024, 1536]}, {"budget.arm": ["moe"], "train.tokens": [1024]}]
    points = expand(small.replace(sweep__grids=grids, sweep__seeds=[0, 5]), Corpora())
    assert [point.seed for point in points] == [0] * 4 + [5] * 4
    assert {(p.arm, p.resolved.train.tokens) for p in points} == {
        ("moe", 1024), ("moe", 1536), ("engram", 1024), ("engram", 1536)
    }  # fmt: skip
    assert len({point.digest for point in points}) == 8


def test_settings_of_a_table_do_not_multiply_runs_without_one(small):
    points = expand(swept(small, budget__rho=[1.0, 0.6], train__table_lr_multiplier=[5.0, 20.0]), Corpora())
    assert [point.arm for point in points] == ["moe", "engram", "engram"]


@pytest.mark.parametrize(
    "grid, error, message",
    [
        ({"budget__rho": [0.6, 1.2]}, ConfigError, "point budget.rho=1.2 cannot be run: budget.rho must lie in 0..1"),
        ({"budget__rh": [0.6]}, ConfigError, 'point budget.rh=0.6 .*did you mean "rho"'),
        ({"memory__row_width": [8]}, ConfigError, "point memory.row_width=8 .* beside budget.scale"),
        (
            {"train__tokens": [128, 10**9]},
            DataError,
            r"point train.tokens=1000000000 .* one pass over the text has [\d,]+",
        ),
        ({"train__tokens": []}, ConfigError, '"train.tokens" has no values'),
    ],
)
def test_an_impossible_point_is_named_before_anything_starts(small, tmp_path, console, grid, error, message):
    with pytest.raises(error, match=message):
        run_sweep_verb(swept(small, **grid), tmp_path / "out", tmp_path / "runs", 1, console)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "out").exists()


def test_a_second_pass_must_be_allowed(small):
    config = swept(small, train__tokens=[10**6])
    assert len(expand(config.replace(sweep__repeat=True), Corpora())) == 1


def test_axes_on_the_command_line_replace_the_grids_and_must_be_lists():
    config = with_grid(load_config("demo"), ["budget.rho=[1.0, 0.5]", "train.lr=[0.01]"])
    assert config.sweep.grids == ({"budget.rho": [1.0, 0.5], "train.lr": [0.01]},)
    with pytest.raises(ConfigError, match=r"write section.key=\[value"):
        with_grid(config, ["budget.rho=0.5"])


def test_a_row_belongs_to_a_point_even_where_it_is_older_than_a_key(small):
    (point,) = expand(swept(small, budget__rho=[0.6]), Corpora())
    row_config = facts_of(point.resolved)
    assert same_run(row_config, point.resolved)
    older = {key: value for key, value in row_config.items() if key != "memory.gate"}
    assert same_run(older, point.resolved)
    assert not same_run(older, point.resolved.replace(memory__gate="plain"))
    assert not same_run(row_config | {"train.lr": 0.1}, point.resolved)
    moved = point.resolved.replace(data__cache="elsewhere", data__corpus="moved", train__checkpoint_every=1, name="x")
    assert same_run(row_config, moved)


@pytest.mark.slow
def test_a_sweep_that_is_stopped_and_continued_is_the_sweep_that_was_not(small, tmp_path, console, monkeypatch):
    config = swept(small, budget__rho=[1.0, 0.5], budget__arm=["engram"])
    whole, failures = run_sweep(config, tmp_path / "whole", tmp_path / "runs-1", console, 1)
    assert not failures and [row["arm"] for row in whole] == ["moe", "engram"]

    def one_then_stop(jobs, console, at_once, *, finished, failed):
        run_jobs(jobs[:1], console, at_once, finished=finished)
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run_jobs", one_then_stop)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(config, tmp_path / "cut", tmp_path / "runs-2", console, 1)
    assert len(load_rows(tmp_path / "cut" / "rows.jsonl")) == 1
    monkeypatch.undo()
    ran = []
    monkeypatch.setattr(
        sweep, "run_jobs", lambda jobs, *_, **hooks: (ran.extend(jobs), run_jobs(jobs, console, 1, **hooks))
    )
    continued, _ = run_sweep(config, tmp_path / "cut", tmp_path / "runs-2", console, 1)
    assert [job.name for job in ran] == ["rho=0.5 arm=engram s0"]
    for one, other in zip(whole, continued, strict=True):
        assert (
            one["run"] == other["run"] and one["test_nats"] == other["test_nats"] and one["config"] == other["config"]
        )
    again, _ = run_sweep(config, tmp_path / "cut", tmp_path / "nowhere", console, 1)
    assert again == continued and not (tmp_path / "nowhere").exists()  # the rows alone are enough


@pytest.mark.slow
def test_a_sweep_killed_outright_leaves_no_run_behind_and_goes_on(small, tmp_path, console):
    config = swept(small, budget__rho=[1.0, 0.5], budget__arm=["engram"]).replace(
        train__tokens=38400, train__checkpoint_every=50, sweep__repeat=True
    )
    path = tmp_path / "sweep.toml"
    path.write_text(to_toml(config))
    command = [sys.executable, "-c", "from nengram.cli import main; main()", "sweep", path, "--at-once", "1"]
    places = ["--out", tmp_path / "cut", "--runs", tmp_path / "runs-1"]
    process = subprocess.Popen([*command, *places], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints = tmp_path / "runs-1"
    while not list(checkpoints.glob("*/checkpoint/manifest.json")) and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    (run,) = (found.parents[1] for found in checkpoints.glob("*/checkpoint/manifest.json"))
    with held(run):  # waits until the orphan has gone
        assert not (run / "arm.json").exists()
    cut, _ = run_sweep(config, tmp_path / "cut", checkpoints, console, 1)
    whole, _ = run_sweep(config, tmp_path / "whole", tmp_path / "runs-2", console, 1)
    assert [row["test_nats"] for row in cut] == [row["test_nats"] for row in whole] and len(cut) == 2


@pytest.mark.slow
def test_a_run_that_fails_costs_its_own_row_alone(small, tmp_path, console):
    config = swept(small, train__lr=[1e9, 0.004], budget__arm=["moe"])
    with pytest.raises(NengramError, match=r"1 of 2 runs failed \(.*lr=1000000000.0.*lower train.lr"):
        run_sweep_verb(config, tmp_path / "out", tmp_path / "runs", 1, console)
    (row,) = load_rows(tmp_path / "out" / "rows.jsonl")
    assert row["lr"] == 0.004 and (tmp_path / "out" / "rows.csv").read_text().count("\n") == 2


def test_a_damaged_row_is_refused_by_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"config": {}, "corpus": ""}\n{"config": \n')
    with pytest.raises(NengramError, match="line 2 is no row"):
        load_rows(path)


def test_rows_of_other_text_are_not_believed(small):
    (point,) = expand(swept(small, budget__rho=[0.6]), Corpora())
    row = {"config": facts_of(point.resolved), "corpus": point.corpus, "seed": 0}
    assert rows_of([point], [row]) and not rows_of([point], [row | {"corpus": "other"}])


def test_rates_are_interpolated_on_a_log_scale_and_pure_moe_ends_the_memory_arms_line():
    rates = (RateConfig("moe", 1.0, 0, 0.008), RateConfig("engram", 0.5, 0, 0.002), RateConfig("one_row", 0.6, 7, 0.1))
    config = load_config("demo")
    assert rate_at(rates, config.replace(budget__rho=0.75)) == pytest.approx(0.004)
    assert rate_at(rates, config.replace(budget__rho=0.1)) == pytest.approx(0.002)
    assert rate_at(rates, config.replace(budget__arm="moe")) == pytest.approx(0.008)
    assert rate_at(rates, config.replace(budget__arm="additive")) is None
    assert rate_at(rates, config.replace(budget__arm="one_row")) is None  # tuned for another number of tokens
    assert rate_at(rates, config.replace(budget__arm="one_row", train__tokens=7)) == 0.1


def test_every_node_is_searched_on_the_same_grid_until_all_are_inside():
    nodes = [Node("engram", 1.0, 1), Node("engram", 0.5, 1)]
    best, asked = {nodes[0]: 0.008, nodes[1]: 0.004}, []

    def dev_of(pairs):
        asked.extend(pairs)
        return [abs(lr - best[node]) for node, lr in pairs]

    found = search(nodes, 0.002, dev_of)
    assert len(asked) == len(set(asked)) == 2 * len(found[nodes[0]])
    assert found[nodes[0]].keys() == found[nodes[1]].keys() and max(found[nodes[0]]) > 0.008
    assert search(nodes, 0.002, lambda pairs: [1.0 / 0] if pairs else [], known=found) == found
    with pytest.raises(NengramError, match="no interior best"):
        search(nodes, 0.002, lambda pairs: [-lr for _, lr in pairs])


def test_nodes_are_three_shares_every_other_arm_and_the_best_share_once_it_is_known(small):
    grids = [
        {"budget.rho": [1.0, 0.8, 0.6, 0.4, 0.0]},
        {"budget.arm": ["one_row"], "budget.rho": [0.6]},
    ]
    points = expand(small.replace(sweep__grids=grids), Corpora())
    tokens = points[0].config.train.tokens
    nodes = nodes_of(points, {})
    assert [(node.arm, node.rho) for node in nodes] == [
        ("engram", 1.0),
        ("engram", 0.6),
        ("engram", 0.0),
        ("one_row", 0.6),
    ]
    assert ("engram", 0.4) in [(node.arm, node.rho) for node in nodes_of(points, {tokens: 0.4})]


def row(arm, rho, seed, nats, tokens=10, **settings):
    return {
        "point": {"budget.rho": rho, **settings}, "arm": arm, "rho": rho, "seed": seed, "tokens": tokens, "lr": 0.1,
        "tuned": True, "dev_nats": 1.0, "test_nats": nats, "test_nats_permuted": None, "bits_per_byte": 1.0, "run": "x",
        "cost": {"total": 1, "active": 1, "table": 0, "flops": 1}, "rows": 0, "cpu_seconds": 1.0,
    }  # fmt: skip


def test_differences_are_paired_by_seed_with_pure_moe_of_the_same_tokens():
    rows = [row("moe", 1.0, seed, 5.0 + seed) for seed in range(3)]
    rows += [row("engram", 0.6, seed, 4.9 + seed) for seed in range(3)]
    rows += [row("moe", 1.0, seed, 3.0 + seed, tokens=20, **{"train.tokens": 20}) for seed in range(3)]
    rows += [row("engram", 0.6, seed, 2.5 + seed, tokens=20, **{"train.tokens": 20}) for seed in (1, 2)]
    short, memory, _, longer = differences(rows)
    assert short["difference"] is None and memory["difference"]["mean"] == pytest.approx(-0.1)
    assert memory["difference"]["high"] < 0 and longer["difference"]["mean"] == pytest.approx(-0.5)
    assert longer["difference"]["low"] is None  # two seeds decide nothing
    lines = to_csv(rows).splitlines()
    assert len(lines) == 12 and lines[0].startswith("budget.rho,train.tokens,arm,rho,seed")


def test_the_dry_plan_prints_totals_and_cost_and_runs_nothing(small, tmp_path, console):
    config = swept(small, budget__rho=[1.0, 0.6], budget__arm=["engram"])
    run_dry(config, tmp_path, console)
    printed = console.file.getvalue()
    assert "2 runs, 0 of them done" in printed and "CPU minutes" in printed and "untuned" in printed
    assert list(tmp_path.glob("runs*")) == []
    (one_pass,) = expand(swept(small, train__tokens=[0]), Corpora())
    assert one_pass.tokens > 10 * small.train.batch * small.model.context  # 0 is one pass, not nothing


def test_a_report_names_every_machine_that_its_rows_ran_on():
    made = [{"environment": {"cpu": cpu, "date": "d"}} for cpu in ("A", "B", "A")] + [{}]
    assert ran_on(made) == {"cpu": "A, B", "date": "d"}


def test_a_report_is_made_from_rows_alone(small, tmp_path, console):
    config = swept(small, budget__rho=[1.0, 0.6], budget__arm=["engram"])
    with pytest.raises(NengramError, match="no row of this sweep yet"):
        run_report(config, tmp_path, console)
    points = expand(config, Corpora())
    made = [
        row(point.arm, point.resolved.budget.rho, 0, 5.0 - number)
        | {"config": facts_of(point.resolved), "corpus": point.corpus}
        for number, point in enumerate(points)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in made))
    run_report(config, tmp_path, console)
    (_, memory) = json.loads((tmp_path / "sweep.json").read_text())["differences"]
    assert memory["difference"]["mean"] == -1.0 and "2 of 2 runs" in console.file.getvalue()


def test_tuning_finds_rates_that_the_sweep_then_takes(small, tmp_path, console, monkeypatch):
    config = swept(small, budget__rho=[1.0, 0.6], budget__arm=["engram"]).replace(train__tokens=256)
    from nengram.study import sweep_verb

    def pretend(jobs, *_):
        for job in jobs:
            lr = load_config(job.folder / "arm.toml").train.lr
            job.done.write_text(json.dumps({"dev_nats": abs(lr - 0.006)}))

    monkeypatch.setattr(sweep_verb, "run_jobs", pretend)
    found = run_tune(config, tmp_path, tmp_path / "runs", 1, console)
    assert {(node.arm, node.rho) for node in found} == {("engram", 1.0), ("engram", 0.6)}
    rates = json.loads((tmp_path / "tune.json").read_text())["rates"]
    assert load_found(tmp_path / "tune.json", config) == found
    assert load_found(tmp_path / "tune.json", config.replace(train__table_rule="rowwise_adagrad")) == {}
    tuned = config.replace(sweep__rates=rates)
    assert all(point.tuned and point.config.train.lr == 0.006 for point in expand(tuned, Corpora()))
    assert "rates = [" in console.file.getvalue()


def test_a_search_is_printed_even_where_budgets_were_searched_on_different_grids(console):
    print_search({Node("engram", 1.0, 1): {0.003: 2.0, 0.006: 1.5}, Node("engram", 1.0, 9): {0.006: 1.25}}, console)
    (short, longer) = [line for line in console.file.getvalue().splitlines() if "engram" in line]
    assert "2.0000" in short and "1.5000" in short and "1.2500" in longer and " - " in longer


@pytest.fixture
def published(small, tmp_path):
    """A finished sweep of two points and three seeds, made of rows alone: differences -0.1, -0.2, -0.3."""
    config = swept(small.replace(sweep__seeds=[0, 1, 2]), budget__rho=[1.0, 0.6], budget__arm=["engram"])
    made = [
        row(p.arm, p.resolved.budget.rho, p.seed, 5.0 - 0.1 * (p.seed + 1) * (p.arm == "engram"), tokens=p.tokens)
        | {"point": p.settings, "config": facts_of(p.resolved), "corpus": p.corpus}
        for p in expand(config, Corpora())
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in made))
    return config


@pytest.mark.parametrize("loss, inside", [(4.8, True), (4.0, False)])
def test_a_check_holds_a_new_seed_against_the_interval_of_the_sweep(
    published, tmp_path, console, monkeypatch, loss, inside
):
    from nengram.study import sweep_check

    ran = []
    monkeypatch.setattr(sweep_check, "run_jobs", lambda jobs, *_: ran.extend(jobs))
    monkeypatch.setattr(
        sweep_check, "row_of", lambda point, *_: {"test_nats": loss if point.arm == "engram" else 5.0, "s": point.seed}
    )
    words = ["budget.rho=0.6", "train.seed=7"]
    found = run_check(published, tmp_path, tmp_path / "runs", 1, console, words)
    assert [job.name for job in ran] == ["rho=0.6 arm=engram s7", "rho=1.0 arm=engram s7"]
    assert (found["low"] + found["high"]) / 2 == pytest.approx(-0.2) and found["high"] > -0.1 and found["low"] < -0.3
    assert found["inside"] is inside and ("OUTSIDE" in console.file.getvalue()) is not inside
    run_check(published, tmp_path, tmp_path / "runs", 1, console, words)
    assert [json.loads(line)["seed"] for line in (tmp_path / "checks.jsonl").read_text().splitlines()] == [7, 7]


@pytest.mark.parametrize(
    "words, message",
    [
        (["budget.rho=0.6"], "say which seed"),
        (["budget.rho=0.6", "train.seed=2"], "seed 2 is one of the sweep's own"),
        (["budget.roh=0.6", "train.seed=7"], 'no axis of this sweep .did you mean "budget.rho"'),
        (["train.seed=7"], "means 2 points"),
        (["budget.rho=0.5", "train.seed=7"], "means 0 points.*none"),
        (["budget.rho=1.0", "train.seed=7"], "what the others are read against"),
        (["rho"], "write section.key=value"),
    ],
)
def test_a_check_that_means_no_point_says_so(published, tmp_path, console, words, message):
    with pytest.raises(ConfigError, match=message):
        run_check(published, tmp_path, tmp_path / "runs", 1, console, words)


def test_a_check_of_an_unfinished_sweep_is_refused(published, tmp_path, console):
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:4]) + "\n")
    with pytest.raises(NengramError, match="fewer than 3 finished seeds"):
        run_check(published, tmp_path, tmp_path / "runs", 1, console, ["budget.rho=0.6", "train.seed=7"])


def test_a_sweep_from_the_command_line(small, tmp_path, monkeypatch, capsys):
    path = tmp_path / "small.toml"
    path.write_text(to_toml(small))
    code, out, _ = run_command(monkeypatch, capsys, "sweep", path, "--over", "budget.rho=[1.0,0.6]", "--dry")
    assert code == 0 and "2 runs" in out
    code, _, err = run_command(monkeypatch, capsys, "sweep", path, "--over", "budget.rho=[2.0]", "--dry")
    assert code == 2 and "point budget.rho=2.0 cannot be run" in err
    code, _, err = run_command(monkeypatch, capsys, "sweep", path)
    assert code == 2 and "nothing to sweep" in err
