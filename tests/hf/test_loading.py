"""Whatever a user names is opened, on any tier, and computes what it computes elsewhere; what cannot be opened is one line."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nengram.config import TableOptions
from nengram.errors import CheckpointError, ConfigError
from nengram.hf import save_adapter
from nengram.hf.loading import opened
from nengram.infer import generate
from nengram.infer.hot import RowRecorder
from tests.hf.grafts import strong as strong_graft
from tests.hf.test_released import new_model
from tests.infer.conftest import run_folder  # noqa: F401 - a fixture

TIERS = ("resident", "host", "mapped", "tiered")


@pytest.fixture(scope="module")
def base(strong, tmp_path_factory):
    """A Llama that no memory was ever near, with the strong model's tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    ids = {"bos_token_id": strong.tokenizer.bos_token_id, "eos_token_id": None, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(strong.tokenizer), num_key_value_heads=1, **sizes, **ids))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(folder)
    strong.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, strong, tmp_path_factory):
    """A memory that speaks loudly, for that Llama."""
    folder = tmp_path_factory.mktemp("adapter") / "loud"
    model = LlamaForCausalLM.from_pretrained(base)
    strong_graft(model, compress=True, tokenizer=strong.tokenizer)
    save_adapter(model, folder)
    return folder, model


def greedy(model, ids, tokens=8):
    asked = torch.tensor([ids])
    made = model.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=tokens, do_sample=False)
    return made[0, len(ids) :].tolist()


@pytest.mark.parametrize("tier", TIERS)
def test_a_run_is_opened_where_it_is(run_folder, run_ids, tmp_path, tier):  # noqa: F811
    with opened(run_folder, tables=TableOptions(record_rows=tmp_path)) as one:
        one.model(torch.tensor([run_ids]))
    options = TableOptions(table_tier=tier, hot_from=str(tmp_path) if tier == "tiered" else "")
    with opened(run_folder, tables=options) as one:
        assert one.kind == "run"
        expected = list(generate(one.model.tables, run_ids, max_tokens=8))
        assert greedy(one.model, run_ids) == expected
        assert one.tokenizer("Ada")["input_ids"][0] == one.tokenizer.bos_token_id


def test_a_run_in_another_dtype_is_a_copy_of_its_weights(run_folder, run_ids):  # noqa: F811
    with opened(run_folder, dtype="bfloat16", tables=TableOptions(table_tier="mapped")) as one:
        assert (one.kind, one.model.dtype) == ("run", torch.bfloat16)
        assert one.model.tables.stores[next(iter(one.model.tables.stores))].dtype == torch.float32
        assert len(greedy(one.model, run_ids)) == 8
        folder = one.model.config.name_or_path
        assert Path(folder).is_dir()
    assert not Path(folder).exists()


@pytest.fixture(scope="module")
def run_ids(run_folder):  # noqa: F811
    with opened(run_folder) as one:
        return one.tokenizer("Ada Turing went")["input_ids"]


@pytest.mark.parametrize("tier", TIERS)
def test_a_folder_of_ours_on_every_tier(strong, tmp_path, tier):
    ids = strong.ids("Ada Turing went from Lake Geneva")
    recorder = RowRecorder(strong.own.spec)
    with strong.own.begin(torch.tensor([ids])) as step:
        recorder(step)
    recorder.save(tmp_path)
    options = TableOptions(table_tier=tier, hot_from=str(tmp_path) if tier == "tiered" else "")
    with opened(strong.folder, tables=options) as one:
        assert greedy(one.model, ids) == strong.right(ids, 8)
        kinds = {type(store).__name__ for store in one.model.tables.stores.values()}
        assert kinds == {f"{tier.capitalize()}Store"}


@pytest.mark.parametrize("tier", TIERS[:3])
def test_a_memory_on_another_model(base, adapter, strong, tier):
    folder, grafted = adapter
    ids = strong.ids("Kurt Hopper went from")
    with opened(base, tables=TableOptions(table_tier=tier)) as alone:
        without = greedy(alone.model, ids)
    with opened(base, adapters=[folder], tables=TableOptions(table_tier=tier)) as one:
        assert type(one.model) is LlamaForCausalLM
        assert greedy(one.model, ids) == greedy(grafted, ids) != without


def test_a_lora_behind_a_memory(base, adapter, strong, tmp_path):
    peft = pytest.importorskip("peft")
    model = LlamaForCausalLM.from_pretrained(base)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "lora")
    ids = strong.ids("Kurt Hopper went from")
    with opened(base, adapters=[adapter[0]]) as one, opened(base, adapters=[adapter[0], tmp_path / "lora"]) as both:
        batch = torch.tensor([ids])
        assert not torch.allclose(both.model(batch).logits, one.model(batch).logits)


@pytest.mark.parametrize("tier", TIERS[:3])
def test_a_released_model(strong, tmp_path, tier):
    new_model(vocab_size=512).save_pretrained(tmp_path)
    strong.tokenizer.save_pretrained(tmp_path)
    with opened(tmp_path, tables=TableOptions(table_tier=tier)) as one:
        assert one.kind == "qwen4_exp_text"
        assert len(greedy(one.model, [9, 10, 11])) == 8


def test_what_cannot_be_opened_is_one_line(base, adapter, strong, tmp_path):
    def fails(error, words, *given, **options):
        with pytest.raises(error, match=words) as caught, opened(*given, **options):
            pass
        assert "\n" not in str(caught.value)

    fails(CheckpointError, r"neither a run \(config.toml\) nor a local folder", tmp_path)
    fails(ConfigError, "is an adapter: name the model it belongs to", adapter[0])
    fails(CheckpointError, "no adapter here", base, adapters=[tmp_path])
    wider = LlamaConfig(
        hidden_size=64, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, vocab_size=400
    )
    LlamaForCausalLM(wider).save_pretrained(tmp_path / "wider")
    strong.tokenizer.save_pretrained(tmp_path / "wider")
    fails(CheckpointError, "this memory belongs to", tmp_path / "wider", adapters=[adapter[0]])
    fails(ConfigError, "tier tiered needs --hot-from", strong.folder, tables=TableOptions(table_tier="tiered"))
    fails(
        ConfigError, "which an adapter has not", base, adapters=[adapter[0]], tables=TableOptions(table_tier="tiered")
    )
    fails(ConfigError, "--stats is told of run folders only", base, tables=TableOptions(stats=True))
    fails(ConfigError, 'no device "cuda:99"', base, device="cuda:99")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.C"}})
    )
    (tmp_path / "evil.py").write_text("raise SystemExit('code that came with a checkpoint was run')")
    fails(CheckpointError, "transformers cannot load it", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    fails(CheckpointError, "transformers cannot load it", tmp_path)
