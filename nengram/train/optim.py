"""Which rule moves which parameter: the backbone's by kind, the tables' by their own.

Every parameter is of one kind, and `train.optimizer` says what moves each:

    kind        which                                                          "adamw"       "muon" (the paper's, Table 5)
    matrix      weights of 2 axes, and stacks of them with 3                   AdamW         Muon
    embedding   nn.Embedding, the tied head with it                            AdamW         AdamW
    vector      all else: gains, biases, convolutions, hyper-connections       AdamW, no decay, in both

A module whose shapes would mislead says so itself in `param_groups()`, as the memory layers do; see `kinds`.

A table is not a parameter, so none of these ever sees it: its gradient exists only for the rows that were read, and the store that
owns the rows applies the update rule. `RowOptimizer` carries nothing but the learning rate and calls the stores; schedulers, clipping
and trainers see an ordinary torch optimiser. Tables take `table_lr_multiplier` (5) times the rate and no decay (paper, Table 5), and
follow the same schedule.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

from nengram.config import TrainConfig
from nengram.errors import ConfigError, nearest
from nengram.memory import MemoryStep
from nengram.model.hyper import HyperConnection
from nengram.store import make_rule
from nengram.train.muon import Muon

Option = TypeVar("Option")

OPTIMIZERS = {  # the rule of each kind
    "adamw": {"matrix": "adamw", "embedding": "adamw", "vector": "adamw"},
    "muon": {"matrix": "muon", "embedding": "adamw", "vector": "adamw"},
}
UNDECAYED = "vector"


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


class Together(torch.optim.Optimizer):
    """Optimisers of disjoint parameters as one: their groups in order, and one state whose numbers run on from each to the next."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        super().__init__(self._groups(), {})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """A step of each."""
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict:
        """As torch's: `state` by parameter number, `param_groups` with the numbers in place of parameters."""
        state, groups = {}, []
        for first, optimizer in self._numbered():
            part = optimizer.state_dict()
            state |= {first + number: values for number, values in part["state"].items()}
            groups += [_renumbered(group, first) for group in part["param_groups"]]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict) -> None:
        """Inverse of `state_dict`."""
        groups = iter(state_dict["param_groups"])
        for first, optimizer in self._numbered():
            after = first + _count(optimizer)
            state = {
                number - first: values for number, values in state_dict["state"].items() if first <= number < after
            }
            own = [_renumbered(next(groups), -first) for _ in optimizer.param_groups]
            optimizer.load_state_dict({"state": state, "param_groups": own})
        self.param_groups = self._groups()

    def _groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def _numbered(self) -> list[tuple[int, torch.optim.Optimizer]]:
        """Each optimiser with the number of its first parameter."""
        counts = [_count(optimizer) for optimizer in self.optimizers]
        return [(sum(counts[:place]), optimizer) for place, optimizer in enumerate(self.optimizers)]


