"""A `qwen4_exp` model reads its tables from any tier, and nothing that it computes changes by one bit."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers.models.qwen4_exp", reason="the models are transformers' own")

from transformers import CompileConfig, StaticCache
from transformers.models.qwen4_exp import modeling_qwen4_exp as qwen
from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpConfig, Qwen4ExpTextConfig

from nengram.address import AddressSpec
from nengram.errors import CheckpointError, ConfigError, StoreError
from nengram.hf.released import TableEmbedding, load_with_table, stores_of, with_table
from nengram.memory import hot_name
from nengram.memory.checkpoint_files import TensorPlan, safetensors_header
from nengram.memory.layouts import import_checkpoint
from nengram.store import HotSet, ResidentStore

TIERS = ("resident", "host", "mapped", "tiered")
VOCAB, EOS = 300, 7
SIZES = {
    "vocab_size": VOCAB,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "hc_count": 2,
    "hc_lowrank": 8,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "indexer_head_dim": 16,
    "indexer_kv_heads": 1,
    "indexer_n_heads": 2,
    "ple_layer_ids": [2, 3],
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 100,
    "make_ngram_vocab_size_divisible_by": 64,
    "split_ngram_parts": 8,
}
COMPILED = CompileConfig()
COMPILED._compile_all_devices = (
    True  # as on an accelerator: a static cache means a compiled model, if it is not forbidden
)
SPEC = AddressSpec.qwen_ple(
    vocab_size=VOCAB, eos_id=EOS, ple_layer_ids=[2, 3], rows_per_head=100, heads=2, divisible_by=64
)


def new_model(dtype=torch.float32, **changes):
    """A random model in which the memory speaks loudly."""
    torch.manual_seed(0)
    model = qwen.Qwen4ExpForCausalLM(Qwen4ExpTextConfig(**SIZES | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ple." in name:
                parameter.normal_(std=1.0 if "ngram_embedding" in name else 0.3)
    return model.to(dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model as transformers saves it: the table in pieces, under the released names."""
    folder = tmp_path_factory.mktemp("released")
    new_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """The model as transformers loads it."""
    return qwen.Qwen4ExpForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def tables(folder, tmp_path_factory):
    """The same tables as files of ours."""
    into = tmp_path_factory.mktemp("tables")
    import_checkpoint(folder, into)
    return into


@pytest.fixture(scope="module")
def ids_BT():
    ids_BT = torch.randint(8, VOCAB, (2, 23), generator=torch.Generator().manual_seed(1))
    ids_BT[0, 9] = EOS
    return ids_BT


def hot():
    return {place: HotSet(np.arange(0, SPEC.num_rows(place), 2), belongs_to=hot_name(SPEC, place)) for place in (0, 1)}


def opened(folder, tier="mapped", tables=None, **options):
    return load_with_table(folder, tables, tier=tier, hot=hot() if tier == "tiered" else None, **options)


def close(model):
    for store in stores_of(model).values():
        store.close()


@torch.no_grad()
def everything(model, ids_BT, **static):
    """Logits of a whole pass, of a left-padded one and in chunks; tokens, greedy, by beams, and with a static cache."""
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, :6] = 0
    padded = {"input_ids": ids_BT, "attention_mask": mask_BT}
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": VOCAB - 1}
    cache, chunks = None, []
    for chunk_BT in ids_BT.split([9, 1, 1, 12], dim=1):
        out = model(chunk_BT, cache=cache, use_cache=True)
        cache = out.cache
        chunks.append(out.logits)
    return {
        "whole": model(ids_BT).logits,
        "padded": model(**padded).logits[mask_BT.bool()],
        "chunks": torch.cat(chunks, dim=1),
        "greedy": model.generate(**padded, **greedy),
        "beams": model.generate(**padded, **greedy, num_beams=3),
        "static": model.generate(**padded, **greedy, cache_implementation="static", **static),
    }


@pytest.fixture(scope="module")
def expected(whole, ids_BT):
    return everything(whole, ids_BT)


