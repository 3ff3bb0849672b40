"""Our models under transformers' `Trainer`: what moves their weights, their tables and their experts' balance, as one optimiser.

    Trainer(model, args, train_dataset=..., optimizers=nengram.hf.own_optimizers(model, steps=1000))

The weights move as in our own training (`nengram.train.optim`: kinds, betas, decay), the tables by the rows that were read since the
last step, and after each step every mixture of experts is balanced. A checkpoint is whole: `save_pretrained` writes the tables as they
are, and the optimiser's state holds their update state, so a resumed run is the same run.
"""

from collections.abc import Mapping

import torch

from nengram.config import TrainConfig
from nengram.errors import ConfigError
from nengram.hf.modeling import NengramPreTrainedModel
from nengram.hf.optim import TableOptimizer
from nengram.store import Store
from nengram.train.optim import Together, backbone_optimizer, lr_share, row_optimizer


class _OwnTables:
    """A model as `TableOptimizer` knows it: stores, and who learns them."""

    def __init__(self, model: NengramPreTrainedModel):
        self.model = model

    def adapter(self) -> "_OwnTables":
        return self

    @property
    def stores(self) -> Mapping[int, Store]:
        return self.model.tables.stores

    def learn_by(self, optimizer: TableOptimizer) -> None:
        self.model.base_model.learner = optimizer


def own_optimizers(
    model: NengramPreTrainedModel, config: TrainConfig | None = None, *, steps: int | None = None
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR | None]:
    """For `Trainer(optimizers=...)`: the optimiser of weights and tables, and its schedule.

    config: rates, rules, decay and clipping of tables as in a run; the rest is the Trainer's. None: the defaults.
    steps: length of the schedule (warm-up, then `config.schedule`); without it there is none, and `Trainer` makes its own.
    Raises: ConfigError for a model that is not ours, and unknown options; StoreError, at the first step, for tables that are only read.
    """
    if not isinstance(model, NengramPreTrainedModel):
        raise ConfigError(
            f"a {type(model).__name__} is not our model: nengram.hf.optimizers is for one with a grafted memory"
        )
    config = config or TrainConfig()
    parts: list[torch.optim.Optimizer] = [backbone_optimizer(model, config)]
    if model.tables.spec is not None and not model.tables.memory_config.frozen:
        rows = row_optimizer(config)
        parts.append(TableOptimizer(_OwnTables(model), rows.rule, rows.param_groups[0]["lr"], clip=rows.clip))
    whole = Together(*parts)
    whole.register_step_post_hook(lambda *_: model.tables.rebalance())
    if steps is None:
        return whole, None

    def share(step: int) -> float:
        return lr_share(min(step, steps - 1), steps, config.warmup_steps, config.final_lr_share, config.schedule)

    return whole, torch.optim.lr_scheduler.LambdaLR(whole, share)
