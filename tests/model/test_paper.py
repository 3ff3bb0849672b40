"""The paper's models as presets: parameter counts to the third digit, table sizes, rho; and one of the same shape that trains here."""

import math

import pytest
import torch

from nengram.config import Config, load_config
from nengram.model import Cost, Transformer
from nengram.train import train

# total (one vocabulary matrix counted), active (none), table: in billions, from the paper's table 5 and section 2.1
PAPER = {
    "dense-4b": (4.134, 3.803, 0.0),
    "moe-27b": (26.718, 3.809, 0.0),
    "engram-27b": (26.726, 3.840, 5.792),
    "engram-40b": (39.468, 3.840, 18.534),
}


def built(name: str) -> Transformer:
    """The whole model without a byte of its weights; tables are stores, made later."""
    config = load_config(f"paper/{name}")
    with torch.device("meta"):
        return Transformer(config.model, config.memory)


@pytest.fixture(scope="module")
def costs() -> dict[str, Cost]:
    return {name: built(name).cost() for name in PAPER}


@pytest.mark.parametrize("name", PAPER)
def test_parameters_are_the_papers(name, costs):
    total, active, table = PAPER[name]
    found = costs[name]
    assert [round(number / 1e9, 3) for number in (found.total_with_vocabulary, found.active, found.table)] == [
        pytest.approx(number, abs=6e-4) for number in (total, active, table)
    ]
    assert found.vocabulary == 129280 * 2560


@pytest.mark.parametrize("name", PAPER)
def test_costs_are_those_of_the_built_model(name, costs):
    model = built(name)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert all(parameter.is_meta for parameter in model.parameters()) and not model.stores
    assert parameters + costs[name].table == costs[name].total_with_vocabulary


@pytest.mark.parametrize(("name", "nominal"), [("engram-27b", 2_262_400), ("engram-40b", 7_239_680)])
def test_every_head_has_a_prime_of_its_own_at_or_above_the_nominal_size(name, nominal):
    spec = built(name).spec
    moduli = [int(prime) for layer_id in spec.layer_ids for prime in spec.moduli(layer_id)]
    assert list(spec.layer_ids) == [1, 14]
    assert len(set(moduli)) == len(moduli) == 32
    assert nominal <= min(moduli) and max(moduli) < nominal * 1.0005
    assert all(all(prime % factor for factor in range(2, math.isqrt(prime) + 1)) for prime in moduli)
    rows = [spec.num_rows(layer_id) for layer_id in spec.layer_ids]
    assert rows == [sum(moduli[:16]), sum(moduli[16:])]


def test_rho_is_the_papers(costs):
    """Of the sparse budget of pure MoE, what is not spent on tables: 74.3 %."""
    rho = 1 - costs["engram-27b"].table / costs["moe-27b"].sparse
    assert round(100 * rho, 1) == 74.3


def test_the_parts_are_those_that_the_numbers_were_made_from(costs):
    model = built("moe-27b")
    block = model.blocks[1]
    assert model.blocks[0].moe is None and all(each.moe is not None for each in model.blocks[1:])
    assert [block.attention.cost(1).active, block.attention.key_value.in_features] == [31_883_264 + 512, 512]
    assert block.attention_residual.cost().active == 4 * 2560 * 24 + 4 * 2560 + 3 + 24
    assert costs["moe-27b"].experts_idle == 29 * 66 * 3 * 2560 * 1536
    assert costs["engram-27b"].experts_idle == 29 * 49 * 3 * 2560 * 1536
    assert costs["engram-27b"].memory_flops and not costs["moe-27b"].memory_flops


def test_the_small_one_has_every_part_of_the_paper_and_its_loss_falls(data, tmp_path):
    config: Config = load_config("paper-small")
    assert (config.model.attention, config.model.streams, config.model.dense_blocks) == ("mla", 4, 1)
    assert config.memory.blocks == (1,) and (config.model.blocks, config.model.width) == (4, 128)
    config = config.replace(
        model__context=32, train__batch=4, train__tokens=2560, train__warmup_steps=3, train__eval_tokens=100
    )
    losses = [record.loss_nats for record in train(config, data, tmp_path / "run")]
    assert len(losses) == 20
    assert sum(losses[-5:]) / 5 < losses[0] - 1.0


@pytest.mark.parametrize("chunk", [1, 7])
@torch.no_grad()
def test_the_small_one_decodes_in_chunks_what_it_says_of_the_whole(chunk):
    config = load_config("paper-small", ("model.vocab_size=60",))
    model = Transformer(config.model, config.memory).eval()
    model.init_weights(0)
    torch.nn.init.normal_(model.blocks[1].memory.conv_weight, generator=torch.Generator().manual_seed(1))
    ids_BT = torch.randint(0, 60, (2, 24), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(2, 24)
    parts = [model(ids_BT[:, at : at + chunk], cache=cache) for at in range(0, 24, chunk)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids_BT), atol=1e-4, rtol=1e-4)
