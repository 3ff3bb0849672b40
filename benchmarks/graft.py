"""A memory grafted onto a model of transformers: nengram against engram-peft 1.2.7, the same model and table sizes, one run.

Each side has a process of its own (`graft_side.py`), a third has the model without memory; they work by turns, one thread each. The
opponent's interpreter is named by NENGRAM_PEFT, a Python with engram-peft==1.2.7 and the same torch; without it nothing is measured.
Both sides use their own default of hashing, gate and optimiser, so what is compared is what a user gets. The model that carries the
memory costs the same in both and draws the ratios towards one; what the memory alone adds stands beside them.

Chunked prefill is the gate and a finding in one: a text in two chunks must give the logits of the whole text.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.gates import RedGate
from benchmarks.report import figure, result

SIDE = Path(__file__).with_name("graft_side.py")
OPPONENT = "NENGRAM_PEFT"
SHIM = "import typing, typing_extensions; typing.override = typing_extensions.override"  # it asks 3.11 for what came with 3.12
IMPORTS = {"nengram": "import nengram.hf; nengram.hf.graft", "engram-peft": f"{SHIM}; import engram_peft"}


@dataclass(frozen=True)
class Sizes:
    """A model of 5 M parameters, a table of 5 M."""

    vocab_size: int = 4096
    width: int = 256
    blocks: int = 4
    block: int = 1
    heads: int = 8
    rows: int = 20_000
    row_width: int = 16
    batch: int = 4
    context: int = 128
    generated: int = 32
    pairs: int = 20
    imports: int = 5


FULL = Sizes()


class Process:
    """One side, asked a word at a time."""

    def __init__(self, python: str, name: str, sizes: Sizes) -> None:
        self.name = name
        command = [python, str(SIDE), name, json.dumps(asdict(sizes))]
        quiet = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, text=True, env=quiet, **pipes)
        self._answer()

    def ask(self, word: str) -> dict:
        """The answer to a word. Raises RedGate when the process has ended instead."""
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RedGate(f"{self.name} ended without an answer, exit code {self.process.wait()}")


def run(sizes: Sizes = FULL) -> dict:
    """The result of this benchmark. Raises RedGate without an opponent, and when our own chunks differ from the whole."""
    theirs_python = os.environ.get(OPPONENT)
    if not theirs_python:
        raise RedGate(f"{OPPONENT} is not set: name a Python that has engram-peft==1.2.7")
    pythons = {"nengram": sys.executable, "engram-peft": theirs_python, "none": sys.executable}
    sides = [Process(python, name, sizes) for name, python in pythons.items()]
    ours, theirs, _ = sides
    chunks = {side.name: side.ask("chunks") for side in (ours, theirs)}
    if chunks["nengram"]["difference"] > 1e-4 * chunks["nengram"]["scale"]:
        raise RedGate(f"a text in two chunks differs from the whole by {chunks['nengram']['difference']:.2g}")
    spent = {word: by_turns(sides, word, sizes.pairs) for word in ("train", "generate")}
    about = {side.name: side.ask("about") for side in (ours, theirs)}
    for side in sides:
        side.close()
    imports_P2 = np.array(
        [[import_seconds(pythons[name], name) for name in IMPORTS] for _ in range(sizes.imports + 1)][1:]
    )
    weight = np.array([about["engram-peft"]["megabytes"] / about["nengram"]["megabytes"]])
    figures = [
        *compared("training step", spent["train"]),
        *compared("greedy generation", spent["generate"]),
        figure("engram-peft / nengram, import in a fresh process", imports_P2[:, 1] / imports_P2[:, 0], "x"),
        figure("engram-peft / nengram, installed bytes", weight, "x"),
    ]
    tokens = sizes.batch * sizes.context
    absolute = {}
    for place, name in enumerate(("nengram", "engram_peft")):
        side = name.replace("_", "-")
        absolute |= {
            f"{name}_train_tokens_per_cpu_s": tokens / np.median(spent["train"][:, place]),
            f"{name}_generate_tokens_per_cpu_s": sizes.generated / np.median(spent["generate"][:, place]),
            f"{name}_import_cpu_s": np.median(imports_P2[:, place]),
            f"{name}_chunked_difference_of_logits": chunks[side]["difference"],
            f"{name}_packages": about[side]["packages"],
            f"{name}_installed_mb": about[side]["megabytes"],
        }
    what = f"Llama of {sizes.blocks} blocks of width {sizes.width}, {2 * sizes.heads} x {sizes.rows:,} rows of {sizes.row_width}"
    gate = "nengram's logits of a text in two chunks are those of the whole text"
    return result("graft", what, gate, figures, absolute)


def compared(what: str, spent_P3: np.ndarray) -> list[dict]:
    """The whole, and the memory's own part of it: what it costs more than the model alone (medians, which no noise makes negative)."""
    ours_P, theirs_P, none_P = spent_P3.T
    own = (np.median(theirs_P) - np.median(none_P)) / (np.median(ours_P) - np.median(none_P))
    return [
        figure(f"engram-peft / nengram, {what}", theirs_P / ours_P, "x", (">=", 2.0)),
        figure(f"the same, what the memory alone adds to a {what}", np.array([own]), "x"),
        figure(f"nengram / the model without memory, {what}", ours_P / none_P, "x"),
    ]


def by_turns(sides: list[Process], word: str, rounds: int, warmup: int = 3) -> np.ndarray:
    """CPU seconds of every side, `[rounds, sides]`."""
    spent = [[side.ask(word)["cpu_seconds"] for side in sides] for _ in range(warmup + rounds)]
    return np.array(spent[warmup:])


def import_seconds(python: str, name: str) -> float:
    """CPU seconds of a fresh process that imports what a user would. Raises RedGate when it fails."""
    code = f"import time; {IMPORTS[name]}; print(time.process_time())"
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        raise RedGate(f"{IMPORTS[name]}: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.split()[-1])
