"""The law's report on made-up sweeps: the right runs are compared, unfinished sweeps are read, and all of it is JSON."""

import io
import json
import random
import sys
from functools import cache

import numpy as np
import pytest
from rich.console import Console

from nengram.errors import NengramError
from nengram.study import verdict
from nengram.study.law import law_summary
from nengram.study.law_figure import draw_law, draw_rows
from nengram.study.law_report import tables

SHARES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
KEPT = {"one_row": 0.0, "misaligned": 0.2, "frozen": 0.5, "no_table": -0.5}


def loss_of(rho: float, tokens: int) -> float:
    """Lowest at 0.5; 0.1 below pure MoE at the small budget, 0.2 at the large one."""
    depth = 0.1 if tokens == 400_000 else 0.2
    return (5.0 if tokens == 400_000 else 4.3) - depth * (1 - 4 * (rho - 0.5) ** 2)


def row(arm: str, rho: float, seed: int, tokens: int, loss: float, rows: int = 0, **point) -> dict:
    """A line of rows.jsonl: each seed has its shift, each run a little of its own."""
    shift = {0: 0.02, 1: -0.01, 2: 0.0}[seed]
    own = random.Random(f"{arm} {rho} {seed} {tokens} {rows}").gauss(0, 0.001)
    return {
        "point": {"budget.arm": arm, "budget.rho": rho, "train.tokens": tokens, **point},
        "arm": arm,
        "rho": rho,
        "seed": seed,
        "tokens": tokens,
        "lr": 0.006,
        "test_nats": loss + shift + own,
        "dev_nats": loss + shift + own - 0.01,
        "bits_per_byte": 2.0,
        "cost": {"total": 4_000_000, "active": 650_000, "table": 4 * rows, "flops": 2_000_000, "experts_idle": 1},
        "rows": rows,
        "cpu_seconds": tokens / 3000 * (0.8 if rho < 1 else 1),
        "cpu_ms_per_token": 0.3,
    }


