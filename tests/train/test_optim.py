"""The schedules, and who moves what: matrices, embeddings and vectors of the backbone, and tables apart from it."""

import copy

import pytest
import torch
from torch import nn

from nengram.config import TrainConfig
from nengram.errors import ConfigError
from nengram.model import resolve
from nengram.model.hyper import HyperConnection
from nengram.store.rules import SparseAdam
from nengram.train import RowOptimizer, build_model, lr_share
from nengram.train.muon import Muon
from nengram.train.optim import backbone_optimizer, kinds, routing, row_optimizer, set_lr
from tests.conftest import TINY, run_command


def test_the_rate_warms_up_linearly_and_ends_at_its_share():
    shares = [lr_share(step, 100, 10, 0.1) for step in range(100)]
    assert shares[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert shares[-1] == pytest.approx(0.1) and max(shares) == 1.0
    assert all(a >= b for a, b in zip(shares[10:], shares[11:], strict=False))


def test_the_papers_schedule_is_flat_and_falls_at_80_and_90_per_cent():
    shares = [lr_share(step, 100, 10, 0.5, "step") for step in range(100)]
    assert shares[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert shares[10:] == [1.0] * 70 + [0.316] * 10 + [0.1] * 10
    paper = [lr_share(step, 50000, 2000, 0.1, "step") for step in (1999, 39999, 40000, 44999, 45000, 49999)]
    assert paper == [1.0, 1.0, 0.316, 0.316, 0.1, 0.1]


@pytest.mark.parametrize("schedule", ["cosine", "step"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_short_runs_have_a_schedule_too(steps, schedule):
    assert all(0 < lr_share(step, steps, 40, 0.1, schedule) <= 1 for step in range(steps))


def test_an_unknown_schedule_names_the_nearest():
    with pytest.raises(ConfigError, match=r'"cosin" is unknown \(did you mean "cosine"\?\); there are cosine, step'):
        lr_share(0, 10, 2, 0.1, "cosin")


@pytest.fixture
def new_model(config, data):
    """Makes a model with memory, the same every time."""
    resolved = resolve(config.replace(budget__arm="engram"), data.tokenizer.get_vocab_size())

    def make():
        model = build_model(resolved, data)
        model.init_weights(0)
        return model

    return make


@pytest.fixture
def memory_model(new_model):
    return new_model()


def backward(model, scale: float = 1.0):
    ids_BT = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    step = model.begin(ids_BT)
    (scale * model(ids_BT, step=step).square().mean()).backward()
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


def test_the_tables_can_have_the_papers_adam(memory_model):
    """Table 5: Adam, five times the rate, no decay; betas and eps of the sister paper. A first step has the rate's length."""
    paper = TrainConfig(lr=4e-4, beta1=0.9, beta2=0.95, adam_eps=1e-20)
    rows = row_optimizer(paper)
    assert rows.rule == SparseAdam(betas=(0.9, 0.95), eps=1e-20) and rows.param_groups[0]["lr"] == pytest.approx(2e-3)
    before = memory_model.stores[1].tensors()["weight"].clone()
    step = backward(memory_model, scale=1e-6)
    rows_U, grads_UE = (tensor.clone() for tensor in step.grads()[1])
    rows.take(step)
    rows.step()
    moved_UE = (memory_model.stores[1].tensors()["weight"] - before)[rows_U]
    has_gradient = grads_UE.abs() > 1e-15
    assert has_gradient.float().mean() > 0.9 and grads_UE.abs().max() < 1e-7, "an eps of 1e-8 would show"
    torch.testing.assert_close(moved_UE[has_gradient], -2e-3 * grads_UE[has_gradient].sign(), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_eps_and_betas_of_the_backbones_adamw_are_the_configs(memory_model, optimizer):
    config = TrainConfig(optimizer=optimizer, beta1=0.8, beta2=0.99, adam_eps=1e-20)
    adamw = [group for group in backbone_optimizer(memory_model, config).param_groups if "betas" in group]
    assert [(group["betas"], group["eps"]) for group in adamw] == [((0.8, 0.99), 1e-20)] * 2


def test_hyper_connections_are_left_to_adamw():
    unit = nn.ModuleDict({"unit": HyperConnection(8, 4), "layer": nn.Linear(8, 8)})
    kind_of = kinds(unit)
    assert kind_of.pop("layer.weight") == "matrix" and set(kind_of.values()) == {"vector"}


def test_kinds_go_by_place_and_shape_and_by_what_a_module_says(memory_model):
    kind_of = kinds(memory_model)
    assert kind_of.keys() == dict(memory_model.named_parameters()).keys()
    expected = {
        "embed.weight": "embedding",
        "norm.weight": "vector",
        "blocks.0.attention.query.weight": "matrix",
        "blocks.0.moe.router.weight": "matrix",
        "blocks.0.moe.gate_up_XDF": "matrix",
        "blocks.0.moe.shared.down.weight": "matrix",
        "blocks.1.memory.value_proj.weight": "matrix",
        "blocks.1.memory.query_gain": "vector",
        "blocks.1.memory.conv_weight": "vector",
    }
    assert {name: kind_of[name] for name in expected} == expected


class Saying(nn.Module):
    """A module with a map that no Muon should move, and a part that speaks for itself."""

    def __init__(self, kind: str = "vector"):
        super().__init__()
        self.map, self.plain, self.bias = (nn.Parameter(torch.zeros(shape)) for shape in ((3, 3), (3, 3), (3,)))
        self.kind = kind

    def param_groups(self) -> list[dict]:
        return [{"kind": self.kind, "params": [self.map]}]


def test_what_a_module_leaves_out_is_of_its_shapes_kind_and_an_unknown_kind_is_refused():
    assert kinds(nn.Sequential(Saying())) == {"0.map": "vector", "0.plain": "matrix", "0.bias": "vector"}
    with pytest.raises(ConfigError, match=r'"vectr" is unknown \(did you mean "vector"'):
        kinds(Saying("vectr"))


def gradients(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def stepped(model, optimizer, steps: int = 3) -> dict[str, torch.Tensor]:
    """Parameters by name after some steps with made-up gradients."""
    for seed in range(steps):
        gradients(model, seed)
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_muon_moves_matrices_and_leaves_all_else_to_adamw_bit_for_bit(new_model):
    memory_model, other, alone = new_model(), new_model(), new_model()
    kind_of = kinds(memory_model)
    muon = stepped(memory_model, backbone_optimizer(memory_model, TrainConfig(optimizer="muon")))
    adamw = stepped(other, backbone_optimizer(other, TrainConfig()))
    matrices = [parameter for name, parameter in alone.named_parameters() if kind_of[name] == "matrix"]
    only = stepped(alone, Muon(matrices, 0.006, weight_decay=0.1))
    for name, kind in kind_of.items():
        assert torch.equal(muon[name], (only if kind == "matrix" else adamw)[name]), name
        assert not torch.equal(only[name], adamw[name]), name


def test_a_schedule_reaches_every_group_of_both(memory_model):
    optimizer = backbone_optimizer(memory_model, TrainConfig(optimizer="muon"))
    set_lr([optimizer], [0.01], 0.5)
    before = {name: parameter.detach().clone() for name, parameter in memory_model.named_parameters()}
    set_lr([optimizer], [0.01], 0.0)
    after = stepped(memory_model, optimizer, steps=1)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_state_of_both_survives_saving(new_model):
    config, memory_model, other = TrainConfig(optimizer="muon"), new_model(), new_model()
    whole, cut = backbone_optimizer(memory_model, config), backbone_optimizer(other, config)
    stepped(memory_model, whole)
    stepped(other, cut)
    again = backbone_optimizer(other, config)
    again.load_state_dict(copy.deepcopy(cut.state_dict()))
    state = again.state_dict()["state"]
    assert sorted(state) == list(range(len(list(other.parameters()))))
    assert {frozenset(values) for values in state.values()} == {
        frozenset({"momentum_buffer"}),
        frozenset({"step", "exp_avg", "exp_avg_sq"}),
    }
    set_lr([whole, again], [0.003, 0.003], 1.0)
    mine, theirs = stepped(other, again), stepped(memory_model, whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_routing_counts_every_parameter_once_and_says_what_the_optimisers_do(memory_model, optimizer):
    config = TrainConfig(optimizer=optimizer, lr=0.01)
    routes = {route.kind: route for route in routing(memory_model, config)}
    assert list(routes) == ["matrix", "embedding", "vector", "table"]
    assert [route.rule for route in routes.values()] == [optimizer, "adamw", "adamw", "sparse_adam"]
    assert [route.lr for route in routes.values()] == pytest.approx([0.01, 0.01, 0.01, 0.05])
    assert [route.decay for route in routes.values()] == [0.1, 0.1, 0.0, 0.0]
    backbone = [route for route in routes.values() if route.kind != "table"]
    assert sum(route.parameters for route in backbone) == sum(p.numel() for p in memory_model.parameters())
    assert sum(route.tensors for route in backbone) == len(list(memory_model.parameters()))
    assert routes["table"].parameters == memory_model.stores[1].tensors()["weight"].numel()
    groups = backbone_optimizer(memory_model, config).param_groups
    by_decay = {decay: sum(len(g["params"]) for g in groups if g["weight_decay"] == decay) for decay in (0.0, 0.1)}
    assert by_decay == {0.0: routes["vector"].tensors, 0.1: routes["matrix"].tensors + routes["embedding"].tensors}


def test_an_unknown_optimizer_names_the_nearest(memory_model):
    with pytest.raises(ConfigError, match=r'"mun" is unknown \(did you mean "muon"\?\); there are adamw, muon'):
        backbone_optimizer(memory_model, TrainConfig(optimizer="mun"))


def test_nengram_train_prints_what_moves_what(monkeypatch, capsys, tmp_path, corpus_file):
    monkeypatch.chdir(tmp_path)
    own = (f"data.corpus={corpus_file}", "data.vocab_size=400", "train.optimizer=muon", "train.lr=0.01")
    code, out, _ = run_command(monkeypatch, capsys, "train", "demo", *TINY, *own)
    told = {cells[0]: cells[1:] for line in out.splitlines() if len(cells := line.strip("│ ").split()) > 10}
    assert code == 0 and [told[kind][1] for kind in ("matrix", "embedding", "vector", "table")] == [
        "muon",
        "adamw",
        "adamw",
        "sparse_adam",
    ]
    assert told["table"][-3:] == ["0.05", "│", "0"]
    assert out.index("sparse_adam") < out.index("tokens, dev")
