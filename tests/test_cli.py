"""The command line: a user's mistake ends in one line that says what to do, and exit code 2."""

import json
import subprocess
import sys

import pytest

from nengram.train import train
from tests.conftest import run_command as run


def refused(monkeypatch, capsys, *arguments: str) -> str:
    """The one line that refuses."""
    code, _, error = run(monkeypatch, capsys, *arguments)
    assert code == 2 and error.count("\n") == 1 and error.startswith("nengram: "), error
    return error


@pytest.fixture
def finished(config, data, tmp_path):
    """A finished run folder of the engram arm on the small corpus."""
    list(train(config.replace(data__cache=str(tmp_path / "cache")), data, tmp_path / "run"))
    return tmp_path / "run"


@pytest.mark.parametrize(
    "arguments, hint",
    [
        (("train", "demo", "train.lrr=0.1"), 'unknown key "train.lrr" (did you mean "lr"?)'),
        (("train", "demo", "trian.lr=0.1"), 'unknown key "trian" (did you mean "train"?)'),
        (("train", "demo", "train.lr=fast"), "must be a number"),
        (("train", "demo", "train.lr"), "write section.key=value"),
        (("train", "demoo"), 'did you mean "demo"'),
        (("train", "demo", "data.corpus=no-such.txt"), "no-such.txt"),
        (("train", "demo", "budget.arm=engrm"), 'did you mean "engram"'),
        (("compare", "demo", "compare.arms=['moe','one_rwo']"), 'did you mean "one_row"'),
        (("compare", "demo", "budget.rho=1.5"), "must lie in 0..1"),
        (("generate", "no-such-run", "hello"), "no-such-run"),
        (("eval", "no-such-run"), "no-such-run"),
        (("data", "fetch", "fcats"), 'did you mean "facts"'),
    ],
)
def test_a_mistake_gets_one_line_that_names_it(monkeypatch, capsys, tmp_path, arguments, hint):
    monkeypatch.chdir(tmp_path)
    assert hint in refused(monkeypatch, capsys, *arguments)


def test_an_unknown_option_and_an_unknown_verb_name_the_nearest(monkeypatch, capsys):
    code, out, error = run(monkeypatch, capsys, "train", "demo", "--resum")
    assert code == 2 and "--resume" in out + error
    code, out, error = run(monkeypatch, capsys, "tarin", "demo")
    assert code == 2 and "train" in out + error


@pytest.mark.parametrize("content, hint", [("", "empty"), ("short text", "train"), (b"\xff\xfe\x00", "UTF-8")])
def test_unusable_text_is_refused_before_training(monkeypatch, capsys, tmp_path, content, hint):
    path = tmp_path / "mine.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.chdir(tmp_path)
    assert hint in refused(monkeypatch, capsys, "train", "demo", f"data.corpus={path}", "data.vocab_size=300")


def test_eval_and_generate_work_on_a_finished_run_and_refuse_a_damaged_one(monkeypatch, capsys, finished, tmp_path):
    code, out, _ = run(
        monkeypatch, capsys, "generate", str(finished), "Ada Hopper went", "--tokens", "8", "--temperature", "0"
    )
    assert code == 0 and out.startswith("Ada Hopper went") and len(out) > 20
    again = run(
        monkeypatch, capsys, "generate", str(finished), "Ada Hopper went", "--tokens", "8", "--temperature", "0"
    )
    assert again[1] == out
    assert "empty" in refused(monkeypatch, capsys, "generate", str(finished), "")
    path = finished / "final" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 64
    path.write_bytes(content)
    assert "model.safetensors: damaged" in refused(monkeypatch, capsys, "generate", str(finished), "Ada")
    path.unlink()
    assert "model.safetensors: missing" in refused(monkeypatch, capsys, "generate", str(finished), "Ada")


