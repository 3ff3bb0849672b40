"""The example that people copy runs as it stands, learns, and needs only the three rooms it promises."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN_TRAINER = ROOT / "examples" / "own_trainer.py"


@pytest.fixture(scope="module")
def printed() -> list[tuple[str, float]]:
    """What own_trainer.py prints: (line without its number, nats a byte)."""
    alone = os.environ | {"OMP_NUM_THREADS": "1", "NENGRAM_CHECK_SHAPES": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(OWN_TRAINER)], capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stderr
    return [
        (label.strip(), float(nats)) for label, nats in re.findall(r"^(.*?)(\d\.\d{3}) nats a byte$", done.stdout, re.M)
    ]


def test_own_trainer_learns(printed):
    losses = [nats for label, nats in printed if label.startswith("step")]
    assert losses[0] > 5.0 and losses[-1] < 2.5  # 5.5 is a uniform guess over bytes
    assert dict(printed)["held-out text, as trained"] < 2.5


def test_own_trainer_reads_what_its_rows_hold(printed):
    """With the rows of every slot permuted the held-out loss is far worse: the table was used."""
    held_out = dict(printed)
    assert held_out["held-out text, rows permuted"] > held_out["held-out text, as trained"] + 0.3


def test_own_trainer_stays_plain():
    """About 60 lines of code, and of nengram address, store and memory alone."""
    source = OWN_TRAINER.read_text(encoding="utf-8")
    rooms = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    assert {room for room in rooms if room.startswith("nengram")} == {
        "nengram.address",
        "nengram.memory",
        "nengram.store",
    }
    code = source.split('"""', 2)[2]
    assert sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in code.splitlines()) <= 60


@pytest.mark.network
@pytest.mark.skipif(os.environ.get("NENGRAM_NETWORK") != "1", reason="downloads 96 MB; NENGRAM_NETWORK=1 runs it")
def test_graft_smollm2_recalls_what_it_was_shown(tmp_path):
    """Shown facts are known better after than before, in the trained words above all; the adapter is saved."""
    command = [sys.executable, str(ROOT / "examples" / "graft_smollm2.py"), str(tmp_path / "adapter")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    right = {what: (int(a), int(b)) for what, a, b in re.findall(r"^(.+?) +(\d+)% +(\d+)%$", done.stdout, re.M)}
    assert right["shown, as trained"][1] >= right["shown, as trained"][0] + 20
    assert right["shown, begun in other words"][1] > right["shown, begun in other words"][0]
    assert (tmp_path / "adapter" / "adapter.json").is_file()
