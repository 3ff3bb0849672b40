"""A table file: the same bytes back, the optimiser too, and a clear refusal of anything else."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nengram.address import AddressSpec
from nengram.config import TABLE_TIERS
from nengram.errors import CheckpointError, StoreError
from nengram.memory import hot_name, load_table, open_store, order_labels, save_table
from nengram.memory.packing import pack
from nengram.memory.table import open_rows
from nengram.store import HotSet, ResidentStore, SparseAdam, make_codec, write_table

FIXTURES = Path(__file__).parent / "fixtures"


def make_spec(seed: int = 0) -> AddressSpec:
    return AddressSpec.engram(
        compressed_vocab_size=50, rows_per_head=[11, 13], heads=2, layer_ids=[1, 4], pad_cid=0, seed=seed
    )


SPEC = make_spec()


def trained_store(dtype=torch.float32) -> ResidentStore:
    store = ResidentStore(SPEC.num_rows(4), 3, dtype=dtype)
    for step in range(3):
        store.update(torch.tensor([step, 9]), torch.randn(2, 3), SparseAdam(), 0.1)
    return store


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", [False, True])
def test_what_was_saved_comes_back(tmp_path, dtype, optimizer):
    store = trained_store(dtype)
    save_table(tmp_path / "table", store, SPEC, 4, optimizer=optimizer)
    table = load_table(tmp_path / "table", SPEC)
    assert (table.spec, table.layer_id) == (SPEC, 4)
    expected = store.tensors() if optimizer else {"weight": store.weight, "step": torch.tensor(0)}
    assert table.store.tensors().keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(table.store.tensors()[key], tensor), key


def test_training_goes_on_exactly_from_a_file(tmp_path):
    store = trained_store()
    save_table(tmp_path / "table", store, SPEC, 4, optimizer=True)
    again = load_table(tmp_path / "table").store
    for table in (store, again):
        table.update(torch.tensor([2, 9]), torch.ones(2, 3), SparseAdam(), 0.1)
    for key, tensor in store.tensors().items():
        assert torch.equal(again.tensors()[key], tensor), key


def test_any_safetensors_reader_opens_it(tmp_path):
    store = trained_store()
    save_table(tmp_path / "table", store, SPEC, 4)
    assert torch.equal(load_file(tmp_path / "table")["weight"], store.weight)
    with safe_open(tmp_path / "table", framework="pt") as file:
        assert AddressSpec.from_json(file.metadata()["address_spec"]) == SPEC
        assert json.loads(file.metadata()["layer_id"]) == 4


def test_a_table_of_other_addresses_is_refused_with_both_codes(tmp_path):
    other = make_spec(seed=1)
    save_table(tmp_path / "table", trained_store(), SPEC, 4)
    with pytest.raises(CheckpointError, match=f"addresses {SPEC.word_code}, this model's are {other.word_code}"):
        load_table(tmp_path / "table", other)


def test_every_truncation_is_refused_by_name(tmp_path):
    save_table(tmp_path / "table", trained_store(), SPEC, 4)
    whole = (tmp_path / "table").read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="cut"):
            load_table(tmp_path / "cut")


def test_a_flipped_bit_anywhere_is_refused(tmp_path):
    save_table(tmp_path / "table", trained_store(), SPEC, 4, optimizer=True)
    whole = (tmp_path / "table").read_bytes()
    for place in (*range(0, len(whole), 997), len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        (tmp_path / "table").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=str(tmp_path / "table")):
            load_table(tmp_path / "table")


def written(path, *, rows: int = SPEC.num_rows(4), **metadata) -> Path:
    """A table file of zeros with this metadata."""
    zeros_NB = np.zeros((rows, 12), np.uint8)
    write_table(path, make_codec("fp32", 3), rows, metadata, [zeros_NB])
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"address_spec": None}, "no readable address spec"),
        ({"address_spec": "{"}, "no readable address spec"),
        ({"address_spec": "[]"}, "no readable address spec"),
        ({"layer_id": None}, "no readable address spec"),
        ({"layer_id": "four"}, "no readable address spec"),
        ({"layer_id": "3"}, "no memory layer 3"),
        ({"layer_id": "1"}, "memory layer 1 addresses .* rows, the table has"),
    ],
    ids=str,
)
def test_metadata_that_mean_nothing_are_refused_by_name(tmp_path, changes, words):
    good = {"address_spec": SPEC.to_json(), "layer_id": "4"} | changes
    path = written(tmp_path / "table", **{name: text for name, text in good.items() if text is not None})
    for read in (load_table, lambda path: open_store(path, "resident")):
        with pytest.raises(CheckpointError, match=words) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


OLD = FIXTURES / "table-format-1.safetensors"
OLD_WITH_STATE = FIXTURES / "table-format-1-optimizer.safetensors"


def test_tables_of_the_first_format_are_read_as_they_were():
    table = load_table(OLD_WITH_STATE, SPEC)
    expected = load_file(OLD_WITH_STATE)
    assert table.layer_id == 4 and table.store.step == 3
    assert table.store.tensors().keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(table.store.tensors()[name].view(tensor.dtype), tensor), name
    assert torch.equal(load_table(OLD, SPEC).store.weight, expected["weight"])
    assert load_table(OLD, SPEC).store.tensors().keys() == {"weight", "step"}


def test_training_goes_on_from_a_table_of_the_first_format(tmp_path):
    first = load_table(OLD_WITH_STATE, SPEC).store
    save_table(tmp_path / "table", first, SPEC, 4, optimizer=True)
    second = load_table(tmp_path / "table", SPEC).store
    for table in (first, second):
        table.update(torch.tensor([2, 9]), torch.ones(2, 3), SparseAdam(), 0.1)
    assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": None}, "not a table file"),
        ({"format": "nengram-table-99"}, "nengram-table-99"),
        ({"address_spec": "{"}, "no readable address spec"),
        ({"layer_id": "3"}, "no memory layer 3"),
        ({"sha256": None}, "damaged"),
    ],
    ids=str,
)
def test_a_forged_table_of_the_first_format_is_refused(tmp_path, changes, words):
    with safe_open(OLD, framework="pt") as file:
        metadata = {**file.metadata(), **changes}
    kept = {name: text for name, text in metadata.items() if text is not None}
    save_file(load_file(OLD), tmp_path / "table", kept)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_table(tmp_path / "table")
    assert str(tmp_path / "table") in str(caught.value)


def test_a_flipped_bit_in_the_first_format_is_refused(tmp_path):
    damaged = bytearray(OLD_WITH_STATE.read_bytes())
    damaged[-20] ^= 1
    (tmp_path / "table").write_bytes(damaged)
    with pytest.raises(CheckpointError, match="is damaged: its bytes do not match"):
        load_table(tmp_path / "table")


def test_a_missing_file_a_folder_and_a_wrong_size_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such file"):
        load_table(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is no table"):
        load_table(tmp_path)
    with pytest.raises(CheckpointError, match="the table has 5"):
        save_table(tmp_path / "table", ResidentStore(5, 3), SPEC, 4)
    assert not list(tmp_path.iterdir())


def test_a_table_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_table(tmp_path / "file" / "table", trained_store(), SPEC, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def table(tmp_path):
    """A trained table, in the codec fp8 and in shards, and as it was."""
    save_table(tmp_path / "fp32", trained_store(), SPEC, 4)
    pack(tmp_path / "fp32", tmp_path / "fp8", codec="fp8", shards=3)
    return tmp_path


def open_tiers(path, **wanted):
    hot = HotSet(np.array([0, 9, 20]), belongs_to=hot_name(SPEC, 4))
    return {tier: open_store(path, tier, hot=hot if tier == "tiered" else None, **wanted) for tier in TABLE_TIERS}


@pytest.mark.parametrize("name", ["fp32", "fp8"])
def test_every_tier_gives_the_same_vectors(table, name):
    rows = torch.tensor([[9, 0], [SPEC.num_rows(4) - 1, 9]])
    expected = load_table(table / name, SPEC).store.prefetch(rows).vectors()
    for tier, store in open_tiers(table / name, spec=SPEC, layer_id=4, row_width=3).items():
        with store, store.prefetch(rows) as ticket:
            assert torch.equal(ticket.vectors(), expected), tier


@pytest.mark.parametrize("tier", TABLE_TIERS)
@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"spec": make_spec(seed=1)}, f"addresses {SPEC.word_code}, this model's are {make_spec(seed=1).word_code}"),
        ({"layer_id": 1}, "holds the table of memory layer 4, not of 1"),
        ({"row_width": 4}, "its rows have 3 numbers, the model's 4"),
    ],
    ids=str,
)
def test_every_tier_refuses_the_table_of_another_model(table, tier, wanted, words):
    hot = HotSet(np.array([0])) if tier == "tiered" else None
    with pytest.raises(CheckpointError, match=words) as caught:
        open_store(table / "fp8", tier, hot=hot, **wanted)
    assert "fp8" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("tier", TABLE_TIERS)
def test_every_tier_refuses_a_part_of_a_table(table, tier):
    hot = HotSet(np.array([0])) if tier == "tiered" else None
    shard = next((table / "fp8").glob("*.safetensors"))
    with pytest.raises(CheckpointError, match="of a table of"):
        open_store(shard, tier, hot=hot)


def test_a_hot_set_is_read_from_its_file_and_must_be_this_tables(table):
    mine, other = (HotSet(np.array([1, 5]), belongs_to=hot_name(SPEC, layer_id)) for layer_id in (4, 1))
    for name, hot in (("mine", mine), ("other", other)):
        hot.save(table / name)
    with open_store(table / "fp32", "tiered", hot=table / "mine") as store:
        assert store.num_rows == SPEC.num_rows(4)
    for hot, kind in ((other, StoreError), (table / "other", CheckpointError)):
        with pytest.raises(kind, match="would keep other rows hot"):
            open_store(table / "fp32", "tiered", hot=hot)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in /proc")
def test_a_refused_table_leaves_no_file_open(table):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for tier in TABLE_TIERS:
        with pytest.raises(CheckpointError):
            open_store(table / "fp8", tier, hot=HotSet(np.array([0])) if tier == "tiered" else None, row_width=4)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_wrong_tiers_are_one_line(table):
    for tier, hot, words in (
        ("maped", None, r'unknown tier "maped" \(did you mean "mapped"\?\)'),
        ("tiered", None, "goes with a hot set"),
        ("mapped", HotSet(np.array([0])), "goes with a hot set"),
    ):
        with pytest.raises(StoreError, match=words):
            open_store(table / "fp32", tier, hot=hot)
    with pytest.raises(CheckpointError, match="first format, which is read whole: `nengram table pack` renews it"):
        open_store(OLD, "mapped")


def test_tables_in_memory_are_trained_on_from_a_file(tmp_path):
    store = trained_store()
    save_table(tmp_path / "table", store, SPEC, 4, optimizer=True)
    tables = [store, *(open_store(tmp_path / "table", tier) for tier in ("resident", "host"))]
    for table in tables:
        table.update(torch.tensor([2, 9]), torch.ones(2, 3), SparseAdam(), 0.1)
    for table in tables[1:]:
        assert torch.equal(table.tensors()["weight"], store.weight)


def test_a_coded_store_is_saved_as_it_is(table):
    coded = load_table(table / "fp8").store
    save_table(table / "again", coded, SPEC, 4)
    with open_rows(table / "again") as again, open_rows(table / "fp8") as first:
        assert again.codec == first.codec
        np.testing.assert_array_equal(again.read_rows(0, again.num_rows), first.read_rows(0, first.num_rows))


def test_orders_label_all_rows_of_the_slots():
    spec = AddressSpec.qwen_ple(vocab_size=50, eos_id=1, ple_layer_ids=[1], rows_per_head=20, max_order=4, heads=3)
    labels = order_labels(spec, 0)
    assert [name for name, _, _ in labels] == ["2-gram", "3-gram", "4-gram"]
    for (_, first, end), order in zip(labels, (2, 3, 4), strict=True):
        slots = spec.slot_orders == order
        assert first == spec.offsets(0)[slots][0] and end - first == spec.moduli(0)[slots].sum()
    assert labels[-1][2] == spec.moduli(0).sum() <= spec.num_rows(0)
