"""A table file: the same bytes back, the optimiser too, and a clear refusal of anything else."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nengram.address import AddressSpec
from nengram.errors import CheckpointError
from nengram.memory import load_table, save_table
from nengram.store import ResidentStore, SparseAdam


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


def test_a_flipped_bit_is_refused(tmp_path):
    save_table(tmp_path / "table", trained_store(), SPEC, 4, optimizer=True)
    damaged = bytearray((tmp_path / "table").read_bytes())
    damaged[-20] ^= 1
    (tmp_path / "table").write_bytes(damaged)
    with pytest.raises(CheckpointError, match="is damaged: its bytes do not match"):
        load_table(tmp_path / "table")


def with_metadata(path, **changes) -> None:
    """Rewrite a table file with other metadata; None leaves an entry out."""
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **changes}
    save_file(load_file(path), path, {key: value for key, value in metadata.items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": None}, "not a table file of this version"),
        ({"format": "nengram-table-99"}, "nengram-table-99"),
        ({"address_spec": None}, "no readable address spec"),
        ({"address_spec": "{"}, "no readable address spec"),
        ({"address_spec": "[]"}, "no readable address spec"),
        ({"layer_id": "four"}, "no readable address spec"),
        ({"layer_id": "3"}, "no memory layer 3"),
        ({"layer_id": "1"}, "memory layer 1 addresses .* rows, the table has"),
        ({"sha256": None}, "damaged"),
    ],
    ids=str,
)
def test_forged_metadata_is_refused_by_name(tmp_path, changes, words):
    save_table(tmp_path / "table", trained_store(), SPEC, 4)
    with_metadata(tmp_path / "table", **changes)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_table(tmp_path / "table")
    assert str(tmp_path / "table") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_a_folder_and_a_wrong_size_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no table file at"):
        load_table(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no table file at"):
        load_table(tmp_path)
    with pytest.raises(CheckpointError, match="the table has 5"):
        save_table(tmp_path / "table", ResidentStore(5, 3), SPEC, 4)
    assert not list(tmp_path.iterdir())


def test_a_table_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write table"):
        save_table(tmp_path / "file" / "table", trained_store(), SPEC, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
