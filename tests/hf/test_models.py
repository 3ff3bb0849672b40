"""Our models behind the classes of transformers: the same numbers, however a batch is arranged; one line for what is not offered."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from nengram.address import AddressSpec
from nengram.config import MemoryConfig, ModelConfig, as_dict
from nengram.errors import AddressError, ConfigError
from nengram.hf.auto import register
from nengram.hf.configuration import NengramConfig
from nengram.hf.export import from_run
from nengram.hf.modeling import NengramForCausalLM, NengramModel
from nengram.model import Transformer
from tests.hf.strong import PROMPTS

SMALL = {
    "vocab_size": 60,
    "width": 32,
    "blocks": 2,
    "experts": 4,
    "expert_width": 16,
    "shared_width": 16,
    "context": 40,
}
TABLES = {"heads": 2, "row_width": 4, "rows_per_head": [101, 101], "table_std": 0.5}
KINDS = {
    "plain": {},
    "engram": {"kind": "engram", "blocks": [0, 1], **TABLES},
    "additive": {"kind": "additive", "blocks": [1], **TABLES},
    "deepseek_v41": {"kind": "engram", "dialect": "deepseek_v41", "kernel": 0, "pad_id": 2, **TABLES},
    "qwen_ple": {"kind": "engram", "dialect": "qwen_ple", "compress": False, "pad_id": 7, **TABLES},
    "one_row": {"kind": "engram", "control": "one_row", **TABLES},
}


@pytest.fixture(scope="module")
def loaded(any_strong):
    return any_strong, AutoModelForCausalLM.from_pretrained(any_strong.folder)


def text(batch: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(0))


def test_logits_are_those_of_our_own_model_bit_for_bit(loaded):
    strong, model = loaded
    ids_BT = torch.tensor([strong.ids(PROMPTS[0])])
    with torch.no_grad():
        assert torch.equal(model(ids_BT, use_cache=False).logits, strong.own(ids_BT))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_kind_of_memory_is_served(kind, tmp_path):
    model = NengramForCausalLM(NengramConfig(SMALL, KINDS[kind])).eval()
    ids_BT = text()
    if kind == "qwen_ple":
        ids_BT[0, 9] = 7  # an end of text, which this dialect looks for itself
    whole_BTV = model.tables(ids_BT)
    assert torch.equal(model(ids_BT).logits, whole_BTV)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    made = again.generate(ids_BT[:, :8], max_new_tokens=6, do_sample=False, eos_token_id=-1)
    assert torch.equal(made[:, 8:], again.tables(made[:, :-1]).argmax(-1)[:, 7:])


@torch.no_grad()
def test_padding_on_either_side_changes_no_text(loaded):
    strong, model = loaded
    ids = strong.ids(PROMPTS[0])
    whole_TV, pads = strong.logits(ids), 5
    for left in (True, False):
        ids_BT = torch.tensor([[9] * pads + ids if left else ids + [9] * pads])
        mask_BT = torch.tensor([[0] * pads + [1] * len(ids) if left else [1] * len(ids) + [0] * pads])
        logits_TV = model(ids_BT, attention_mask=mask_BT).logits[0]
        shown = slice(pads, None) if left else slice(0, -pads)
        torch.testing.assert_close(logits_TV[shown], whole_TV, atol=1e-4, rtol=1e-4)
        assert logits_TV.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@torch.no_grad()
def test_a_mask_by_query_is_read_like_that_of_the_keys(loaded, dtype):
    strong, model = loaded
    ids_BT = torch.tensor([[9, 9, *strong.ids(PROMPTS[2])]])
    shown_BT = torch.arange(ids_BT.shape[1])[None] >= 2
    visible = torch.ones(1, 1, *[ids_BT.shape[1]] * 2, dtype=torch.bool).tril() & shown_BT[:, None, None]
    mask = visible if dtype == torch.bool else torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(dtype).min)
    by_key = model(ids_BT, attention_mask=shown_BT.long()).logits
    torch.testing.assert_close(model(ids_BT, attention_mask=mask).logits[:, 2:], by_key[:, 2:])


@torch.no_grad()
def test_the_last_logits_are_the_last_of_all(loaded):
    strong, model = loaded
    ids_BT = torch.tensor([strong.ids(PROMPTS[0])])
    whole = model(ids_BT).logits
    torch.testing.assert_close(model(ids_BT, logits_to_keep=1).logits, whole[:, -1:])
    torch.testing.assert_close(model(ids_BT, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]])


@torch.no_grad()
def test_the_loss_is_that_of_the_next_token_and_skips_what_is_masked(loaded):
    strong, model = loaded
    ids_BT = torch.tensor([strong.ids(PROMPTS[0])])
    labels_BT = ids_BT.clone()
    labels_BT[:, :4] = -100
    output = model(ids_BT, labels=labels_BT)
    wanted = torch.nn.functional.cross_entropy(strong.own(ids_BT)[0, 3:-1], ids_BT[0, 4:])
    torch.testing.assert_close(output.loss, wanted)
    assert model(ids_BT, labels=labels_BT, return_dict=False)[0] == output.loss


@torch.no_grad()
def test_ids_without_any_order_are_read_by_the_history_that_comes_with_them(tmp_path_factory):
    """What an engine with flat rows passes: per token the ids before it. Here the rows come backwards."""
    model = NengramForCausalLM(NengramConfig(SMALL, KINDS["deepseek_v41"])).eval()
    ids_BT = text(1, 12)
    past = torch.nn.functional.pad(ids_BT, (2, 0), value=-1)
    history_BTH = torch.stack([past[:, 1:-1], past[:, :-2]], -1)
    seen = []
    model.tables.observer = seen.append
    model(ids_BT)
    model(ids_BT.flip(1), position_ids=torch.arange(12).flip(0)[None], lookback_ids=history_BTH.flip(1))
    whole, flat = (step.rows[1].reshape(12, -1) for step in seen)
    assert torch.equal(flat.flip(0), whole)


@torch.no_grad()
def test_a_shorter_dtype_leaves_tables_alone(strong):
    model = AutoModelForCausalLM.from_pretrained(strong.folder, dtype=torch.bfloat16, device_map="cpu")
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    half = AutoModelForCausalLM.from_pretrained(strong.folder).to(torch.bfloat16)
    for one in (model, half):
        for layer_id, store in strong.own.stores.items():
            weight = one.tables.stores[layer_id].tensors()["weight"]
            assert weight.dtype == torch.float32 and torch.equal(weight, store.tensors()["weight"])
    ids_BT = torch.tensor([strong.ids(PROMPTS[0])])
    assert torch.equal(model(ids_BT).logits, half(ids_BT).logits)
    assert not any("table" in name for name in model.state_dict())


def test_both_auto_classes_and_the_module_find_us(strong):
    register()
    register()
    assert type(AutoConfig.from_pretrained(strong.folder)) is NengramConfig is transformers.NengramConfig
    assert (
        type(AutoModelForCausalLM.from_pretrained(strong.folder))
        is NengramForCausalLM
        is transformers.NengramForCausalLM
    )
    base = AutoModel.from_pretrained(strong.folder)
    ids_BT = torch.tensor([strong.ids(PROMPTS[0])])
    assert type(base) is NengramModel
    with torch.no_grad():
        assert torch.equal(base(ids_BT).last_hidden_state @ base.stack.embed.weight.T, strong.own(ids_BT))
    assert AutoTokenizer.from_pretrained(strong.folder)(PROMPTS[0])["input_ids"] == strong.ids(PROMPTS[0])


@pytest.mark.slow
def test_importing_the_room_is_enough(strong):
    script = (
        "import nengram.hf\nfrom transformers import AutoModelForCausalLM as A\n"
        f"print(type(A.from_pretrained({str(strong.folder)!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "NengramForCausalLM", done.stderr


def test_a_run_stays_as_it_was_and_is_not_copied(strong):
    before = {name: tensor.clone() for name, tensor in strong.own.state_dict().items()}
    model = from_run(strong.run)
    assert model.tables is strong.own and strong.own.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in strong.own.state_dict().items())


def test_a_fresh_model_is_drawn_as_ours_are():
    model = NengramForCausalLM(NengramConfig(SMALL, KINDS["engram"]))
    own = Transformer(
        ModelConfig(**SMALL), MemoryConfig(**KINDS["engram"] | {"blocks": (0, 1), "rows_per_head": (101, 101)})
    )
    own.init_weights(0)
    assert all(torch.equal(model.tables.state_dict()[name], tensor) for name, tensor in own.state_dict().items())
    assert torch.equal(model.tables.stores[0].tensors()["weight"], own.stores[0].tensors()["weight"])


def test_the_config_holds_every_number_and_gives_the_usual_names():
    config = NengramConfig(SMALL | {"heads": 4}, KINDS["engram"])
    again = NengramConfig.from_dict(json.loads(config.to_json_string()))
    assert again.sections() == config.sections()
    assert config.sections()[0] == ModelConfig(**SMALL) and as_dict(config.sections()[1]) == config.memory
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    assert [getattr(config, name) for name in names] == [60, 32, 2, 4, 2, 8] and config.max_position_embeddings == 40


def test_a_fresh_model_of_compressed_ids_brings_its_own_map(strong):
    config = AutoConfig.from_pretrained(strong.folder)
    with pytest.raises(ConfigError, match=f"{strong.own.spec.word_code}.* their map lies with the weights"):
        AutoModelForCausalLM.from_config(config)
    assert NengramForCausalLM(config, strong.own).tables is strong.own


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            {"backbone": {"widht": 32}},
            r'config of a nengram model: unknown key "model.widht" \(did you mean "width"\?\)',
        ),
        ({"backbone": {"width": "wide"}}, '"model.width" must be a whole number'),
        ({"memory": {"kind": "engram", "row": 3}}, 'unknown key "memory.row"'),
    ],
)
def test_a_config_of_unknown_keys_is_refused(arguments, line):
    with pytest.raises(ConfigError, match=line) as refused:
        NengramConfig(**arguments)
    assert "\n" not in str(refused.value)


def test_a_damaged_spec_is_refused():
    spec = AddressSpec.engram(compressed_vocab_size=60, rows_per_head=[101, 101], heads=2, layer_ids=[1], pad_cid=0)
    content = json.loads(spec.to_json())
    assert NengramConfig(SMALL, address_spec=content).spec.digest == spec.digest
    with pytest.raises(AddressError, match="pad_cid"):
        NengramConfig(SMALL, address_spec=content | {"pad_cid": 60})


def test_what_is_not_offered_says_so():
    model = NengramForCausalLM(NengramConfig(SMALL, KINDS["engram"]))
    with pytest.raises(ConfigError, match="it cannot be resized under a table"):
        model.resize_token_embeddings(64)
    with pytest.raises(ConfigError, match=r"rows without any order .*: memory.kernel=0"):
        model(text(), lookback_ids=torch.zeros(2, 20, 2, dtype=torch.long))
    with pytest.raises(ConfigError, match="the attention mask has 3 columns for 0 tokens in the cache and 20 new ones"):
        model(text(), attention_mask=torch.ones(2, 3))
    with pytest.raises(ConfigError, match="output_attentions is not offered"):
        model(text(), output_attentions=True)
    with pytest.raises(ConfigError, match="push_to_hub is not offered"):
        model.save_pretrained("nowhere", push_to_hub=True)


def test_lora_on_our_own_model_trains_and_generates(strong):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["query", "key_value", "out"], r=2)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(strong.folder), lora)
    ids = strong.ids(PROMPTS[0])
    said = {"input_ids": torch.tensor([ids]), "max_new_tokens": 6, "do_sample": False}
    assert model.eval().generate(**said)[0, len(ids) :].tolist() == strong.right(ids, 6)
    moved = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    rate = torch.optim.SGD(moved, 5.0)
    for _ in range(2):
        model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.backward()
        rate.step()
    tuned = model.eval().generate(**said)[0, len(ids) :].tolist()
    whole = model(torch.tensor([ids + tuned[:-1]])).logits[0, len(ids) - 1 :].argmax(-1)
    assert tuned == whole.tolist() != strong.right(ids, 6)
