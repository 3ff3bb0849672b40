"""Whole models of every dialect: its addresses, its layers, blocked positions, and no table of another dialect."""

import dataclasses

import numpy as np
import pytest
import torch

from nengram.address import Addresser, AddressSpec
from nengram.config import MemoryConfig, ModelConfig, load_config
from nengram.errors import CheckpointError, ConfigError
from nengram.memory import load_table
from nengram.model import Transformer
from nengram.model.folder import load_model, save_model
from nengram.model.memories import address_spec, memory_layer
from nengram.store import SparseAdam

EOS, PAD = 5, 3
MODEL = ModelConfig(
    vocab_size=60,
    width=32,
    blocks=4,
    heads=4,
    kv_heads=2,
    context=24,
    experts=4,
    expert_width=16,
    shared_width=16,
    norm_eps=1e-5,
)
SHARED = MemoryConfig(kind="engram", blocks=(1, 3), heads=2, row_width=4, rows_per_head=(101, 101), pad_id=PAD)
MEMORIES = {
    "engram": SHARED,
    "deepseek_v41": dataclasses.replace(SHARED, dialect="deepseek_v41", kernel=0),
    "qwen_ple": dataclasses.replace(SHARED, dialect="qwen_ple", compress=False, pad_id=EOS, seed=1234),
}
FOLDED = np.arange(60) // 2  # a compression that maps two ids to one


def built(dialect: str, cids_V: np.ndarray | None = None, **changes) -> Transformer:
    model = Transformer(MODEL, dataclasses.replace(MEMORIES[dialect], **changes), cids_V=cids_V)
    model.init_weights(3)
    for block in model.memory_blocks():  # a fresh convolution is silent and would hide its own mistakes
        if getattr(block.memory, "conv", False):
            torch.nn.init.normal_(block.memory.conv_weight, std=0.5, generator=torch.Generator().manual_seed(1))
    for store in model.stores.values():
        store.tensors()["weight"].mul_(25)
    return model.eval()


