"""Benchmarks run at any size, leave complete results, and measure nothing that is wrong."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import (
    backbone,
    disk,
    fused_projection,
    gates,
    gather,
    graft,
    hashing,
    memory_path,
    moe,
    report,
    row_update,
    serving,
    startup,
    table_tools,
)
from benchmarks.measure import interleave
from nengram.memory import Engram
from nengram.model.init import Draws
from nengram.model.moe import MoE
from nengram.store import RowwiseAdagrad
from nengram.study.share import PARTS

HASHING = hashing.Sizes(compressed_vocab_size=50, rows_per_head=37, row_width=4, batch=2, context=9, batches=2, pairs=2)
MOE = moe.Sizes(widths=(16,), tokens=16, experts=4, checked_tokens=8, pairs=2)
BACKBONE = backbone.Sizes(
    model=dataclasses.replace(backbone.MODEL, vocab_size=40, width=32, context=8, experts=4, kv_rank=12, blocks=2),
    batch=2,
    pairs=2,
    trial_pairs=1,
)
ROW_UPDATE = row_update.Sizes(num_rows=500, row_width=4, lookups=64, checked_rows=50, pairs=2)
TABLE_TOOLS = table_tools.Sizes(table_bytes=2**20, killed_bytes=2**20, row_width=32, kills=2)
DISK = disk.Sizes(num_rows=3000, row_bytes=64, batches=(8, 200), package_rows=200, memmap_rows=8, rounds=2)
GATHER = gather.Sizes(num_rows=300, row_bytes=32, lookups=64, middle=40, batch=8, batches=2, file_rows=100, pairs=2)
FUSED = fused_projection.Sizes(shapes=(fused_projection.Shape(12, 8, 2),), tokens=32, calls=2, pairs=2)
ONE_GOAL = report.result("hashing", "x", "y", [report.figure("f", np.array([2.0]), "x", (">=", 3.0))], {})


@pytest.mark.parametrize(
    ("benchmark", "sizes"),
    [
        (hashing, HASHING),
        (moe, MOE),
        (backbone, BACKBONE),
        (row_update, ROW_UPDATE),
        (gather, GATHER),
        (fused_projection, FUSED),
    ],
)
def test_leaves_a_complete_result(benchmark, sizes, tmp_path):
    check_saved(benchmark.run(sizes), tmp_path)


def test_a_backbone_that_differs_from_transformers_turns_red(monkeypatch):
    right = backbone.as_transformers
    monkeypatch.setattr(backbone, "as_transformers", lambda plain, name: nudged(right(plain, name)))
    with pytest.raises(gates.RedGate, match="backbone .eager.: "):
        backbone.run(BACKBONE)


def nudged(model: torch.nn.Module) -> torch.nn.Module:
    """The model with one weight made a tenth larger."""
    model.model.layers[1].self_attn.o_proj.weight.data *= 1.1
    return model


def test_without_transformers_only_the_streams_are_timed(monkeypatch):
    monkeypatch.setattr(backbone.importlib.util, "find_spec", lambda name: None)
    found = backbone.run(BACKBONE)
    assert "transformers is not installed" in found["gate"]
    assert [one["what"] for one in found["figures"]] == ["4 residual streams / one, training step"]


@pytest.mark.skipif(disk.shutil.which("gcc") is None, reason="needs a C compiler for the ceiling")
def test_disk_leaves_a_complete_result(tmp_path, monkeypatch):
    monkeypatch.setattr(disk.tempfile, "tempdir", str(tmp_path))
    check_saved(disk.run(DISK), tmp_path)
    assert not list(tmp_path.glob("nengram-disk-*"))


def test_wrong_rows_from_the_disk_turn_red(tmp_path, monkeypatch):
    monkeypatch.setattr(disk.tempfile, "tempdir", str(tmp_path))
    right = disk.MappedStore.prefetch
    monkeypatch.setattr(disk.MappedStore, "prefetch", lambda self, rows: right(self, rows ^ 1))
    with pytest.raises(gates.RedGate, match="rows of the store"):
        disk.run(DISK)


@pytest.mark.slow
def test_table_tools_leave_a_complete_result(tmp_path):
    check_saved(table_tools.run(TABLE_TOOLS), tmp_path)


def test_what_takes_long_runs_only_when_named(places, monkeypatch):
    ran: list[str] = []
    monkeypatch.setattr(command, "run_all", lambda names, console: ran.extend(names) or 0)
    assert command.main([]) == 0
    assert ran == [name for name in command.NAMES if name not in command.ONLY_WHEN_NAMED]
    ran.clear()
    assert command.main(["table_tools"]) == 0
    assert ran == ["table_tools"]


def test_gather_goes_without_what_is_not_there_and_says_so(monkeypatch):
    monkeypatch.setattr(gather.shutil, "which", lambda name: None)
    monkeypatch.setattr(gather.importlib.util, "find_spec", lambda name: None)
    found = gather.run(GATHER)
    assert "no gcc" in found["gate"] and "engramdb-python is not installed" in found["gate"]
    assert {one["what"].split()[0] for one in found["figures"]} == {"F.embedding,", "store", "kernel"}


def test_a_wrong_gather_turns_red(monkeypatch):
    right = gather.HostStore.prefetch
    monkeypatch.setattr(gather.HostStore, "prefetch", lambda self, rows: right(self, rows ^ 1))
    with pytest.raises(gates.RedGate, match="the store|a batch of the store"):
        gather.run(GATHER)


def test_memory_path_leaves_a_complete_result(data, config, tmp_path, monkeypatch):
    monkeypatch.setattr(memory_path, "prepare_for", lambda config: data)
    found = memory_path.run(memory_path.Sizes(config, pairs=2, checked_tokens=4))
    check_saved(found, tmp_path)
    whole, *parts = (one["what"] for one in found["figures"])
    assert whole == "whole memory path / step"
    assert parts == [f"{part} / step" for part in PARTS]


def test_serving_leaves_a_complete_result(data, tmp_path):
    sizes = serving.Sizes(
        width=64, blocks=2, row_width=4, rows_per_head=300, context=12, pairs=6, prefills=2, resamples=50
    )
    found = serving.run(sizes, data=data, folder=tmp_path)
    check_saved(found, tmp_path)
    assert [one["what"].split(",")[0] for one in found["figures"]][:1] == ["decode at batch 1"]
    assert list(tmp_path.glob("*.safetensors")) == []


@pytest.mark.slow
def test_startup_leaves_a_complete_result(tmp_path):
    check_saved(startup.run(startup.Sizes(rounds=1)), tmp_path)


def check_saved(found, folder):
    saved = json.loads(report.save(found, folder).read_text())
    assert saved == found
    assert {"what", "gate", "absolute", "command"} <= saved.keys()
    assert {"date", "cpu", "threads", "torch", "load_average"} <= saved["environment"].keys()
    assert any(one["goal"] for one in saved["figures"])
    for one in saved["figures"]:
        low, high = one["bounds"]
        assert low <= one["median"] <= high
        assert (one["met"] is None) == (one["goal"] is None)
    assert np.isfinite(list(saved["absolute"].values())).all()
    assert report.markdown_table([saved]).count(f"\n| {saved['name']} |") == len(saved["figures"])


def test_pairs_alternate_on_one_input_each_and_warmup_is_dropped():
    calls, inputs = [], iter(range(100))
    timings = interleave(
        lambda given: calls.append(("ours", given)),
        lambda given: calls.append(("theirs", given)),
        inputs.__next__,
        pairs=3,
        warmup=2,
    )
    assert calls == [(who, given) for given in range(5) for who in ("ours", "theirs")]
    assert len(timings.ours_s) == len(timings.theirs_s) == 3


def test_speedup_and_cost_are_ratios_of_each_pair(monkeypatch):
    ticks = iter([0, 1, 0, 4, 0, 2, 0, 4])  # began, ended: ours 1 s, theirs 4 s, ours 2 s, theirs 4 s
    monkeypatch.setattr("benchmarks.measure.time.process_time", ticks.__next__)
    timings = interleave(lambda _: None, lambda _: None, lambda: None, pairs=2, warmup=0)
    assert timings.speedup.tolist() == [4, 2]
    assert timings.cost.tolist() == [0.25, 0.5]


@pytest.mark.parametrize(
    ("sense", "bound", "met"), [(">=", 2, True), (">=", 2.1, False), ("<=", 2, True), ("<", 2, False)]
)
def test_goal_is_judged_on_the_median(sense, bound, met):
    assert report.figure("f", np.array([0.0, 2.0, 90.0]), "x", (sense, bound))["met"] is met


def test_a_figure_without_a_goal_is_neither_met_nor_missed():
    assert report.figure("f", np.array([1.0]), "s")["met"] is None


def test_wrong_opponent_turns_hashing_red(monkeypatch):
    right = hashing.numpy_rows
    monkeypatch.setattr(
        hashing, "numpy_rows", lambda *given: {layer: rows ^ 1 for layer, rows in right(*given).items()}
    )
    with pytest.raises(gates.RedGate, match="NumPy rows of layer 1"):
        hashing.run(HASHING)


def test_wrong_hash_turns_its_gate_red():
    spec = hashing.AddressSpec.engram(compressed_vocab_size=9, rows_per_head=[5], heads=2, layer_ids=[3], pad_cid=0)
    cids_BT = np.arange(8).reshape(2, 4)
    rows = hashing.Addresser(spec)(cids_BT)
    gates.check_rows(rows, cids_BT, spec)
    rows[3][1, 2, 0] += 1
    with pytest.raises(gates.RedGate, match=r"rows of layer 3: 1 of 16"):
        gates.check_rows(rows, cids_BT, spec)


def test_wrong_engram_turns_its_gate_red(monkeypatch):
    torch.manual_seed(0)
    layer, vecs_BTM, hidden_BTGD = Engram(6, 4), torch.randn(1, 5, 6), torch.randn(1, 5, 1, 4)
    gates.check_engram(layer, vecs_BTM, hidden_BTGD)
    right = Engram.forward
    monkeypatch.setattr(Engram, "forward", lambda self, *given: 1.01 * right(self, *given))
    with pytest.raises(gates.RedGate, match="Engram: output"):
        gates.check_engram(layer, vecs_BTM, hidden_BTGD)


def test_wrong_gradient_of_the_moe_turns_its_gate_red(monkeypatch):
    layer, hidden_BTD = MoE(16, 4, 2, 8, 8), torch.randn(1, 6, 16)
    layer.init_weights(Draws(0), 1.0)
    gates.check_moe(layer, hidden_BTD)
    right = MoE.forward
    monkeypatch.setattr(MoE, "forward", lambda self, x: right(self, x.detach()) + x - x.detach())
    with pytest.raises(gates.RedGate, match="MoE: gradient of input 0"):
        gates.check_moe(layer, hidden_BTD)


def test_a_wrong_fused_projection_turns_its_gate_red(monkeypatch):
    right = fused_projection.fuse

    def wrong(state):
        fused = right(state)
        fused["kv_proj.weight"] = fused["kv_proj.weight"].flip(0)
        return fused

    monkeypatch.setattr(fused_projection, "fuse", wrong)
    with pytest.raises(gates.RedGate, match="fused projection: numbers"):
        fused_projection.run(FUSED)


def test_wrong_update_turns_its_gate_red(monkeypatch):
    rows_N, grads_NE = torch.tensor([3, 1, 3]), torch.ones(3, 2)
    gates.check_update(RowwiseAdagrad(), rows_N, grads_NE, num_rows=4)
    right = RowwiseAdagrad.apply
    monkeypatch.setattr(
        RowwiseAdagrad, "apply", lambda self, *given, lr, step: right(self, *given, lr=2 * lr, step=step)
    )
    with pytest.raises(gates.RedGate, match="table after rowwise_adagrad"):
        gates.check_update(RowwiseAdagrad(), rows_N, grads_NE, num_rows=4)


def test_not_a_number_is_red():
    with pytest.raises(gates.RedGate):
        gates.require_close("x", torch.tensor([float("nan")]), torch.tensor([1.0]), 0.1)


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    monkeypatch.setattr(command, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text(f"before\n{report.MARK}\nold\n{report.MARK}\nafter\n")
    return tmp_path


def test_a_red_gate_fails_and_keeps_the_last_result(places, monkeypatch, capsys):
    report.save(ONE_GOAL, places)
    before = (places / "hashing.json").read_text()

    def red():
        raise gates.RedGate("rows differ")

    monkeypatch.setattr(hashing, "run", red)
    assert command.main(["hashing"]) == 1
    assert "RED hashing: rows differ" in capsys.readouterr().out
    assert (places / "hashing.json").read_text() == before


def test_a_missed_goal_is_said_and_does_not_fail(places, monkeypatch, capsys):
    monkeypatch.setattr(hashing, "run", lambda: ONE_GOAL)
    assert command.main(["hashing"]) == 0
    assert "MISSED hashing: f" in capsys.readouterr().out
    assert json.loads((places / "hashing.json").read_text())["figures"][0]["met"] is False
    readme = (places / "README.md").read_text()
    assert "| hashing | f | 2.00x | 2.00x .. 2.00x | >= 3.00x | MISSED |" in readme
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme


def test_an_unknown_name_is_refused_with_the_nearest(places, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["hashin"])
    assert stopped.value.code == 2
    assert 'did you mean "hashing"' in capsys.readouterr().err


def test_the_readme_shows_the_committed_results():
    found = report.load_all(command.FOLDER, command.NAMES)
    assert [one["name"] for one in found] == list(command.NAMES)
    text = command.README.read_text(encoding="utf-8")
    assert report.put_between_marks(text, report.markdown_table(found)) == text


def test_the_graft_is_not_measured_without_its_opponent(monkeypatch):
    monkeypatch.delenv(graft.OPPONENT, raising=False)
    with pytest.raises(gates.RedGate, match="name a Python that has engram-peft==1.2.7"):
        graft.run()


def test_what_the_memory_alone_adds_is_the_step_less_the_models_own():
    spent_R3 = np.tile([1.2, 1.5, 1.0], (4, 1))  # ours, theirs, neither
    whole, own, ours = graft.compared("step", spent_R3)
    assert [one["median"] for one in (whole, own, ours)] == pytest.approx([1.25, 2.5, 1.2])
