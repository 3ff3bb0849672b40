"""Two optimisers that look like one kind: AdamW for the backbone, `RowOptimizer` for tables.

A table is not a parameter, so AdamW never sees it: its gradient exists only for the rows that were read, and the store that owns the
rows applies the update rule. `RowOptimizer` carries nothing but the learning rate and calls the stores; schedulers, clipping and
trainers see an ordinary torch optimiser. Tables take `table_lr_multiplier` (5) times the rate and no decay (paper, Table 5).
"""

import math

import torch
from torch import nn

from nengram.config import TrainConfig
from nengram.memory import MemoryStep
from nengram.store import make_rule


class RowOptimizer(torch.optim.Optimizer):
    """Applies an update rule to the rows that a `MemoryStep` read.

    Args:
        rule: an update rule from `nengram.store.rules`.
        lr: learning rate of the tables; schedulers change `param_groups[0]["lr"]`.
        clip: limit of the gradient norm of one table; 0: none. The backbone is clipped elsewhere, without the tables.
    """

    def __init__(self, rule, lr: float, clip: float = 0.0):
        super().__init__([nn.Parameter(torch.zeros(()))], {"lr": lr})
        self.rule, self.clip = rule, clip
        self._pending: list[MemoryStep] = []

    def take(self, step: MemoryStep | None) -> None:
        """Hand over a forward's memory step after its backward; `step()` will apply it and release its tickets."""
        if step is not None:
            self._pending.append(step)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every table that a pending memory step read, unless it is frozen, then release the tickets."""
        for memory_step in self._pending:
            if memory_step.frozen:
                memory_step.release()
                continue
            grads = memory_step.grads()
            for _, grads_UE in grads.values():
                norm = float(grads_UE.norm()) if self.clip else 0.0
                if norm > self.clip:
                    grads_UE *= self.clip / norm
            memory_step.update(self.rule, self.param_groups[0]["lr"], grads=grads)
        self._pending.clear()


def backbone_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay, vectors (gains, biases, convolutions) do not."""
    undecayed = {
        id(p)
        for block in model.memory_blocks()
        for group in block.memory.param_groups()
        if group["kind"] == "vector"
        for p in group["params"]
    }
    matrices = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in undecayed]
    vectors = [p for p in model.parameters() if p.ndim < 2 or id(p) in undecayed]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, "lr": config.lr},
        {"params": vectors, "weight_decay": 0.0, "lr": config.lr},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-8, fused=True)


def row_optimizer(config: TrainConfig) -> RowOptimizer:
    """The tables' optimiser that a config asks for. Raises ConfigError for an unknown rule (nearest named)."""
    options = {"betas": (config.beta1, config.beta2)} if config.table_rule == "sparse_adam" else {}
    return RowOptimizer(
        make_rule(config.table_rule, **options), config.lr * config.table_lr_multiplier, clip=config.table_clip
    )


def lr_share(step: int, steps: int, warmup_steps: int, final_share: float) -> float:
    """The schedule: linear warm-up, then a cosine from 1 down to `final_share` at the last step. `step` counts from 0."""
    warmup = min(warmup_steps, max(1, steps // 4))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_lr(optimizers: list[torch.optim.Optimizer], base: list[float], share: float) -> None:
    """Give every group of the i-th optimiser `base[i] * share`."""
    for optimizer, lr in zip(optimizers, base, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr * share