def sweep() -> list[dict]:
    """Two budgets and three seeds over rho, controls at 60 % of the small one, and a line of five table sizes."""
    made = []
    for seed in (0, 1, 2):
        for tokens in (400_000, 1_200_000):
            for rho in SHARES:
                rows = int(700_000 * (1 - rho))
                made.append(row("engram", rho, seed, tokens, loss_of(rho, tokens), rows))
        moe, engram = loss_of(1.0, 400_000), loss_of(0.6, 400_000)
        for arm, kept in KEPT.items():
            made.append(row(arm, 0.6, seed, 400_000, moe - kept * (moe - engram)))
        for doublings in range(5):
            size = 4000 * 2**doublings
            loss = 4.9 - 0.01 * doublings
            made.append(row("engram", 0.6, seed, 400_000, loss, size, **{"memory.rows_per_head": [size // 16] * 2}))
    return made


@pytest.fixture(scope="module", autouse=True)
def quick_quantiles():
    """The same few quantiles, asked for a thousand times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdict, "t_quantile", cache(verdict.t_quantile))
        yield


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return sweep()


@pytest.fixture(scope="module")
def summary(rows) -> dict:
    return law_summary(rows)


def printed(rows: list[dict]) -> str:
    console = Console(file=io.StringIO(), width=200)
    for table in tables(law_summary(rows)):
        console.print(table)
    return console.file.getvalue()


def test_the_planted_law_is_read_off(summary):
    small, large = summary["curves"]
    assert (small["tokens"], large["tokens"]) == (400_000, 1_200_000)
    for curve, depth in ((small, 0.1), (large, 0.2)):
        assert curve["optimum"]["low"] - 0.01 < 0.5 < curve["optimum"]["high"] + 0.01
        assert curve["claim"]["claimed"] and curve["claim"]["point"] in (0.4, 0.6)
        assert curve["quadratic"]["lack_of_fit"]["refused"] is False
        assert curve["monotone"]["lack_of_fit"]["refused"] is True
        best = next(point for point in curve["points"] if point["rho"] == 0.6)
        assert best["against_moe"]["mean"] == pytest.approx(-depth * 0.96, abs=0.003)
        assert curve["points"][-1]["against_moe"] is None
    assert summary["tokens_to_show"] == []


def test_controls_are_told_by_what_they_keep(summary):
    assert [part["arm"] for part in summary["controls"]] == ["one_row", "misaligned", "frozen", "no_table"]
    for part in summary["controls"]:
        assert part["keeps"]["low"] < KEPT[part["arm"]] + 0.01 and part["keeps"]["high"] > KEPT[part["arm"]] - 0.01
        assert part["keeps"]["share"] == pytest.approx(KEPT[part["arm"]], abs=0.03)
        assert part["against_engram"]["mean"] > 0


def test_the_row_line_takes_runs_that_differ_in_rows_alone(summary):
    (line,) = summary["rows"]
    assert line["rows"] == [4000, 8000, 16000, 32000, 64000]
    assert line["fit"]["low"] < -0.01 < line["fit"]["high"]


def test_equal_cpu_time_is_read_where_it_can_be(summary):
    readings = {(reading["label"], reading["rho"]): reading for reading in summary["equal_cpu"]}
    assert readings["0.4 M tokens", 0.6]["paired"] is None
    large = readings["1.2 M tokens", 0.6]
    assert large["seconds"] == pytest.approx(320)
    slope = (loss_of(1, 1_200_000) - loss_of(1, 400_000)) / np.log(3)
    moe = loss_of(1, 1_200_000) + slope * np.log(0.8)
    assert large["paired"]["mean"] == pytest.approx(loss_of(0.6, 1_200_000) - moe, abs=0.003)


def test_seconds_of_two_machines_are_not_compared(rows):
    apart = [one | {"environment": {"cpu": "A" if one["tokens"] == 400_000 else "B"}} for one in rows]
    assert law_summary(apart)["equal_cpu"] == []


def test_pure_moe_is_a_share_of_one_under_any_name(rows, summary):
    renamed = [one | {"arm": "moe", "rho": 0.6} if one["rho"] == 1 else one for one in rows]
    assert law_summary(renamed) == summary


def test_order_and_repeats_change_nothing(rows, summary):
    shuffled = rows * 2
    random.Random(0).shuffle(shuffled)
    assert law_summary(shuffled) | {"runs": len(rows)} == summary


def test_the_summary_is_json_and_the_report_says_its_numbers(rows, summary):
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    text = printed(rows)
    for words in (
        "0.4 M tokens",
        "interior optimum",
        "one row",
        "nats per doubling",
        "equal CPU time",
        "P_tot/P_act 6.2",
    ):
        assert words in text
    assert f"{summary['curves'][0]['points'][0]['mean']:.4f}" in text


def test_an_unfinished_sweep_is_read_as_far_as_it_goes(rows):
    first = [one for one in rows if one["seed"] == 0 or (one["seed"] == 1 and one["rho"] > 0.3)]
    curve = law_summary(first)["curves"][0]
    assert curve["seeds"] == [0] and curve["unfinished_seeds"] == [1]
    assert curve["claim"] is None and curve["optimum"] is None and curve["quadratic"] is not None
    for count in (0, 1, 7, 20, 29):
        assert isinstance(printed(rows[:count]), str)


def test_a_run_that_diverged_is_counted_and_left_out(rows):
    broken = [one | {"test_nats": float("nan")} if i == 2 else one for i, one in enumerate(rows)]
    found = law_summary(broken)
    assert found["without_a_finite_loss"] == 1
    assert found["curves"][0]["seeds"] == [1, 2] and found["curves"][0]["unfinished_seeds"] == [0]
    json.dumps(found, allow_nan=False)


def test_settings_are_never_mixed(rows):
    other = [one | {"point": one["point"] | {"budget.scale": 5}, "test_nats": one["test_nats"] - 1} for one in rows]
    labels = [curve["label"] for curve in law_summary(rows + other)["curves"]]
    assert labels == [
        "0.4 M tokens, budget.scale 5",
        "1.2 M tokens, budget.scale 5",
        "0.4 M tokens",
        "1.2 M tokens",
    ]


def test_where_no_optimum_is_claimed_the_tokens_that_would_show_it_are_told():
    """A falling curve whose interior gains on the high end with the budget."""
    made = [
        row("engram", rho, seed, tokens, 5 - 0.1 * rho + lag * (rho == 1))
        for seed in (0, 1, 2)
        for tokens, lag in ((400_000, 0.0), (1_200_000, 0.018))
        for rho in SHARES
    ]
    found = law_summary(made)
    assert [curve["claim"]["claimed"] for curve in found["curves"]] == [False, False]
    (trend,) = found["tokens_to_show"]
    assert trend["low_end"] is None or trend["low_end"] > 0
    assert 1_200_000 < trend["high_end"] < 4_000_000
    assert "not better than 100%" in found["curves"][1]["claim"]["words"]
    assert f"against the highest share at about {trend['high_end'] / 1e6:.2g} M tokens" in printed(made)


def test_names_are_no_markup_and_reach_no_terminal(rows):
    evil = [one | {"point": one["point"] | {"[red]x[/]\x1b[2J": "$y$"}} for one in rows]
    text = printed(evil)
    assert "[red]x[/]" in text and "\x1b" not in text


def test_a_row_that_names_no_run_is_refused(rows):
    broken = [{key: value for key, value in rows[0].items() if key != "seed"}]
    with pytest.raises(NengramError, match="row 1 has no seed"):
        law_summary(broken)


def test_figures_are_drawn_twice_the_same(rows, tmp_path):
    pytest.importorskip("matplotlib")
    evil = [one | {"point": one["point"] | {"$x^": "[b]"}} for one in rows]
    first, second = draw_law(law_summary(evil), tmp_path / "a.png"), draw_law(law_summary(evil), tmp_path / "b.png")
    assert first.read_bytes() == second.read_bytes() and first.stat().st_size > 20_000
    assert draw_rows(law_summary(evil), tmp_path / "rows.png").stat().st_size > 10_000


def test_nothing_to_draw_draws_nothing(tmp_path, monkeypatch, rows):
    assert (
        draw_law(law_summary([]), tmp_path / "a.png") is None and draw_rows(law_summary([]), tmp_path / "a.png") is None
    )
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert (
        draw_law(law_summary(rows), tmp_path / "a.png") is None
        and draw_rows(law_summary(rows), tmp_path / "a.png") is None
    )
    assert not (tmp_path / "a.png").exists()
