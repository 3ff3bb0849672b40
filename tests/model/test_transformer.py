"""The whole model: causal, sound at the start, honest about its sizes, and done with its tables after every forward."""

import dataclasses

import numpy as np
import pytest
import torch

from nengram.config import MemoryConfig, ModelConfig
from nengram.errors import ConfigError
from nengram.memory import MemoryStep
from nengram.model import Transformer, split_budget
from nengram.store import SparseAdam

MODEL = ModelConfig(
    vocab_size=60, width=32, blocks=3, heads=4, kv_heads=2, context=24, experts=6, expert_width=16, shared_width=16
)
MEMORIES = {
    "none": MemoryConfig(),
    "engram": MemoryConfig(kind="engram", blocks=(0, 2), heads=2, row_width=4, rows_per_head=(101, 103)),
    "additive": MemoryConfig(kind="additive", blocks=(1,), heads=2, row_width=4, rows_per_head=(101, 103)),
}
MEMORIES["shared"] = dataclasses.replace(MEMORIES["engram"], shared_table=True)


def built(kind: str, **changes) -> Transformer:
    model = Transformer(MODEL, dataclasses.replace(MEMORIES[kind], **changes))
    model.init_weights(3)
    for block in model.memory_blocks():  # a fresh convolution is silent and would hide its own mistakes
        if hasattr(block.memory, "conv_weight"):
            torch.nn.init.normal_(block.memory.conv_weight, std=0.5, generator=torch.Generator().manual_seed(1))
    return model.eval()


