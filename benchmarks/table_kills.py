"""Killing the table tools at random moments (SIGKILL, which nobody can catch) and looking at what is left.

A moment is drawn from the time that a run which nobody kills has its part on the disk; before that nothing could be lost. Afterwards
the old table or the new one must stand at the place, whole: every checksum is recomputed. Of a checkpoint every byte is compared. The
run after the last kill must succeed and leave nothing but its result.
"""

import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gates import RedGate
from benchmarks.table_runs import BLOCK_BYTES, check_same_rows, command_of, digest_of, remove, tool, write_random
from nengram.store.codecs import make_codec


def kill_pack(folder: Path, table_bytes: int, row_width: int, kills: int) -> int:
    """Kill `pack` over an older table; how many kills came while it wrote. Raises RedGate."""
    source, place = folder / "source", folder / "packed"
    write_random(source, make_codec("fp32", row_width), table_bytes)
    verb = ("pack", source, place, "--codec", "fp8")
    longest_s = seconds_of_writing(verb, place)
    new, while_it_wrote = digest_of(place), 0
    codec = make_codec("int4", row_width)
    old_bytes = table_bytes * codec.row_bytes // (4 * row_width)
    write_random(place, codec, old_bytes)
    old = digest_of(place)
    for wait_s in moments(longest_s, kills):
        while_it_wrote += kill(verb, place, wait_s)
        found = digest_of(place)
        if found not in (old, new):
            raise RedGate("a killed pack left a table that is neither the old nor the new one")
        if found == new:
            write_random(place, codec, old_bytes)
    tool(*verb)
    if digest_of(place) != new:
        raise RedGate("pack after the kills made another table than before them")
    require_only(folder, {"source", "packed"})
    remove(source)
    remove(place)
    return while_it_wrote


def kill_convert(folder: Path, table_bytes: int, row_width: int, kills: int) -> int:
    """Kill `convert`, half of the time to a checkpoint and half from one; how many kills came while it wrote. Raises RedGate."""
    source, checkpoint, table = folder / "source", folder / "checkpoint", folder / "table.safetensors"
    whole, while_it_wrote = folder / "whole", 0
    write_random(source, make_codec("fp8", row_width), table_bytes)
    tool("convert", source, whole, "--to", "deepseek_v41")
    runs = {
        checkpoint: (("convert", source, checkpoint, "--to", "deepseek_v41"), kills // 2),
        table: (("convert", whole, table), kills - kills // 2),
    }
    for place, (verb, count) in runs.items():
        for wait_s in moments(seconds_of_writing(verb, place), count):
            remove(place)
            while_it_wrote += kill(verb, place, wait_s)
            if place.exists():
                require_whole(place, whole, source)
        remove(place)
        tool(*verb)
        require_whole(place, whole, source)
    require_only(folder, {"source", "whole", "checkpoint", "table.safetensors"})
    for path in (source, whole, checkpoint, table):
        remove(path)
    return while_it_wrote


def moments(longest_s: float, count: int) -> Iterator[float]:
    """Random times within a run's writing."""
    rng = random.Random(0)
    for _ in range(count):
        yield rng.uniform(0, longest_s)


def seconds_of_writing(verb: tuple, place: Path) -> float:
    """How long a run that nobody kills has its part on the disk. Raises RedGate."""
    process = started(verb, place)
    began = time.perf_counter()
    while process.poll() is None and part_of(place).exists():
        time.sleep(0.001)
    longest_s = time.perf_counter() - began
    if process.wait():
        raise RedGate(f"nengram table {verb[0]} failed")
    return longest_s


def kill(verb: tuple, place: Path, wait_s: float) -> bool:
    """Kill a run `wait_s` after it began to write; whether it was still writing."""
    process = started(verb, place)
    time.sleep(wait_s)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL and part_of(place).exists()


def started(verb: tuple, place: Path) -> subprocess.Popen:
    """A run of `nengram table <verb>` that has begun to write: its part is there, or has changed if one was left there."""
    before = changed_at(part_of(place))
    process = subprocess.Popen(command_of(verb), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and changed_at(part_of(place)) == before:
        time.sleep(0.001)
    return process


def changed_at(part: Path) -> int | None:
    """When a file or folder was last changed; None when it is not there."""
    try:
        return part.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def part_of(place: Path) -> Path:
    """Where a table or checkpoint is written before it is whole."""
    return place.with_name(f".{place.name}.part")


def require_whole(place: Path, whole: Path, source: Path) -> None:
    """A table with the rows of `source`, or a checkpoint like `whole`. Raises RedGate."""
    if place.is_file():
        check_same_rows(source, place)
        return
    for file in whole.iterdir():
        if not (place / file.name).is_file() or not same_bytes(place / file.name, file):
            raise RedGate(f"a killed convert left a checkpoint whose {file.name} is not whole")


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two files are equal, read in pieces."""
    with open(one, "rb") as left, open(other, "rb") as right:
        while piece := left.read(BLOCK_BYTES):
            if piece != right.read(BLOCK_BYTES):
                return False
        return not right.read(1)


def require_only(folder: Path, expected: set[str]) -> None:
    """Raises RedGate when anything else lies in `folder`."""
    if litter := {path.name for path in folder.iterdir()} - expected:
        raise RedGate(f"kills left litter that the next run did not take away: {', '.join(sorted(litter))}")
