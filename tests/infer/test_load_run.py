"""A run folder into text: what was trained is what speaks, and a folder that is not whole or not its own is refused."""

import dataclasses
import json
import shutil

import pytest
import torch

from nengram.errors import CheckpointError, ConfigError, DataError
from nengram.files import sha256_file
from nengram.infer import encode, generate, load_run, stream_text
from nengram.text import CompressionMap, train_bpe
from nengram.train import train

PROMPT = "Ada Hopper went from"


def resealed(folder) -> None:
    """Make the manifest's digests agree with the files again, as someone does who swaps one on purpose."""
    path = folder / "final" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = {file.name: sha256_file(file) for file in sorted(path.parent.iterdir()) if file != path}
    path.write_text(json.dumps(manifest))


@pytest.fixture
def copy(run_folder, tmp_path):
    return shutil.copytree(run_folder, tmp_path / "copy")


def test_the_loaded_model_is_the_trained_one(run, run_folder, data):
    assert not run.model.training
    assert run.config.budget.scale == 0 and run.config.model.context == 32
    assert run.facts["corpus"] == data.digest and run.facts["step"] == 40
    assert run.doc_id == data.doc_id and run.compression.digest == data.compression.digest
    assert run.model.spec.compressed_vocab_size == data.compression.compressed_vocab_size
    from nengram.train import token_nats

    nats = token_nats(run.model, data.splits["dev"], batch=4, context=32, tokens=200)
    last = json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert float(nats[nats == nats].mean()) == pytest.approx(last["dev_nats"], abs=1e-6)


def test_pieces_add_up_to_what_the_tokens_decode_to(run):
    pieces = list(stream_text(run, PROMPT, max_tokens=12, temperature=1.0, seed=3))
    prompt = [run.doc_id, *encode(run.tokenizer, PROMPT)]
    tokens = generate(run.model, prompt, max_tokens=12, temperature=1.0, seed=3, stop_id=run.doc_id, doc_id=run.doc_id)
    assert len(pieces) > 3
    whole = run.tokenizer.decode([*prompt, *tokens], skip_special_tokens=False)
    assert "<|doc|>" + PROMPT + "".join(pieces) == whole


def test_a_separator_spelt_out_in_the_prompt_is_plain_text(run):
    assert run.doc_id not in encode(run.tokenizer, "a<|doc|>b")
    assert run.tokenizer.encode("a<|doc|>b").ids.count(run.doc_id) == 1  # and the tokenizer is left as it was


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        ("", "the prompt is empty"),
        ("word " * 40, r"the prompt is \d+ tokens long, the model reads at most 32: give a shorter one"),
        ("a\udcff", "not valid Unicode at character 1"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused_at_the_call(run, prompt, line):
    with pytest.raises(DataError, match=line) as refused:
        stream_text(run, prompt)
    assert "\n" not in str(refused.value)


def test_no_run_and_an_unfinished_run_are_told_apart(copy, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: no run here \(config.toml is missing\)"):
        load_run(tmp_path / "nowhere")
    shutil.rmtree(copy / "final")
    with pytest.raises(CheckpointError, match="this run is not finished .* --resume"):
        load_run(copy)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "table-1.safetensors", "tokenizer.json", "compression.safetensors"]
)
def test_missing_and_damaged_files_are_refused_by_name(copy, name):
    path = copy / "final" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: damaged"):
        load_run(copy)
    path.write_bytes(content[:40])
    resealed(copy)
    with pytest.raises(CheckpointError, match=name):
        load_run(copy)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        load_run(copy)
    resealed(copy)
    with pytest.raises(CheckpointError, match=name) as refused:
        load_run(copy)
    assert "\n" not in str(refused.value)


def test_another_tokenizer_is_refused_with_both_digests(copy, data):
    size = data.tokenizer.get_vocab_size()
    train_bpe([f"{n} other text entirely {n * n}" for n in range(900)], size).save(
        str(copy / "final" / "tokenizer.json")
    )
    resealed(copy)
    with pytest.raises(CheckpointError, match=r"another tokenizer \((\w{5}-){2}\w{5}, now (\w{5}-){2}\w{5}\)"):
        load_run(copy)


def test_another_compression_map_is_refused_with_both_digests(copy, data):
    other = CompressionMap.identity(data.vocab_size, data.compression.tokenizer_digest)
    other.save(copy / "final" / "compression.safetensors")
    resealed(copy)
    with pytest.raises(CheckpointError, match=r"another compression \((\w{5}-){2}\w{5}, now (\w{5}-){2}\w{5}\)"):
        load_run(copy)


def test_an_edited_config_is_refused_and_one_of_another_size_names_the_tensor(copy):
    path = copy / "final" / "config.toml"
    text = path.read_text()
    path.write_text(text.replace("norm_eps = ", "norm_eps = 1"))
    with pytest.raises(CheckpointError, match="config.toml: damaged"):
        load_run(copy)
    path.write_text(text.replace("experts = ", "experts = 1"))
    resealed(copy)
    with pytest.raises(CheckpointError, match=r"model.safetensors: blocks\S+ is \(.*the config asks for"):
        load_run(copy)
    path.write_text(text[: len(text) // 2] + "\n[")
    resealed(copy)
    with pytest.raises(ConfigError, match=r"config.toml: cannot be read as TOML"):
        load_run(copy)


@pytest.mark.parametrize(
    "changes", [{"budget__arm": "moe"}, {"memory__compress": False}, {"budget__arm": "one_row"}], ids=str
)
def test_every_kind_of_run_speaks(config, data, tmp_path, changes):
    config = config.replace(train__tokens=128 * 3, **changes)
    for _ in train(config, data, tmp_path / "run"):
        pass
    run = load_run(tmp_path / "run")
    assert len("".join(stream_text(run, PROMPT, max_tokens=5))) > 0
    if run.model.spec is not None:
        assert run.model.spec.compressed_vocab_size == run.compression.compressed_vocab_size
    assert dataclasses.asdict(run.config)["budget"]["arm"] == changes.get("budget__arm", "engram")


def test_generating_leaves_no_gradient_behind(run):
    next(iter(stream_text(run, PROMPT, max_tokens=3)))
    assert torch.is_grad_enabled() and all(parameter.grad is None for parameter in run.model.parameters())
