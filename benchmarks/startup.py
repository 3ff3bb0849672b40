"""Is it quick to say hello? What `import nengram` adds to `import torch`, and the whole of `nengram --help`.

Each figure is of a fresh process, by turns. The import is timed inside a process that has torch already; the rooms that a trainer of
one's own needs (address, store, memory) are timed the same way, for information. Wall time, because that is what one waits for.
"""

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np

from benchmarks.gates import RedGate
from benchmarks.report import figure, result

IMPORTS = """
import json, sys, time, torch
def seconds(name):
    wall, cpu = time.perf_counter(), time.process_time()
    __import__(name)
    return time.perf_counter() - wall, time.process_time() - cpu
spent = seconds("nengram"), seconds("nengram.memory")
print(json.dumps([*spent, [name for name in ("numba", "transformers", "matplotlib") if name in sys.modules]]))
"""
HELP = "import sys; from nengram.cli import main; sys.argv[0] = 'nengram'; main()"  # as the console script does


@dataclass(frozen=True)
class Sizes:
    """How many processes of each kind."""

    rounds: int = 9


FULL = Sizes()


def run(sizes: Sizes = FULL) -> dict:
    """The result of this benchmark. Raises RedGate when a process fails or imports what it must not."""
    rounds = [(*import_seconds(), help_seconds()) for _ in range(sizes.rounds + 1)]
    package_R2, rooms_R2, help_R2 = np.array(rounds[1:]).transpose(1, 0, 2)
    figures = [
        figure("import nengram, beyond import torch", package_R2[:, 0], "s", ("<", 0.050)),
        figure("nengram --help, the whole process", help_R2[:, 0], "s", ("<", 0.7)),
        figure("import nengram.memory (with address, store), beyond both", rooms_R2[:, 0], "s"),
    ]
    absolute = {
        "import_nengram_cpu_ms": 1e3 * np.median(package_R2[:, 1]),
        "import_memory_cpu_ms": 1e3 * np.median(rooms_R2[:, 1]),
        "help_cpu_ms": 1e3 * np.median(help_R2[:, 1]),
    }
    gate = "every process ends well; --help names the verbs; no import brings numba, transformers or matplotlib"
    return result("startup", "what one waits for before anything happens (wall time)", gate, figures, absolute)


def import_seconds() -> tuple[list[float], list[float]]:
    """(wall, CPU) seconds of importing nengram after torch, and then its memory room. Raises RedGate."""
    package, rooms, heavy = json.loads(output_of(IMPORTS))
    if heavy:
        raise RedGate(f"importing nengram.memory brings {', '.join(heavy)}")
    return package, rooms


def help_seconds() -> tuple[float, float]:
    """Wall and CPU seconds of `nengram --help`, interpreter included. Raises RedGate."""
    wall, cpu = time.perf_counter(), children_cpu_seconds()
    text = output_of(HELP, "--help")
    spent = time.perf_counter() - wall, children_cpu_seconds() - cpu
    if "compare" not in text or "trace" not in text:
        raise RedGate("nengram --help does not name the verbs compare and trace")
    return spent


def children_cpu_seconds() -> float:
    """User and system time of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def output_of(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints when it runs `code`. Raises RedGate when it fails."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RedGate(f"a fresh process failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return done.stdout
