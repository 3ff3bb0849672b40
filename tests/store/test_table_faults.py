"""What can go wrong with a table file: each is refused in one line that names it, and what stood there before is not lost."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from nengram.errors import CheckpointError, StoreError
from nengram.store import table_place, table_writer
from nengram.store.codecs import make_codec
from nengram.store.safetensors_header import Header, read_header
from nengram.store.table_file import TableFile, TableWriter, create_zero_table, open_table, write_table
from nengram.store.table_layout import PAGE, RESERVED, check_layout, plan_layout

CODEC = make_codec("fp8", 40)  # 42 bytes a row
METADATA = {"layer_id": "4"}
ROOT = Path(__file__).parents[2]


def make_rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 256, (count, CODEC.row_bytes), dtype=np.uint8)


def write_small(path: Path, shards: int = 1, seed: int = 0) -> np.ndarray:
    """301 rows, in chunks of a page, with rows of zeros and a tensor beside them."""
    rows_NB = make_rows(301, seed)
    rows_NB[100:200] = 0
    extras = {"step": torch.tensor(2), "state.a.b": torch.arange(301.0)}
    write_table(path, CODEC, 301, METADATA, [rows_NB], shards=shards, extras=extras, chunk_bytes=PAGE)
    return rows_NB


def refusal(path: Path) -> str:
    """The line with which a table is refused, at opening or by `verify`."""
    with pytest.raises(CheckpointError) as refused, open_table(path) as table:
        table.verify()
    line = str(refused.value)
    assert str(path) in line and line.isprintable() and len(line) < 400
    assert ";" in line, "says what to do"
    return line


def test_every_truncation_is_refused(tmp_path):
    write_small(tmp_path / "t")
    whole = (tmp_path / "t").read_bytes()
    for size in [*range(0, len(whole), 61), len(whole) - 1]:
        (tmp_path / "cut").write_bytes(whole[:size])
        refusal(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(whole + b"\0")
    assert "belong to no tensor" in refusal(tmp_path / "cut")


def test_a_flipped_bit_anywhere_is_refused(tmp_path):
    """Header, rows, zeros, padding, tensors beside them, checksums, seal."""
    path, rng = tmp_path / "t", random.Random(0)
    write_small(path)
    header = read_header(path)
    edges = [begin for entry in header.tensors.values() for begin in (entry.begin, entry.end - 1)]
    places = [*range(0, 700, 3), *edges, *rng.sample(range(path.stat().st_size), 200)]
    with open(path, "r+b") as file:
        for place in places:
            byte = os.pread(file.fileno(), 1, place)
            os.pwrite(file.fileno(), bytes([byte[0] ^ 1 << rng.randrange(8)]), place)
            refusal(path)
            os.pwrite(file.fileno(), byte, place)
        open_table(path).verify()


def test_the_damaged_rows_are_named_and_others_are_fine(tmp_path):
    path = tmp_path / "t"
    write_small(path)
    with open_table(path) as table, open(path, "r+b") as file:
        os.pwrite(file.fileno(), b"\0", table.files[0].rows_offset + 42 * 250)  # chunk 2: bytes 8192 to 12287
        assert f"{path}: damaged: chunk 2, rows 195 to 292, are not what was written" in refusal(path)
        table.verify_rows(0, 195)
        table.verify_rows(293, 8)
        table.verify_rows(250, 0)
        for first, count in ((0, 301), (194, 2), (292, 1), (250, 1)):
            with pytest.raises(CheckpointError, match="chunk 2"):
                table.verify_rows(first, count)


def test_damage_beside_the_rows_is_named_as_such(tmp_path):
    write_small(tmp_path / "t")
    end = read_header(tmp_path / "t").tensors["state.a.b"].end
    with open(tmp_path / "t", "r+b") as file:
        os.pwrite(file.fileno(), b"\7", end - 1)
    assert "chunk 3, rows 292 to 300 and the tensors after them, are not" in refusal(tmp_path / "t")
    extras = {"state.a.b": torch.arange(9000.0)}
    write_table(tmp_path / "t", CODEC, 3, {}, [make_rows(3)], extras=extras, chunk_bytes=PAGE)
    with open(tmp_path / "t", "r+b") as file:
        os.pwrite(file.fileno(), b"\7", read_header(tmp_path / "t").data_begin + 5 * PAGE)
    assert "chunk 5, tensors beside the rows, are not" in refusal(tmp_path / "t")


def test_a_hole_where_rows_were_is_found(tmp_path):
    """What a disk that lost a block, or a copy that was cut and filled up, looks like."""
    write_small(tmp_path / "t")
    whole, begin = (tmp_path / "t").read_bytes(), read_header(tmp_path / "t").data_begin
    with open(tmp_path / "t", "wb") as file:
        file.write(whole[:begin])
        file.seek(begin + PAGE)
        file.write(whole[begin + PAGE :])
    assert "chunk 0" in refusal(tmp_path / "t")


def test_a_file_cut_short_while_open_is_said(tmp_path):
    write_small(tmp_path / "t")
    with open_table(tmp_path / "t") as table:
        os.truncate(tmp_path / "t", table.files[0].rows_offset + 100)
        with pytest.raises(CheckpointError, match="was cut short while it was open"):
            table.read_rows(0, 10)
        with pytest.raises(CheckpointError, match="damaged"):
            table.verify()


def test_an_unsealed_file_is_refused(tmp_path):
    write_small(tmp_path / "t")
    with open(tmp_path / "t", "r+b") as file:
        os.pwrite(file.fileno(), bytes(32), read_header(tmp_path / "t").tensors["seal"].begin)
    assert "its writer did not finish" in refusal(tmp_path / "t")


def resealed(path: Path, change) -> None:
    """Write the file again with a changed header, sealed as if by a writer who meant it."""
    whole, found = path.read_bytes(), read_header(path)
    header = json.loads(whole[8 : found.data_begin])
    change(header)
    is_padded = header.pop("padded", True)
    text = json.dumps(header).encode()
    size = -(-(8 + len(text)) // PAGE) * PAGE - 8 if is_padded else len(text)
    front = size.to_bytes(8, "little") + text.ljust(size)
    digests = found.tensors["chunk_sha256"]
    data = whole[found.data_begin : digests.begin]
    seal = hashlib.sha256(front + whole[digests.begin : digests.end]).digest()
    path.write_bytes(front + data + whole[digests.begin : digests.end] + seal)


def metadata_of(header: dict) -> dict:
    return header["__metadata__"]


WRONG = {
    "another format": (lambda h: metadata_of(h).update(format="nengram-table-9"), 'format is "nengram-table-9"'),
    "no format": (lambda h: metadata_of(h).pop("format"), 'format is "not given"'),
    "no codec": (lambda h: metadata_of(h).pop("codec"), "metadata lack codec"),
    "codec that is no JSON": (lambda h: metadata_of(h).update(codec="{"), "codec is not JSON"),
    "codec that nests": (lambda h: metadata_of(h).update(codec="[" * 100_000), "codec is not JSON"),
    "codec that is a list": (lambda h: metadata_of(h).update(codec="[]"), "not a JSON object"),
    "unknown codec": (lambda h: metadata_of(h).update(codec='{"name":"fp9","row_width":40}'), "fp9"),
    "wider codec": (
        lambda h: metadata_of(h).update(codec=json.dumps(make_codec("fp8", 41).to_dict())),
        "its rows are U8 [301, 42], codec fp8 needs U8 [301, 43]",
    ),
    "plain codec": (
        lambda h: metadata_of(h).update(codec=json.dumps(make_codec("bf16", 21).to_dict())),
        "codec bf16 needs BF16 [301, 21]",
    ),
    "rows as text": (lambda h: metadata_of(h).update(num_rows="three"), 'num_rows is "three"'),
    "rows with a sign": (lambda h: metadata_of(h).update(num_rows="+301"), "not a whole number"),
    "rows in other digits": (lambda h: metadata_of(h).update(num_rows="٣٠١"), "not a whole number"),
    "more rows than it has": (lambda h: metadata_of(h).update(num_rows="302"), "no part of a table of 301 rows"),
    "fewer rows than it has": (lambda h: metadata_of(h).update(num_rows="300"), "codec fp8 needs U8 [300, 42]"),
    "first row too far": (lambda h: metadata_of(h).update(first_row="1"), "rows 1 to 302 are no part"),
    "smaller table": (lambda h: metadata_of(h).update(table_rows="300"), "no part of a table of 300 rows"),
    "endless table": (lambda h: metadata_of(h).update(table_rows="9" * 18), "more than a file can hold"),
    "chunk of nothing": (lambda h: metadata_of(h).update(chunk_bytes="0"), "chunk_bytes is 0"),
    "odd chunk": (lambda h: metadata_of(h).update(chunk_bytes="5000"), "chunk_bytes is 5,000"),
    "other chunks": (lambda h: metadata_of(h).update(chunk_bytes="8192"), "not U8 [2, 32]"),
    "rows not at a page": (lambda h: h.update(padded=False), "not at a multiple of 4096"),
    "rows not first": (lambda h: h.update(weight=h.pop("step"), step=h["weight"]), "do not run from weight"),
    "no checksums": (lambda h: h.update(x=h.pop("chunk_sha256")), "do not run from weight"),
    "no seal": (lambda h: h.update(x=h.pop("seal")), "do not run from weight"),
    "narrow checksums": (lambda h: h["chunk_sha256"].update(shape=[8, 16]), "not U8 [4, 32]"),
    "typed checksums": (lambda h: h["chunk_sha256"].update(dtype="I32", shape=[4, 8]), "not U8 [4, 32]"),
    "typed seal": (lambda h: h["seal"].update(dtype="F32", shape=[8]), "seal is not U8 [32]"),
    "tensor of no use": (lambda h: h["state.a.b"].update(dtype="C64", shape=[301 // 2, 1]), "cannot be the bytes"),
    "tensor of bits": (lambda h: h["step"].update(dtype="U64", shape=[]), "is U64, which no table file holds"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_header_that_does_not_fit_is_refused_even_when_sealed(tmp_path, name):
    change, expected = WRONG[name]
    write_small(tmp_path / "t")
    resealed(tmp_path / "t", lambda header: None)
    open_table(tmp_path / "t").verify()
    resealed(tmp_path / "t", change)
    assert expected in refusal(tmp_path / "t")


def test_generated_metadata_never_pass_unless_everything_fits(tmp_path):
    write_small(tmp_path / "t")
    found, rng = read_header(tmp_path / "t"), random.Random(0)
    numbers = [
        "0",
        "1",
        "42",
        "300",
        "301",
        "302",
        "4096",
        "8192",
        str(2**30),
        str(2**61),
        "-1",
        "1e3",
        "",
        " 1",
        "01",
        "9" * 40,
    ]
    codecs = [
        json.dumps(make_codec(name, width).to_dict()) for name in ("fp8", "int4", "bf16") for width in (21, 40, 41)
    ]
    values = (
        numbers
        + codecs
        + ["null", '{"name":null}', '{"name":"fp8","row_width":1e400}', '{"name":"fp8","row_width":-1}']
    )
    for _ in range(3_000):
        metadata = dict(found.metadata)
        for _ in range(rng.choice((1, 1, 2, 3))):
            metadata[rng.choice(RESERVED[1:])] = rng.choice(values)
        entries = {name: entry for name, entry in found.tensors.items() if rng.random() < 0.97}
        header = Header(entries, metadata, found.data_begin, found.file_bytes)
        try:
            layout = check_layout("t", header)
        except CheckpointError:
            continue
        assert (layout.codec, layout.num_rows) == (CODEC, 301) and layout.table_rows >= layout.first_row + 301
        assert layout.rows_end <= layout.digests_offset < layout.seal_offset == layout.file_bytes - 32
        assert layout.file_bytes == found.file_bytes


def test_shards_that_do_not_belong_together_are_refused(tmp_path):
    write_small(tmp_path / "t", shards=3)
    write_small(tmp_path / "other", shards=3, seed=1)
    names = sorted(path.name for path in (tmp_path / "t").iterdir())
    last = (tmp_path / "t" / names[3]).read_bytes()
    for wrong in (tmp_path / "other" / names[3], tmp_path / "t" / names[1]):
        (tmp_path / "t" / names[3]).write_bytes(wrong.read_bytes())
        assert "not the shard that the index tells of" in refusal(tmp_path / "t")
    (tmp_path / "t" / names[3]).unlink()
    assert f"{names[3]}: no such file" in refusal(tmp_path / "t")
    (tmp_path / "t" / names[3]).write_bytes(last)
    open_table(tmp_path / "t").verify()


def change_index(folder: Path, change) -> None:
    """Change the index and give it the digest that fits."""
    index = json.loads((folder / "index.json").read_text())
    del index["digest"]
    change(index)
    text = json.dumps(index, sort_keys=True, separators=(",", ":"))
    (folder / "index.json").write_text(json.dumps(index | {"digest": hashlib.sha256(text.encode()).hexdigest()}))


WRONG_INDEX = {
    "up and away": (lambda i: i["shards"][0].update(file="../t"), "no file name in its folder"),
    "absolute": (lambda i: i["shards"][0].update(file="/etc/passwd"), "no file name in its folder"),
    "nothing": (lambda i: i["shards"][0].update(file="."), "no file name in its folder"),
    "gap": (lambda i: i["shards"].pop(1), "does not begin at row 100"),
    "end missing": (lambda i: i["shards"].pop(), "hold 200 of 301 rows"),
    "no shards": (lambda i: i["shards"].clear(), "hold 0 of 301 rows"),
    "negative": (lambda i: i["shards"][0].update(num_rows=-1), "does not begin at row 0"),
    "truth for a number": (lambda i: i["shards"][0].update(num_rows=True), "num_rows is no int"),
    "float": (lambda i: i.update(table_rows=301.0), "not a whole number"),
    "unknown field": (lambda i: i.update(extra=1), 'field "extra" is missing or unknown'),
    "shard as a number": (lambda i: i["shards"].append(3), "described by an object"),
    "another codec": (lambda i: i["codec"].update(name="fp9"), "fp9"),
    "wider codec": (lambda i: i.update(codec=make_codec("fp8", 41).to_dict()), "not the shard"),
    "another format": (lambda i: i.update(format="x"), "not the index of a table"),
}


@pytest.mark.parametrize("name", WRONG_INDEX)
def test_an_index_that_does_not_fit_is_refused(tmp_path, name):
    change, expected = WRONG_INDEX[name]
    write_small(tmp_path / "t", shards=3)
    change_index(tmp_path / "t", change)
    assert expected in refusal(tmp_path / "t")


def test_a_damaged_index_is_refused_at_every_byte(tmp_path):
    write_small(tmp_path / "t", shards=2)
    whole, rng = (tmp_path / "t" / "index.json").read_bytes(), random.Random(0)
    meaning = json.loads(whole)
    for place in range(0, len(whole), 5):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(7)
        for damaged in (flipped, whole[:place]):
            (tmp_path / "t" / "index.json").write_bytes(damaged)
            if not means(damaged, meaning):
                refusal(tmp_path / "t")
    (tmp_path / "t" / "index.json").write_bytes(b"[" * 200_000)
    assert "not an index" in refusal(tmp_path / "t")
    (tmp_path / "t" / "index.json").unlink()
    assert "a folder without index.json is no table" in refusal(tmp_path / "t")


def means(text: bytes, meaning: dict) -> bool:
    """Whether a change was one of white space."""
    try:
        return json.loads(text) == meaning
    except ValueError:
        return False


def no_space(*_: object) -> int:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("call", ["pwrite", "truncate", "fsync"])
def test_a_full_disk_leaves_the_old_table_and_no_litter(tmp_path, monkeypatch, call, shards):
    old_NB = write_small(tmp_path / "t", shards)
    calls = []

    def fails_later(*given):
        calls.append(given)
        return no_space() if len(calls) > shards else real(*given)

    real = getattr(os, call)
    monkeypatch.setattr(table_writer.os, call, fails_later if call == "pwrite" else no_space)
    with pytest.raises(
        CheckpointError, match="t: cannot be written: No space left on device; nothing there was changed, make room"
    ):
        write_small(tmp_path / "t", shards, seed=1)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["t"]
    assert np.array_equal(open_table(tmp_path / "t").read_rows(0, 301), old_NB)
    write_small(tmp_path / "t", shards, seed=1)


@pytest.mark.parametrize("shards", [1, 4])
def test_a_truly_full_disk(tmp_path, shards):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system of 1 MiB needs the right to mount: {mounted.stderr.strip()}")
    try:
        old_NB = write_small(disk / "t", shards)
        with pytest.raises(CheckpointError, match="No space left on device; nothing there was changed, make room"):
            write_table(disk / "t", CODEC, 100_000, {}, (make_rows(10_000) for _ in range(10)), shards=shards)
        assert os.listdir(disk) == ["t"]
        with open_table(disk / "t") as table:
            table.verify()
            assert np.array_equal(table.read_rows(0, 301), old_NB)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_no_place_for_a_table(tmp_path):
    (tmp_path / "file").write_text("")
    for place, reason in (
        (tmp_path / "file" / "t", "Not a directory|File exists"),
        (Path("/"), "not a place for a table"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            create_zero_table(place, CODEC, 10, {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write and read everything")
def test_no_permission(tmp_path):
    write_small(tmp_path / "t")
    (tmp_path / "t").chmod(0)
    with pytest.raises(CheckpointError, match="cannot be opened: Permission denied"):
        open_table(tmp_path / "t")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="Permission denied; nothing there was changed, choose a place"):
            write_small(tmp_path / "t")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("shards", [1, 2])
def test_no_permission_as_the_system_would_say_it(tmp_path, monkeypatch, shards):
    """For root, whom no permission stops."""
    write_small(tmp_path / "t")
    real = os.open

    def denied(path, *given, **options):
        if ".part" in str(path) or str(path).endswith("/t"):
            raise PermissionError(13, "Permission denied")
        return real(path, *given, **options)

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(CheckpointError, match="cannot be opened: Permission denied"):
        open_table(tmp_path / "t")
    with pytest.raises(CheckpointError, match="Permission denied; nothing there was changed, choose a place"):
        write_small(tmp_path / "t", shards)


def test_a_read_error_is_said(tmp_path, monkeypatch):
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    write_small(tmp_path / "t")
    with open_table(tmp_path / "t") as table:
        monkeypatch.setattr(os, "preadv", broken)
        for read in (lambda: table.read_rows(0, 1), table.verify, lambda: table.verify_rows(0, 1), table.extras):
            with pytest.raises(CheckpointError, match="t: cannot be read: Input/output error; check the disk"):
                read()
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error"):
        open_table(tmp_path / "t")


@pytest.mark.parametrize("first_folder", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_second_writer_is_refused_while_the_first_lives(tmp_path, shards, first_folder):
    rows_NB = make_rows(10)
    claim = table_place.Claim(tmp_path / "t", folder=first_folder)
    with pytest.raises(CheckpointError, match="t: another process is writing it; wait until that one ends"):
        write_table(tmp_path / "t", CODEC, 10, {}, [rows_NB], shards=shards)
    claim.discard()
    write_table(tmp_path / "t", CODEC, 10, {}, [rows_NB], shards=shards)
    assert os.listdir(tmp_path) == ["t"]


def test_the_first_of_two_writers_wins_whole(tmp_path):
    with TableWriter(tmp_path / "t", CODEC, 10, {}) as first:
        first.write(make_rows(4))
        with pytest.raises(CheckpointError, match="another process"):
            create_zero_table(tmp_path / "t", CODEC, 10, {})
        first.write(make_rows(6, seed=1))
    expected = np.concatenate([make_rows(4), make_rows(6, seed=1)])
    assert np.array_equal(open_table(tmp_path / "t").read_rows(0, 10), expected)


def test_a_part_renamed_away_before_it_was_locked_is_left_alone(tmp_path, monkeypatch):
    """Between opening the part and locking it, its writer may finish: then it is the table."""
    place, real = tmp_path / "t", table_place.fcntl.flock
    first = TableWriter(place, CODEC, 10, {}).__enter__()
    first.write(make_rows(10))

    def lock(descriptor, how):
        monkeypatch.setattr(table_place.fcntl, "flock", real)
        first.__exit__(None, None, None)
        real(descriptor, how)

    monkeypatch.setattr(table_place.fcntl, "flock", lock)
    second = TableWriter(place, CODEC, 10, {})
    with pytest.raises(CheckpointError, match="only 0 of 10 rows"), second:
        assert np.array_equal(open_table(place).read_rows(0, 10), make_rows(10))
    assert np.array_equal(open_table(place).read_rows(0, 10), make_rows(10))


def test_what_a_crash_between_two_renames_left_is_found_and_replaced(tmp_path, monkeypatch):
    old_NB = write_small(tmp_path / "t", shards=2)
    os.rename(tmp_path / "t", table_place.old_place(tmp_path / "t"))
    assert np.array_equal(open_table(tmp_path / "t").read_rows(0, 301), old_NB)
    new_NB = write_small(tmp_path / "t", shards=3, seed=1)
    assert np.array_equal(open_table(tmp_path / "t").read_rows(0, 301), new_NB)
    assert os.listdir(tmp_path) == ["t"]


@pytest.mark.parametrize("left", ["file", "folder"])
@pytest.mark.parametrize("shards", [1, 2])
def test_what_a_killed_writer_left_is_taken_over(tmp_path, left, shards):
    part = tmp_path / ".t.part"
    if left == "file":
        part.write_bytes(b"x" * 10_000_000)
    else:
        (part / "deeper").mkdir(parents=True)
        (part / "table-00001-of-00002.safetensors").write_bytes(b"x")
    write_small(tmp_path / "t", shards)
    open_table(tmp_path / "t").verify()
    assert os.listdir(tmp_path) == ["t"]


def test_a_link_laid_out_as_a_part_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".t.part").symlink_to(tmp_path / "precious")
    for shards in (1, 2):
        with pytest.raises(CheckpointError, match="cannot be written"):
            write_small(tmp_path / "t", shards)
    assert (tmp_path / "precious").read_text() == "mine"


WRITER = """
import sys, numpy as np
from nengram.store.codecs import make_codec
from nengram.store.table_file import write_table
path, shards = sys.argv[1], int(sys.argv[2])
codec = make_codec("fp8", 40)
for turn in range(1, 10_000):
    rows_NB = np.full((20_000, codec.row_bytes), turn % 255 + 1, np.uint8)
    write_table(path, codec, 200_000, {"turn": str(turn)}, (rows_NB for _ in range(10)), shards=shards)
    print(turn, flush=True)
