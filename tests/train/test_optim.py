"""The schedule, and the two optimisers: tables apart from the backbone in rate, decay and clipping."""

import pytest
import torch

from nengram.config import TrainConfig
from nengram.errors import ConfigError
from nengram.model import resolve
from nengram.train import RowOptimizer, build_model, lr_share
from nengram.train.optim import backbone_optimizer, row_optimizer


def test_the_rate_warms_up_linearly_and_ends_at_its_share():
    shares = [lr_share(step, 100, 10, 0.1) for step in range(100)]
    assert shares[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert shares[-1] == pytest.approx(0.1) and max(shares) == 1.0
    assert all(a >= b for a, b in zip(shares[10:], shares[11:], strict=False))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_short_runs_have_a_schedule_too(steps):
    assert all(0 < lr_share(step, steps, 40, 0.1) <= 1 for step in range(steps))


@pytest.fixture
def memory_model(config, data):
    resolved = resolve(config.replace(budget__arm="engram"), data.tokenizer.get_vocab_size())
    model = build_model(resolved, data)
    model.init_weights(0)
    return model


def backward(model):
    ids_BT = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    step = model.begin(ids_BT)
    model(ids_BT, step=step).square().mean().backward()
    return step


def test_matrices_decay_and_gains_and_the_convolution_do_not(memory_model):
    decayed, spared = backbone_optimizer(memory_model, TrainConfig()).param_groups
    names = {id(parameter): name for name, parameter in memory_model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    spared_names = {names[id(parameter)] for parameter in spared["params"]}
    assert any("norm" in name for name in spared_names) and any("conv_weight" in name for name in spared_names)
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_rows_move_by_the_tables_rate_and_only_rows_that_were_read(memory_model):
    before = memory_model.stores[1].tensors()["weight"].clone()
    step = backward(memory_model)
    read = step.rows[1].unique()
    rows = row_optimizer(TrainConfig(lr=0.01))
    assert rows.param_groups[0]["lr"] == pytest.approx(0.05)
    rows.take(step)
    rows.step()
    moved = (memory_model.stores[1].tensors()["weight"] != before).any(1)
    assert moved.any() and not moved[torch.isin(torch.arange(len(before)), read, invert=True)].any()


def test_an_ordinary_scheduler_drives_the_tables_rate():
    rows = row_optimizer(TrainConfig(lr=0.01))
    scheduler = torch.optim.lr_scheduler.LambdaLR(rows, lambda step: 0.5**step)
    rows.step()
    scheduler.step()
    assert rows.param_groups[0]["lr"] == pytest.approx(0.025)


def test_clipping_a_table_limits_its_gradient_and_leaves_the_backbone_alone(memory_model):
    step = backward(memory_model)
    backbone = [p.grad.clone() for p in memory_model.parameters() if p.grad is not None]
    norm = float(step.grads()[1][1].norm())
    seen = {}

    class Watch:
        def __getattr__(self, _name):
            raise AssertionError("the store, not the optimiser, applies the rule")

    rows = RowOptimizer(Watch(), lr=0.1, clip=norm / 4)
    rows.take(step)
    step.update = lambda rule, lr, grads: seen.update(grads)
    rows.step()
    assert float(seen[1][1].norm()) == pytest.approx(norm / 4, rel=1e-4)
    assert all(
        torch.equal(a, b)
        for a, b in zip(backbone, [p.grad for p in memory_model.parameters() if p.grad is not None], strict=True)
    )


def test_an_unknown_rule_names_the_nearest():
    with pytest.raises(ConfigError, match="sparse_adam"):
        row_optimizer(TrainConfig(table_rule="sparse_adm"))