def ids(length: int, batch: int = 2) -> torch.Tensor:
    ids_BT = torch.randint(0, MODEL.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))
    ids_BT[:, length // 3] = EOS
    return ids_BT


def spans(length: int) -> torch.Tensor:
    blocked_BT = torch.zeros(2, length, dtype=torch.bool)
    blocked_BT[0, 4:9] = blocked_BT[1, 12] = True
    return blocked_BT


def test_every_dialect_has_its_own_spec():
    sizes = {"rows_per_head": 101, "max_order": 3, "heads": 2}
    expected = {
        "engram": AddressSpec.engram(
            compressed_vocab_size=30,
            rows_per_head=[101, 101],
            heads=2,
            layer_ids=[1, 3],
            block_indices=[1, 3],
            pad_cid=1,
        ),
        "deepseek_v41": AddressSpec.deepseek_v41(compressed_vocab_size=30, layer_ids=[1, 3], pad_cid=1, **sizes),
        "qwen_ple": AddressSpec.qwen_ple(vocab_size=60, eos_id=EOS, ple_layer_ids=[2, 4], **sizes),
    }
    for dialect, spec in expected.items():
        assert built(dialect, cids_V=FOLDED).spec == spec


def test_every_dialect_has_its_own_layer():
    for dialect, (gate, fused, conv, eps) in {
        "engram": ("sign", False, True, None),
        "deepseek_v41": ("copysign", True, False, 1e-20),
        "qwen_ple": ("sign", False, True, MODEL.norm_eps),
    }.items():
        for block in built(dialect).memory_blocks():
            layer = block.memory
            assert (layer.gate, layer.fused, layer.conv, layer.gate_eps) == (gate, fused, conv, eps)
    assert built("qwen_ple").memory_blocks()[0].memory.conv_eps == MODEL.norm_eps
    assert built("deepseek_v41", gate="plain").memory_blocks()[0].memory.gate == "plain"
    assert not built("deepseek_v41", gate="open").memory_blocks()[0].memory.fused


@pytest.mark.parametrize(
    ("preset", "expected", "projections"),
    [
        ("deepseek-v41-flash", AddressSpec.deepseek_v41(), {"kv_proj.weight": (25_600, 6_144)}),
        (
            "qwen-ple",
            AddressSpec.qwen_ple(ple_layer_ids=[2]),
            {"key_proj.weight": (8_192, 2_560), "value_proj.weight": (2_048, 2_560), "conv_weight": (4, 4, 2_048)},
        ),
    ],
)
def test_presets_are_the_released_addresses_and_shapes(preset, expected, projections):
    """No tables and no weights are made: numbers, and shapes on the meta device, of four streams."""
    config = load_config(preset)
    memory = config.memory
    vocab = memory.compressed_vocab_size or config.model.vocab_size
    assert address_spec(memory, vocab, memory.pad_id) == expected
    width = config.model.width if preset == "deepseek-v41-flash" else 2_048
    with torch.device("meta"):
        layer = memory_layer(dataclasses.replace(config.model, width=width, streams=4), memory)
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes | projections == shapes
    assert layer.dilation == expected.max_order or not layer.conv


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dialect", MEMORIES)
def test_every_table_learns_and_each_block_reads_its_own(dialect, shared):
    model, ids_BT = built(dialect, shared_table=shared).train(), ids(16)
    readers = [block.layer_id for block in model.memory_blocks()]
    assert sorted(set(readers)) == sorted(model.stores) == sorted(model.spec.layer_ids)
    step = model.begin(ids_BT)
    before = {layer_id: store.tensors()["weight"].clone() for layer_id, store in model.stores.items()}
    model(ids_BT, step=step).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    step.update(SparseAdam(), 0.1)
    for layer_id, store in model.stores.items():
        assert not torch.equal(store.tensors()["weight"], before[layer_id])


@pytest.mark.parametrize("cuts", [[1] * 20, [7, 1, 12], [5, 15]], ids=str)
@pytest.mark.parametrize("dialect", MEMORIES)
@torch.no_grad()
def test_chunks_with_blocked_positions_are_the_whole(dialect, cuts):
    model, ids_BT, blocked_BT = built(dialect), ids(20), spans(20)
    with model.begin(ids_BT, blocked_BT=blocked_BT) as step:
        rows, whole_BTV = step.rows, model(ids_BT, step=step)
    cache, pieces = model.new_cache(2, 20), []
    for chunk in torch.arange(20).split(cuts):
        with model.begin(ids_BT[:, chunk], blocked_BT=blocked_BT[:, chunk], cache=cache) as step:
            assert all(torch.equal(step.rows[layer], rows[layer][:, chunk]) for layer in rows)
            pieces.append(model(ids_BT[:, chunk], step=step, cache=cache))
    torch.testing.assert_close(torch.cat(pieces, 1), whole_BTV, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dialect", MEMORIES)
def test_every_dialect_feeds_every_residual_stream(dialect):
    model = Transformer(dataclasses.replace(MODEL, streams=3), MEMORIES[dialect])
    model.init_weights(3)
    for block in model.memory_blocks():
        assert block.memory.branches == 3
    step = model.begin(ids(12))
    model(ids(12), step=step).square().mean().backward()
    assert set(step.grads()) == set(model.spec.layer_ids)


@pytest.mark.parametrize("dialect", MEMORIES)
@torch.no_grad()
def test_blocked_positions_reach_rows_and_gates(dialect):
    model, ids_BT, blocked_BT = built(dialect), ids(20), spans(20)
    seen = []
    for block in model.memory_blocks():
        block.memory.register_forward_hook(
            lambda layer, given, kept, out: seen.append((layer, given, kept)), with_kwargs=True
        )
    with model.begin(ids_BT, blocked_BT=blocked_BT) as step:
        model(ids_BT, step=step)
        for layer_id, rows_BTS in step.rows.items():
            cids_BT = model.cids_V[ids_BT]
            assert torch.equal(rows_BTS, Addresser(model.spec)(cids_BT, blocked_BT=blocked_BT)[layer_id])
        for layer, given, kept in seen:
            gates_BTG = layer.gates(*given, blocked_BT=kept["blocked_BT"])
            assert not gates_BTG[blocked_BT].any() and gates_BTG[~blocked_BT].all()
    assert len(seen) == 2


def test_qwens_end_of_text_stops_look_back_and_the_others_go_on():
    one_BT = ids(12, batch=1)
    other_BT = one_BT.clone()
    other_BT[:, 3] = one_BT[:, 3] + 1 if one_BT[0, 3] < 59 else 0
    one_BT[:, 4] = other_BT[:, 4] = EOS
    for dialect in MEMORIES:
        model = built(dialect)
        for one, other in zip(model.begin(one_BT).rows.values(), model.begin(other_BT).rows.values(), strict=True):
            assert torch.equal(one[:, 5], other[:, 5]) == (dialect == "qwen_ple")


@pytest.mark.parametrize("saved", MEMORIES)
@pytest.mark.parametrize("loaded", MEMORIES)
def test_a_checkpoint_of_another_dialect_is_refused_with_both_named(saved, loaded, tmp_path):
    first = built(saved)
    save_model(tmp_path / "final", first, {})
    second = built(loaded)
    if saved == loaded:
        load_model(second, tmp_path / "final")
        assert torch.equal(first(ids(9)), second(ids(9)))
        return
    with pytest.raises(CheckpointError, match=f'trained with dialect "{saved}", this model has "{loaded}"'):
        load_model(second, tmp_path / "final")
    table = next((tmp_path / "final").glob("table-*.safetensors"))
    with pytest.raises(CheckpointError, match=f'of dialect "{saved}" .addresses .*this model\'s is "{loaded}"'):
        load_table(table, second.spec)


@pytest.mark.parametrize(
    ("dialect", "changes", "line"),
    [
        ("deepseek_v41", {"kernel": 4}, 'memory.kernel 4: layers of dialect "deepseek_v41" have no convolution'),
        ("qwen_ple", {"compress": True}, 'memory.compress: dialect "qwen_ple" hashes raw ids; memory.compress=false'),
        ("qwen_ple", {"rows_per_head": (101, 103)}, 'dialect "qwen_ple" has one size for all orders'),
        ("engram", {"dialect": "qwen"}, r'memory.dialect "qwen" is unknown \(did you mean "qwen_ple"\?\)'),
    ],
)
def test_what_a_dialect_cannot_be_is_refused_in_one_line(dialect, changes, line):
    with pytest.raises(ConfigError, match=line) as refused:
        Transformer(MODEL, dataclasses.replace(MEMORIES[dialect], **changes))
    assert "\n" not in str(refused.value)
