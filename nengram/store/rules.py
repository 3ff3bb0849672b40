"""Update rules: what becomes of the rows that a batch touched, as pure functions that stores call.

Every rule here is lazy. A row that the batch did not touch keeps its vector and its state bit for bit, so a
step costs what the batch touches, not what the table holds. That is also where these rules part from their
dense namesakes: a dense Adam would keep moving a row on old momentum, and decay its second moment, while the
row is not seen.

`SparseAdam` is the paper's optimiser for tables (Table 5: Adam, weight decay 0, five times the base rate), at
two numbers of state per weight. The row-wise rules keep ONE number per row, the mean square of its gradient:
4 bytes a row whatever its width. There is no weight decay in any of them, as in the paper: a row seen twice a
week must not fade in between.

All arithmetic is float32; `step` counts the store's updates from 1.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from nengram.errors import ConfigError, nearest

State = dict[str, torch.Tensor]


class Rule(Protocol):
    """An update rule: frozen hyper-parameters, a name that checkpoints record, and two pure functions."""

    name: ClassVar[str]

    def state_shapes(self, num_rows: int, row_width: int) -> dict[str, tuple[int, ...]]:
        """Shape of each float32 state tensor of a whole table; all start at zero."""
        ...

    def apply(
        self, weight_UE: torch.Tensor, grads_UE: torch.Tensor, state: State, *, lr: float, step: int
    ) -> tuple[torch.Tensor, State]:
        """The new vectors and new state of the U rows given. Nothing is changed in place."""
        ...


@dataclass(frozen=True)
class SparseAdam:
    """Lazy Adam, by the convention of `torch.optim.SparseAdam`: both moments of touched rows only, and bias
    correction by the GLOBAL step. A row first met late in training thus takes a first step of (1 - b1) /
    sqrt(1 - b2) x lr, 0.45 x lr at the default betas, where correction by the row's own count would give lr
    at the price of a counter per row.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    name: ClassVar[str] = "sparse_adam"

    def __post_init__(self) -> None:
        for beta in self.betas:
            _require_share("beta", beta)
        _require_positive("eps", self.eps)

    def state_shapes(self, num_rows: int, row_width: int) -> dict[str, tuple[int, ...]]:
        return {"exp_avg": (num_rows, row_width), "exp_avg_sq": (num_rows, row_width)}

    def step_size(self, lr: float, step: int) -> float:
        """lr x sqrt(1 - b2^step) / (1 - b1^step)."""
        return lr * math.sqrt(1 - self.betas[1] ** step) / (1 - self.betas[0] ** step)

    def apply(
        self, weight_UE: torch.Tensor, grads_UE: torch.Tensor, state: State, *, lr: float, step: int
    ) -> tuple[torch.Tensor, State]:
        exp_avg_UE = state["exp_avg"].lerp(grads_UE, 1 - self.betas[0])
        exp_avg_sq_UE = state["exp_avg_sq"].lerp(grads_UE.square(), 1 - self.betas[1])
        denominator_UE = exp_avg_sq_UE.sqrt().add_(self.eps)
        weight_UE = weight_UE.addcdiv(exp_avg_UE, denominator_UE, value=-self.step_size(lr, step))
        return weight_UE, {"exp_avg": exp_avg_UE, "exp_avg_sq": exp_avg_sq_UE}


@dataclass(frozen=True)
class RowwiseAdagrad:
    """Adagrad with one accumulator per row: s += mean(g^2); w -= lr * g / (sqrt(s) + eps).

    At row width 1 this is `torch.optim.Adagrad` on sparse gradients.
    """

    eps: float = 1e-10
    name: ClassVar[str] = "rowwise_adagrad"

    def __post_init__(self) -> None:
        _require_positive("eps", self.eps)

    def state_shapes(self, num_rows: int, row_width: int) -> dict[str, tuple[int, ...]]:
        return {"sum_sq": (num_rows,)}

    def apply(
        self, weight_UE: torch.Tensor, grads_UE: torch.Tensor, state: State, *, lr: float, step: int
    ) -> tuple[torch.Tensor, State]:
        sum_sq_U = state["sum_sq"] + grads_UE.square().mean(-1)
        return _rowwise_step(weight_UE, grads_UE, sum_sq_U, lr, self.eps), {"sum_sq": sum_sq_U}


@dataclass(frozen=True)
class RowwiseRMSprop:
    """RMSprop with one average per row: s = beta s + (1 - beta) mean(g^2); w -= lr * g / (sqrt(s) + eps).

    A row's FIRST gradient sets s = mean(g^2). Left to grow from zero, as in the dense form, s would make the
    first step 1 / sqrt(1 - beta) times too long; in a table most rows are seen a few times, so first steps
    are most of the training.
    """

    beta: float = 0.95
    eps: float = 1e-8
    name: ClassVar[str] = "rowwise_rmsprop"

    def __post_init__(self) -> None:
        _require_share("beta", self.beta)
        _require_positive("eps", self.eps)

    def state_shapes(self, num_rows: int, row_width: int) -> dict[str, tuple[int, ...]]:
        return {"mean_sq": (num_rows,)}

    def apply(
        self, weight_UE: torch.Tensor, grads_UE: torch.Tensor, state: State, *, lr: float, step: int
    ) -> tuple[torch.Tensor, State]:
        now_U = grads_UE.square().mean(-1)
        before_U = state["mean_sq"]
        mean_sq_U = torch.where(before_U == 0, now_U, before_U.lerp(now_U, 1 - self.beta))
        return _rowwise_step(weight_UE, grads_UE, mean_sq_U, lr, self.eps), {"mean_sq": mean_sq_U}


RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (SparseAdam, RowwiseAdagrad, RowwiseRMSprop)}


def make_rule(name: str, **options: object) -> Rule:
    """The rule called `name`, e.g. `make_rule("sparse_adam", betas=(0.9, 0.99))`.

    Raises: ConfigError for an unknown name or option (the nearest is named), or a value out of range.
    """
    if name not in RULES:
        raise ConfigError(f'unknown update rule "{name}"{nearest(name, RULES)}; there are {", ".join(RULES)}')
    known = RULES[name].__dataclass_fields__
    for option in options:
        if option not in known or option == "name":
            raise ConfigError(f'{name} has no option "{option}"{nearest(option, known)}')
    return RULES[name](**options)


def _rowwise_step(
    weight_UE: torch.Tensor, grads_UE: torch.Tensor, sq_U: torch.Tensor, lr: float, eps: float
) -> torch.Tensor:
    return weight_UE.addcdiv(grads_UE, sq_U.sqrt().add_(eps).unsqueeze(-1), value=-lr)


def _require_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"{name} must be at least 0 and below 1, not {value}")


def _require_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{name} must be above 0, not {value}")
