"""A memory comes back from its folder bit for bit, on any tier, and only onto the model that it was made for."""

import json

import pytest
import torch

from nengram.errors import CheckpointError, ConfigError
from nengram.files import sha256_file

pytest.importorskip("transformers")

from nengram.hf import graft, grafted, load_adapter, save_adapter
from nengram.memory import open_store
from tests.hf.grafts import CONFIGS, MEMORY, logits_of, model_of, some_ids, strong
from tests.hf.test_graft import words


@pytest.fixture
def saved(tmp_path):
    """A folder with the memory of a llama, and what that model says with it."""
    model = model_of("llama")
    strong(model)
    save_adapter(model, tmp_path / "memory")
    return tmp_path / "memory", logits_of(model, some_ids())


@pytest.mark.parametrize("tier", ["resident", "host", "mapped"])
def test_a_saved_memory_comes_back_bit_for_bit_on_any_tier(saved, tier):
    folder, wanted = saved
    model = model_of("llama")
    memory = load_adapter(model, folder, tier=tier)
    assert torch.equal(logits_of(model, some_ids()), wanted)
    assert memory.adapter().learns is (tier != "mapped")


def test_compression_and_every_size_travel_with_it(tmp_path):
    model = model_of("gpt2")
    sizes = {
        "compress": True,
        "dialect": "deepseek_v41",
        "kernel": 0,
        "rows_per_head": (300,) * 3,
        "seed": 5,
        "gate": "plain",
    }
    memory = graft(model, words(96), **MEMORY | sizes)
    memory.adapter().stores[1].weight.normal_()
    save_adapter(model, tmp_path / "memory")
    twin = model_of("gpt2")
    back = load_adapter(twin, tmp_path / "memory").adapter()
    ours = memory.adapter()
    assert back.memory == ours.memory and back.spec == ours.spec and back.compression.digest == ours.compression.digest
    assert torch.equal(logits_of(twin, some_ids()), logits_of(model, some_ids()))


def test_the_folder_says_its_addresses_as_numbers_and_its_tables_are_tables(saved):
    folder, _ = saved
    about = json.loads((folder / "adapter.json").read_text())
    assert about["base"] == {
        "architecture": "LlamaForCausalLM",
        "model_type": "llama",
        "hidden_size": 32,
        "blocks": 3,
        "vocab_size": 96,
    }
    assert len(about["spec"]["layers"][0]["multipliers"]) == 3
    assert open_store(folder / "table-1.safetensors", "mapped").num_rows == about["spec"]["layers"][0]["num_rows"]


def test_several_memories_are_switched_by_name_and_off(saved):
    folder, wanted = saved
    model, ids_BT = model_of("llama"), some_ids()
    before = logits_of(model, ids_BT)
    memory = load_adapter(model, folder, name="facts")
    strong(model, name="style", seed=1, blocks=(0,))
    assert memory.active == "style" and not torch.equal(logits_of(model, ids_BT), wanted)
    memory.set_adapter("facts")
    assert torch.equal(logits_of(model, ids_BT), wanted)
    learning = {name for name, p in model.named_parameters() if p.requires_grad and "nengram" in name}
    assert learning and all(".facts." in name for name in learning)
    with memory.disabled():
        assert torch.equal(logits_of(model, ids_BT), before)
    save_adapter(model, folder.with_name("style"), "style")
    twin = model_of("llama")
    load_adapter(twin, folder.with_name("style"))
    memory.set_adapter("style")
    assert torch.equal(logits_of(twin, ids_BT), logits_of(model, ids_BT))
    with pytest.raises(ConfigError, match='did you mean "facts"'):
        memory.set_adapter("fact")
    with pytest.raises(ConfigError, match='an adapter "facts" already'):
        load_adapter(model, folder, name="facts")
    memory.discard("style")
    with pytest.raises(ConfigError, match="no memory is active"):
        memory.adapter()
    assert torch.equal(logits_of(model, ids_BT), before)


def test_a_memory_of_another_base_is_refused_and_both_are_named(saved):
    folder, _ = saved
    model = model_of("qwen2")
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM \(width 32, 3 blocks, 96 ids\); .* Qwen2ForCausalLM"):
        load_adapter(model, folder)
    assert not [name for name, _ in model.named_parameters() if "nengram" in name]
    from transformers import AutoModelForCausalLM

    wider = CONFIGS["llama"]()
    wider.hidden_size = 64
    with pytest.raises(CheckpointError, match="the model here is LlamaForCausalLM \\(width 64"):
        load_adapter(AutoModelForCausalLM.from_config(wider), folder)


@pytest.mark.parametrize("tier", ["resident", "mapped"])
@pytest.mark.parametrize(
    "name", ["memory.safetensors", "adapter.json", "compression.safetensors", "table-2.safetensors"]
)
def test_a_damaged_file_is_refused_by_name(saved, name, tier):
    folder, _ = saved
    raw = bytearray((folder / name).read_bytes())
    raw[200] ^= 1  # of a table this is in its header, which every tier reads
    (folder / name).write_bytes(raw)
    with pytest.raises(CheckpointError, match=f"{name}") as error:
        load_adapter(model_of("llama"), folder, tier=tier)
    assert "\n" not in str(error.value)


def test_a_table_of_other_addresses_is_refused_by_name(saved):
    """Even where its manifest was made to fit: a foreign table is not read under these n-grams."""
    folder, _ = saved
    other = model_of("llama")
    strong(other, seed=9)
    save_adapter(other, folder.with_name("other"))
    for kind in ("files", "tables"):
        manifests = [json.loads((place / "manifest.json").read_text()) for place in (folder, folder.with_name("other"))]
        manifests[0][kind]["table-1.safetensors"] = manifests[1][kind]["table-1.safetensors"]
        (folder / "manifest.json").write_text(json.dumps(manifests[0]))
    (folder / "table-1.safetensors").write_bytes((folder.with_name("other") / "table-1.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"table-1.safetensors holds a table for addresses"):
        load_adapter(model_of("llama"), folder)


def test_a_folder_of_something_else_is_refused(saved, tmp_path):
    folder, _ = saved
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        load_adapter(model_of("llama"), tmp_path)
    about = json.loads((folder / "adapter.json").read_text()) | {"format": "nengram-adapter-9"}
    (folder / "adapter.json").write_text(json.dumps(about))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["adapter.json"] = sha256_file(folder / "adapter.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="nengram-adapter-9"):
        load_adapter(model_of("llama"), folder)


def test_an_interrupted_save_leaves_the_old_memory(saved, monkeypatch):
    folder, wanted = saved
    model = model_of("llama")
    memory = load_adapter(model, folder)
    memory.adapter().stores[1].weight.zero_()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("nengram.model.folder.seal_folder", stop)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(model, folder)
    twin = model_of("llama")
    load_adapter(twin, folder)
    assert torch.equal(logits_of(twin, some_ids()), wanted)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["memory"]


def test_a_memory_without_a_name_is_the_active_one(saved):
    folder, _ = saved
    memory = load_adapter(model_of("llama"), folder)
    with memory.disabled(), pytest.raises(ConfigError, match="no memory is active"):
        save_adapter(memory, folder.with_name("none"))
    assert grafted(memory.place.base) is memory