def test_eval_judges_other_text_and_row_controls(monkeypatch, capsys, finished, tmp_path):
    from tests.conftest import small_corpus

    other = tmp_path / "other.jsonl"
    entries = small_corpus(seed=1)
    other.write_text("".join(json.dumps({"key": e.key, "source": e.source, "text": e.text}) + "\n" for e in entries))
    losses = {}
    for control in ("hashed", "permuted"):
        arguments = ("eval", str(finished), "--corpus", str(other), "--control", control, "--json")
        code, out, _ = run(monkeypatch, capsys, *arguments)
        losses[control] = json.loads(out)["losses"]["all"]["nats"]
        assert code == 0
    assert losses["hashed"] != losses["permuted"]


def test_text_from_disk_is_the_same_text_and_its_reads_are_told(monkeypatch, capsys, finished, data, tmp_path):
    from nengram.study import reading

    monkeypatch.setattr(reading, "prepare_for", lambda config: data)
    words = ("generate", str(finished), "Ada Hopper went", "--tokens", "8", "--temperature", "0")
    _, expected, _ = run(monkeypatch, capsys, *words)
    stats, seen = tmp_path / "stats.json", str(tmp_path / "seen")
    tiered = ("--table-tier", "tiered", "--hot-share", "0.02", "--verify-rows", "0.5", "--stats")
    code, out, told = run(monkeypatch, capsys, *words, *tiered, "--stats-to", str(stats), "--record-rows", seen)
    assert (code, out) == (0, expected) and "1, 2-gram" in told and "hot" in told
    layer = json.loads(stats.read_text())["layers"]["1"]
    assert layer["total"]["rows"] == 16 * json.loads(stats.read_text())["tokens"]
    run(monkeypatch, capsys, *words, *tiered, "--stats-to", str(stats), "--hot-from", seen)
    recorded = json.loads(stats.read_text())["layers"]["1"]["total"]
    assert recorded["tiers"]["hot"]["hits"] == recorded["distinct"] > layer["total"]["tiers"]["hot"]["hits"]


def test_evaluation_from_disk_gives_the_same_losses_and_its_reads_as_json(monkeypatch, capsys, finished, tmp_path):
    from tests.conftest import small_corpus

    other = tmp_path / "other.jsonl"
    entries = small_corpus(seed=1)
    other.write_text("".join(json.dumps({"key": e.key, "source": e.source, "text": e.text}) + "\n" for e in entries))
    words = ("eval", str(finished), "--corpus", str(other), "--json")
    _, resident, _ = run(monkeypatch, capsys, *words)
    _, mapped, _ = run(monkeypatch, capsys, *words, "--table-tier", "mapped", "--stats")
    assert json.loads(mapped)["losses"] == json.loads(resident)["losses"]
    assert json.loads(mapped)["stats"]["layers"]["1"]["total"]["distinct"] > 0
    assert "share" in refused(monkeypatch, capsys, *words, "--table-tier", "tiered", "--hot-share", "2")


def test_trace_prints_rows_and_json(monkeypatch, capsys, finished):
    code, out, _ = run(monkeypatch, capsys, "trace", "Alan Turing", "--run", str(finished), "--json")
    assert code == 0 and json.loads(out)
    code, out, _ = run(monkeypatch, capsys, "trace", "Alan Turing", "--run", str(finished))
    assert code == 0 and "Turing" in out
    assert "nothing to trace" in refused(monkeypatch, capsys, "trace", "", "--run", str(finished))


def test_help_needs_no_torch():
    code = (
        "import sys; sys.argv = ['nengram', '--help']\n"
        "from nengram.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb in ("compare", "train", "eval", "generate", "trace", "data"):
        assert verb in done.stdout


def test_an_interrupt_ends_in_one_line(monkeypatch, capsys):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("nengram.config.load_config", interrupted)
    code, _, error = run(monkeypatch, capsys, "train", "demo")
    assert code == 130 and error == "nengram: interrupted; what was finished is kept, --resume continues\n"


def test_a_full_disk_ends_in_one_line(monkeypatch, capsys):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr("nengram.config.load_config", full)
    assert "model.safetensors: No space left on device" in refused(monkeypatch, capsys, "train", "demo")


def test_a_file_in_the_place_of_a_results_folder_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        code, _, error = run(monkeypatch, capsys, "twin", "--out", tmp_path / place)
        assert (
            code == 2
            and error == f"nengram: {tmp_path / 'file'}: is a file; results need a folder, choose another --out\n"
        )
