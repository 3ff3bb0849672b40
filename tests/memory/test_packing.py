"""Tables are packed, cut and made without loss, and what a file says of itself is what it is."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nengram.address import AddressSpec
from nengram.errors import AddressError, CheckpointError, StoreError
from nengram.memory import load_table, open_store, order_labels, save_table
from nengram.memory.packing import codec_named, create, pack, slice_table
from nengram.memory.stat import stat, verify
from nengram.memory.table import open_rows, table_metadata
from nengram.store import ResidentStore, SparseAdam
from nengram.store.codecs import CODECS, make_codec
from nengram.store.table_file import write_table

WIDTH = 48
OLD_WITH_STATE = Path(__file__).parent / "fixtures" / "table-format-1-optimizer.safetensors"
SPEC = AddressSpec.engram(
    compressed_vocab_size=50, rows_per_head=[400, 900], heads=3, layer_ids=[1, 4], pad_cid=0, block_indices=[1, 4]
)
ROWS = SPEC.num_rows(4)


@pytest.fixture
def table(tmp_path):
    """A trained fp32 table, a third of it zeros, with optimiser state."""
    store = ResidentStore(ROWS, WIDTH, init_std=0)
    rows_U = torch.arange(0, ROWS, 3)
    torch.manual_seed(0)
    store.update(rows_U, torch.randn(len(rows_U), WIDTH), SparseAdam(), 0.1)
    save_table(tmp_path / "table.safetensors", store, SPEC, 4, optimizer=True)
    return tmp_path / "table.safetensors"


def bytes_of(path):
    with open_rows(path, whole=False) as table:
        return table.read_rows(0, table.num_rows)


def test_the_same_codec_is_a_copy_of_bytes(table, tmp_path):
    assert pack(table, tmp_path / "copy").name == "fp32"
    np.testing.assert_array_equal(bytes_of(tmp_path / "copy"), bytes_of(table))
    assert stat(tmp_path / "copy").extras == () != stat(table).extras


@pytest.mark.parametrize("name", CODECS)
def test_another_codec_holds_what_it_makes_of_the_vectors(table, tmp_path, name):
    codec = pack(table, tmp_path / "packed", codec=name, shards=3)
    weight = load_table(table).store.weight
    np.testing.assert_array_equal(bytes_of(tmp_path / "packed"), codec.encode(weight).numpy())
    found = verify(tmp_path / "packed", expect_spec=SPEC)
    assert (found.codec["name"], found.files, found.num_rows) == (name, 3, ROWS)
    if name == "fp8_tensor":
        assert codec.scale == pytest.approx(float(weight.abs().max()) / 448)


def test_a_table_of_the_first_format_becomes_a_new_one(tmp_path):
    pack(OLD_WITH_STATE, tmp_path / "new", codec="bf16")
    assert stat(OLD_WITH_STATE).format == "nengram-table-1"
    assert stat(tmp_path / "new").format == "nengram-table-2"
    verify(OLD_WITH_STATE)
    expected = load_table(OLD_WITH_STATE).store.weight.to(torch.bfloat16)
    assert torch.equal(load_table(tmp_path / "new").store.weight, expected)


def test_damage_is_not_sealed_anew(table, tmp_path):
    damaged = bytearray(table.read_bytes())
    damaged[8192] ^= 1
    table.write_bytes(damaged)
    for work in (
        lambda: pack(table, tmp_path / "packed", codec="fp8"),
        lambda: pack(table, tmp_path / "packed"),
        lambda: slice_table(table, tmp_path / "packed", rows=(0, 100)),
    ):
        with pytest.raises(CheckpointError, match="table.safetensors: damaged"):
            work()
    assert [path.name for path in tmp_path.iterdir()] == ["table.safetensors"]


def test_numbers_a_codec_cannot_hold_are_refused_with_the_rows(tmp_path):
    weight = torch.zeros(ROWS, WIDTH)
    weight[5, 7] = torch.inf
    metadata = table_metadata(SPEC, 4)
    write_table(tmp_path / "t", make_codec("fp32", WIDTH), ROWS, metadata, [weight.view(torch.uint8).numpy()])
    with pytest.raises(StoreError, match="t: rows from 0 on: row 5 holds inf at place 7"):
        pack(tmp_path / "t", tmp_path / "out", codec="int8")
    assert not (tmp_path / "out").exists()


def test_a_slice_says_what_it_is(table, tmp_path):
    labels = order_labels(SPEC, 4)
    assert [name for name, _, _ in labels] == ["2-gram", "3-gram"]
    assert slice_table(table, tmp_path / "order", order=3) == labels[1][1:]
    assert slice_table(table, tmp_path / "rows", rows=(7, 12)) == (7, 12)
    np.testing.assert_array_equal(bytes_of(tmp_path / "rows"), bytes_of(table)[7:12])
    np.testing.assert_array_equal(bytes_of(tmp_path / "order"), bytes_of(table)[labels[1][1] :])
    found = verify(tmp_path / "rows", expect_spec=SPEC)
    assert (found.is_part, found.first_row, found.num_rows, found.table_rows) == (True, 7, 5, ROWS)
    for read in (load_table, open_store, lambda path: pack(path, tmp_path / "x")):
        with pytest.raises(CheckpointError, match="rows 7 to 11 of a table of"):
            read(tmp_path / "rows")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "give one of them"),
        ({"rows": (0, 1), "order": 2}, "give one of them"),
        ({"order": 4}, "the n-gram orders 2 to 3, not 4"),
        ({"order": 1}, "the n-gram orders 2 to 3, not 1"),
        ({"rows": (5, 5)}, r"rows 5 to 5 \(not included\) are no part"),
        ({"rows": (-1, 5)}, "no part of a table"),
        ({"rows": (0, ROWS + 1)}, "no part of a table"),
    ],
    ids=str,
)
def test_a_slice_that_is_none_is_refused(table, tmp_path, arguments, words):
    with pytest.raises(StoreError, match=words):
        slice_table(table, tmp_path / "slice", **arguments)
    assert not (tmp_path / "slice").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"codec": "fp9"}, r'unknown codec "fp9" \(did you mean "fp8"\?\)'),
        ({"codec": "fp8", "scale": 0.5}, "a scale belongs to codec fp8_tensor, not to fp8"),
        ({"codec": "fp8_tensor", "scale": 0.0}, "scale of fp8_tensor must be above 0"),
        ({"shards": 0}, "shards"),
        ({"shards": ROWS + 1}, "shards"),
    ],
    ids=str,
)
def test_a_wrong_option_of_pack_is_one_line(table, tmp_path, arguments, words):
    with pytest.raises(StoreError, match=words) as caught:
        pack(table, tmp_path / "packed", **arguments)
    assert "\n" not in str(caught.value) and not (tmp_path / "packed").exists()


def test_a_table_is_not_written_over_itself(table):
    for work in (lambda: pack(table, table, codec="fp8"), lambda: slice_table(table, table, order=2)):
        with pytest.raises(CheckpointError, match="is the table that is read"):
            work()
    verify(table)


def test_a_terabyte_of_zeros_takes_no_space_and_is_whole(tmp_path):
    spec = AddressSpec.deepseek_v41()
    create(tmp_path / "table", spec, 14, codec_named("fp32", 720))
    found = verify(tmp_path / "table", expect_spec=spec)
    assert found.table_bytes == 384_016_682 * 4 * 720 > 1e12
    assert found.written_bytes == 0
    assert (tmp_path / "table").stat().st_blocks * 512 < 100e6
    with open_rows(tmp_path / "table") as table:
        assert not table.read_rows(384_016_000, 682).any()


def test_stat_counts_what_was_written(table, tmp_path):
    found = stat(table)
    assert (found.addresses, found.layer_id, found.block_index) == (SPEC.word_code, 4, 4)
    assert found.codec == {"name": "fp32", "row_width": WIDTH, "row_bytes": 4 * WIDTH}
    assert found.orders == tuple(order_labels(SPEC, 4))
    assert 0 < found.written_bytes <= found.table_bytes == ROWS * 4 * WIDTH
    assert json.loads(json.dumps(found.to_dict()))["extras"][0] == "step"


def forged(tmp_path, spec, rows):
    path = tmp_path / "forged"
    write_table(path, make_codec("fp32", 3), rows, table_metadata(spec, 4), [np.zeros((rows, 12), np.uint8)])
    return path


def with_moduli(moduli, num_rows=None):
    layer = SPEC.layers[1]
    num_rows = num_rows or sum(map(sum, moduli))
    return dataclasses.replace(
        SPEC, layers=(SPEC.layers[0], dataclasses.replace(layer, moduli=moduli, num_rows=num_rows))
    )


def test_row_counts_are_derived_again(tmp_path):
    good = SPEC.layers[1].moduli
    other = (good[0], (*good[1][:2], good[1][2] + 2))
    for spec, words in (
        (with_moduli(other), rf"layer 4, order 3, head 2 has {other[1][2]} rows, dialect engram makes it {good[1][2]}"),
        (with_moduli((good[0], (*good[1][:2], 1000))), "it is not even prime"),
        (with_moduli(good, sum(map(sum, good)) + 9), "would not pad by 9"),
    ):
        path = forged(tmp_path, spec, spec.num_rows(4))
        stat(path)
        with pytest.raises(CheckpointError, match=words) as caught:
            verify(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path = forged(tmp_path, SPEC, ROWS - 1)
    for read in (stat, verify, load_table):
        with pytest.raises(CheckpointError, match=rf"addresses {ROWS:,} rows, the table has {ROWS - 1:,}"):
            read(path)


def test_verify_refuses_other_addresses(table):
    other = AddressSpec.engram(compressed_vocab_size=50, rows_per_head=[400, 900], heads=3, layer_ids=[1, 4], pad_cid=1)
    with pytest.raises(CheckpointError, match=f"{SPEC.word_code}, this model's are {other.word_code}"):
        verify(table, expect_spec=other)


def test_padding_of_the_qwen_dialect_passes_and_too_much_does_not(tmp_path):
    spec = AddressSpec.qwen_ple(
        vocab_size=300, eos_id=7, ple_layer_ids=[2, 5], rows_per_head=100, heads=2, divisible_by=60
    )
    create(tmp_path / "good", spec, 1, make_codec("bf16", 8))
    assert verify(tmp_path / "good").padding_rows == spec.num_rows(1) - spec.moduli(1).sum()
    layers = tuple(
        dataclasses.replace(layer, num_rows=layer.num_rows + 60 * place) for place, layer in enumerate(spec.layers)
    )
    worse = dataclasses.replace(spec, layers=layers)
    create(tmp_path / "bad", worse, 1, make_codec("bf16", 8))
    with pytest.raises(CheckpointError, match="would not pad by"):
        verify(tmp_path / "bad")


def test_create_refuses_a_layer_there_is_not(tmp_path):
    with pytest.raises(AddressError, match="no memory layer has layer_id 2"):
        create(tmp_path / "table", SPEC, 2, make_codec("fp32", 4))


def test_progress_ends_at_the_whole(table, tmp_path):
    for work in (
        lambda report: pack(table, tmp_path / "a", codec="int4", shards=2, progress=report),
        lambda report: slice_table(table, tmp_path / "b", order=2, progress=report),
        lambda report: verify(table, progress=report),
    ):
        seen = []
        work(lambda done, total, seen=seen: seen.append((done, total)))
        assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] > 0