"""


def kill_writers(folder: Path, shards: int, kills: int, seed: int) -> int:
    """Kill writers of an 8 MB table at random moments; after each the table must be whole. How many died in the middle."""
    place, rng, in_the_middle = folder / "t", random.Random(seed), 0
    for _ in range(kills):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, place, str(shards)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        writer.stdout.readline()  # the first table stands
        time.sleep(rng.uniform(0, 0.15))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        in_the_middle += (folder / ".t.part").exists()
        with open_table(place) as table:
            table.verify()
            expected = int(table.metadata["turn"]) % 255 + 1
            assert all((block == expected).all() for block in table.blocks())
        assert set(os.listdir(folder)) <= {"t", ".t.part"}
    write_small(place, shards)
    assert os.listdir(folder) == ["t"]
    return in_the_middle


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 3])
def test_no_kill_leaves_half_a_table(tmp_path, shards):
    assert kill_writers(tmp_path, shards, kills=25, seed=shards) > 5


def test_a_file_of_another_kind_is_refused_by_name(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3, 4)}, tmp_path / "t")
    assert "not a table file: its format is" in refusal(tmp_path / "t")
    (tmp_path / "t").write_text("hello, I am a text file")
    assert "not a whole safetensors file" in refusal(tmp_path / "t")
    with pytest.raises(CheckpointError, match="no such file"):
        TableFile.open(tmp_path / "nothing")


def test_a_header_cannot_outgrow_what_is_read_again(monkeypatch):
    monkeypatch.setattr("nengram.store.table_layout.MAX_HEADER_BYTES", 10_000)
    with pytest.raises(StoreError, match="beyond the 10,000 that safetensors allows"):
        plan_layout(CODEC, 10, {"a": "x" * 10_000})
