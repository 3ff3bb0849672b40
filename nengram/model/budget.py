"""Two dials make a model: `scale` says how big, `rho` says what share of the sparse budget goes to experts.

At a given scale every arm has the same total parameters and the same forward FLOPs (paper, section 3: P_tot and P_act fixed, only the
number of experts and of rows varies). Pure MoE (rho = 1) sets both totals. For another arm:

    experts   K + rho x (X - K), rounded; the rho really reached is reported
    shared    the shared expert narrows (in every block alike) until the FLOPs match: it pays for the memory path
    rows      whatever parameters are left become table rows

so memory never comes on top. At rho = 1 nothing is left for a table, and the memory arm is pure MoE. Two arms stand outside the
rule, both with the memory arm's experts and no table, and each keeps one of the two totals:

    no_table      equal FLOPs, hence fewer parameters (the iso-expert control)
    wide_shared   equal parameters, the shared expert taking what the table would, hence more FLOPs

Backbones are compared the same way: give the arms of the simpler one the totals of the richer as their target, and they spend on a
wider shared expert and on rows what the simpler parts save.
"""

import dataclasses
from dataclasses import dataclass

import torch

from nengram.config import ARMS, BudgetConfig, Config, MemoryConfig, ModelConfig
from nengram.errors import ConfigError, nearest
from nengram.model.cost import Cost
from nengram.model.memories import address_spec
from nengram.model.transformer import Transformer

SIZES = ("width", "blocks", "heads", "kv_heads", "experts", "experts_per_token", "expert_width", "shared_width")
TABLE_SIZES = ("kind", "control", "row_width", "rows_per_head")
CONTROL_OF_ARM = {"one_row": "one_row", "misaligned": "misaligned"}
WITHOUT_TABLE = ("no_table", "wide_shared")


@dataclass(frozen=True)
class Split:
    """One arm of a budget, complete."""

    model: ModelConfig
    memory: MemoryConfig
    rho: float  # reached, with whole experts
    cost: Cost
    target: Cost  # of pure MoE at the same scale; only `total` and `flops` where they were given


def split_budget(
    scale: int,
    rho: float,
    *,
    vocab_size: int,
    arm: str = "engram",
    model: ModelConfig | None = None,
    memory: MemoryConfig | None = None,
    target_total: int = 0,
    target_flops: int = 0,
) -> Split:
    """The complete sizes of one arm.

    Args:
        scale: number of blocks; width 32 x scale, 32 experts of half the width, row width `scale`.
        rho: share of the sparse budget for experts, 0..1; rounded to whole experts. At 1, arm "engram" is pure MoE.
        arm: one of `nengram.config.ARMS`.
        model, memory: knobs to keep that are no sizes (context, balancing; orders, heads, blocks ...).
        target_total, target_flops: totals to reach (`Cost.total`, `Cost.flops`), both or neither; 0: those of pure MoE.
    Raises: ConfigError when a dial is out of range, no table of at least 2 rows a head fits (a control at rho 1 has none), or a
        target is given to an arm that has nothing to reach it with.
    """
    if scale < 1:
        raise ConfigError(f"budget.scale must be at least 1, got {scale}")
    if not 0 <= rho <= 1:
        raise ConfigError(f"budget.rho must lie in 0..1, got {rho}")
    if arm not in ARMS:
        raise ConfigError(f'budget.arm "{arm}" is unknown{nearest(arm, ARMS)}; arms: {", ".join(ARMS)}')
    pure = _pure_moe(scale, vocab_size, model or ModelConfig())
    target = _cost(pure, MemoryConfig())
    if target_total or target_flops:
        _check_target(target_total, target_flops, arm, rho)
        target = Cost(active=target_total, flops=target_flops)
    if arm == "moe" or (arm == "engram" and rho == 1):
        return Split(pure, MemoryConfig(), 1.0, target, target)
    kind = "additive" if arm == "additive" else "engram"
    memory = dataclasses.replace(
        memory or MemoryConfig(), kind=kind, control=CONTROL_OF_ARM.get(arm, "hashed"), row_width=scale
    )
    if arm == "frozen":
        memory = dataclasses.replace(memory, frozen=True, table_std=memory.frozen_std)
    K, X = pure.experts_per_token, pure.experts
    experts = K + round(rho * (X - K))
    reached = (experts - K) / (X - K)
    if arm in WITHOUT_TABLE:
        match = _match_flops if arm == "no_table" else _match_total
        model = match(dataclasses.replace(pure, experts=experts), MemoryConfig(), target)
        return Split(model, MemoryConfig(), reached, _cost(model, MemoryConfig()), target)
    memory = _with_rows(memory, 2)
    model = _match_flops(dataclasses.replace(pure, experts=experts), memory, target)
    memory = _spend_on_rows(model, memory, target, reached)
    return Split(model, memory, reached, _cost(model, memory), target)


