"""The two dials: at every rho, whole experts, equal totals and equal FLOPs; what cannot be is refused in one line."""

import dataclasses
import tomllib

import pytest

from nengram.config import ARMS, BudgetConfig, Config, MemoryConfig, ModelConfig, load_config, shipped, to_toml
from nengram.errors import ConfigError
from nengram.model import Transformer, resolve, split_budget

VOCAB_SIZE = 4096
MEMORY_ARMS = [arm for arm in ARMS if arm not in ("moe", "no_table", "wide_shared")]
K, X = 2, 32
PRESETS = sorted(path.stem for path in shipped("configs").glob("*.toml") if path.stem != "sources")


def off(found: int, wanted: int) -> float:
    return abs(found / wanted - 1)


@pytest.mark.parametrize(
    ("arm", "scale"),
    [
        ("engram", 2),
        ("additive", 2),
        ("engram", 4),
        pytest.param("additive", 4, marks=pytest.mark.slow),
        pytest.param("engram", 6, marks=pytest.mark.slow),
        pytest.param("additive", 6, marks=pytest.mark.slow),
    ],
)
def test_every_legal_rho_has_the_totals_and_flops_of_pure_moe(arm, scale):
    pure = split_budget(scale, 1.0, vocab_size=VOCAB_SIZE, arm="moe")
    for experts in range(K, X):
        split = split_budget(scale, (experts - K) / (X - K), vocab_size=VOCAB_SIZE, arm=arm)
        assert split.model.experts == experts
        assert split.rho == (experts - K) / (X - K)
        assert split.target == pure.cost
        assert off(split.cost.total, pure.cost.total) < 0.005, experts
        assert off(split.cost.flops, pure.cost.flops) < 0.005, experts
        assert split.cost.table > 0


@pytest.mark.parametrize("scale", [2, 4, pytest.param(6, marks=pytest.mark.slow)])
def test_the_control_without_a_table_has_equal_flops_and_fewer_parameters(scale):
    for experts in range(K, X):
        split = split_budget(scale, (experts - K) / (X - K), vocab_size=VOCAB_SIZE, arm="no_table")
        assert split.model.experts == experts
        assert split.memory.kind == "none"
        assert off(split.cost.flops, split.target.flops) < 0.005
        assert split.cost.total < split.target.total


def test_the_row_controls_differ_from_engram_in_nothing_but_the_rows():
    engram = split_budget(4, 0.6, vocab_size=VOCAB_SIZE, arm="engram")
    for arm in ("one_row", "misaligned"):
        split = split_budget(4, 0.6, vocab_size=VOCAB_SIZE, arm=arm)
        assert split.model == engram.model
        assert split.memory == dataclasses.replace(engram.memory, control=arm)


@pytest.mark.parametrize("rho", [0.0, 0.2, 0.6])
def test_at_the_demos_scale_totals_and_flops_agree_within_a_thousandth(rho):
    for arm in ARMS:
        cost, target = (split := split_budget(4, rho, vocab_size=VOCAB_SIZE, arm=arm)).cost, split.target
        assert off(cost.total, target.total) < 1e-3 or arm == "no_table", arm
        assert off(cost.flops, target.flops) < 1e-3 or arm == "wide_shared", arm


@pytest.mark.parametrize(
    "knobs",
    [{"gate": "open"}, {"gate": "plain"}, {"blocks": (0, 2)}, {"blocks": (2, 0), "shared_table": True}],
    ids=str,
)
def test_whatever_the_memory_layers_are_like_the_budget_is_the_same(knobs):
    split = split_budget(4, 0.6, vocab_size=VOCAB_SIZE, memory=MemoryConfig(**knobs))
    assert off(split.cost.total, split.target.total) < 1e-3 and off(split.cost.flops, split.target.flops) < 1e-3


def test_a_shared_table_has_the_rows_of_all_that_it_replaces():
    apart, shared = (
        split_budget(4, 0.6, vocab_size=VOCAB_SIZE, memory=MemoryConfig(blocks=(0, 2), shared_table=is_shared))
        for is_shared in (False, True)
    )
    assert shared.model == apart.model
    assert off(shared.memory.rows_per_head[0], 2 * apart.memory.rows_per_head[0]) < 2e-2  # primes
    assert off(shared.cost.table, apart.cost.table) < 2e-3


