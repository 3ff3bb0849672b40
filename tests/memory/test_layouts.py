"""Released layouts: checkpoints of exactly those names, dtypes and shapes become tables and come back byte for byte."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nengram.address import AddressSpec
from nengram.errors import CheckpointError
from nengram.memory import load_table, save_table
from nengram.memory.layouts import LAYOUTS, export_tables, import_checkpoint, tables_in
from nengram.memory.packing import pack
from nengram.memory.stat import stat, verify
from nengram.memory.table import open_rows
from nengram.store import ResidentStore
from nengram.store.table_file import write_table

DEEPSEEK = {
    "engram_layer_ids": [1, 4],
    "engram_max_ngram_size": 4,
    "engram_vocab_size": 90,
    "engram_n_heads": 2,
    "engram_head_dim": 64,
    "engram_pad_token_id": 2,
    "engram_compressed_vocab_size": 500,
}
DEEPSEEK_SPEC = AddressSpec.deepseek_v41(
    compressed_vocab_size=500, rows_per_head=90, max_order=4, heads=2, layer_ids=[1, 4], pad_cid=2
)
DEEPSEEK["engram_num_embeddings"] = [DEEPSEEK_SPEC.num_rows(1), DEEPSEEK_SPEC.num_rows(4)]
QWEN = {
    "vocab_size": 300,
    "eos_token_id": [7, 9],
    "hidden_size": 32,
    "ple_layer_ids": [2, 5],
    "ngram_size": 3,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 100,
    "make_ngram_vocab_size_divisible_by": 64,
    "seed": 99,
}
QWEN_SPEC = AddressSpec.qwen_ple(
    vocab_size=300, eos_id=7, ple_layer_ids=[2, 5], rows_per_head=100, heads=2, divisible_by=64, seed=99
)
PLE = "model.language_model.layers.{}.ple.ple_embedding."


def any_bytes(*shape, dtype, seed=0):
    """Every bit pattern, NaNs among them, and some rows of zeros."""
    bytes_RB = np.random.default_rng(seed).integers(0, 256, (shape[0], shape[1] * dtype.itemsize), dtype=np.uint8)
    bytes_RB[::5] = 0
    return torch.from_numpy(bytes_RB).view(dtype).view(shape)


def write_checkpoint(folder, files, config):
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        save_file(tensors, folder / name, {"format": "pt"})
    weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def deepseek_tensors(layer_id):
    rows = DEEPSEEK_SPEC.num_rows(layer_id)
    return {
        f"layers.{layer_id}.engram.embed.weight": any_bytes(rows, 64, dtype=torch.float8_e4m3fn, seed=layer_id),
        f"layers.{layer_id}.engram.embed.scale": any_bytes(rows, 2, dtype=torch.float8_e8m0fnu, seed=layer_id + 50),
    }


@pytest.fixture
def deepseek(tmp_path):
    """Two tables and some backbone, in the names, dtypes and shapes of the release."""
    other = {"layers.0.attn.wq.weight": torch.randn(4, 4), "layers.1.engram.q_weight": torch.randn(4, 8)}
    files = {
        "model-00001-of-00003.safetensors": other,
        "model-00002-of-00003.safetensors": deepseek_tensors(1),
        "model-00003-of-00003.safetensors": deepseek_tensors(4),
    }
    return write_checkpoint(tmp_path / "deepseek", files, {"text_config": DEEPSEEK})


def qwen_tensors(layer_id, dtype=torch.float8_e4m3fn, pieces=4):
    prefix, rows = PLE.format(QWEN_SPEC.layer(layer_id).block_index), QWEN_SPEC.num_rows(layer_id)
    matrix = any_bytes(rows, 8, dtype=dtype, seed=layer_id)
    tensors = {
        f"{prefix}layer_multipliers": torch.from_numpy(QWEN_SPEC.multipliers(layer_id)),
        f"{prefix}ngram_heads_vocab_sizes": torch.from_numpy(QWEN_SPEC.moduli(layer_id)),
        f"{prefix}ngram_heads_offsets": torch.from_numpy(QWEN_SPEC.offsets(layer_id)),
    }
    if pieces == 1:
        tensors[f"{prefix}ngram_embedding.weight"] = matrix
    else:
        for number, piece in enumerate(matrix.chunk(pieces)):
            tensors[f"{prefix}ngram_embedding.shard_{number}.weight"] = piece.clone()
    if dtype == torch.float8_e4m3fn:
        tensors[f"{prefix}ngram_embedding.weight_scale_inv"] = torch.tensor([0.0123])
    return tensors


@pytest.fixture
def qwen(tmp_path):
    files = {f"model-{layer_id}.safetensors": qwen_tensors(layer_id, pieces=12) for layer_id in (0, 1)}
    return write_checkpoint(tmp_path / "qwen", files, {"text_config": QWEN})


def all_tensors(folder):
    """{name: (dtype, shape, bytes)} of a checkpoint."""
    found = {}
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            found[name] = (tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found


@pytest.mark.parametrize("shards", [1, 3])
def test_deepseek_comes_in_row_by_row_and_goes_out_byte_for_byte(deepseek, tmp_path, shards):
    written = import_checkpoint(deepseek, tmp_path / "tables", shards=shards)
    assert [(one.layer_id, one.rows, one.codec) for one in written] == [
        (layer_id, DEEPSEEK_SPEC.num_rows(layer_id), "fp8") for layer_id in (1, 4)
    ]
    for one in written:
        tensors = deepseek_tensors(one.layer_id)
        halves = [tensor.view(torch.uint8).numpy() for tensor in tensors.values()]
        with open_rows(one.path) as table:
            np.testing.assert_array_equal(table.read_rows(0, table.num_rows), np.hstack(halves))
        found = verify(one.path, expect_spec=DEEPSEEK_SPEC)
        assert (found.origin, found.files, found.row_bytes) == ("deepseek_v41", shards, 66)
    export_tables(tables_in(tmp_path / "tables"), tmp_path / "back", "deepseek_v41")
    back = all_tensors(tmp_path / "back")
    assert back == {name: tensor for name, tensor in all_tensors(deepseek).items() if ".embed." in name}
    assert json.loads((tmp_path / "back" / "config.json").read_text())["text_config"] == DEEPSEEK
    again = import_checkpoint(tmp_path / "back", tmp_path / "again")
    assert [stat(one.path).addresses for one in again] == [DEEPSEEK_SPEC.word_code] * 2


def test_decoded_rows_are_values_times_scales(deepseek, tmp_path):
    [written] = import_checkpoint(deepseek, tmp_path / "one.safetensors", layer_ids=[1])
    store = load_table(written.path, DEEPSEEK_SPEC).store
    values, scales = (tensor.float() for tensor in deepseek_tensors(1).values())
    expected = values * scales.repeat_interleave(32, dim=1)
    with store.prefetch(torch.arange(store.num_rows)) as ticket:
        torch.testing.assert_close(ticket.vectors(), expected, rtol=0, atol=0, equal_nan=True)


def test_a_config_of_the_reference_code_gives_the_same_addresses(deepseek, tmp_path):
    flat = dict(DEEPSEEK)
    flat["engram_pad_id"] = flat.pop("engram_pad_token_id")
    (deepseek / "config.json").write_text(json.dumps(flat))
    [written] = import_checkpoint(deepseek, tmp_path / "tables", layer_ids=[4])
    assert stat(written.path).addresses == DEEPSEEK_SPEC.word_code
    named = {f"model.{name}": tensor for name, tensor in deepseek_tensors(4).items()}
    single = write_checkpoint(tmp_path / "single", {"model.safetensors": named}, {"text_config": DEEPSEEK})
    (single / "model.safetensors.index.json").unlink()
    for place in (single, single / "model.safetensors"):
        [written] = import_checkpoint(place, tmp_path / "tables", layer_ids=[4])
        assert stat(written.path).addresses == DEEPSEEK_SPEC.word_code
    export_tables([written.path], tmp_path / "back", "deepseek_v41")
    assert all_tensors(tmp_path / "back").keys() == named.keys()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("pieces", [1, 12])
def test_qwen_comes_in_and_goes_out_byte_for_byte(tmp_path, dtype, pieces):
    files = {f"model-{layer_id}.safetensors": qwen_tensors(layer_id, dtype, pieces) for layer_id in (0, 1)}
    source = write_checkpoint(tmp_path / "qwen", files, QWEN)
    written = import_checkpoint(source, tmp_path / "tables")
    for one in written:
        found = verify(one.path, expect_spec=QWEN_SPEC)
        assert found.padding_rows == QWEN_SPEC.num_rows(one.layer_id) - QWEN_SPEC.moduli(one.layer_id).sum()
        with open_rows(one.path) as table:
            rows_RB = any_bytes(table.num_rows, 8, dtype=dtype, seed=one.layer_id).view(torch.uint8).numpy()
            np.testing.assert_array_equal(table.read_rows(0, table.num_rows), rows_RB)
            assert dtype != torch.float8_e4m3fn or table.codec.scale == np.float32(0.0123)
    export_tables(tables_in(tmp_path / "tables"), tmp_path / "back", "qwen_ple")
    assert all_tensors(tmp_path / "back") == all_tensors(source)


def test_pieces_are_taken_by_number_not_by_spelling(qwen, tmp_path):
    [written] = import_checkpoint(qwen, tmp_path / "tables", layer_ids=[0])
    whole = any_bytes(QWEN_SPEC.num_rows(0), 8, dtype=torch.float8_e4m3fn).view(torch.uint8).numpy()
    with open_rows(written.path) as table:
        np.testing.assert_array_equal(table.read_rows(0, table.num_rows), whole)


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale", "scale", "shard_3.weight_scale", "weight.scale"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_whatever_is_called_a_scale_and_is_one_number_is_taken(qwen, tmp_path, name, shape):
    tensors = qwen_tensors(0, pieces=12)
    value = tensors.pop(PLE.format(1) + "ngram_embedding.weight_scale_inv").to(torch.bfloat16).view(shape)
    tensors[PLE.format(1) + f"ngram_embedding.{name}"] = value
    write_checkpoint(qwen, {"model-0.safetensors": tensors}, {"text_config": QWEN})
    [written] = import_checkpoint(qwen, tmp_path / "tables", layer_ids=[0])
    assert stat(written.path).codec["scale"] == float(value.float()).hex()
    export_tables([written.path], tmp_path / "back", "qwen_ple")
    assert all_tensors(tmp_path / "back") == all_tensors_of(qwen / "model-0.safetensors")


def all_tensors_of(path):
    shutil.copy(path, path.parent.parent / "alone.safetensors")
    (path.parent.parent / "alone").mkdir()
    shutil.move(path.parent.parent / "alone.safetensors", path.parent.parent / "alone" / "model.safetensors")
    return all_tensors(path.parent.parent / "alone")


def test_a_scale_can_be_given_and_must_agree(qwen, tmp_path):
    without = {name: tensor for name, tensor in qwen_tensors(0, pieces=12).items() if "scale" not in name}
    with pytest.raises(CheckpointError, match=r"model-0.safetensors says scale|says scale 0.0123, --scale says 0.5"):
        import_checkpoint(qwen, tmp_path / "tables", layer_ids=[0], scale=0.5)
    write_checkpoint(qwen, {"model-0.safetensors": without}, {"text_config": QWEN})
    with pytest.raises(CheckpointError, match="give it with --scale"):
        import_checkpoint(qwen, tmp_path / "tables", layer_ids=[0])
    [written] = import_checkpoint(qwen, tmp_path / "tables", layer_ids=[0], scale=0.5)
    assert stat(written.path).codec["scale"] == (0.5).hex()
    export_tables([written.path], tmp_path / "back", "qwen_ple")
    [back] = import_checkpoint(tmp_path / "back", tmp_path / "again", layer_ids=[0])
    assert stat(back.path).codec["scale"] == (0.5).hex()


def test_a_table_of_our_own_is_exported_if_that_family_could_have_made_it(tmp_path):
    spec = AddressSpec.engram(
        compressed_vocab_size=500, rows_per_head=[90] * 3, heads=2, layer_ids=[1, 4], pad_cid=2, block_indices=[1, 4]
    )
    save_table(tmp_path / "fp32.safetensors", ResidentStore(spec.num_rows(1), 64), spec, 1)
    with pytest.raises(CheckpointError, match="holds fp8 rows, this table is fp32: pack it with --codec fp8"):
        export_tables([tmp_path / "fp32.safetensors"], tmp_path / "out", "deepseek_v41")
    pack(tmp_path / "fp32.safetensors", tmp_path / "fp8.safetensors", codec="fp8")
    export_tables([tmp_path / "fp8.safetensors"], tmp_path / "out", "deepseek_v41")
    [back] = import_checkpoint(tmp_path / "out", tmp_path / "back", layer_ids=[1])
    assert stat(back.path).addresses == DEEPSEEK_SPEC.word_code
    with safe_open(tmp_path / "out" / "model-00001-of-00001.safetensors", framework="pt") as file:
        assert file.get_slice("layers.1.engram.embed.scale").get_shape() == [spec.num_rows(1), 2]
    mixed = AddressSpec.engram(
        compressed_vocab_size=500, rows_per_head=[90, 300], heads=2, layer_ids=[1], pad_cid=2, block_indices=[1]
    )
    save_table(tmp_path / "mixed.safetensors", ResidentStore(mixed.num_rows(1), 64), mixed, 1)
    pack(tmp_path / "mixed.safetensors", tmp_path / "mixed8.safetensors", codec="fp8")
    for layout in LAYOUTS:
        with pytest.raises(CheckpointError, match=f"{layout} cannot say these addresses"):
            export_tables([tmp_path / "mixed8.safetensors"], tmp_path / "no", layout)
    assert not (tmp_path / "no").exists()


def changed(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    inner = config["text_config"]
    inner.update(fields)
    config["text_config"] = {name: value for name, value in inner.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"engram_num_embeddings": [1, 2]}, r"engram_num_embeddings is \[1, 2\], but the primes .* sum to \[630, "),
        (
            {"engram_vocab_size": 98, "engram_num_embeddings": ...},
            "embed.weight hold 630 rows, .* config make 6[0-9][0-9]",
        ),
        ({"engram_vocab_size": 90.0}, "engram_vocab_size is 90.0, not a whole number"),
        ({"engram_vocab_size": True}, "engram_vocab_size is True, not a whole number"),
        ({"engram_vocab_size": ...}, "engram_vocab_size is missing"),
        ({"engram_layer_ids": "1"}, "not a list of whole numbers|engram_layer_ids"),
        ({"engram_layer_ids": [1, 1]}, "1 appears twice"),
        ({"engram_layer_ids": [1, 4, 6], "engram_num_embeddings": ...}, "no tensor of memory layer 6"),
        ({"engram_head_dim": 32}, r"weight is F8_E4M3 \[630, 64\], not F8_E4M3 \[rows, 32\]"),
        ({"engram_pad_token_id": 3}, "the pad token is 3, .* give --tokenizer"),
        ({"engram_n_heads": 0}, "heads must be an integer in 1"),
        ({"engram_compressed_vocab_size": 2**40}, "compressed_vocab_size must be an integer"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_is_refused_in_one_line(deepseek, tmp_path, fields, words):
    changed(deepseek, **fields)
    with pytest.raises(CheckpointError, match=words) as caught:
        import_checkpoint(deepseek, tmp_path / "tables")
    assert str(deepseek) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "tables").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"ngram_vocab_size_base": 103},
            "vocab_sizes has .* its config makes|hold .* rows, the addresses in its config",
        ),
        (
            {"seed": 1234},
            "layer_multipliers has .* at place 0, its config makes .*: config and tables are of different",
        ),
        ({"eos_token_id": ...}, "eos_token_id is missing"),
        ({"eos_token_id": []}, "eos_token_id"),
        ({"hidden_size": 33}, "ple_embed_dim is 33, which 4 heads cannot share"),
        ({"ple_layer_ids": [2, 4]}, "no tensor of memory layer 1"),
    ],
    ids=str,
)
def test_a_qwen_config_that_does_not_fit_is_refused(qwen, tmp_path, fields, words):
    changed(qwen, **fields)
    with pytest.raises(CheckpointError, match=words) as caught:
        import_checkpoint(qwen, tmp_path / "tables")
    assert "\n" not in str(caught.value) and not (tmp_path / "tables").exists()


def test_a_missing_piece_is_named(qwen, tmp_path):
    index = qwen / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][PLE.format(1) + "ngram_embedding.shard_5.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="piece 5 of .* is missing"):
        import_checkpoint(qwen, tmp_path / "tables")


@pytest.mark.parametrize(
    "file", ["../model-00002-of-00003.safetensors", "/etc/passwd", "a/../../b", "", 3, None, "a\\b"]
)
def test_an_index_cannot_lead_out_of_its_folder(deepseek, tmp_path, file):
    index = deepseek / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["layers.1.engram.embed.weight"] = file
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="is no file inside this folder"):
        import_checkpoint(deepseek, tmp_path / "tables")


def test_damaged_and_missing_parts_are_named(deepseek, tmp_path):
    shard = deepseek / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="model-00002-of-00003.safetensors: not a whole safetensors file"):
        import_checkpoint(deepseek, tmp_path / "tables")
    save_file({"other": torch.zeros(1)}, shard)
    with pytest.raises(CheckpointError, match="has no tensor layers.1.engram.embed.weight, which .* says it holds"):
        import_checkpoint(deepseek, tmp_path / "tables")
    shard.unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003.safetensors: no such file"):
        import_checkpoint(deepseek, tmp_path / "tables")
    for name, words in (("model.safetensors.index.json", "is not JSON"), ("config.json", "is not a JSON object")):
        (deepseek / name).write_text("[" * 100_000 if "index" in name else "[]")
        with pytest.raises(CheckpointError, match=words if "index" not in name else "is not JSON"):
            import_checkpoint(deepseek, tmp_path / "tables")
    (deepseek / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json: is missing"):
        import_checkpoint(deepseek, tmp_path / "tables")


def test_a_checkpoint_without_a_table_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "plain", {"model.safetensors": {"x": torch.zeros(2)}}, {})
    with pytest.raises(
        CheckpointError, match=r"has no tensor of a table that is known here \(deepseek_v41, qwen_ple\)"
    ):
        import_checkpoint(folder, tmp_path / "tables")


def test_tables_of_two_models_make_no_checkpoint(deepseek, qwen, tmp_path):
    one = import_checkpoint(deepseek, tmp_path / "one", layer_ids=[1])
    other = import_checkpoint(qwen, tmp_path / "two", layer_ids=[0])
    with pytest.raises(CheckpointError, match="one checkpoint has one config"):
        export_tables([one[0].path, other[0].path], tmp_path / "out", "qwen_ple")
    with pytest.raises(CheckpointError, match="two of these tables are of one memory layer"):
        export_tables([one[0].path, one[0].path], tmp_path / "out", "deepseek_v41")
    with pytest.raises(CheckpointError, match=r'unknown layout "qwen" \(did you mean "qwen_ple"\?\)'):
        export_tables([one[0].path], tmp_path / "out", "qwen")


def test_a_note_of_origin_is_not_believed(deepseek, tmp_path):
    """A table file may come from a stranger: its note of tensor names and pieces can only name tensors."""
    [written] = import_checkpoint(deepseek, tmp_path / "tables", layer_ids=[1])
    with open_rows(written.path) as table:
        for number, origin in enumerate(("[" * 99, "3", '{"layout":"deepseek_v41","prefix":3,"config":7}')):
            path = tmp_path / f"{number}.safetensors"
            rows_NB = table.read_rows(0, table.num_rows)
            write_table(path, table.codec, table.num_rows, table.metadata | {"origin": origin}, [rows_NB])
            export_tables([path], tmp_path / f"out{number}", "deepseek_v41")
            assert all_tensors(tmp_path / f"out{number}").keys() == deepseek_tensors(1).keys()


def test_two_tables_that_claim_one_name_make_no_checkpoint(qwen, tmp_path):
    first, second = import_checkpoint(qwen, tmp_path / "tables")
    with open_rows(first.path) as table, open_rows(second.path) as other:
        forged = other.metadata | {"origin": table.metadata["origin"]}
        rows_NB = other.read_rows(0, other.num_rows)
        write_table(tmp_path / "forged.safetensors", other.codec, other.num_rows, forged, [rows_NB])
    with pytest.raises(CheckpointError, match="would be written twice"):
        export_tables([first.path, tmp_path / "forged.safetensors"], tmp_path / "out", "qwen_ple")
    assert not (tmp_path / "out").exists()
