"""The report on codecs: its errors and losses are those of the tables it says, and it leaves the model as it was."""

import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from nengram.config import load_config
from nengram.errors import CheckpointError, DataError, StoreError
from nengram.infer import load_run
from nengram.store import ResidentStore
from nengram.store.codecs import CODECS, make_codec
from nengram.study import codecs, reading
from nengram.text import prepare
from nengram.train import token_nats, train
from tests.conftest import TINY, small_corpus


@pytest.fixture(scope="module")
def run_folder(data, tmp_path_factory):
    """Five steps of an Engram model with two blocks."""
    folder = tmp_path_factory.mktemp("runs") / "engram"
    for _ in train(load_config("demo", TINY), data, folder):
        pass
    return folder


@pytest.fixture(autouse=True)
def its_corpus(data, monkeypatch):
    monkeypatch.setattr(reading, "prepare_for", lambda config: data)


@pytest.fixture(scope="module")
def found(run_folder, data):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reading, "prepare_for", lambda config: data)
        return codecs.codec_report(run_folder, tokens=500)


def test_every_codec_is_reported(found):
    assert list(found["codecs"]) == list(CODECS)
    assert found["tokens"] >= 500 and math.isfinite(found["nats"])
    for name, one in found["codecs"].items():
        (table,) = one["tables"].values()
        assert one["table_bytes"] == table["rows"] * one["row_bytes"]
        assert table["codec"]["name"] == name
        assert one["nats"] == pytest.approx(found["nats"] + one["difference"], abs=1e-6)


def test_the_same_bits_lose_nothing_and_coarser_ones_err_more(found):
    exact = found["codecs"]["fp32"]
    assert exact["difference"] == exact["standard_error"] == 0
    errors = {}
    for name, one in found["codecs"].items():
        (table,) = one["tables"].values()
        errors[name] = table["rms_relative_error"]["median"]
        assert (table["changed_rows"] > 0.9) == (name != "fp32")
        assert table["rms_relative_error"]["median"] <= table["rms_relative_error"]["p99"]
    assert 0 == errors["fp32"] < errors["fp16"] < errors["bf16"] < errors["int8"] < errors["fp8"] < errors["int4"]


def test_the_loss_is_that_of_a_model_with_the_decoded_table(found, run_folder, data):
    run = load_run(run_folder)
    (layer_id,) = run.model.stores
    packed = data.splits["dev"]

    def nats():
        return token_nats(run.model, packed, batch=4, context=32, tokens=500).astype(np.float64)

    before_N = nats()
    store = run.model.stores[layer_id]
    codec = make_codec("int4", store.row_width)
    store.weight.copy_(codec.decode(codec.encode(store.weight)))
    difference_N = nats() - before_N
    difference_N = difference_N[np.isfinite(difference_N)]
    one = found["codecs"]["int4"]
    assert one["difference"] == pytest.approx(difference_N.mean(), abs=1e-7) and one["difference"] != 0
    assert one["standard_error"] == pytest.approx(difference_N.std(ddof=1) / difference_N.size**0.5, rel=1e-4)


def test_the_model_has_its_own_tables_back(run_folder, monkeypatch):
    run = load_run(run_folder)
    stores = dict(run.model.stores)
    before = {layer_id: store.weight.clone() for layer_id, store in stores.items()}
    monkeypatch.setattr(codecs, "load_run", lambda folder: run)
    codecs.codec_report(run_folder, ["int4"], tokens=200)
    assert run.model.stores == stores
    assert all(torch.equal(store.weight, before[layer_id]) for layer_id, store in stores.items())


def test_errors_of_known_rows():
    store = ResidentStore(4, 3, init_std=0)
    store.weight[1] = torch.tensor([7.0, -1.0, 2.0])  # whole steps of int4
    store.weight[2] = torch.tensor([7.0, 0.5, 0.0])  # half a step, to the even 0
    store.weight[3] = torch.tensor([14.0, 3.0, -14.0])  # 1.5 steps, to the even 2
    _, errors = codecs.encoded_table(store, make_codec("int4", 3))
    assert errors["changed_rows"] == 0.5
    largest = [0, 0.5 / 7, 1 / 14]  # the row of zeros has no relative error
    assert errors["max_relative_error"]["median"] == pytest.approx(np.median(largest))
    rms = [0, 0.5 / math.hypot(7, 0.5), 1 / math.hypot(14, 3, 14)]
    assert errors["rms_relative_error"]["median"] == pytest.approx(np.median(rms))
    assert errors["rms_relative_error"]["p99"] == pytest.approx(np.percentile(rms, 99))


def test_a_long_table_is_read_in_spans(monkeypatch):
    monkeypatch.setattr(codecs, "ROWS_AT_ONCE", 7)
    store = ResidentStore(20, 3, init_std=1)
    codec = codecs.codec_for("fp8_tensor", store)
    assert codec.scale == pytest.approx(float(store.weight.abs().max()) / 448, rel=1e-6)
    bytes_RB, _ = codecs.encoded_table(store, codec)
    assert torch.equal(bytes_RB, codec.encode(store.weight))


def test_a_table_that_a_codec_cannot_hold_is_said_and_the_others_go_on(run_folder, monkeypatch):
    run = load_run(run_folder)
    for store in run.model.stores.values():
        store.weight[5, 1] = 1e6
    monkeypatch.setattr(codecs, "load_run", lambda folder: run)
    text = io.StringIO()
    names = ["fp16", "bf16"]
    found = codecs.run_codec_report(run_folder, codecs=names, tokens=100, console=Console(file=text, width=160))
    assert "row 5 holds 1000000.0 at place 1: fp16 holds" in found["codecs"]["fp16"]["refused"]
    assert "difference" in found["codecs"]["bf16"]
    assert "fp16: row 5 holds" in text.getvalue()


def test_table_json_and_picture(run_folder, tmp_path, capsys):
    text = io.StringIO()
    console = Console(file=text, width=160)
    found = codecs.run_codec_report(run_folder, codecs=["int8", "int4"], tokens=100, out=tmp_path, console=console)
    assert json.loads((tmp_path / "codecs.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "codecs.png").read_bytes()[:4] == b"\x89PNG"
    assert "int8" in text.getvalue() and f"{found['codecs']['int4']['difference']:+.6f}" in text.getvalue()
    again = codecs.run_codec_report(run_folder, codecs=["int8"], tokens=100, as_json=True, console=console)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(again))


def test_what_cannot_be_reported_is_refused_in_one_line(run_folder, tmp_path, data, monkeypatch):
    with pytest.raises(StoreError, match=r'unknown codec "fp9" \(did you mean "fp8"\?\)'):
        codecs.codec_report(run_folder, ["fp9"])
    with pytest.raises(CheckpointError, match="no run here"):
        codecs.codec_report(tmp_path)
    other = prepare(small_corpus(50, seed=1), vocab_size=400, cache_folder=tmp_path)
    monkeypatch.setattr(reading, "prepare_for", lambda config: other)
    with pytest.raises(DataError, match="is not the text"):
        codecs.codec_report(run_folder, ["int8"])
    for _ in train(load_config("demo", (*TINY, "budget.arm=moe", "train.tokens=128")), data, tmp_path / "moe"):
        pass
    with pytest.raises(CheckpointError, match="no memory layer"):
        codecs.codec_report(tmp_path / "moe")