def test_the_control_with_a_wide_shared_expert_has_equal_parameters_and_more_flops():
    for rho in (0.0, 0.6):
        split = split_budget(4, rho, vocab_size=VOCAB_SIZE, arm="wide_shared")
        assert split.model.experts == split_budget(4, rho, vocab_size=VOCAB_SIZE, arm="engram").model.experts
        assert split.memory.kind == "none" and split.cost.table == 0
        assert off(split.cost.total, split.target.total) < 1e-3
        assert split.cost.flops > 1.5 * split.target.flops


def test_the_frozen_arm_differs_from_engram_in_its_rows_alone():
    knobs = MemoryConfig(frozen_std=0.3)
    engram = split_budget(4, 0.6, vocab_size=VOCAB_SIZE, memory=knobs)
    frozen = split_budget(4, 0.6, vocab_size=VOCAB_SIZE, memory=knobs, arm="frozen")
    assert (frozen.model, frozen.cost) == (engram.model, engram.cost)
    assert frozen.memory == dataclasses.replace(engram.memory, frozen=True, table_std=0.3)


def test_at_rho_1_the_memory_arm_is_pure_moe():
    for arm in ("engram", "no_table", "wide_shared"):
        split = split_budget(4, 1.0, vocab_size=VOCAB_SIZE, arm=arm)
        assert split == split_budget(4, 0.6, vocab_size=VOCAB_SIZE, arm="moe"), arm
    config = resolve(load_config("demo", ("budget.rho=1.0",)), VOCAB_SIZE)
    assert config.memory.kind == "none" and config.budget == BudgetConfig(scale=0, rho=1.0, arm="engram")
    with pytest.raises(ConfigError, match="leaves no share for a table"):
        split_budget(4, 1.0, vocab_size=VOCAB_SIZE, arm="one_row")


@pytest.mark.parametrize("arm", ARMS)
def test_the_cost_is_that_of_the_model_it_describes(arm):
    split = split_budget(2, 0.5, vocab_size=300, arm=arm)
    model = Transformer(split.model, split.memory)
    model.init_weights(0)
    tables = sum(store.tensors()["weight"].numel() for store in model.stores.values())
    assert split.cost == model.cost()
    assert split.cost.total_with_vocabulary == sum(p.numel() for p in model.parameters()) + tables


def test_rho_is_rounded_to_whole_experts_and_reported():
    split = split_budget(4, 0.61, vocab_size=VOCAB_SIZE)
    assert split.model.experts == K + 18 and split.rho == 0.6


@pytest.mark.parametrize("arm", MEMORY_ARMS)
def test_a_rho_that_leaves_no_table_is_refused(arm):
    with pytest.raises(ConfigError, match=r"^budget: rho 1 leaves no share for a table of 16 hash heads; lower rho$"):
        split_budget(4, 0.99, vocab_size=VOCAB_SIZE, arm=arm)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"scale": 0}, "budget.scale must be at least 1, got 0"),
        ({"rho": 1.5}, r"budget.rho must lie in 0..1, got 1.5"),
        ({"rho": float("nan")}, r"budget.rho must lie in 0..1, got nan"),
        ({"arm": "engam"}, r'budget.arm "engam" is unknown \(did you mean "engram"\?\); arms: moe, '),
        ({"scale": 1}, r"memory.blocks \[1\] must be blocks of 0..0"),
        ({"memory": MemoryConfig(heads=64)}, r"FLOPs a token more than the shared expert can give up; use fewer"),
    ],
)
def test_dials_out_of_range_are_refused_in_one_line(arguments, line):
    arguments = {"scale": 4, "rho": 0.6, "arm": "engram"} | arguments
    with pytest.raises(ConfigError, match=line) as refused:
        split_budget(arguments.pop("scale"), arguments.pop("rho"), vocab_size=VOCAB_SIZE, **arguments)
    assert "\n" not in str(refused.value)


def test_knobs_that_are_no_sizes_are_kept():
    model = ModelConfig(context=48, rope_theta=500.0, balance_rate=0.5)
    memory = MemoryConfig(blocks=(0, 2), max_order=4, heads=2, kernel=0, compress=False, table_std=0.5, seed=9)
    split = split_budget(4, 0.6, vocab_size=VOCAB_SIZE, model=model, memory=memory)
    assert (split.model.context, split.model.rope_theta, split.model.balance_rate) == (48, 500.0, 0.5)
    kept = dataclasses.replace(split.memory, kind="none", row_width=4, rows_per_head=memory.rows_per_head)
    assert kept == memory and len(split.memory.rows_per_head) == 3
    assert off(split.cost.total, split.target.total) < 0.005 and off(split.cost.flops, split.target.flops) < 0.005