def _count(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _renumbered(group: dict, by: int) -> dict:
    return group | {"params": [number + by for number in group["params"]]}


@runtime_checkable
class SaysKinds(Protocol):
    """A module that names the kind of its own parameters, those of its parts included."""

    def param_groups(self) -> list[dict]:
        """Groups `{"kind", "params"}`; what it leaves out is of the kind that its shape says."""
        ...


def kinds(model: nn.Module) -> dict[str, str]:
    """The kind of every parameter by name: as a module says, the innermost first, else as the parameter's place and shape say.

    Raises: ConfigError for a kind that does not exist (nearest named).
    """
    said: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            said[id(module.weight)] = "embedding"
        elif isinstance(module, SaysKinds):
            said |= {id(parameter): group["kind"] for group in module.param_groups() for parameter in group["params"]}
        elif isinstance(module, HyperConnection):
            said |= {id(parameter): "vector" for parameter in module.parameters()}
    for kind in said.values():
        _chosen("a parameter's kind", kind, OPTIMIZERS["adamw"])
    return {name: said.get(id(p), "matrix" if p.ndim in (2, 3) else "vector") for name, p in model.named_parameters()}


def backbone_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """What `train.optimizer` asks for. Raises ConfigError for an unknown optimiser or schedule (nearest named)."""
    _chosen("train.schedule", config.schedule, SCHEDULES)
    rules, kind_of = _chosen("train.optimizer", config.optimizer, OPTIMIZERS), kinds(model)

    def group(rule: str, *, decays: bool) -> dict:
        params = [
            parameter
            for name, parameter in model.named_parameters()
            if rules[kind_of[name]] == rule and (kind_of[name] != UNDECAYED) == decays
        ]
        return {"params": params, "weight_decay": config.weight_decay if decays else 0.0, "lr": config.lr}

    adamw = torch.optim.AdamW(
        [group("adamw", decays=True), group("adamw", decays=False)],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=True,
    )
    if "muon" not in rules.values():
        return adamw
    return Together(Muon([group("muon", decays=True)], config.lr), adamw)


def row_optimizer(config: TrainConfig) -> RowOptimizer:
    """The tables' optimiser that a config asks for. Raises ConfigError for an unknown rule (nearest named)."""
    adam = {"betas": (config.beta1, config.beta2), "eps": config.adam_eps}
    rule = make_rule(config.table_rule, **(adam if config.table_rule == "sparse_adam" else {}))
    return RowOptimizer(rule, config.lr * config.table_lr_multiplier, clip=config.table_clip)


@dataclass(frozen=True)
class Route:
    """What moves the parameters of one kind."""

    kind: str  # "matrix", "embedding", "vector", "table"
    rule: str
    tensors: int
    parameters: int
    lr: float  # at the height of the schedule
    decay: float


def routing(model: nn.Module, config: TrainConfig) -> list[Route]:
    """A route for each kind that a `Transformer` has, its tables last; it may lie on the meta device, and its stores may be empty.

    Raises: as `backbone_optimizer`.
    """
    rules, kind_of = _chosen("train.optimizer", config.optimizer, OPTIMIZERS), kinds(model)
    routes = []
    for kind, rule in rules.items():
        sizes = [parameter.numel() for name, parameter in model.named_parameters() if kind_of[name] == kind]
        decay = 0.0 if kind == UNDECAYED else config.weight_decay
        routes += [Route(kind, rule, len(sizes), sum(sizes), config.lr, decay)] if sizes else []
    if model.spec:
        rows = [model.spec.num_rows(layer_id) for layer_id in model.spec.layer_ids]
        rule = "none (frozen)" if model.memory_config.frozen else config.table_rule
        parameters = sum(rows) * model.memory_config.row_width
        routes.append(Route("table", rule, len(rows), parameters, config.lr * config.table_lr_multiplier, 0.0))
    return routes


def lr_share(step: int, steps: int, warmup_steps: int, final_share: float, schedule: str = "cosine") -> float:
    """Share of the rate at a step, which counts from 0: linear warm-up, then one of `SCHEDULES`. Raises ConfigError.

    final_share: where "cosine" ends, at the last step. "step" has the ends of the paper's sister (2512.24880, Table 5).
    """
    after_warmup = _chosen("train.schedule", schedule, SCHEDULES)
    warmup = min(warmup_steps, max(1, steps // 4))
    if step < warmup:
        return (step + 1) / warmup
    return after_warmup(step, steps, warmup, final_share)


def set_lr(optimizers: list[torch.optim.Optimizer], base: list[float], share: float) -> None:
    """Give every group of the i-th optimiser `base[i] * share`."""
    for optimizer, lr in zip(optimizers, base, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr * share


def _cosine(step: int, steps: int, warmup: int, final_share: float) -> float:
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _stairs(step: int, steps: int, warmup: int, final_share: float) -> float:
    """Down by a root of ten at 80 % and again at 90 % of the steps."""
    if 10 * step < 8 * steps:
        return 1.0
    return 0.316 if 10 * step < 9 * steps else 0.1


SCHEDULES: dict[str, Callable[[int, int, int, float], float]] = {"cosine": _cosine, "step": _stairs}


def _chosen(key: str, name: str, options: Mapping[str, Option]) -> Option:
    """The option called `name`. Raises ConfigError (nearest named)."""
    if name not in options:
        raise ConfigError(f'{key} "{name}" is unknown{nearest(name, options)}; there are {", ".join(options)}')
    return options[name]