@pytest.mark.parametrize(
    ("made", "tier"), [*(("released", tier) for tier in TIERS), ("converted", "mapped"), ("converted", "tiered")]
)
def test_all_outputs_are_the_same_bits(whole, expected, folder, tables, ids_BT, made, tier):
    model = opened(folder, tier, None if made == "released" else tables)
    assert {type(store).__name__.removesuffix("Store").lower() for store in stores_of(model).values()} == {tier}
    assert not [name for name in model.state_dict() if name.endswith("ngram_embedding.weight")]
    found = everything(model, ids_BT, compile_config=COMPILED)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert model.dtype == whole.dtype
    close(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_table_of_bf16_in_a_model_of_any_dtype(tmp_path, ids_BT, dtype):
    new_model(torch.bfloat16).save_pretrained(tmp_path)
    whole = qwen.Qwen4ExpForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    model = opened(tmp_path, dtype=dtype)
    assert model.dtype == dtype and stores_of(model)[0].dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(model(ids_BT).logits, whole(ids_BT).logits)
    close(model)


def test_a_loaded_model_changes_its_tables_in_one_call(whole, folder, tables, ids_BT):
    with torch.no_grad():
        expected = whole(ids_BT).logits
        model = qwen.Qwen4ExpForCausalLM.from_pretrained(folder)
        for tier, source in (("mapped", folder), ("resident", tables), ("host", folder)):
            assert with_table(model, source, tier=tier) is model
            assert torch.equal(model(ids_BT).logits, expected)
        zeros = {place: ResidentStore(SPEC.num_rows(place), 8, init_std=0.0) for place in (0, 1)}
        assert not torch.equal(with_table(model, zeros)(ids_BT).logits, expected)


def test_rows_are_asked_for_before_the_first_block_and_used(folder, ids_BT, monkeypatch):
    model = opened(folder)
    order = []
    for layer in model.model.layers:
        layer.attn_hyper_connection.register_forward_pre_hook(lambda *_: order.append("block"))
    asks = TableEmbedding.ask
    monkeypatch.setattr(TableEmbedding, "ask", lambda self, rows: (order.append("ask"), asks(self, rows)))
    with torch.no_grad():
        model(ids_BT)
    assert order == ["ask", "ask", *["block"] * 4]
    model.generate(ids_BT, max_new_tokens=12, do_sample=False, eos_token_id=VOCAB - 1, num_beams=2)
    found = [(layer.asked, layer.used) for layer in model.modules() if isinstance(layer, TableEmbedding)]
    assert len(found) == 2
    assert all(asked == used > 10 for asked, used in found)
    close(model)


def test_rows_asked_for_in_vain_do_no_harm(whole, folder, ids_BT, monkeypatch):
    model = opened(folder)
    asks = TableEmbedding.ask
    monkeypatch.setattr(TableEmbedding, "ask", lambda self, rows: asks(self, rows * 0))
    with torch.no_grad():
        assert torch.equal(model(ids_BT).logits, whole(ids_BT).logits)
    assert not any(layer.used for layer in model.modules() if isinstance(layer, TableEmbedding))
    close(model)


@pytest.mark.parametrize("tier", TIERS)
def test_vectors_that_were_given_stay_what_they_were(folder, tier):
    model = opened(folder, tier)
    embedding = model.model.layers[1].ple.ple_embedding.ngram_embedding
    rows_BTS = torch.arange(40).view(1, 10, 4)
    given = embedding(rows_BTS)
    before = given.clone()
    for first in (0, 100, 200):
        embedding(rows_BTS + first)
    assert torch.equal(given, before)
    close(model)


def test_a_static_cache_by_hand_and_training_around_the_tables(folder, whole, ids_BT):
    model = opened(folder)
    cache = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        first = model(ids_BT[:, :10], cache=cache, use_cache=True).logits
        rest = model(ids_BT[:, 10:], cache=cache, use_cache=True).logits
        theirs = StaticCache(config=whole.config, max_cache_len=64)
        for found, chunk_BT in ((first, ids_BT[:, :10]), (rest, ids_BT[:, 10:])):
            assert torch.equal(found, whole(chunk_BT, cache=theirs, use_cache=True).logits)
    model.train()
    model.gradient_checkpointing_enable()
    model(ids_BT, labels=ids_BT).loss.backward()
    assert model.model.layers[1].ple.key_proj.weight.grad.any()
    close(model)


def test_rows_of_fp8_under_one_scale(tmp_path, ids_BT):
    """As released: the in-memory twin has each row times the scale, in the model's dtype."""
    whole = new_model(torch.bfloat16)
    scale = torch.tensor([0.0123])
    whole.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        if ".shard_" in name:
            tensors[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.ple.ple_embedding.ngram_embedding"
        rows_RE = torch.cat([tensors[f"{prefix}.shard_{part}.weight"] for part in range(8)]).float() * scale
        whole.get_submodule(prefix).weight.data = rows_RE.to(torch.bfloat16)
        tensors[f"{prefix}.weight_scale"] = scale.clone()
    whole.save_pretrained(tmp_path / "twin")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    twin = qwen.Qwen4ExpForCausalLM.from_pretrained(tmp_path / "twin")
    for tier in TIERS:
        model = opened(tmp_path, tier)
        with torch.no_grad():
            assert torch.equal(model(ids_BT).logits, twin(ids_BT).logits)
        close(model)


def test_the_text_model_inside_a_multimodal_one(tmp_path, ids_BT):
    torch.manual_seed(0)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen4ExpConfig(text_config=SIZES, vision_config=vision)
    whole = qwen.Qwen4ExpForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    model = opened(tmp_path)
    assert type(model) is type(whole) and len(stores_of(model)) == 2
    with torch.no_grad():
        assert torch.equal(model(ids_BT).logits, whole(ids_BT).logits)
    close(model)


def test_a_table_of_95_gib_opens_here(tmp_path, ids_BT):
    """The released size in a sparse file: whoever read it into memory would need 102 GB."""
    sizes = {"ngram_vocab_size_base": 20_000_000, "heads_per_ngram": 8, "split_ngram_parts": 512}
    sizes |= {"make_ngram_vocab_size_divisible_by": 128, "ple_layer_ids": [2], "ple_embed_dim": 16 * 160}
    small = new_model(torch.bfloat16, **sizes | {"ngram_vocab_size_base": 100})
    small.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "ple_embedding" not in name}
    rows, prefix = 320_001_536, "model.layers.1.ple.ple_embedding.ngram_embedding.shard_{}.weight"
    plans = [TensorPlan(prefix.format(part), "BF16", (rows // 512 + (part < rows % 512), 160)) for part in range(512)]
    header, _ = safetensors_header(plans)
    with open(tmp_path / "table.safetensors", "wb") as file:
        file.write(header)
        os.truncate(file.fileno(), len(header) + sum(plan.size for plan in plans))
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    files = dict.fromkeys(kept, "model.safetensors") | {plan.name: "table.safetensors" for plan in plans}
    index = {"metadata": {}, "weight_map": files}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | sizes))
    model = opened(tmp_path)
    assert stores_of(model)[0].num_rows == rows
    with torch.no_grad():
        logits = model(ids_BT).logits
    assert logits.isfinite().all()
    close(model)


def test_mistakes_are_one_line_each(folder, tables, tmp_path, whole):
    model = opened(folder)
    with pytest.raises(ConfigError, match="Linear has no n-gram table"):
        with_table(torch.nn.Linear(2, 2), folder)
    with pytest.raises(StoreError, match='unknown tier "disk"'):
        with_table(model, folder, tier="disk")
    with pytest.raises(CheckpointError, match=r"neither a released checkpoint .* nor a folder of tables"):
        with_table(model, tmp_path)
    with pytest.raises(StoreError, match="memory layer 1 needs a table of 512 rows of 8, not none"):
        with_table(model, {0: ResidentStore(SPEC.num_rows(0), 8)})
    with pytest.raises(CheckpointError, match="no local folder of a model"):
        load_with_table(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"table of memory layer 1, only of \[0\]"):
        with_table(model, tables / "table-0.safetensors")
    other = new_model(ngram_vocab_size_base=101, seed=5)
    with pytest.raises(CheckpointError, match="its rows would be read under other n-grams"):
        with_table(other, folder)
    with pytest.raises(CheckpointError, match="its rows would be read under other n-grams"):
        with_table(other, tables)
    assert not any(isinstance(module, TableEmbedding) for module in other.modules())
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ConfigError, match="its architecture is LlamaForCausalLM"):
        load_with_table(tmp_path / "llama")
    close(model)