@pytest.mark.parametrize("arm", ARMS)
def test_resolving_twice_changes_nothing_nor_does_a_trip_through_toml(arm, tmp_path):
    config = Config(budget=BudgetConfig(scale=2, rho=0.4, arm=arm))
    once = resolve(config, VOCAB_SIZE)
    assert once.budget.scale == 0 and once.model.vocab_size == VOCAB_SIZE
    assert resolve(once, VOCAB_SIZE) == once
    (tmp_path / "config.toml").write_text(to_toml(once))
    assert resolve(load_config(tmp_path), VOCAB_SIZE) == once
    assert tomllib.loads(to_toml(once))["budget"]["rho"] == pytest.approx(1.0 if arm == "moe" else 0.4)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("arm", ARMS)
def test_every_preset_loads_and_resolves(preset, arm):
    config = load_config(preset)
    resolved = resolve(config.replace(budget__arm=arm), config.data.vocab_size)
    assert resolved.model.vocab_size == config.data.vocab_size
    assert resolved.budget.scale == 0
    if config.budget.scale and arm != "moe":
        assert abs(resolved.budget.rho - config.budget.rho) <= 0.5 / (X - K)


def test_a_size_written_beside_a_budget_is_refused_by_name():
    config = load_config("demo", ("model.experts=64",))
    with pytest.raises(ConfigError, match="model.experts is set beside budget.scale 4"):
        resolve(config, 4096)
    with pytest.raises(ConfigError, match="memory.row_width is set"):
        resolve(load_config("demo", ("memory.row_width=8",)), 4096)


@pytest.mark.parametrize(
    "knobs",
    [
        {"dense_blocks": 1, "dense_width": 192},
        {"attention": "mla", "kv_rank": 32, "rope_width": 16},
        {"streams": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("arm", ["engram", "additive"])
def test_whatever_the_backbone_is_like_the_budget_is_the_same(knobs, arm):
    split = split_budget(4, 0.6, vocab_size=VOCAB_SIZE, arm=arm, model=ModelConfig(**knobs))
    assert off(split.cost.total, split.target.total) < 1e-3 and off(split.cost.flops, split.target.flops) < 1e-3


def test_a_budget_without_a_routed_block_is_refused():
    with pytest.raises(ConfigError, match="model.dense_blocks 4 leaves no block of budget.scale 4 with experts"):
        split_budget(4, 0.6, vocab_size=VOCAB_SIZE, model=ModelConfig(dense_blocks=4, dense_width=8))


FULL = {"attention": "mla", "kv_rank": 32, "rope_width": 16, "streams": 4}


@pytest.mark.parametrize("simpler", [{"streams": 1}, {"attention": "gqa", "kv_rank": 0, "rope_width": 0}], ids=str)
@pytest.mark.parametrize("arm", ["engram", "one_row", "additive"])
def test_a_simpler_backbone_reaches_the_totals_of_the_richer(simpler, arm):
    full = split_budget(4, 0.6, vocab_size=VOCAB_SIZE, model=ModelConfig(**FULL)).cost
    reached = split_budget(
        4,
        0.6,
        vocab_size=VOCAB_SIZE,
        arm=arm,
        model=ModelConfig(**FULL | simpler),
        target_total=full.total,
        target_flops=full.flops,
    )
    assert reached.cost != full and reached.rho == 0.6
    assert off(reached.cost.total, full.total) < 1e-3 and off(reached.cost.flops, full.flops) < 1e-3


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"target_total": 10}, "target_flops 0: give both"),
        ({"target_total": 10, "target_flops": 10, "arm": "moe"}, 'arm "moe" at rho 0.6 has no table'),
        ({"target_total": 10, "target_flops": 10, "arm": "no_table"}, 'arm "no_table"'),
        ({"target_total": 9, "target_flops": 5_000_000}, "leaves no share for a table"),
        ({"target_total": 10, "target_flops": 10}, "FLOPs a token more than the shared expert can give up"),
    ],
    ids=str,
)
def test_a_target_that_cannot_be_reached_is_refused(arguments, line):
    with pytest.raises(ConfigError, match=line):
        split_budget(4, 0.6, vocab_size=VOCAB_SIZE, **arguments)
