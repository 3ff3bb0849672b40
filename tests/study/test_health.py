"""Table health: what is said of rows is what training did to them, and gates are those of the layer itself."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from nengram.config import load_config
from nengram.errors import CheckpointError
from nengram.infer import load_run
from nengram.store import ResidentStore
from nengram.study import health, reading
from nengram.study.health_report import QUANTILES, rows_table
from nengram.study.history import CLASSES
from nengram.text import Packed, eval_windows
from nengram.train import train
from tests.conftest import TINY, recorded_batches

OVERRIDES = (*TINY, "train.tokens=1280", "train.seed=3")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Ten steps of an Engram model; its folder, and every batch that the training loop was given."""
    folder = tmp_path_factory.mktemp("runs") / "engram"
    with recorded_batches() as seen:
        for _ in train(load_config("demo", OVERRIDES), data, folder):
            pass
    return folder, seen


@pytest.fixture(autouse=True)
def its_corpus(data, monkeypatch):
    monkeypatch.setattr(reading, "prepare_for", lambda config: data)


@pytest.fixture(scope="module")
def found(trained, data):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reading, "prepare_for", lambda config: data)
        return health.table_health(trained[0])


def lookups(run, batch):
    """Rows [B, T, S] of the only memory layer."""
    with run.model.begin(torch.from_numpy(batch.ids_BT), start_BT=torch.from_numpy(batch.start_BT)) as step:
        return step.rows[run.model.spec.layer_ids[0]].numpy().copy()


def test_touched_rows_are_the_ones_that_changed_and_updates_are_steps(trained, found):
    folder, seen = trained
    run = load_run(folder)
    spec, (layer_id,) = run.model.spec, run.model.spec.layer_ids
    after_RE = run.model.stores[layer_id].weight.clone()
    run.model.create_tables(run.config.train.seed)
    changed_R = (after_RE != run.model.stores[layer_id].weight).any(dim=1).numpy()
    steps_R = np.zeros(len(after_RE), dtype=int)
    for batch in seen:
        steps_R[list(set(lookups(run, batch).ravel().tolist()))] += 1
    ends = {2: int(spec.moduli(layer_id)[: spec.heads].sum()), 3: len(after_RE)}
    for order, span in {2: slice(0, ends[2]), 3: slice(ends[2], ends[3])}.items():
        one = found["tables"][layer_id]["orders"][order]
        assert one["rows"] == span.stop - span.start
        assert one["never_touched"] == pytest.approx(1 - changed_R[span].mean())
        touched = steps_R[span][steps_R[span] > 0]
        assert one["updates"] == pytest.approx(np.quantile(touched, QUANTILES).tolist())
        norms = after_RE[span].norm(dim=1).numpy()
        assert one["norms"]["touched"] == pytest.approx(np.quantile(norms[changed_R[span]], QUANTILES), rel=1e-5)
        assert one["norms"]["untouched"] == pytest.approx(np.quantile(norms[~changed_R[span]], QUANTILES), rel=1e-5)
        assert one["untouched_as_drawn"] == 1
    assert found["trained_tokens"] == 1280


def test_collisions_by_counting_in_plain_python(trained, found):
    folder, seen = trained
    run = load_run(folder)
    spec, cids_V = run.model.spec, run.compression.cids_V
    read = {}  # row -> n-gram -> times
    for batch in seen:
        rows_BTS = lookups(run, batch)
        for b, t in np.ndindex(*batch.ids_BT.shape):
            ngram = [int(cids_V[batch.ids_BT[b, t]])]
            for back in range(1, 3):
                cut = t - back < 0 or batch.start_BT[b, t - back + 1 : t + 1].any()
                ngram.append(spec.pad_cid if cut else int(cids_V[batch.ids_BT[b, t - back]]))
            for slot, order in enumerate(spec.slot_orders):
                ngrams = read.setdefault((order, int(rows_BTS[b, t, slot])), {})
                ngrams[tuple(ngram[:order])] = ngrams.get(tuple(ngram[:order]), 0) + 1
    (layer_id,) = spec.layer_ids
    for order, one in found["tables"][layer_id]["orders"].items():
        rows = [ngrams for (other, _), ngrams in read.items() if other == order]
        lookups_all = sum(sum(ngrams.values()) for ngrams in rows)
        shared = sum(sum(ngrams.values()) for ngrams in rows if len(ngrams) > 1)
        assert lookups_all == 1280 * spec.heads
        assert one["shared_lookups"] == pytest.approx(shared / lookups_all) and one["shared_lookups"] > 0
        assert one["purity"] == pytest.approx(sum(max(ngrams.values()) for ngrams in rows) / lookups_all)
        assert one["ngrams_per_touched_row"] == pytest.approx(np.mean([len(ngrams) for ngrams in rows]))
        assert one["ngrams"] == len({ngram for ngrams in rows for ngram in ngrams})


