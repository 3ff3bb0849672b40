"""Running `nengram table ...` as its user does, in a process of its own, on tables of random numbers.

Peak memory is that process's largest resident set as the system kept it, interpreter and torch included. A small process in between
starts it, because a child would otherwise inherit the peak of this one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.gates import RedGate, require_equal
from nengram.address import AddressSpec
from nengram.errors import NengramError
from nengram.memory.table import table_metadata
from nengram.store.codecs import Codec
from nengram.store.safetensors_header import read_header
from nengram.store.table_file import open_table, write_table

NENGRAM = (sys.executable, "-c", "import sys; from nengram.cli import main; sys.argv[0] = 'nengram'; main()")
LAUNCHER = """
import json, os, subprocess, sys, time
began = time.perf_counter()
run = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
errors = run.stderr.read()
_, status, used = os.wait4(run.pid, 0)
peak_bytes = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps([os.waitstatus_to_exitcode(status), peak_bytes, time.perf_counter() - began, errors]))
"""
LAYER, ORDERS, HEADS = 1, 3, 8
BLOCK_BYTES = 4 << 20


class Spent(NamedTuple):
    """What one run took."""

    peak_bytes: int
    seconds: float


def tool(*verb: object) -> Spent:
    """`nengram table <verb>` to its end, its files out of the page cache before. Raises RedGate when it fails."""
    for path in (Path(str(word)) for word in verb[1:]):
        for file in path.iterdir() if path.is_dir() else [path] * path.is_file():
            forget(file)
    command = [sys.executable, "-S", "-c", LAUNCHER, *command_of(verb)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code, peak_bytes, seconds, errors = json.loads(done.stdout)
    if code:
        raise RedGate(f"nengram table {verb[0]} failed: {(errors.strip().splitlines() or ['no message'])[-1]}")
    return Spent(peak_bytes, seconds)


def command_of(verb: tuple) -> list[str]:
    """The command line of `nengram table <verb>`."""
    return [*NENGRAM, "table", *map(str, verb)]


def write_random(path: Path, codec: Codec, table_bytes: int) -> None:
    """A table of about so many bytes, at DeepSeek-V4.1 addresses: normal numbers where rows are numbers, else any bytes."""
    rows_per_head = max(3, table_bytes // codec.row_bytes // (ORDERS * HEADS))
    spec = AddressSpec.deepseek_v41(rows_per_head=rows_per_head, max_order=ORDERS + 1, heads=HEADS, layer_ids=[LAYER])
    rows, rng = spec.num_rows(LAYER), np.random.default_rng(0)

    def block(count: int) -> np.ndarray:
        if codec.plain:
            return rng.standard_normal((count, codec.row_width), np.float32).view(np.uint8)
        return rng.integers(0, 256, (count, codec.row_bytes), np.uint8)

    step = max(1, BLOCK_BYTES // codec.row_bytes)
    blocks = (block(min(step, rows - first)) for first in range(0, rows, step))
    write_table(path, codec, rows, table_metadata(spec, LAYER), blocks)


def digest_of(path: Path) -> str:
    """The digest of a table after all its checksums. Raises RedGate when it is not whole."""
    try:
        with open_table(path) as table:
            table.verify()
            return table.digest
    except NengramError as error:
        raise RedGate(f"not a whole table: {error}") from error


def check_same_rows(one: Path, other: Path) -> None:
    """Two files in one codec hold the same rows: their chunks have the same checksums. Raises RedGate."""
    digest_of(other)
    require_equal("rows converted there and back", *(chunk_digests(path) for path in (other, one)))


def chunk_digests(path: Path) -> np.ndarray:
    """The checksums that a table file holds, as bytes."""
    entry = read_header(path).tensors["chunk_sha256"]
    with open(path, "rb") as file:
        file.seek(entry.begin)
        return np.frombuffer(file.read(entry.end - entry.begin), np.uint8)


def forget(path: Path) -> None:
    """Put a file out of the page cache, where the system can."""
    drop = getattr(os, "posix_fadvise", None)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        if drop:
            drop(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remove(place: Path) -> None:
    """Remove a file, a flat folder, or nothing."""
    if place.is_dir():
        for path in place.iterdir():
            path.unlink()
        place.rmdir()
    place.unlink(missing_ok=True)
