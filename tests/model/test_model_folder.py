"""A model on disk: what comes back is what was saved, and what is not whole or not its own is refused by name."""

import dataclasses
import json

import pytest
import torch
from safetensors import SafetensorError

from nengram.config import MemoryConfig, ModelConfig
from nengram.errors import CheckpointError
from nengram.model import Transformer
from nengram.model.folder import check_identity, is_saved, load_model, open_folder, save_model, seal_folder

MODEL = ModelConfig(vocab_size=40, width=32, blocks=2, experts=4, expert_width=8, shared_width=8, context=16)
MEMORY = MemoryConfig(kind="engram", blocks=(0, 1), heads=2, rows_per_head=(31, 37))
IDS = torch.arange(12).view(1, 12)


def built(seed: int, **changes) -> Transformer:
    model = Transformer(dataclasses.replace(MODEL, **changes), MEMORY)
    model.init_weights(seed)
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "final", built(0), {"step": 7}, add=lambda beside: (beside / "note.txt").write_text("hello"))
    return tmp_path / "final"


def reseal(folder) -> None:
    (folder / "manifest.json").unlink()
    seal_folder(folder, {"step": 7})


@torch.no_grad()
def test_a_loaded_model_answers_as_the_saved_one(folder):
    assert open_folder(folder)["step"] == 7
    model = built(1)
    assert not torch.equal(model(IDS), built(0)(IDS))
    assert load_model(model, folder) == {}
    assert torch.equal(model(IDS), built(0)(IDS))
    assert (folder / "note.txt").read_text() == "hello"


def test_other_tensors_travel_with_the_model_and_table_state_only_with_them(tmp_path):
    model = built(0)
    save_model(tmp_path / "with", model, {}, optimizer={"optimizer.0.exp_avg": torch.ones(3)})
    assert load_model(built(1), tmp_path / "with").keys() == {"optimizer.0.exp_avg"}


@pytest.mark.parametrize("name", ["model.safetensors", "table-1.safetensors", "note.txt"])
def test_a_flipped_byte_and_a_missing_file_are_refused_by_name(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 4
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: damaged"):
        open_folder(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing from the checkpoint"):
        open_folder(folder)


@pytest.mark.parametrize("manifest", ["", "[]", '{"files": 3}', '{"facts": 1}', "\xff"])
def test_a_damaged_manifest_is_refused(folder, manifest):
    (folder / "manifest.json").write_text(manifest, encoding="latin-1")
    with pytest.raises(CheckpointError, match="manifest.json: damaged"):
        open_folder(folder)


def test_a_manifest_cannot_point_outside_its_folder(folder, tmp_path):
    (tmp_path / "secret").write_text("x")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../secret"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="final/secret: missing"):
        open_folder(folder)


def test_a_crash_between_two_renames_is_found_and_mended(folder):
    folder.rename(folder.with_name(".final.old"))
    assert is_saved(folder) and not folder.exists()
    assert open_folder(folder)["step"] == 7
    assert not is_saved(folder.with_name("other"))
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        open_folder(folder.with_name("other"))


def test_a_failed_save_leaves_the_old_folder_and_nothing_beside_it(folder):
    def no_space(_beside):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save_model(folder, built(1), {"step": 8}, add=no_space)
    assert open_folder(folder)["step"] == 7
    assert [path.name for path in folder.parent.iterdir()] == ["final"]


def test_tensors_that_cannot_be_written_are_one_line(folder, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("nengram.model.folder.save_file", full)
    with pytest.raises(CheckpointError, match="model.safetensors: cannot be written: .*make room and run it again"):
        save_model(folder, built(1), {"step": 8})
    assert open_folder(folder)["step"] == 7
    assert [path.name for path in folder.parent.iterdir()] == ["final"]


def test_a_model_of_another_shape_names_the_first_tensor_that_differs(folder):
    with pytest.raises(
        CheckpointError, match=r"blocks.0.moe.down_XFD is \(4, 8, 32\), the config asks for \(4, 16, 32\)"
    ):
        load_model(built(0, expert_width=16), folder)
    with pytest.raises(CheckpointError, match=r"blocks.2.\S+ is missing, the config asks for"):
        load_model(built(0, blocks=3), folder)


def test_a_table_under_another_layers_name_is_refused(folder):
    (folder / "table-1.safetensors").write_bytes((folder / "table-0.safetensors").read_bytes())
    reseal(folder)
    with pytest.raises(CheckpointError, match="table-1.safetensors: holds the table of memory layer 0, not of 1"):
        load_model(built(0), folder)


def test_a_table_of_other_addresses_is_refused_with_both_word_codes(folder):
    model = Transformer(MODEL, dataclasses.replace(MEMORY, seed=1))
    model.init_weights(0)
    with pytest.raises(
        CheckpointError, match=r"table-0\S+ holds a table for addresses \w{5}-\w{5}-\w{5}, this model's are \w{5}"
    ):
        load_model(model, folder)


def test_another_identity_is_refused_with_both_digests(folder):
    facts = {"tokenizer": "a" * 64, "corpus": "b" * 64}
    check_identity(facts, {"corpus": "b" * 64, "tokenizer": "a" * 64}, folder)
    with pytest.raises(CheckpointError, match=r"another tokenizer \((\w{5}-){2}\w{5}, now (\w{5}-){2}\w{5}\)"):
        check_identity(facts, {"corpus": "b" * 64, "tokenizer": "c" * 64}, folder)
    with pytest.raises(CheckpointError, match=r"another compression \(none, now "):
        check_identity(facts, {"compression": "c" * 64}, folder)
