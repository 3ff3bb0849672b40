"""A grafted memory beside PEFT's LoRA, put on before or after: what is to learn learns, what is saved comes back."""

import pytest
import torch

from nengram.errors import ConfigError

pytest.importorskip("transformers")
pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")

import peft

from nengram.hf import graft, grafted, load_adapter, optimizers, save_adapter, train_jointly, train_memory
from tests.hf.grafts import MEMORY, logits_of, model_of, some_ids


def lora(**options) -> "peft.LoraConfig":
    return peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options)


def grown(model, steps: int = 3) -> tuple[float, float]:
    """Train, and give the first and the last loss."""
    ids_BT = some_ids(4, 16)
    optimizer, _ = optimizers(model, 1e-2, base_lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1]


def unmoved(model, before: dict) -> set[str]:
    """Parameters and tables that learn by name and are as they were."""
    return {name for name, value in state_of(model).items() if torch.equal(value, before[name])}


def state_of(model) -> dict:
    found = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return found | {f"table {i}": store.weight.clone() for i, store in grafted(model).adapter().stores.items()}


def test_a_graft_and_then_lora_learn_together_and_come_back(tmp_path):
    model, ids_BT = model_of("llama"), some_ids()
    before = logits_of(model, ids_BT)
    graft(model, **MEMORY)
    both = peft.get_peft_model(model, lora())
    assert torch.equal(logits_of(both, ids_BT), before)
    train_jointly(both)
    started = state_of(both)
    assert any("lora_A" in name for name in started) and any("value_proj" in name for name in started)
    first, last = grown(both)
    assert last < first and unmoved(both, started) == set()
    both.save_pretrained(tmp_path / "lora")
    save_adapter(both, tmp_path / "memory")
    twin = model_of("llama")
    load_adapter(twin, tmp_path / "memory")
    twin = peft.PeftModel.from_pretrained(twin, tmp_path / "lora")
    assert torch.equal(logits_of(twin, ids_BT), logits_of(both, ids_BT))


def test_lora_and_then_a_graft_learn_together_and_come_back(tmp_path):
    both, ids_BT = peft.get_peft_model(model_of("llama"), lora()), some_ids()
    before = logits_of(both, ids_BT)
    graft(both, **MEMORY)
    assert torch.equal(logits_of(both, ids_BT), before)
    started = state_of(both)
    first, last = grown(both)
    assert last < first and unmoved(both, started) == set()
    assert {"lora" in name or "nengram" in name or "table" in name for name in started} == {True}
    both.save_pretrained(tmp_path / "lora")
    save_adapter(both, tmp_path / "memory")
    twin = peft.PeftModel.from_pretrained(model_of("llama"), tmp_path / "lora")
    load_adapter(twin, tmp_path / "memory")
    assert torch.equal(logits_of(twin, ids_BT), logits_of(both, ids_BT))


def test_lora_alone_leaves_the_memory_as_it_is_and_the_memory_alone_leaves_lora():
    model = model_of("llama")
    memory = graft(model, **MEMORY)
    memory.adapter().stores[1].weight.normal_(std=0.1)
    both = peft.get_peft_model(model, lora())
    started = state_of(both)
    grown(both)
    assert unmoved(both, started) == {"table 1", "table 2"}
    train_memory(both)
    assert all("nengram" in name for name, p in both.named_parameters() if p.requires_grad)
    held = {name: p.detach().clone() for name, p in both.named_parameters() if "lora" in name}
    grown(both)
    assert all(torch.equal(p, held[name]) for name, p in both.named_parameters() if name in held)
    train_jointly(both)
    assert all(p.requires_grad for name, p in both.named_parameters() if name in held)


def test_lora_on_a_memorys_own_projection_is_pefts_to_save(tmp_path):
    model, ids_BT = model_of("llama"), some_ids()
    memory = graft(model, **MEMORY)
    for store in memory.adapter().stores.values():
        store.weight.normal_(generator=torch.Generator().manual_seed(0))
    save_adapter(model, tmp_path / "before")
    both = peft.get_peft_model(model, lora(target_modules=["value_proj"]))
    started = state_of(both)
    grown(both)
    assert unmoved(both, started) == {"table 1", "table 2"}  # PEFT froze the layer, and with it what it reads
    both.save_pretrained(tmp_path / "lora")
    save_adapter(both, tmp_path / "memory")
    files = [(tmp_path / name / "memory.safetensors").read_bytes() for name in ("before", "memory")]
    assert files[0] == files[1]
    twin = model_of("llama")
    load_adapter(twin, tmp_path / "memory")
    twin = peft.PeftModel.from_pretrained(twin, tmp_path / "lora")
    assert torch.equal(logits_of(twin, ids_BT), logits_of(both, ids_BT))


def test_a_layer_among_modules_to_save_is_read_and_trained_in_peft_s_copy(tmp_path):
    """The hook looks the module up when it is called: one that held it would go on with the untrained original."""
    model, ids_BT = model_of("llama"), some_ids()
    before = logits_of(model, ids_BT)
    graft(model, **MEMORY)
    both = peft.get_peft_model(model, lora(modules_to_save=["block_1", "block_2"]))
    started = state_of(both)
    assert sum("modules_to_save" in name for name in started) == 12
    grown(both)
    assert unmoved(both, started) == set()
    save_adapter(both, tmp_path / "memory")
    alone = model_of("llama")
    load_adapter(alone, tmp_path / "memory")
    for name, module in both.named_modules():
        if name.endswith("lora_B.default"):
            torch.nn.init.zeros_(module.weight)
    assert torch.equal(logits_of(alone, ids_BT), logits_of(both, ids_BT))
    assert not torch.equal(logits_of(alone, ids_BT), before)


def test_all_layers_of_a_memory_at_once_are_no_module_to_save():
    model = model_of("llama")
    graft(model, **MEMORY)
    with pytest.raises(TypeError, match="modules_to_save cannot be applied"):
        peft.get_peft_model(model, lora(modules_to_save=["nengram"]))


def test_a_copy_of_what_holds_the_tables_is_refused():
    model = model_of("llama")
    graft(model, **MEMORY)
    both = peft.get_peft_model(model, lora(target_modules=["lm_head"], modules_to_save=["model"]))
    with pytest.raises(ConfigError, match="leave the memory out of modules_to_save") as error:
        optimizers(both, 1e-3)
    assert "\n" not in str(error.value)


def test_merged_lora_leaves_the_memory_in_place():
    model, ids_BT = model_of("llama"), some_ids()
    graft(model, **MEMORY)
    both = peft.get_peft_model(model, lora())
    train_jointly(both)
    grown(both)
    wanted = logits_of(both, ids_BT)
    merged = both.merge_and_unload()
    assert grafted(merged) is grafted(both)
    assert (logits_of(merged, ids_BT) - wanted).abs().max() < 1e-4 * wanted.abs().max()