def resolve(config: Config, vocab_size: int) -> Config:
    """A config with every size written out: `[budget]` expanded into `[model]` and `[memory]`. Raises ConfigError."""
    if not config.budget.scale:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
    budget = config.budget
    _refuse_sizes(config)
    split = split_budget(
        budget.scale,
        budget.rho,
        vocab_size=vocab_size,
        arm=budget.arm,
        model=config.model,
        memory=config.memory,
        target_total=budget.target_total,
        target_flops=budget.target_flops,
    )
    written_out = BudgetConfig(scale=0, rho=split.rho, arm=budget.arm)
    return dataclasses.replace(config, budget=written_out, model=split.model, memory=split.memory)


def _check_target(total: int, flops: int, arm: str, rho: float) -> None:
    if min(total, flops) < 1:
        raise ConfigError(f"budget.target_total {total} and budget.target_flops {flops}: give both, or neither")
    if arm in ("moe", *WITHOUT_TABLE) or rho == 1:
        raise ConfigError(f'budget.target_total: arm "{arm}" at rho {rho:g} has no table that could take what is left')


def _refuse_sizes(config: Config) -> None:
    """A size written beside a budget would be overruled in silence. Raises ConfigError naming it."""
    derived = {"model": (config.model, ModelConfig(), SIZES), "memory": (config.memory, MemoryConfig(), TABLE_SIZES)}
    for section, (written, default, names) in derived.items():
        for name in names:
            if getattr(written, name) != getattr(default, name):
                raise ConfigError(
                    f"{section}.{name} is set beside budget.scale {config.budget.scale}, which derives it; "
                    f"leave it out, or set budget.scale=0 and write all sizes"
                )


def _pure_moe(scale: int, vocab_size: int, knobs: ModelConfig) -> ModelConfig:
    return dataclasses.replace(
        knobs,
        vocab_size=vocab_size,
        width=32 * scale,
        blocks=scale,
        heads=scale,
        kv_heads=scale // 2 if scale % 2 == 0 else scale,
        experts=32,
        experts_per_token=2,
        expert_width=16 * scale,
        shared_width=16 * scale,
    )


def _cost(model: ModelConfig, memory: MemoryConfig) -> Cost:
    with torch.device("meta"):
        return Transformer(model, memory).cost()


def _with_rows(memory: MemoryConfig, rows: int) -> MemoryConfig:
    return dataclasses.replace(memory, rows_per_head=(rows,) * (memory.max_order - 1))


def _match_flops(model: ModelConfig, memory: MemoryConfig, target: Cost) -> ModelConfig:
    excess = _cost(model, memory).flops - target.flops
    per_unit = 2 * 3 * model.width * _routed_blocks(model)
    shared_width = model.shared_width - round(excess / per_unit)
    if shared_width < 1:
        raise ConfigError(
            f"budget: the memory path costs {excess:,} FLOPs a token more than the shared expert can give up; "
            "use fewer memory blocks, heads or orders, or a larger scale"
        )
    return dataclasses.replace(model, shared_width=shared_width)


def _match_total(model: ModelConfig, memory: MemoryConfig, target: Cost) -> ModelConfig:
    """The shared expert takes the parameters that are left; three matrices a block, so it is never narrowed."""
    left = target.total - _cost(model, memory).total
    per_unit = 3 * model.width * _routed_blocks(model)
    return dataclasses.replace(model, shared_width=model.shared_width + round(left / per_unit))


def _routed_blocks(model: ModelConfig) -> int:
    """The blocks that have a shared expert to change. Raises ConfigError when there is none."""
    if model.dense_blocks >= model.blocks:
        raise ConfigError(
            f"model.dense_blocks {model.dense_blocks} leaves no block of budget.scale {model.blocks} with experts to budget"
        )
    return model.blocks - model.dense_blocks


def _spend_on_rows(model: ModelConfig, memory: MemoryConfig, target: Cost, rho: float) -> MemoryConfig:
    tables = 1 if memory.shared_table else len(memory.blocks)
    slots = memory.heads * (memory.max_order - 1) * tables
    left = target.total - _cost(model, memory).total + _table_rows(memory) * memory.row_width
    rows = left // memory.row_width
    if rho == 1 or rows < 2 * slots:
        raise ConfigError(f"budget: rho {rho:g} leaves no share for a table of {slots} hash heads; lower rho")
    nominal = rows // slots
    for _ in range(4):  # moduli are primes above the nominal size: walk it down until the sum of primes fits
        overshoot = _table_rows(_with_rows(memory, nominal)) - rows
        if abs(overshoot) < slots:
            break
        nominal = max(2, nominal - round(overshoot / slots))
    return _with_rows(memory, nominal)


def _table_rows(memory: MemoryConfig) -> int:
    spec = address_spec(memory, 2, 0)
    return sum(spec.num_rows(layer_id) for layer_id in spec.layer_ids)
