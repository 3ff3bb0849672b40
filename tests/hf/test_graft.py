"""A graft changes nothing until it has learned, finds its place in every family, and says what to pass where it cannot."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn

from nengram.errors import AddressError, ConfigError, DataError

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, JambaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nengram.hf import graft, grafted, train_memory
from tests.hf.grafts import FAMILIES, MEMORY, V, logits_of, model_of, some_ids, strong

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "graft_tiny.py"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_graft_is_bit_for_bit_the_model_and_a_filled_one_is_not(family):
    model, ids_BT = model_of(family), some_ids()
    before, kind = logits_of(model, ids_BT), type(model)
    memory = graft(model, **MEMORY)
    assert torch.equal(logits_of(model, ids_BT), before) and type(model) is kind
    for store in memory.adapter().stores.values():
        store.weight.normal_(generator=torch.Generator().manual_seed(0))
    assert (logits_of(model, ids_BT) - before).abs().max() > 1e-3
    with memory.disabled():
        assert torch.equal(logits_of(model, ids_BT), before)
    memory.remove()
    assert torch.equal(logits_of(model, ids_BT), before)
    assert not [name for name, _ in model.named_parameters() if "nengram" in name]


@pytest.mark.parametrize(
    "sizes",
    [
        {"dialect": "engram", "shared_table": True},
        {"dialect": "deepseek_v41", "kernel": 0},
        {"dialect": "qwen_ple"},
        {"kind": "additive"},
    ],
)
def test_every_kind_of_memory_starts_as_the_model_and_learns_from_the_first_step(sizes):
    sizes = {"rows_per_head": (500, 500)} | sizes
    model, ids_BT = model_of("llama"), some_ids()
    before = logits_of(model, ids_BT)
    memory = graft(model, **MEMORY | sizes)
    assert torch.equal(logits_of(model, ids_BT), before)
    model(ids_BT, labels=ids_BT).loss.backward()
    assert all(grads_UE.abs().sum() > 0 for _, grads_UE in memory.step.grads().values())


def test_nothing_but_rows_has_a_gradient_at_first_and_everything_has_one_after_a_step():
    model, ids_BT = model_of("llama"), some_ids()
    memory = graft(model, **MEMORY)
    train_memory(model)
    moving = []
    for _ in range(2):
        model.zero_grad()
        model(ids_BT, labels=ids_BT).loss.backward()
        moving.append({n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0})
        for layer_id, (rows_U, grads_UE) in memory.step.grads().items():
            assert grads_UE.abs().sum() > 0
            memory.adapter().stores[layer_id].weight[rows_U] -= 10 * grads_UE
    own = {n for n, p in model.named_parameters() if p.requires_grad}
    assert own and moving[0] == set()
    # the convolution starts at zero, so its gain waits for its first step
    assert moving[1] == {name for name in own if "conv_gain" not in name}


def test_one_memory_step_a_forward_released_when_nothing_can_learn():
    model = model_of("llama")
    memory = strong(model)
    seen = []
    begin = memory.adapter().lookback.begin
    memory.adapter().lookback.begin = lambda *args, **how: seen.append(begin(*args, **how)) or seen[-1]
    model(some_ids())
    assert len(seen) == 1 and seen[0].vectors(1).requires_grad
    logits_of(model, some_ids())
    assert len(seen) == 2
    with pytest.raises(Exception, match="released"):
        seen[1].vectors(1)


def test_recomputing_activations_gives_the_same_loss_and_gradients():
    ids_BT, grads = some_ids(), {}
    for recompute in (False, True):
        model = model_of("llama").train()
        memory = strong(model)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(ids_BT, labels=ids_BT, use_cache=True).loss
        loss.backward()
        own = {name: p.grad for name, p in model.named_parameters()}
        grads[recompute] = (loss, own, memory.step.grads())
    (loss, own, rows), (loss_2, own_2, rows_2) = grads.values()
    assert torch.equal(loss, loss_2)
    assert all(torch.allclose(own[name], own_2[name], atol=1e-6) for name in own)
    assert all(torch.allclose(rows[layer][1], rows_2[layer][1], atol=1e-6) for layer in rows)


def test_half_precision_weights_keep_the_memory_whole():
    model, ids_BT = model_of("llama").to(torch.bfloat16), some_ids()
    before = logits_of(model, ids_BT)
    memory = graft(model, **MEMORY)
    assert torch.equal(logits_of(model, ids_BT), before)
    assert {p.dtype for layer in memory.layers().values() for p in layer.parameters()} == {torch.float32}
    model(ids_BT, labels=ids_BT).loss.backward()
    _, grads_UE = memory.step.grads()[1]
    assert grads_UE.dtype == torch.float32 and grads_UE.isfinite().all() and grads_UE.abs().sum() > 0
    model.to(torch.bfloat16)
    assert logits_of(model, ids_BT).dtype == torch.bfloat16


def test_a_blocks_list_that_is_not_found_is_asked_for_by_name():
    mixed = JambaConfig(
        vocab_size=V,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(mixed).eval()
    with pytest.raises(ConfigError, match=r'pass blocks_at="<name>", one of: model.layers \(4\)'):
        graft(model, **MEMORY)
    with pytest.raises(ConfigError, match=r'did you mean "model.layers"'):
        graft(model, **MEMORY, blocks_at="model.layer")
    before = logits_of(model, some_ids())
    strong(model, blocks_at="model.layers")
    assert not torch.equal(logits_of(model, some_ids()), before)


def test_what_is_no_model_of_transformers_is_refused():
    with pytest.raises(ConfigError, match="holds no transformers model"):
        graft(nn.Linear(2, 2), **MEMORY)
    with pytest.raises(ConfigError, match=r"has no memory: nengram.hf.graft\(model"):
        grafted(model_of("llama"))


@pytest.mark.parametrize(
    ("sizes", "line"),
    [
        ({"rows_per_heads": (5, 5)}, 'did you mean "rows_per_head"'),
        ({"blocks": (3,)}, r"blocks \[3\] must be blocks of 0..2"),
        ({"dialect": "engrams"}, 'did you mean "engram"'),
        ({"kind": "none"}, "adds nothing"),
        ({"frozen": True}, "table_std=0.02"),
        ({"tier": "mapped"}, "a new table lives on tier resident or host"),
        ({"name": "a.b"}, "cannot be the name of an adapter"),
        ({"name": "pop"}, "cannot be the name of an adapter"),
        ({"name": "training"}, "cannot be the name of an adapter"),
        ({"compress": True}, "pass the model's tokenizer, or compress=False"),
    ],
)
def test_sizes_that_cannot_be_had_are_one_clear_line(sizes, line):
    with pytest.raises(ConfigError, match=line) as error:
        graft(model_of("llama"), **MEMORY | sizes)
    assert "\n" not in str(error.value)


def words(count: int) -> Tokenizer:
    """A tokenizer of `count` words, every second a capital form of the one before."""
    vocabulary = {("word" if i % 2 == 0 else "WORD") + str(i // 2): i for i in range(count)}
    return Tokenizer(models.WordLevel(vocabulary, unk_token="word0"))


@pytest.mark.parametrize("form", ["tokenizers", "transformers", "path", "folder"])
def test_ids_are_compressed_by_the_models_own_tokenizer_in_any_form(form, tmp_path):
    own = words(V - 1)  # an embedding may be a little larger than its tokenizer
    own.save(str(tmp_path / "tokenizer.json"))
    forms = {"tokenizers": own, "path": tmp_path / "tokenizer.json", "folder": str(tmp_path)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own) if form == "transformers" else forms[form]
    memory = graft(model_of("llama"), tokenizer, **MEMORY | {"compress": True})
    adapter = memory.adapter()
    assert adapter.compression.compressed_vocab_size == V // 2 + 1 == adapter.spec.compressed_vocab_size
    lower, upper = torch.tensor([[10, 12, 14]]), torch.tensor([[11, 13, 15]])
    rows = [adapter.lookback.begin(adapter.stores, ids_BT).rows[1] for ids_BT in (lower, upper)]
    assert torch.equal(*rows)


def test_another_models_tokenizer_is_refused(tmp_path):
    for count in (V + 1, V // 2):
        with pytest.raises(ConfigError, match=f"the tokenizer has {count} ids, the model's embedding {V}"):
            graft(model_of("llama"), words(count), **MEMORY | {"compress": True})
    with pytest.raises(ConfigError, match="no tokenizer.json behind it"):
        graft(model_of("llama"), object(), **MEMORY | {"compress": True})
    with pytest.raises(DataError, match="No such file"):
        graft(model_of("llama"), tmp_path / "nothing.json", **MEMORY | {"compress": True})


def test_embeddings_without_ids_are_refused_and_with_the_memory_off_are_not():
    model = model_of("llama")
    memory = strong(model)
    embeds_BTD = model.get_input_embeddings()(some_ids())
    with pytest.raises(AddressError, match="pass input_ids") as error:
        model(inputs_embeds=embeds_BTD)
    assert "\n" not in str(error.value)
    with memory.disabled():
        model(inputs_embeds=embeds_BTD)


def test_packed_rows_need_their_starts_and_then_read_like_texts_apart():
    model = model_of("llama")
    strong(model, kernel=0, blocks=(0,))
    text_BT = some_ids(1, 12)
    positions_BT = torch.arange(12).remainder(6).unsqueeze(0)
    with pytest.raises(ConfigError, match="start_BT"):
        model(text_BT, position_ids=positions_BT, use_cache=False)
    start_BT = positions_BT == 0
    seen = {}
    grafted(model).place.blocks[0].register_forward_pre_hook(lambda _, args: seen.update(h=args[0]))
    logits_of(model, text_BT, position_ids=positions_BT, start_BT=start_BT)
    packed = seen["h"]
    logits_of(model, text_BT.view(2, 6))
    assert torch.allclose(packed.view(2, 6, -1), seen["h"], atol=1e-6)


def test_a_deep_copy_has_a_memory_of_its_own():
    model, ids_BT = model_of("llama"), some_ids()
    strong(model)
    before = logits_of(model, ids_BT)
    twin = copy.deepcopy(model)
    assert grafted(twin) is not grafted(model)
    assert torch.equal(logits_of(twin, ids_BT), before)
    grafted(twin).adapter().stores[1].weight.zero_()
    assert not torch.equal(logits_of(twin, ids_BT), before) and torch.equal(logits_of(model, ids_BT), before)


def test_the_model_itself_is_saved_and_loads_without_the_memory(tmp_path):
    model, ids_BT = model_of("llama"), some_ids()
    before = logits_of(model, ids_BT)
    strong(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(LlamaForCausalLM.from_pretrained(tmp_path), ids_BT), before)


def test_controls_replace_rows_and_are_taken_back():
    model, ids_BT = model_of("llama"), some_ids()
    memory = strong(model)
    before = logits_of(model, ids_BT)
    with memory.controlled("one_row"):
        assert not torch.equal(logits_of(model, ids_BT), before)
        assert memory.step.rows[1].unique().numel() == memory.adapter().spec.slots
    assert torch.equal(logits_of(model, ids_BT), before)


def test_the_example_runs_and_its_memory_learns():
    alone = os.environ | {"OMP_NUM_THREADS": "1", "NENGRAM_CHECK_SHAPES": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stderr
    first, last, from_disk = (float(nats) for nats in re.findall(r"(\d\.\d{3}) nats a byte", done.stdout))
    assert done.stdout.count("True") == 2 and from_disk < last < first - 1
