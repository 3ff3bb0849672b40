"""Cost accounting: parameters against a count of what was built, FLOPs against a formula written out and against torch's counter."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nengram.config import Config, MemoryConfig, ModelConfig
from nengram.model import Cost, Transformer

MODEL = ModelConfig(
    vocab_size=96,
    width=48,
    blocks=3,
    heads=6,
    kv_heads=2,
    context=16,
    experts=7,
    experts_per_token=3,
    expert_width=20,
    shared_width=13,
)
ENGRAM = MemoryConfig(kind="engram", blocks=(0, 2), max_order=4, heads=3, row_width=5, rows_per_head=(50, 60, 70))
MEMORIES = {
    "none": MemoryConfig(),
    "engram": ENGRAM,
    "no conv": dataclasses.replace(ENGRAM, kernel=0),
    "additive": dataclasses.replace(ENGRAM, kind="additive"),
    "open gate": dataclasses.replace(ENGRAM, gate="open"),
    "plain gate": dataclasses.replace(ENGRAM, gate="plain"),
    "shared table": dataclasses.replace(ENGRAM, shared_table=True),
}


def built(memory: MemoryConfig) -> Transformer:
    model = Transformer(MODEL, memory)
    model.init_weights(0)
    return model


@pytest.mark.parametrize("name", MEMORIES)
def test_parameters_are_those_of_the_built_model_and_its_tables(name):
    model = built(MEMORIES[name])
    cost = model.cost()
    table = sum(store.tensors()["weight"].numel() for store in model.stores.values())
    trained = sum(parameter.numel() for parameter in model.parameters())
    one_expert = 3 * MODEL.width * MODEL.expert_width
    assert cost.table == table and (table > 0) == (name != "none")
    assert cost.vocabulary == model.embed.weight.numel()
    assert cost.experts_idle == MODEL.blocks * (MODEL.experts - MODEL.experts_per_token) * one_expert
    assert cost.active == trained - cost.vocabulary - cost.experts_idle
    assert cost.total_with_vocabulary == trained + table
    assert cost.sparse == cost.experts_idle + table
    assert cost.total == cost.active + cost.sparse


def flops_by_hand(memory: MemoryConfig) -> tuple[int, int]:
    """Forward FLOPs a token, and the memory path's part, from the sizes alone."""
    D, T = MODEL.width, MODEL.context
    head_width = D // MODEL.heads
    attention = 2 * D * D + 2 * D * 2 * MODEL.kv_heads * head_width + 2 * D * D  # query; key and value; out
    keys_seen = (T + 1) / 2
    attention += 2 * MODEL.heads * head_width * keys_seen * 2  # scores, and mixing values
    experts = MODEL.experts_per_token * 3 * 2 * D * MODEL.expert_width
    block = attention + 2 * D * MODEL.experts + experts + 3 * 2 * D * MODEL.shared_width
    M = (memory.max_order - 1) * memory.heads * memory.row_width
    key = 0 if memory.gate == "open" else 2 * M * D + D * (4 + 4 + 2 + 1)
    path = {"none": 0, "additive": 2 * M * D, "engram": key + 2 * M * D}[memory.kind]
    if memory.kind == "engram" and memory.kernel:
        path += D * (4 + 2 * memory.kernel + 4 + 1)  # norm, taps, silu, sum
    path *= len(memory.blocks)
    return int(MODEL.blocks * block + path + 2 * D * MODEL.vocab_size), path


@pytest.mark.parametrize("name", MEMORIES)
def test_flops_are_those_of_the_formula(name):
    cost = built(MEMORIES[name]).cost()
    assert (cost.flops, cost.memory_flops) == flops_by_hand(MEMORIES[name])


@pytest.mark.parametrize("name", MEMORIES)
def test_matrix_products_are_those_that_torch_counts(name):
    """torch's counter sees dense products only: experts, scores, gate and convolution are added by hand."""
    model, memory = built(MEMORIES[name]).eval(), MEMORIES[name]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(MODEL.context)[None])
    T, D = MODEL.context, MODEL.width
    unseen = MODEL.blocks * (MODEL.experts_per_token * 6 * D * MODEL.expert_width + 2 * D * (T + 1))
    if memory.kind == "engram":
        unseen += (
            len(memory.blocks)
            * D
            * ((11 if memory.gate != "open" else 0) + (9 + 2 * memory.kernel if memory.kernel else 0))
        )
    assert counter.get_total_flops() == T * (model.cost().flops - unseen)


def test_costs_add_up_field_by_field():
    one, two = Cost(1, 2, 3, 4, 5, 6), Cost(10, 20, 30, 40, 50, 60)
    assert one + two == Cost(11, 22, 33, 44, 55, 66)
    assert (one + two).to_dict() == {
        "active": 11,
        "experts_idle": 22,
        "table": 33,
        "vocabulary": 44,
        "flops": 55,
        "memory_flops": 66,
        "sparse": 55,
        "total": 66,
        "total_with_vocabulary": 110,
    }


def test_reachable_parameters_are_one_row_a_slot_when_there_is_nothing_to_look_up():
    slots = 2 * 3 * 3
    assert built(dataclasses.replace(ENGRAM, control="one_row")).reachable_table_parameters() == slots * 5
    model = built(ENGRAM)
    assert model.reachable_table_parameters() == model.cost().table
    assert built(MemoryConfig()).reachable_table_parameters() == 0


def test_the_defaults_cost_what_they_always_did():
    model = dataclasses.replace(Config().model, vocab_size=4096)
    cost = Transformer(model, MemoryConfig()).cost()
    assert (cost.active, cost.sparse, cost.vocabulary, cost.flops) == (509_056, 2_949_120, 524_288, 2_196_480)