@torch.no_grad()
def test_gates_are_the_layers_own_and_classes_weigh_up_to_their_mean(trained, found, data):
    run = load_run(trained[0])
    (block,) = [index for index, one in enumerate(run.model.blocks) if one.memory is not None]
    layer, gates, shares = run.model.blocks[block].memory, [], []
    for window in eval_windows(data.splits["dev"], batch=4, context=32):
        real_BT = window.positions_BT >= 0
        with run.model.begin(torch.from_numpy(window.ids_BT), start_BT=torch.from_numpy(window.start_BT)) as step:
            hidden_BTD = run.model.embed(torch.from_numpy(window.ids_BT))
            for before in run.model.blocks[:block]:
                hidden_BTD = before(hidden_BTD, step)
            vecs_BTSE, hidden_BTGD = step.vectors(run.model.spec.layer_ids[0]), hidden_BTD.unsqueeze(2)
            gates.append(layer.gates(vecs_BTSE, hidden_BTGD)[..., 0].numpy()[real_BT])
            update_BTD = layer(vecs_BTSE, hidden_BTGD).squeeze(2)
            shares.append((update_BTD.norm(dim=-1) / hidden_BTD.norm(dim=-1)).numpy()[real_BT])
    one = found["blocks"][block]
    assert found["dev_positions"] == len(np.concatenate(gates)) == len(data.splits["dev"]) - 1
    assert one["gate"] == pytest.approx(np.quantile(np.concatenate(gates), QUANTILES).tolist(), rel=1e-5)
    assert one["residual_share"] == pytest.approx(np.quantile(np.concatenate(shares), QUANTILES).tolist(), rel=1e-5)
    for classes in one["by_history"].values():
        assert list(classes) == list(CLASSES)
        there = [row for row in classes.values() if row["positions"]]
        assert sum(row["positions"] for row in there) == pytest.approx(1) and len(there) > 2
        mean = sum(row["positions"] * row["gate"] for row in there)
        assert mean == pytest.approx(float(np.concatenate(gates).mean()), rel=1e-4)


def test_a_long_dev_is_looked_at_here_and_there(trained, data):
    found = health.table_health(trained[0], dev_tokens=200)
    assert 200 <= found["dev_positions"] <= 400 < len(data.splits["dev"])


