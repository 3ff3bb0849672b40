"""Do the table tools keep their two promises: memory that does not grow with the table, and no half-written table?

`nengram table verify`, `pack` (fp32 to fp8) and `convert` (to the DeepSeek-V4.1 layout and back) run on 8 GiB each, as their user runs
them. The tables hold random numbers, not holes, and are put out of the page cache first, so the seconds (wall time, start of the
interpreter included) hold reading, hashing and writing on whatever disk the system's temporary folder lies; 24 GiB must be free there.
Then `pack` and `convert` are killed 25 times each on a smaller table (`table_kills.py`).
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.gates import require_equal
from benchmarks.report import figure, result
from benchmarks.table_kills import kill_convert, kill_pack
from benchmarks.table_runs import LAYER, Spent, check_same_rows, digest_of, remove, tool, write_random
from nengram.store.codecs import make_codec
from nengram.store.table_file import open_table

GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    """`table_bytes`: of the table that each tool reads, about. `killed_bytes`: of the one they are killed on."""

    table_bytes: int = 8 * GIB
    killed_bytes: int = GIB // 2
    row_width: int = 256
    kills: int = 25


FULL = Sizes()


def run(sizes: Sizes = FULL) -> dict:
    """The result of this benchmark. Raises RedGate when a tool fails, is wrong, or leaves half a table."""
    with tempfile.TemporaryDirectory(prefix="nengram-table-tools-") as name:
        spent = measured(Path(name), sizes)
        killed = sizes.killed_bytes, sizes.row_width, sizes.kills
        while_writing = {"pack": kill_pack(Path(name), *killed), "convert": kill_convert(Path(name), *killed)}
    figures = [
        figure(f"peak memory of {name} / 1 GiB", np.array([one.peak_bytes / GIB]), "share", ("<", 1.0))
        for name, one in spent.items()
    ]
    figures += [  # one half-written table would have turned the gate red
        figure(f"half-written tables after {sizes.kills} kills of {name}", np.zeros(1), "share", ("<=", 0.0))
        for name in while_writing
    ]
    absolute = {}
    for name, one in spent.items():
        key = name.replace(" ", "_")
        absolute[f"{key}_peak_mib"] = one.peak_bytes / 2**20
        absolute[f"{key}_s"] = one.seconds
        absolute[f"{key}_gib_per_s"] = sizes.table_bytes / GIB / one.seconds
    absolute |= {f"kills_while_{name}_wrote": count for name, count in while_writing.items()}
    gate = (
        "packed rows are the codec's; a table converted there and back has the same rows; after each kill the old table "
        "or the new one is there, whole"
    )
    what = f"nengram table verify, pack and convert on {sizes.table_bytes / GIB:.3g} GiB, processes of their own"
    return result("table_tools", what, gate, figures, absolute)


def measured(folder: Path, sizes: Sizes) -> dict[str, Spent]:
    """Peak memory and time of each tool on tables of the full size, which are gone afterwards. Raises RedGate."""
    source, packed, checkpoint, back = (folder / name for name in ("source", "packed", "checkpoint", "back"))
    write_random(source, make_codec("fp32", sizes.row_width), sizes.table_bytes)
    spent = {"verify": tool("verify", source), "pack fp32 to fp8": tool("pack", source, packed, "--codec", "fp8")}
    check_packed(source, packed)
    remove(packed)
    write_random(source, make_codec("fp8", sizes.row_width), sizes.table_bytes)
    spent["convert to deepseek_v41"] = tool("convert", source, checkpoint, "--to", "deepseek_v41")
    spent["convert from deepseek_v41"] = tool("convert", checkpoint, back)
    check_same_rows(source, back / f"table-{LAYER}.safetensors")
    for path in (source, checkpoint, back):
        remove(path)
    return spent


def check_packed(source: Path, packed: Path) -> None:
    """The packed table is whole, and a sample of its rows is what the codec makes of the source's. Raises RedGate."""
    digest_of(packed)
    with open_table(source) as table, open_table(packed) as made:
        for first in np.random.default_rng(1).integers(0, table.num_rows - 8, 200).tolist():
            vectors_NE = table.codec.decode(torch.from_numpy(table.read_rows(first, 8)))
            require_equal("packed rows", made.read_rows(first, 8), made.codec.encode(vectors_NE).numpy())
