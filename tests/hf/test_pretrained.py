"""A model folder: whole or not there, its tables on any tier, and refused by name when something in it is not its own."""

import json
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nengram.address import AddressSpec
from nengram.errors import CheckpointError, ConfigError, NengramError, StoreError
from nengram.files import word_code
from nengram.hf import pretrained
from nengram.hf.export import export
from nengram.hf.modeling import NengramForCausalLM
from nengram.infer import generate, load_run
from nengram.store import HotSet
from nengram.train import train
from tests.hf.strong import PROMPTS


@pytest.fixture
def copy(strong, tmp_path):
    return shutil.copytree(strong.folder, tmp_path / "copy")


def load(folder, **options) -> NengramForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model, strong) -> torch.Tensor:
    return model(torch.tensor([strong.ids(PROMPTS[0])]), use_cache=False).logits[0]


@pytest.mark.parametrize("tier", ["resident", "host", "mapped", "tiered"])
def test_a_table_on_any_tier_gives_the_same_logits(strong, tier):
    hot = {"table_hot": {layer: HotSet(torch.arange(50)) for layer in strong.own.stores}} if tier == "tiered" else {}
    assert torch.equal(
        logits(load(strong.folder, table_tier=tier, **hot), strong), strong.logits(strong.ids(PROMPTS[0]))
    )


def test_every_row_recomputed(strong):
    model = load(strong.folder, table_tier="mapped", table_checked=1.0)
    assert torch.equal(logits(model, strong), strong.logits(strong.ids(PROMPTS[0])))
    assert all(store.checked_rows for store in model.tables.stores.values())


def test_shards_and_what_is_saved_again_from_a_mapped_table(strong, tmp_path):
    load(strong.folder, table_tier="mapped").save_pretrained(tmp_path / "again", max_shard_size="30KB")
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert "model.safetensors.index.json" in names and len([name for name in names if name.startswith("model-")]) > 2
    assert {"tokenizer.json", "chat_template.jinja", "table-0.safetensors", "table-2.safetensors"} <= names
    assert torch.equal(logits(load(tmp_path / "again"), strong), strong.logits(strong.ids(PROMPTS[0])))
    load(strong.folder).save_pretrained(tmp_path / "again")  # fewer shards than before: none may be left
    assert sorted(path.name for path in (tmp_path / "again").glob("model*")) == ["model.safetensors"]
    assert torch.equal(logits(load(tmp_path / "again"), strong), strong.logits(strong.ids(PROMPTS[0])))


def test_a_mapped_table_saved_elsewhere_is_a_file_of_its_own(strong, tmp_path):
    load(strong.folder, table_tier="mapped").save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "table-0.safetensors").stat().st_nlink == 1


def test_a_model_saved_into_its_own_folder_is_still_read_there(strong, copy):
    model = load(copy, table_tier="mapped")
    (copy / "notes.txt").write_text("mine")
    model.save_pretrained(copy)
    assert torch.equal(logits(model, strong), logits(load(copy), strong)) and (copy / "notes.txt").read_text() == "mine"
    assert not list(copy.parent.glob(".copy*"))


@pytest.mark.parametrize("beside_folders", [False, True])
@pytest.mark.parametrize("call", ["_save_tables", "_copy_tokenizer"])
def test_a_save_that_fails_leaves_the_old_model(strong, draft, copy, monkeypatch, call, beside_folders):
    if beside_folders:
        (copy / "checkpoint-1").mkdir()
    other = load(draft.folder)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(NengramForCausalLM, call, fail)
    with pytest.raises(OSError, match="No space left"):
        other.save_pretrained(copy)
    monkeypatch.undo()
    assert torch.equal(logits(load(copy), strong), strong.logits(strong.ids(PROMPTS[0])))
    assert not list(copy.parent.glob(".copy*"))
    other.save_pretrained(copy)
    assert (
        torch.equal(logits(load(copy), strong), logits(other, strong))
        and (copy / "checkpoint-1").exists() == beside_folders
    )