def ids(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, MODEL.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize("length", [2, 23])
@torch.no_grad()
def test_a_later_token_changes_no_earlier_logit(kind, length):
    model, one_BT = built(kind), ids(length)
    for t in {1, length // 2, length - 1}:
        other_BT = one_BT.clone()
        other_BT[:, t] = (other_BT[:, t] + 1) % MODEL.vocab_size
        changed_T = (model(one_BT) - model(other_BT)).abs().amax((0, 2)) > 1e-5
        assert not changed_T[:t].any() and changed_T[t]


@pytest.mark.parametrize("kind", ["engram", "additive", "shared"])
@torch.no_grad()
def test_memory_is_heard_and_stops_at_a_document_start(kind):
    model, ids_BT = built(kind), ids(9)
    start_BT = torch.zeros(2, 9, dtype=torch.bool)
    start_BT[:, 4] = True
    changed_T = (model(ids_BT) - model(ids_BT, start_BT=start_BT)).abs().amax((0, 2)) > 1e-6
    assert not changed_T[:4].any() and changed_T[4]
    empty = built(kind)
    for store in empty.stores.values():
        store.tensors()["weight"].zero_()
    assert (model(ids_BT) - empty(ids_BT)).abs().max() > 1e-4


@torch.no_grad()
def test_rows_follow_the_compression_map():
    halves = np.arange(MODEL.vocab_size) // 2
    model = Transformer(MODEL, MEMORIES["engram"], cids_V=halves)
    model.init_weights(0)
    raw = Transformer(MODEL, dataclasses.replace(MEMORIES["engram"], compress=False), cids_V=halves)
    raw.init_weights(0)
    assert (model.spec.compressed_vocab_size, raw.spec.compressed_vocab_size) == (30, 60)
    even_BT = 2 * (ids(9) // 2)
    for layer_id in model.spec.layer_ids:
        assert torch.equal(model.begin(even_BT).rows[layer_id], model.begin(even_BT + 1).rows[layer_id])
        assert not torch.equal(raw.begin(even_BT).rows[layer_id], raw.begin(even_BT + 1).rows[layer_id])


def test_a_fresh_model_is_undecided_and_the_seed_decides_its_weights():
    one, again, other = (Transformer(MODEL, MEMORIES["engram"]) for _ in range(3))
    for model, seed in ((one, 5), (again, 5), (other, 6)):
        model.init_weights(seed)
    logits_BTV = one(ids(16))
    nats = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids(16).flatten())
    assert abs(nats.item() - np.log(MODEL.vocab_size)) < 1.0
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert not torch.equal(one.embed.weight, other.embed.weight)
    for layer_id, store in one.stores.items():
        table = store.tensors()["weight"]
        assert table.std().item() == pytest.approx(0.02, rel=0.1)
        assert torch.equal(table, again.stores[layer_id].tensors()["weight"])
        assert not torch.equal(table, other.stores[layer_id].tensors()["weight"])


def test_tables_are_no_parameters_and_every_gradient_arrives():
    model = built("engram").train()
    sizes = {tuple(store.tensors()["weight"].shape) for store in model.stores.values()}
    assert not sizes & {tuple(tensor.shape) for tensor in model.state_dict().values()}
    step = model.begin(ids(16, batch=8))
    model(ids(16, batch=8), step=step).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    grads = step.grads()
    assert set(grads) == {0, 2} and all(grads_UE.any() for _, grads_UE in grads.values())


class Apart:
    """A memory step that gives every reader a leaf of its own."""

    def __init__(self, step: MemoryStep):
        self.step, self.leaves, self.blocked_BT = step, [], step.blocked_BT

    def vectors(self, layer_id: int) -> torch.Tensor:
        self.leaves.append(self.step.vectors(layer_id).detach().clone().requires_grad_())
        return self.leaves[-1]


def test_blocks_that_share_a_table_read_one_leaf_in_which_their_gradients_add_up():
    model, ids_BT = built("shared").train(), ids(16, batch=8)
    assert [block.layer_id for block in model.memory_blocks()] == [0, 0]
    assert list(model.stores) == list(model.spec.layer_ids) == [0]
    step, apart = model.begin(ids_BT), Apart(model.begin(ids_BT))
    for one in (step, apart):
        model(ids_BT, step=one).square().mean().backward()
    first, second = (leaf.grad for leaf in apart.leaves)
    assert first.any() and second.any()
    torch.testing.assert_close(step.vectors(0).grad, first + second, rtol=1e-4, atol=1e-7)
    assert list(step.grads()) == [0]
    step.update(SparseAdam(), 0.1)
    assert model.stores[0].step == 1


@pytest.mark.parametrize("fails", [False, True])
def test_a_forward_of_its_own_gives_its_buffers_back_even_when_it_fails(fails, monkeypatch):
    model, steps = built("engram"), []
    begin = MemoryStep.begin.__func__
    monkeypatch.setattr(
        MemoryStep, "begin", classmethod(lambda cls, *a, **k: steps.append(begin(cls, *a, **k)) or steps[-1])
    )
    if fails:
        monkeypatch.setattr(model.blocks[1], "forward", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids(5))
    else:
        model(ids(5))
    assert len(steps) == 1 and not steps[0]._tickets


def test_controls_are_chosen_by_name_and_the_call_overrides_the_config():
    model = built("engram", control="one_row")
    hashed = built("engram").begin(ids(9)).rows
    offsets = {layer_id: torch.from_numpy(model.spec.offsets(layer_id)) for layer_id in model.spec.layer_ids}
    for layer_id, rows_BTS in model.begin(ids(9)).rows.items():
        assert torch.equal(rows_BTS, offsets[layer_id].expand_as(rows_BTS))
    for layer_id, rows_BTS in model.begin(ids(9), control="hashed").rows.items():
        assert torch.equal(rows_BTS, hashed[layer_id])
    for layer_id, rows_BTS in model.begin(ids(9), control="misaligned").rows.items():
        assert torch.equal(rows_BTS, hashed[layer_id].roll(1, dims=0))
    for layer_id, rows_BTS in model.begin(ids(9), control=lambda rows, spec, layer_id: rows * 0).rows.items():
        assert not rows_BTS.any() and layer_id in hashed
    with pytest.raises(ConfigError, match=r'"permutd" is unknown \(did you mean "permuted"\?\)'):
        model.begin(ids(9), control="permutd")


@pytest.mark.parametrize(
    ("model", "memory", "line"),
    [
        ({"vocab_size": 0}, {}, "model.vocab_size is not set"),
        ({"blocks": 0}, {}, "model.blocks must be at least 1, got 0"),
        ({"width": 0}, {}, "model.width must be at least 1, got 0"),
        ({"context": -1}, {}, "model.context must be at least 1, got -1"),
        ({"heads": 5}, {}, r"model.width 32 must be model.heads \(5\) times an even head width"),
        ({"heads": 32, "kv_heads": 32}, {}, r"model.heads \(32\) times an even head width"),
        ({"kv_heads": 3}, {}, r"model.heads 4 must be a multiple of model.kv_heads \(3\)"),
        ({"experts_per_token": 7}, {}, "model.experts_per_token 7 must lie in 1..6"),
        ({"expert_width": 18}, {}, "model.expert_width must be a multiple of 4, got 18"),
        (
            {"width": 36, "heads": 3, "kv_heads": 3},
            {"kind": "engrm"},
            r'"engrm" is unknown \(did you mean "engram"\?\)',
        ),
        ({}, {"blocks": (3,)}, r"memory.blocks \[3\] must be blocks of 0..2"),
        ({}, {"blocks": ()}, r"memory.blocks \[\] must be blocks of 0..2"),
        ({}, {"max_order": 4}, r"memory.rows_per_head needs one number per order 2..4, got \[101, 103\]"),
        ({}, {"gate": "pain"}, r'memory.gate "pain" is unknown \(did you mean "plain"\?\); gates: sign, copysign'),
        ({}, {"control": "onerow"}, r'memory.control "onerow" is unknown \(did you mean "one_row"\?\)'),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(model, memory, line):
    with pytest.raises(ConfigError, match=line) as refused:
        Transformer(dataclasses.replace(MODEL, **model), dataclasses.replace(MEMORIES["engram"], **memory))
    assert "\n" not in str(refused.value)


def test_arms_start_from_the_same_weights_wherever_their_shapes_agree():
    def weights(arm: str, seed: int = 0) -> dict[str, torch.Tensor]:
        split = split_budget(2, 0.5, vocab_size=200, arm=arm)
        model = Transformer(split.model, split.memory)
        model.init_weights(seed)
        return {name: tensor for name, tensor in model.state_dict().items() if tensor.ndim > 1}

    moe, engram, other = weights("moe"), weights("engram"), weights("moe", seed=1)
    alike = [name for name in moe if moe[name].shape == engram[name].shape]
    assert "embed.weight" in alike and "blocks.1.attention.out.weight" in alike
    for name in alike:
        assert torch.equal(moe[name], engram[name]), name
        assert not torch.equal(moe[name], other[name]), name
    experts = len(engram["blocks.0.moe.gate_up_XDF"]) - 1
    assert torch.equal(moe["blocks.0.moe.gate_up_XDF"][:experts], engram["blocks.0.moe.gate_up_XDF"][:experts])
    drawn = [tensor.flatten()[:50] for tensor in moe.values()]
    assert len({tuple(values.sign().tolist()) for values in drawn}) == len(drawn)  # no two tensors share their draws