@pytest.mark.parametrize("arm", ["frozen", "additive"])
def test_arms_without_updates_or_gate_say_so(data, tmp_path, arm):
    for _ in train(load_config("demo", (*OVERRIDES, "train.tokens=256", f"budget.arm={arm}")), data, tmp_path / "run"):
        pass
    found = health.table_health(tmp_path / "run", dev_tokens=200)
    (block,), (table,) = found["blocks"].values(), found["tables"].values()
    if arm == "frozen":
        for one in table["orders"].values():
            assert one["updates"][-1] == 0 < one["never_touched"] < 1
            assert one["norms"]["touched"][3] == pytest.approx(one["norms"]["at_start"][3], rel=0.1)
    else:
        assert block["gate"] is None and block["residual_share"][0] > 0
        assert all(row["gate"] is None for classes in block["by_history"].values() for row in classes.values())
    health.draw_health(found, tmp_path / "health.png")
    assert (tmp_path / "health.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("is_one_table", [False, True])
def test_every_table_and_every_block_that_reads_it_is_told_of(data, tmp_path, is_one_table):
    changes = ("train.tokens=256", "memory.blocks=[0, 1]", f"memory.shared_table={str(is_one_table).lower()}")
    for _ in train(load_config("demo", (*OVERRIDES, *changes)), data, tmp_path / "run"):
        pass
    found = health.table_health(tmp_path / "run", dev_tokens=200)
    assert list(found["blocks"]) == [0, 1] and found["blocks"][0]["gate"] != found["blocks"][1]["gate"]
    assert list(found["tables"]) == ([0] if is_one_table else [0, 1])
    console = Console(file=io.StringIO(), width=160)
    console.print(rows_table(found))
    lines = [line.split()[1:4:2] for line in console.file.getvalue().splitlines() if line.startswith("│")]
    assert lines == [[str(layer_id), str(order)] for layer_id in found["tables"] for order in (2, 3)]
    assert health.draw_health(found, tmp_path / "health.png").stat().st_size > 10_000


@pytest.mark.parametrize("way", ["fresh_tables", "mask_rare"])
def test_a_further_pass_is_counted_as_its_way_says(data, tmp_path, monkeypatch, way):
    """The rows that were never drawn or moved since are exactly those said to be untouched, and updates are those of the store."""
    moved, update = [], ResidentStore.update
    monkeypatch.setattr(
        ResidentStore, "update", lambda store, rows_U, *rest: moved.append(rows_U) or update(store, rows_U, *rest)
    )
    whole = data.splits["train"]
    documents = int(np.searchsorted(whole.doc_starts_D, 450))
    cut = {name: getattr(whole, name)[:documents] for name in ("doc_starts_D", "doc_sources_D", "doc_bytes_D")}
    short = Packed(whole.ids_N[: whole.doc_starts_D[documents]], **cut, sources=whole.sources)  # 3 steps a pass
    little = replace(data, splits=data.splits | {"train": short})
    monkeypatch.setattr(reading, "prepare_for", lambda config: little)
    changes = ("train.tokens=640", f"train.second_pass={way}", "train.rare_below=3")
    with pytest.warns(UserWarning, match="about to repeat"):
        for _ in train(load_config("demo", (*OVERRIDES, *changes)), little, tmp_path / "run"):
            pass
    run = load_run(tmp_path / "run")
    steps_R = np.zeros(run.model.spec.num_rows(1), dtype=int)
    for rows_U in moved[3:] if way == "fresh_tables" else moved:
        steps_R[rows_U.numpy()] += 1
    found = health.table_health(tmp_path / "run", dev_tokens=200)
    orders = found["tables"][1]["orders"]
    parts = np.split(steps_R, [orders[2]["rows"]])
    assert found["trained_tokens"] == (256 if way == "fresh_tables" else 640)
    for one, part in zip(orders.values(), parts, strict=True):
        assert one["never_touched"] == pytest.approx((part == 0).mean())
        assert one["updates"] == pytest.approx(np.quantile(part[part > 0], QUANTILES).tolist())
        assert one["untouched_as_drawn"] == 1


def test_table_json_and_picture(trained, found, tmp_path, capsys):
    console = Console(file=io.StringIO(), width=160)
    again = health.run_health(trained[0], out=tmp_path, console=console)
    assert json.loads((tmp_path / "health.json").read_text()) == json.loads(json.dumps(again))
    assert (tmp_path / "health.png").read_bytes()[:4] == b"\x89PNG"
    assert again["tables"] == found["tables"]
    (one,) = found["tables"].values()
    assert f"{one['orders'][2]['never_touched']:.1%}" in console.file.getvalue()
    health.run_health(trained[0], as_json=True, console=console)
    assert json.loads(capsys.readouterr().out)["tables"] == json.loads(json.dumps(found["tables"]))


@pytest.mark.parametrize(
    ("arm", "message"),
    [("moe", "no memory layer, hence no table"), ("one_row", 'chosen by the control "one_row"')],
)
def test_what_has_no_health_is_refused_in_one_line(data, tmp_path, arm, message):
    for _ in train(load_config("demo", (*OVERRIDES, f"budget.arm={arm}", "train.tokens=128")), data, tmp_path / arm):
        pass
    with pytest.raises(CheckpointError, match=message):
        health.table_health(tmp_path / arm)
    with pytest.raises(CheckpointError, match="no run here"):
        health.table_health(tmp_path / "nothing")
