"""The table file: the same bytes back from any cut, plain safetensors to everyone else, sparse where it is zero."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from nengram.errors import CheckpointError, StoreError
from nengram.store.codecs import CODECS, make_codec
from nengram.store.safetensors_header import read_header
from nengram.store.table_chunks import data_extents
from nengram.store.table_file import TableFile, TableWriter, create_zero_table, open_table, write_table
from nengram.store.table_index import read_index
from nengram.store.table_layout import ALIGNMENT, PAGE, plan_layout

FP8 = make_codec("fp8", 40)  # 42 bytes a row: rows cross chunks
TEBIBYTE_ROWS = 2**40 // FP8.row_bytes
METADATA = {"address_spec": '{"orders": [2, 3], "é": "\\n"}', "layer_id": "4"}


def make_rows(count: int, codec=FP8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, codec.row_bytes), dtype=np.uint8)


def cut(rows_NB: np.ndarray, *sizes: int) -> list[np.ndarray]:
    return np.split(rows_NB, np.cumsum(sizes))


def codec_of(name: str, row_width: int = 40):
    return make_codec(name, row_width, **({"scale": 0.5} if name == "fp8_tensor" else {}))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", CODECS)
def test_rows_come_back_under_every_codec(tmp_path, name, shards):
    codec = codec_of(name)
    rows_NB = make_rows(301, codec)
    digest = write_table(tmp_path / "t", codec, 301, METADATA, cut(rows_NB, 100, 0, 1), shards=shards, chunk_bytes=PAGE)
    with open_table(tmp_path / "t") as table:
        assert (table.codec, table.num_rows, table.table_rows, table.first_row) == (codec, 301, 301, 0)
        assert (table.metadata, table.digest, len(table.files)) == (METADATA, digest, shards)
        assert np.array_equal(table.read_rows(0, 301), rows_NB)
        assert np.array_equal(np.concatenate(list(table.blocks(1000))), rows_NB)
        table.verify()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", CODECS)
def test_the_library_reads_it(tmp_path, name, shards):
    codec = codec_of(name)
    rows_NB = make_rows(99, codec)
    extras = {"step": torch.tensor(7), "state.rowwise_adagrad.sum_sq": torch.rand(99)}
    write_table(tmp_path / "t", codec, 99, METADATA, [rows_NB], shards=shards, extras=extras)
    with open_table(tmp_path / "t") as table:
        for file in table.files:
            mine = rows_NB[file.first_row : file.first_row + file.num_rows]
            with safe_open(file.path, framework="pt") as theirs:
                assert METADATA.items() <= theirs.metadata().items()
                assert (
                    theirs.get_slice("weight")[5:9].contiguous().view(torch.uint8).numpy().tobytes()
                    == mine[5:9].tobytes()
                )
            tensors = load_file(file.path)
            assert tensors["weight"].view(torch.uint8).numpy().tobytes() == mine.tobytes()
            assert tensors["step"] == 7
        for key, tensor in table.extras().items():
            assert torch.equal(tensor, extras[key]), key


def test_every_tensor_lies_where_the_format_says(tmp_path):
    extras = {
        "step": torch.tensor(3),
        "odd": torch.arange(5, dtype=torch.uint8),
        "half": torch.ones(3, 2).bfloat16(),
        "none": torch.zeros(0, 4),
    }
    write_table(tmp_path / "t", FP8, 333, {}, [make_rows(333)], extras=extras)
    header = read_header(tmp_path / "t")
    assert header.data_begin % PAGE == 0
    assert [name for name in header.tensors if not name.startswith("padding.")] == [
        "weight",
        *extras,
        "chunk_sha256",
        "seal",
    ]
    assert header.tensors["weight"].begin == header.data_begin
    for name in ("weight", *extras, "chunk_sha256"):
        assert header.tensors[name].begin % ALIGNMENT == 0, name
    with open_table(tmp_path / "t") as table:
        for key, tensor in table.extras().items():
            assert torch.equal(tensor, extras[key]) and tensor.dtype == extras[key].dtype


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_file_does_not_depend_on_how_its_rows_came(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    count = data.draw(st.integers(1, 400))
    rows_NB = make_rows(count)
    for _ in range(data.draw(st.integers(0, 3))):
        first = data.draw(st.integers(0, count - 1))
        rows_NB[first : first + data.draw(st.integers(1, 300))] = 0
    write_table(folder / "whole", FP8, count, METADATA, [rows_NB], chunk_bytes=PAGE)
    borders = sorted(data.draw(st.lists(st.integers(0, count), max_size=6)))
    with TableWriter(folder / "cut", FP8, count, METADATA, chunk_bytes=PAGE) as writer:
        for block in np.split(rows_NB, borders):
            if block.any():
                writer.write(block)
            else:
                writer.write_zeros(len(block))
    assert (folder / "cut").read_bytes() == (folder / "whole").read_bytes()
    assert writer.seal == open_table(folder / "cut").digest
    assert_checksums_are_plain_sha256(folder / "whole")


def assert_checksums_are_plain_sha256(path: Path) -> None:
    """By the words of the format, on the bytes of the whole file."""
    whole, header = path.read_bytes(), read_header(path)
    digests, seal = header.tensors["chunk_sha256"], header.tensors["seal"]
    chunk_bytes = int(header.metadata["chunk_bytes"])
    expected = b""
    for begin in range(header.data_begin, digests.begin, chunk_bytes):
        chunk = whole[begin : min(begin + chunk_bytes, digests.begin)]
        expected += hashlib.sha256(chunk).digest() if any(chunk) else bytes(32)
    assert whole[digests.begin : digests.end] == expected
    assert whole[seal.begin :] == hashlib.sha256(whole[: header.data_begin] + expected).digest()


def test_the_caller_may_use_its_block_again_at_once(tmp_path):
    rows_NB = make_rows(5000)
    block = np.empty((100, FP8.row_bytes), np.uint8)
    with TableWriter(tmp_path / "t", FP8, 5000, {}) as writer:
        for first in range(0, 5000, 100):
            block[:] = rows_NB[first : first + 100]
            writer.write(block)
            block[:] = 0
    assert np.array_equal(open_table(tmp_path / "t").read_rows(0, 5000), rows_NB)


@given(first=st.integers(0, 301), count=st.integers(0, 301))
@settings(max_examples=50)
def test_any_range_reads_across_shards(sharded, first, count):
    rows_NB, table = sharded
    if first + count > 301:
        with pytest.raises(StoreError, match="outside a table of 301 rows"):
            table.read_rows(first, count)
        with pytest.raises(StoreError, match="outside a table of 301 rows"):
            table.verify_rows(first, count)
    else:
        assert np.array_equal(table.read_rows(first, count), rows_NB[first : first + count])
        table.verify_rows(first, count)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    rows_NB = make_rows(301)
    folder = tmp_path_factory.mktemp("sharded") / "t"
    write_table(folder, FP8, 301, METADATA, [rows_NB], shards=7, chunk_bytes=PAGE)
    with open_table(folder) as table:
        yield rows_NB, table


def test_rows_outside_are_refused_before_anything_is_read(sharded, monkeypatch):
    _, table = sharded
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("read"))
    for first, count in ((-1, 1), (301, 1), (0, 302), (5, -1), (-3, 2)):
        with pytest.raises(StoreError):
            table.read_rows(first, count)
        with pytest.raises(StoreError):
            table.files[0].read_rows(first, count)


def test_a_slice_opens_as_a_file_and_not_as_a_table(tmp_path):
    rows_NB = make_rows(50)
    with TableWriter(tmp_path / "t", FP8, 1000, METADATA, first_row=200, num_rows=50) as writer:
        writer.write(rows_NB)
    with TableFile.open(tmp_path / "t") as file:
        assert (file.first_row, file.num_rows, file.table_rows) == (200, 50, 1000)
        assert np.array_equal(file.read_rows(3, 4), rows_NB[3:7])
    with pytest.raises(CheckpointError, match="holds rows 200 to 249 of a table of 1,000"):
        open_table(tmp_path / "t")
    with open_table(tmp_path / "t", whole=False) as part:
        assert (part.first_row, part.num_rows) == (200, 50)
        assert np.array_equal(part.read_rows(3, 4), rows_NB[3:7])


@pytest.fixture
def terabyte(tmp_path):
    create_zero_table(tmp_path / "t", FP8, TEBIBYTE_ROWS, METADATA)
    if os.stat(tmp_path / "t").st_blocks * 512 > 2**24:
        pytest.skip("this file system has no sparse files")
    return tmp_path / "t"


def test_a_terabyte_of_zeros_is_a_few_blocks_and_verifies(terabyte):
    with open_table(terabyte) as table:
        assert terabyte.stat().st_size > TEBIBYTE_ROWS * FP8.row_bytes > 0.99 * 2**40
        assert terabyte.stat().st_blocks * 512 <= 2**16
        assert table.written_bytes() == 0
        assert not table.read_rows(TEBIBYTE_ROWS - 9, 9).any()
        table.verify()
    with safe_open(terabyte, framework="np") as theirs:
        assert theirs.get_slice("weight").get_shape() == [TEBIBYTE_ROWS, FP8.row_bytes]


def test_room_for_optimiser_state_is_a_hole_too(tmp_path):
    extras = {
        "step": torch.tensor(5),
        "state.sparse_adam.exp_avg": torch.empty(TEBIBYTE_ROWS // 99, 40, device="meta"),
    }
    create_zero_table(tmp_path / "t", FP8, TEBIBYTE_ROWS // 99, {}, extras=extras)
    assert (tmp_path / "t").stat().st_size > 5 * (tmp_path / "t").stat().st_blocks * 512
    with TableFile.open(tmp_path / "t") as file:
        assert file.extra_entries["state.sparse_adam.exp_avg"].shape == (TEBIBYTE_ROWS // 99, 40)
        file.verify()


def test_a_byte_in_a_hole_is_found(terabyte):
    with open_table(terabyte) as table:
        with open(terabyte, "r+b") as file:
            file.seek(table.files[0].rows_offset + 10**12)
            file.write(b"\1")
        with pytest.raises(
            CheckpointError, match=f"chunk {10**12 // 2**20}, rows {10**12 // 2**20 * 2**20 // 42:,} to"
        ):
            table.verify()


def test_zero_chunks_stay_holes_and_what_was_written_is_counted(tmp_path):
    rows_NB = np.zeros((10 * PAGE, 64), np.uint8)
    rows_NB[100 * 64 : 101 * 64] = 1  # the 100th page
    codec = make_codec("int8", 62)
    write_table(tmp_path / "t", codec, len(rows_NB), {}, [rows_NB], chunk_bytes=PAGE)
    with open_table(tmp_path / "t") as table:
        file = table.files[0]
        extents = list(data_extents(file.fd, file.rows_offset, file.layout.rows_end))
        if len(extents) == 1 and extents[0][1] - extents[0][0] > 64 * PAGE:
            pytest.skip("this file system has no holes of a page")
        assert extents == [(file.rows_offset + 100 * PAGE, file.rows_offset + 101 * PAGE)]
        assert table.written_bytes() == PAGE
        table.verify()


def test_a_copy_without_holes_is_as_good(tmp_path):
    rows_NB = np.concatenate([np.zeros((3000, FP8.row_bytes), np.uint8), make_rows(500)])
    write_table(tmp_path / "t", FP8, 3500, {}, [rows_NB], chunk_bytes=PAGE)
    (tmp_path / "dense").write_bytes((tmp_path / "t").read_bytes())
    with open_table(tmp_path / "dense") as dense, open_table(tmp_path / "t") as table:
        dense.verify()
        assert dense.written_bytes() == table.written_bytes() <= 500 * FP8.row_bytes + 2 * PAGE
        assert dense.digest == table.digest


def test_without_a_way_to_ask_for_holes_everything_is_read(tmp_path, monkeypatch):
    rows_NB = np.concatenate([np.zeros((3000, FP8.row_bytes), np.uint8), make_rows(500)])
    write_table(tmp_path / "t", FP8, 3500, {}, [rows_NB], chunk_bytes=PAGE)
    with open_table(tmp_path / "t") as table:
        written = table.written_bytes()
        monkeypatch.setattr("nengram.store.table_chunks.SEEK_DATA", None)
        monkeypatch.setattr("nengram.store.table_chunks.SEEK_HOLE", None)
        table.verify()
        assert table.written_bytes() == written


def test_progress_runs_to_the_end(tmp_path):
    seen: list[tuple[int, int]] = []
    blocks = cut(make_rows(3000), 1000, 1000)
    write_table(tmp_path / "t", FP8, 3000, {}, blocks, shards=2, chunk_bytes=PAGE, progress=lambda *at: seen.append(at))
    assert seen[-1] == (3000 * 42, 3000 * 42) and seen == sorted(seen)
    seen.clear()
    open_table(tmp_path / "t").verify(lambda *at: seen.append(at))
    assert seen[-1][0] == seen[-1][1] >= 3000 * 42 and seen == sorted(seen)


def test_any_chunk_size_streams_through_small_buffers(tmp_path):
    rows_NB = make_rows(60_000)  # 2.4 MiB
    for chunk_bytes in (PAGE, 3 * PAGE, 2**21, 2**30):
        write_table(tmp_path / "t", FP8, 60_000, {}, [rows_NB], chunk_bytes=chunk_bytes)
        with open_table(tmp_path / "t") as table:
            table.verify()
            assert table.files[0].chunk_bytes == chunk_bytes


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"table_rows": 0}, "no part of a table"),
        ({"first_row": -1}, "no part of a table"),
        ({"first_row": 5, "num_rows": 6}, "no part of a table"),
        ({"num_rows": 0}, "no part of a table"),
        ({"table_rows": 2**62}, "more than a file can hold"),
        ({"chunk_bytes": 1000}, "not a multiple of 4096"),
        ({"chunk_bytes": 2**31}, "from 4,096 to 1,073,741,824"),
        ({"metadata": {"codec": "x"}}, "written by the table file itself"),
        ({"metadata": {"a": 1}}, "metadata are strings"),
        ({"metadata": {"a": "\ud800"}}, "UTF-8"),
        ({"extras": {"seal": torch.zeros(1)}}, 'cannot be called "seal"'),
        ({"extras": {"padding.7": torch.zeros(1)}}, "cannot be called"),
        ({"extras": {"a": torch.zeros(1, dtype=torch.complex64)}}, "complex64, which a table file does not hold"),
    ],
)
def test_what_fits_no_table_is_refused_before_a_file_is_touched(tmp_path, options, reason):
    given = {"table_rows": 10, "metadata": {}} | options
    with pytest.raises(StoreError, match=reason):
        plan_layout(FP8, **given)
    with pytest.raises(StoreError, match=reason):
        TableWriter(tmp_path / "t", FP8, **given)
    assert not list(tmp_path.iterdir())


def test_too_few_or_too_many_or_wrong_rows_leave_nothing(tmp_path):
    for shards in (1, 2):
        for count, error, reason in (
            (9, CheckpointError, "only"),
            (11, StoreError, "more rows came than|rows for a file"),
        ):
            with pytest.raises(error, match=reason):
                write_table(tmp_path / "t", FP8, 10, {}, [make_rows(count)], shards=shards)
        with pytest.raises(StoreError, match=r"rows are uint8 \[n, 42\]"):
            write_table(tmp_path / "t", FP8, 10, {}, [make_rows(10)[:, :41]], shards=shards)
        with pytest.raises(ZeroDivisionError):
            write_table(tmp_path / "t", FP8, 10, {}, (make_rows(1 // place) for place in (1, 0)), shards=shards)
    assert not list(tmp_path.iterdir())


def test_a_table_that_is_replaced_goes_on_being_read(tmp_path):
    old_NB, new_NB = make_rows(100), make_rows(100, seed=1)
    write_table(tmp_path / "t", FP8, 100, {}, [old_NB])
    with open_table(tmp_path / "t") as table:
        write_table(tmp_path / "t", FP8, 100, {}, [new_NB])
        assert np.array_equal(table.read_rows(0, 100), old_NB)
        table.verify()
    assert np.array_equal(open_table(tmp_path / "t").read_rows(0, 100), new_NB)


def test_a_file_and_a_folder_replace_each_other(tmp_path):
    place, rows_NB = tmp_path / "t", make_rows(100)
    for shards in (1, 3, 2, 1, 4):
        write_table(place, FP8, 100, {}, [rows_NB], shards=shards)
        with open_table(place) as table:
            assert len(table.files) == shards
            assert np.array_equal(table.read_rows(0, 100), rows_NB)
        assert os.listdir(tmp_path) == ["t"]


def test_a_folder_is_swapped_where_the_system_cannot_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr("nengram.store.table_place.exchange", lambda one, other: False)
    test_a_file_and_a_folder_replace_each_other(tmp_path)


def test_a_folder_of_other_things_is_not_replaced(tmp_path):
    folder = tmp_path / "t"
    write_table(folder, FP8, 100, {}, [make_rows(100)], shards=2)
    (folder / "notes.txt").write_text("mine")
    for shards in (1, 2):
        with pytest.raises(CheckpointError, match=r"holds something else \(notes.txt\)"):
            write_table(folder, FP8, 100, {}, [make_rows(100)], shards=shards)
    (folder / "index.json").unlink()
    (folder / "notes.txt").unlink()
    with pytest.raises(CheckpointError, match="holds something else"):
        create_zero_table(folder, FP8, 100, {})
    shutil.rmtree(folder)
    folder.mkdir()
    create_zero_table(folder, FP8, 100, {})
    assert os.listdir(tmp_path) == ["t"]


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_table(tmp_path / "t", FP8, 10, {}, [make_rows(10)])
    finally:
        os.umask(before)
    assert (tmp_path / "t").stat().st_mode & 0o777 == 0o640


FORMAT_DOC = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")


def test_the_reader_in_the_specification_reads_it(tmp_path):
    """Thirty lines with the standard library alone; it refuses what is damaged, too."""
    code = re.search(r"```python\n(.*?)```", FORMAT_DOC, re.DOTALL)[1]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 30
    assert set(re.findall(r"^(?:import|from) .*", code, re.MULTILINE)) == {"import hashlib, json, struct"}
    reader: dict = {}
    exec(compile(code, "format.md", "exec"), reader)
    rows_NB = np.concatenate([make_rows(250), np.zeros((300, FP8.row_bytes), np.uint8), make_rows(5)])
    write_table(tmp_path / "t", FP8, 555, METADATA, [rows_NB], extras={"step": torch.tensor(1)}, chunk_bytes=PAGE)
    row, metadata = reader["open_table"](tmp_path / "t")
    assert all(row(number) == rows_NB[number].tobytes() for number in range(555))
    assert METADATA.items() <= metadata.items()
    for number in (-1, 555):
        with pytest.raises(AssertionError):
            row(number)
    for place in (9, 3000, 5000, PAGE + 42 * 300, -100, -1):
        damaged = bytearray((tmp_path / "t").read_bytes())
        damaged[place] ^= 4
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises((AssertionError, ValueError, KeyError)):
            reader["open_table"](tmp_path / "damaged")


def test_the_example_header_of_the_specification_is_one(tmp_path):
    """The header that the document shows is what the writer makes, but for the padding."""
    shown = json.loads(re.search(r"```json\n(\{\s*\"__metadata__.*?)```", FORMAT_DOC, re.DOTALL)[1])
    own = shown["__metadata__"]
    codec = make_codec("fp8", 256)
    extras = {"step": torch.tensor(0)}
    _, header = plan_layout(codec, int(own["table_rows"]), {"layer_id": own["layer_id"]}, extras=extras)
    assert json.loads(header[8:]) == shown


def test_the_example_index_of_the_specification_is_one(tmp_path):
    shown = json.loads(re.search(r"```json\n(\{\s*\"format.*?)```", FORMAT_DOC, re.DOTALL)[1])
    (tmp_path / "index.json").write_text(json.dumps(shown))
    assert read_index(tmp_path).digest == shown["digest"]


def test_descriptors_are_given_back(tmp_path):
    count = len(os.listdir("/dev/fd"))
    write_table(tmp_path / "t", FP8, 100, {}, [make_rows(100)], shards=3)
    with open_table(tmp_path / "t") as table:
        table.verify()
    table.close()
    (tmp_path / "t" / "index.json").write_text("{}")
    with pytest.raises(CheckpointError):
        open_table(tmp_path / "t")
    assert len(os.listdir("/dev/fd")) == count