def test_a_save_cut_short_between_two_renames_is_refused(draft, copy, monkeypatch):
    """In a folder with sub-folders, whose files change one by one."""
    (copy / "checkpoint-1").mkdir()
    other, replace, done = load(draft.folder), pretrained.os.replace, []

    def twice(source, path):
        if path.parent == copy and len(done) == 2:
            raise KeyboardInterrupt
        done.append(replace(source, path)) if path.parent == copy else replace(source, path)

    monkeypatch.setattr(pretrained.os, "replace", twice)
    with pytest.raises(KeyboardInterrupt):
        other.save_pretrained(copy)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"nengram.json: missing; a save was cut short"):
        load(copy)


@pytest.mark.parametrize("tier", ["resident", "mapped"])
def test_a_table_of_other_addresses_is_refused_with_both_word_codes(strong, copy, tier):
    content = json.loads((copy / "config.json").read_text())
    content["address_spec"]["layers"][0]["multipliers"][0] = "12345"
    (copy / "config.json").write_text(json.dumps(content))
    foreign = AddressSpec.from_json(json.dumps(content["address_spec"])).word_code
    with pytest.raises(CheckpointError, match=f"{strong.own.spec.word_code}, this model's are {foreign}") as refused:
        load(copy, table_tier=tier)
    assert "table-0.safetensors" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("tier", ["resident", "mapped"])
def test_a_missing_and_a_damaged_table_are_refused_by_name(strong, copy, tier):
    path = copy / "table-2.safetensors"
    content = bytearray(path.read_bytes())
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="table-2.safetensors"):
        load(copy, table_tier=tier)
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(NengramError, match="table-2.safetensors"):
        logits(load(copy, table_tier=tier, table_checked=1.0), strong)
    path.unlink()
    with pytest.raises(CheckpointError, match="table-2.safetensors: missing"):
        load(copy, table_tier=tier)


def test_the_table_of_another_save_is_refused(draft, copy):
    shutil.copy(draft.folder / "table-0.safetensors", copy)
    with pytest.raises(
        CheckpointError, match=r"table-0.safetensors: is another table \(its seal is not the one in nengram.json\)"
    ):
        load(copy)


def test_another_compression_map_is_refused(strong, copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.cids_V"] = torch.arange(len(tensors["model.cids_V"]))
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"config.json was made for {word_code(strong.run.compression.digest)}"):
        load(copy)


def test_weights_that_are_missing_or_unreadable_are_refused(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.stack.blocks.1.attention.query.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="the weights lack model.stack.blocks.1.attention.query.weight"):
        load(copy)
    (copy / "model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(CheckpointError, match="copy: its weights cannot be read"):
        load(copy)


def test_an_unknown_tier_is_refused(strong):
    with pytest.raises(StoreError, match=r'unknown tier "maped" \(did you mean "mapped"\?\)'):
        load(strong.folder, table_tier="maped")


def test_a_run_becomes_a_folder_that_speaks_as_the_run_does(config, data, tmp_path):
    for _ in train(config.replace(train__tokens=640), data, tmp_path / "run"):
        pass
    run = load_run(tmp_path / "run")
    folder = export(tmp_path / "run", tmp_path / "folder")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder, table_tier="mapped")
    ids = tokenizer("Ada Hopper went from")["input_ids"]
    assert (
        ids[0] == run.doc_id == tokenizer.bos_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id
    )
    said = list(generate(run.model, ids, max_tokens=12, stop_id=run.doc_id, doc_id=run.doc_id))
    made = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    assert made[: len(said)] == said and len(said) > 3
    with pytest.raises(ConfigError, match="run: holds a run, which an export would mix with"):
        export(tmp_path / "run", tmp_path / "run")


def test_a_full_disk_is_told_in_one_line_and_the_old_folder_stays(strong, copy, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(CheckpointError, match="copy: cannot be written: I/O error: No space left.*make room"):
        load(copy).save_pretrained(copy)
    assert torch.equal(logits(load(copy), strong), strong.logits(strong.ids(PROMPTS[0])))
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]
