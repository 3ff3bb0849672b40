"""Released checkpoints as stores: every tier lends the vectors that the converted table lends, and the layer obeys the equations."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nengram.address.reference import table_rows
from nengram.errors import CheckpointError, StoreError
from nengram.memory import hot_name, load_table
from nengram.memory.checkpoint_store import open_released
from nengram.memory.deepseek import deepseek_layer
from nengram.memory.layouts import import_checkpoint
from nengram.memory.reference import engram_reference
from nengram.store import Counters, HotSet
from tests.memory.test_layouts import (
    DEEPSEEK,
    DEEPSEEK_SPEC,
    QWEN,
    QWEN_SPEC,
    deepseek_tensors,
    qwen_tensors,
    write_checkpoint,
)

TIERS = ("resident", "host", "mapped", "tiered")
WIDTH, BRANCHES = 40, 3
MEMORY_WIDTH = 3 * 2 * 64


@pytest.fixture
def qwen(tmp_path):
    """Two tables in pieces, in one file, a scale beside each."""
    tensors = qwen_tensors(0, pieces=12) | qwen_tensors(1, pieces=5)
    return write_checkpoint(tmp_path / "qwen", {"model.safetensors": tensors}, {"text_config": QWEN})


@pytest.fixture
def deepseek(tmp_path):
    """Layers 1 and 4, whole: tables, FP8 matrix with its scales, and gains."""
    generator = torch.Generator().manual_seed(3)
    files = {}
    for layer_id in (1, 4):
        rows = DEEPSEEK_SPEC.num_rows(layer_id)
        outputs = (BRANCHES + 1) * WIDTH
        numbers = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
        exponents = torch.randint(118, 126, (rows, 2), generator=generator, dtype=torch.uint8)
        files[f"model-{layer_id}.safetensors"] = {
            f"layers.{layer_id}.engram.embed.weight": (numbers(rows, 64) * 8).to(torch.float8_e4m3fn),
            f"layers.{layer_id}.engram.embed.scale": exponents.view(torch.float8_e8m0fnu),
            f"layers.{layer_id}.engram.wkv.weight": (numbers(outputs, MEMORY_WIDTH) * 8).to(torch.float8_e4m3fn),
            f"layers.{layer_id}.engram.wkv.scale": torch.full((-(-outputs // 32), MEMORY_WIDTH // 32), 2.0**-9).to(
                torch.float8_e8m0fnu
            ),
            f"layers.{layer_id}.engram.q_weight": 1 + numbers(BRANCHES, WIDTH) / 4,
            f"layers.{layer_id}.engram.k_weight": 1 + numbers(BRANCHES, WIDTH) / 4,
        }
    return write_checkpoint(tmp_path / "deepseek", files, {"text_config": DEEPSEEK | {"rms_norm_eps": 1e-20}})


def hot_rows(spec, layer_id):
    return HotSet(np.arange(0, spec.num_rows(layer_id), 3), belongs_to=hot_name(spec, layer_id))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(("family", "layer_id"), [("qwen", 0), ("qwen", 1), ("deepseek", 1), ("deepseek", 4)])
def test_every_tier_lends_what_the_converted_table_lends(request, tmp_path, family, layer_id, tier):
    folder = request.getfixturevalue(family)
    spec = {"qwen": QWEN_SPEC, "deepseek": DEEPSEEK_SPEC}[family]
    [written] = import_checkpoint(folder, tmp_path / "tables", layer_ids=[layer_id])
    converted = load_table(written.path, spec).store
    hot = hot_rows(spec, layer_id) if tier == "tiered" else None
    store, own, own_id = open_released(folder, layer_id, tier, hot=hot)
    assert (own.digest, own_id, store.num_rows, store.codec) == (
        spec.digest,
        layer_id,
        converted.num_rows,
        converted.codec,
    )
    store.counters = Counters()
    rows = torch.randint(0, store.num_rows, (3, 50, 4), generator=torch.Generator().manual_seed(1))
    rows[0, 0] = torch.tensor([0, store.num_rows - 1, 0, 1])
    with store, store.prefetch(rows) as ours, store.prefetch(rows[:, :1]) as again, converted.prefetch(rows) as theirs:
        bits = lambda ticket: ticket.vectors().contiguous().view(torch.uint8)  # noqa: E731
        assert torch.equal(bits(ours), bits(theirs))
        assert torch.equal(bits(again), bits(theirs).view(3, 50, 4, -1)[:, :1])
    if tier == "mapped":
        with pytest.raises(StoreError, match="closed"):
            store.prefetch(rows)


def test_a_table_that_changes_while_it_is_read_is_refused(deepseek):
    store, _, _ = open_released(deepseek, 1)
    with store, open(deepseek / "model-1.safetensors", "r+b") as file:
        file.truncate(5000)
        with (
            pytest.raises(StoreError, match=r"model-1\.safetensors: was cut"),
            store.prefetch(torch.arange(9)) as ticket,
        ):
            ticket.vectors()


def test_what_is_not_there_is_said(deepseek, qwen):
    with pytest.raises(CheckpointError, match=r"no memory layer 2 in it, only \[1, 4\]"):
        open_released(deepseek, 2)
    with pytest.raises(CheckpointError, match=r"no tensor layers\.3\.engram\.embed\.weight"):
        deepseek_layer(deepseek, 3)
    with pytest.raises(StoreError, match='unknown tier "maped" .did you mean "mapped"'):
        open_released(qwen, 0, "maped")
    with pytest.raises(StoreError, match="goes with a hot set"):
        open_released(qwen, 0, "tiered")
    with pytest.raises(StoreError, match="hot set is of another table"):
        open_released(qwen, 0, "tiered", hot=hot_rows(QWEN_SPEC, 1))


@pytest.mark.parametrize("tier", TIERS)
def test_a_deepseek_layer_obeys_the_specification(deepseek, tier):
    generator = torch.Generator().manual_seed(7)
    cids_BT = torch.randint(0, 500, (2, 17), generator=generator)
    blocked_BT = torch.zeros(2, 17, dtype=torch.bool)
    blocked_BT[1, 5:8] = True
    hidden_BTGD = torch.randn(2, 17, BRANCHES, WIDTH, generator=generator, dtype=torch.float64)
    hot = hot_rows(DEEPSEEK_SPEC, 4) if tier == "tiered" else None
    released = deepseek_layer(deepseek, 4, tier=tier, hot=hot, dtype=torch.float64)
    assert (released.layer.gate, released.layer.conv, released.layer.gate_eps) == ("copysign", False, 1e-20)
    found_BTGD = released(cids_BT, hidden_BTGD, blocked_BT=blocked_BT).detach()
    expected_BTGD, _ = engram_reference(released.layer, decoded(deepseek, cids_BT, blocked_BT), hidden_BTGD, blocked_BT)
    torch.testing.assert_close(found_BTGD, expected_BTGD, rtol=1e-9, atol=1e-12)
    assert expected_BTGD[~blocked_BT].abs().amin(dim=(1, 2)).max() > 0
    assert not found_BTGD[blocked_BT].any()
    state = released.addresser.new_state(2)
    parts = [
        released(cids_BT[:, t], hidden_BTGD[:, t], blocked_BT=blocked_BT[:, t], state=state)
        for t in torch.arange(17).split([6, 1, 1, 9])
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1).detach(), found_BTGD, rtol=1e-12, atol=1e-14)
    released.close()


def decoded(folder, cids_BT, blocked_BT):
    """Layer 4's vectors side by side, float64: rows from plain Python ints, each value times 2^(byte - 127)."""
    tensors = load_file(folder / "model-4.safetensors")
    values_RE = tensors["layers.4.engram.embed.weight"].double()
    exponents_RK = tensors["layers.4.engram.embed.scale"].view(torch.uint8).double() - 127
    table_RE = values_RE * torch.exp2(exponents_RK).repeat_interleave(32, dim=1)
    layer = DEEPSEEK_SPEC.layer(4)
    numbers = {"multipliers": layer.multipliers, "moduli": layer.moduli, "pad_cid": DEEPSEEK_SPEC.pad_cid}
    rows = [
        table_rows(cids_T.tolist(), blocked=blocked_T.tolist(), **numbers)
        for cids_T, blocked_T in zip(cids_BT, blocked_BT, strict=True)
    ]
    return table_RE[torch.tensor(rows)].flatten(2)


def test_the_released_matrix_is_descaled_by_blocks(deepseek):
    released = deepseek_layer(deepseek, 1)
    tensors = load_file(deepseek / "model-1.safetensors")
    expected = tensors["layers.1.engram.wkv.weight"].float() * 2.0**-9
    assert torch.equal(released.layer.kv_proj.weight, expected)
    released.close()


def test_a_matrix_that_does_not_fit_the_rows_is_refused(deepseek):
    tensors = deepseek_tensors(1)
    shapes = {"wkv.weight": (4 * WIDTH, 100), "q_weight": (3, WIDTH), "k_weight": (3, WIDTH)}
    tensors |= {f"layers.1.engram.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    write_checkpoint(
        deepseek, {"model-1.safetensors": tensors}, {"text_config": DEEPSEEK | {"engram_layer_ids": [1, 4]}}
    )
    with pytest.raises(CheckpointError, match=r"reads 100 numbers, 6 rows of 64 are 384"):
        deepseek_layer(deepseek, 1)
