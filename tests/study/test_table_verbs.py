"""`nengram table`: every verb on real tables, and every mistake in one line."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nengram.address import Addresser, AddressSpec
from nengram.cli import VERBS, choose
from nengram.memory import load_table, save_table
from nengram.store import ResidentStore
from tests.conftest import run_command

DEEPSEEK = {
    "engram_layer_ids": [1],
    "engram_max_ngram_size": 3,
    "engram_vocab_size": 50,
    "engram_n_heads": 2,
    "engram_head_dim": 32,
    "engram_pad_token_id": 2,
    "engram_compressed_vocab_size": 99,
}


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Exit code and what is printed of `nengram table ARGUMENTS`, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        return run_command(monkeypatch, capsys, "table", *arguments)

    return run


@pytest.fixture
def finished(data, tmp_path):
    """What `nengram table` reads of a finished run: a table with its tokenizer beside it."""
    spec = AddressSpec.engram(
        compressed_vocab_size=data.compression.compressed_vocab_size,
        rows_per_head=[500, 900],
        heads=4,
        layer_ids=[1],
        block_indices=[1],
        pad_cid=int(data.compression.cids_V[0]),
    )
    folder = tmp_path / "run" / "final"
    folder.mkdir(parents=True)
    data.tokenizer.save(str(folder / "tokenizer.json"))
    save_table(folder / "table-1.safetensors", ResidentStore(spec.num_rows(1), 8), spec, 1)
    return tmp_path / "run"


def test_stat_and_verify_take_files_folders_and_runs(run, finished):
    path = finished / "final" / "table-1.safetensors"
    for place in (finished, finished / "final", path):
        code, out, _ = run("stat", place)
        assert code == 0 and "fp32, 8 numbers in 32 bytes" in out and "ever written" in out and "3-gram" in out
    code, out, _ = run("stat", path, path, "--json")
    assert code == 0 and [one["layer_id"] for one in json.loads(out)] == [1, 1]
    code, out, _ = run("verify", finished)
    assert code == 0 and "match their checksums" in out and "primes of engram" in out
    code, out, _ = run("verify", finished, "--json")
    assert code == 0 and json.loads(out)[0]["verified"] is True
    damaged = bytearray(path.read_bytes())
    damaged[5000] ^= 1
    path.write_bytes(damaged)
    code, out, error = run("verify", finished)
    assert code == 2 and error.count("\n") == 1 and "table-1.safetensors: damaged" in error


def test_pack_slice_and_create(run, finished, tmp_path):
    path = finished / "final" / "table-1.safetensors"
    code, out, _ = run("pack", path, "packed", "--codec", "int8", "--shards", 2)
    assert code == 0 and "of fp32 ->" in out and "of int8 in 2 files" in out
    assert run("verify", "packed")[0] == 0
    code, out, _ = run("slice", path, "slice", "--rows", "1_0:30")
    assert code == 0 and "rows 10 to 30 (not included)" in out
    assert "a part: rows 10 to 30" in run("stat", "slice")[1]
    code, out, _ = run("create", "zeros", path, "--codec", "bf16")
    assert code == 0 and "of zeros in" in out
    assert "0 (0.0%)" in run("stat", "zeros")[1]
    code, out, _ = run("create", "large", "deepseek-v41-flash", "--layer", 14)
    assert code == 0 and "384,016,682 rows, 94.4 GiB of zeros" in out
    assert (tmp_path / "large").stat().st_blocks * 512 < 1 << 20


def test_create_reads_the_sizes_of_a_preset_that_has_a_tokenizer(run, finished, tmp_path, data):
    tokenizer = finished / "final" / "tokenizer.json"
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Ada Hopper went to place {number}." * 50 for number in range(400)))
    overrides = (f"data.tokenizer={tokenizer}", f"data.corpus={text}", f"data.cache={tmp_path}", "budget.scale=0")
    arguments = (*overrides, "memory.kind=engram", "memory.row_width=16")
    code, out, error = run("create", "zeros", "demo", *arguments)
    assert code == 0, error
    assert '"row_width": 16' in run("stat", "zeros", "--json")[1]


def checkpoint(folder, config=DEEPSEEK):
    spec = AddressSpec.deepseek_v41(
        compressed_vocab_size=99, rows_per_head=50, max_order=3, heads=2, layer_ids=[1], pad_cid=2
    )
    rows = spec.num_rows(1)
    folder.mkdir()
    tensors = {
        "layers.1.engram.embed.weight": torch.randint(0, 255, (rows, 32), dtype=torch.uint8).view(torch.float8_e4m3fn),
        "layers.1.engram.embed.scale": torch.randint(0, 255, (rows, 1), dtype=torch.uint8).view(torch.float8_e8m0fnu),
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return spec


def test_convert_both_ways(run, tmp_path):
    spec = checkpoint(tmp_path / "released")
    code, out, error = run("convert", "released", "tables")
    assert code == 0 and spec.word_code in out and "(fp8)" in out, error
    code, out, _ = run("convert", "tables", "back", "--to", "deepseek_v41")
    assert code == 0
    before = load_file(tmp_path / "released" / "model.safetensors")
    after = load_file(tmp_path / "back" / "model-00001-of-00001.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)
    code, out, _ = run("convert", "back", "single.safetensors")
    assert code == 0 and run("verify", "single.safetensors")[0] == 0


def test_a_tokenizer_beside_a_checkpoint_is_held_against_its_config(run, tmp_path, data):
    checkpoint(tmp_path / "released")
    data.tokenizer.save(str(tmp_path / "released" / "tokenizer.json"))
    code, _, error = run("convert", "released", "tables")
    assert code == 2 and "the config says 99: every address would be wrong" in error and error.count("\n") == 1
    compressed = data.compression.compressed_vocab_size
    config = DEEPSEEK | {"engram_compressed_vocab_size": compressed, "engram_pad_token_id": 7}
    (tmp_path / "released" / "config.json").write_text(json.dumps(config))
    code, out, error = run("convert", "released", "tables")
    assert code == 0 and f"compresses to {compressed} ids, as the config says" in out, error
    assert load_table(tmp_path / "tables" / "table-1.safetensors").spec.pad_cid == data.compression.cids_V[7]


def test_diff_names_the_ngram_that_was_edited(run, finished, tmp_path, data):
    path = finished / "final" / "table-1.safetensors"
    table = load_table(path)
    text = "Ada Hopper went from Mount Ararat."
    ids = data.tokenizer.encode(text, add_special_tokens=False).ids
    rows_S = Addresser(table.spec)(data.compression(np.array([ids])))[1][0, 4]
    table.store.weight[rows_S[table.spec.slot_orders == 3]] += 1
    save_table(tmp_path / "edited", table.store, table.spec, 1)
    (tmp_path / "corpus.txt").write_text(text)
    code, out, error = run("diff", path, "edited", "--corpus", "corpus.txt")
    assert code == 0, error
    assert "4 of" in out.splitlines()[0] and "changed rows that none of them reads: 0" in out
    named = next(line for line in out.splitlines() if "4 of 4" in line)
    keys = [data.tokenizer.decode([token]).lower().strip() for token in ids[2:5]]
    assert all(key in named for key in keys)
    code, out, _ = run("diff", path, "edited", "--corpus", "corpus.txt", "--json", "--most", 1)
    found = json.loads(out)["ngrams"]
    assert code == 0 and len(found) == 1 and found[0]["cids"] == data.compression(np.array(ids[2:5])).tolist()
    assert "name a text with --corpus" in run("diff", path, "edited")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("stat",), "name a table"),
        (("stat", "nope"), "nope: no such file or folder"),
        (("stat", "."), ".: no table here"),
        (("verify", "text"), "text: not a whole safetensors file"),
        (("pack", "nope", "x"), "nope: no such file"),
        (("pack", "t", "x", "--codec", "fp7"), 'did you mean "fp8"'),
        (("pack", "t", "t"), "is the table that is read"),
        (("slice", "t", "x", "--rows", "5"), "write FIRST:END"),
        (("slice", "t", "x"), "give one of them"),
        (("create", "x", "deepseek-v41-flash"), "choose one with --layer"),
        (("create", "x", "demoo"), 'did you mean "demo"'),
        (("convert", "nope", "x"), "nope: no such file or folder"),
        (("convert", ".", "x"), "config.json: is missing"),
        (("convert", "t", "x"), "is a table already"),
        (("convert", "t", "x", "--to", "deepseek_v41"), "deepseek_v41 cannot say these addresses"),
        (("convert", "t", "x", "--to", "deepseek_v41", "--layers", "5"), "has no table of memory layer 5"),
        (("diff", "t", "t", "--corpus", "text"), "name one with --tokenizer"),
        (("diff", "t", "t", "--most", "0"), "--most"),
        (("diff", "t", "nope"), "nope: no such file"),
        (("codecs", "nope"), "nope: no run here"),
    ],
    ids=str,
)
def test_a_mistake_gets_one_line(run, finished, tmp_path, arguments, words):
    (tmp_path / "t").symlink_to(finished / "final" / "table-1.safetensors")
    (tmp_path / "text").write_text("not a table at all")
    code, _, error = run(*arguments)
    assert code == 2 and error.startswith("nengram: ") and error.count("\n") == 1 and words in error, error
    assert not (tmp_path / "x").exists()


def test_what_a_file_says_of_itself_cannot_steer_a_terminal(run, tmp_path, finished):
    path = tmp_path / "evil\x1b[2Jname"
    path.write_bytes((finished / "final" / "table-1.safetensors").read_bytes())
    for verb in ("stat", "verify"):
        code, out, _ = run(verb, path)
        assert code == 0 and "\x1b" not in out and "\\x1b[2Jname" in out


def test_verbs_of_a_group_are_called_by_two_words():
    def named(name):
        return lambda: name

    verbs = {name: named(name) for name in VERBS}
    assert [choose(verbs, args=name.split(), prog="nengram") for name in VERBS] == list(VERBS)
