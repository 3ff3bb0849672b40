"""Trainer trains weights and tables alike, and a resumed run is the run."""

import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from nengram.config import TrainConfig
from nengram.errors import CheckpointError, ConfigError
from nengram.hf.modeling import NengramForCausalLM
from nengram.hf.optim import BestTables
from nengram.hf.training import own_optimizers
from nengram.train.loop import train_step
from nengram.train.optim import backbone_optimizer, row_optimizer

STEPS = 6
CONFIG = TrainConfig(lr=0.01, warmup_steps=1)


def rows() -> list[dict[str, list[int]]]:
    """Two texts of one length, in turns; as labels the same ids."""
    ids_NT = torch.randint(258, 400, (2, 12), generator=torch.Generator().manual_seed(0)).tolist() * 12
    return [{"input_ids": ids, "labels": ids} for ids in ids_NT]


def trainer(model, folder, *, steps: int = STEPS, save: int = 0, config: TrainConfig = CONFIG, **options) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        save_strategy="steps" if save else "no",
        save_steps=save or 500,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        **options,
    )
    moved_by = own_optimizers(model, config, steps=STEPS)
    return Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows()[:2], optimizers=moved_by)


def numbers(model) -> dict[str, torch.Tensor]:
    """Everything that training moves: weights, rows, and what their rules remember."""
    found = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer_id, store in model.tables.stores.items():
        found |= {f"table-{layer_id}.{name}": tensor.clone() for name, tensor in store.tensors().items()}
    return found


def losses(run: Trainer) -> list[float]:
    return [record["loss"] for record in run.state.log_history if "loss" in record]


@pytest.fixture
def fresh(strong):
    return lambda: AutoModelForCausalLM.from_pretrained(strong.folder)


@pytest.fixture(scope="module")
def whole(strong, tmp_path_factory):
    """A run of six steps, saved after three."""
    folder = tmp_path_factory.mktemp("trainer")
    run = trainer(AutoModelForCausalLM.from_pretrained(strong.folder), folder, save=3)
    run.train()
    return run, folder


def test_everything_moves_and_the_loss_falls(whole, fresh):
    before, after = numbers(fresh()), numbers(whole[0].model)
    still = [name for name in before if name != "model.cids_V" and torch.equal(before[name], after[name])]
    assert still == [] and losses(whole[0])[-1] < losses(whole[0])[0]


def test_a_resumed_run_is_the_run_bit_for_bit(whole, fresh):
    run, folder = whole
    again = trainer(fresh(), folder, save=0)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    mine, theirs = numbers(again.model), numbers(run.model)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def test_evaluation_is_the_loss_of_our_own_model(whole):
    ids_BT = torch.tensor([row["input_ids"] for row in rows()[:2]])
    found = whole[0].evaluate()["eval_loss"]
    with torch.no_grad():
        logits_BTV = whole[0].model.tables.eval()(ids_BT)
    wanted = torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    assert found == pytest.approx(float(wanted), abs=1e-5)


def test_a_checkpoint_is_a_model_folder(whole, fresh):
    run, folder = whole
    saved = NengramForCausalLM.from_pretrained(folder / f"checkpoint-{STEPS}", table_tier="mapped")
    ids_BT = torch.tensor([rows()[0]["input_ids"]])
    with torch.no_grad():
        run.model.eval()
        assert torch.equal(saved(ids_BT).logits, run.model(ids_BT).logits)
        assert not torch.equal(saved(ids_BT).logits, fresh()(ids_BT).logits)


def test_a_step_is_that_of_our_own_loop(strong, fresh):
    """Same batch, same rules: weights and tables end where nengram's own `train_step` takes them."""

    class Batch:
        ids_BT = torch.tensor([row["input_ids"] for row in rows()[:2]])
        targets_BT = torch.nn.functional.pad(ids_BT[:, 1:], (0, 1), value=-100)
        start_BT = torch.zeros_like(ids_BT, dtype=torch.bool)

    theirs, config = fresh(), strong.run.config.replace(train__lr=0.01)
    own = fresh().tables.train()
    batch = Batch()
    for name in ("ids_BT", "targets_BT", "start_BT"):
        setattr(batch, name, getattr(Batch, name).numpy())
    train_step(own, batch, backbone_optimizer(own, config.train), row_optimizer(config.train), config)
    optimizer, _ = own_optimizers(theirs.train(), config.train)
    theirs(Batch.ids_BT, labels=Batch.ids_BT).loss.backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), config.train.clip)
    optimizer.step()
    for name, tensor in own.state_dict().items():
        torch.testing.assert_close(theirs.tables.state_dict()[name], tensor, msg=name)
    for layer_id, store in own.stores.items():
        torch.testing.assert_close(theirs.tables.stores[layer_id].tensors()["weight"], store.tensors()["weight"])


def test_accumulated_gradients_are_one_update(fresh, tmp_path):
    """Four rows at once, and two after two: the same tables, up to the order of a sum."""
    config = TrainConfig(lr=0.01, warmup_steps=1, table_rule="rowwise_adagrad")
    at_once = trainer(fresh(), tmp_path / "a", steps=1, config=config)
    at_once.args.per_device_train_batch_size = at_once._train_batch_size = 4
    at_once.train()
    parts = trainer(fresh(), tmp_path / "b", steps=1, config=config, gradient_accumulation_steps=2)
    parts.train()
    for layer_id, store in at_once.model.tables.stores.items():
        assert int(store.tensors()["step"]) == 1 == int(parts.model.tables.stores[layer_id].tensors()["step"])
        torch.testing.assert_close(
            parts.model.tables.stores[layer_id].tensors()["weight"], store.tensors()["weight"], atol=1e-5, rtol=1e-4
        )


def test_without_our_optimiser_tables_stay_as_they_are(fresh):
    model = fresh().train()
    before = numbers(model)
    ids_BT = torch.tensor([rows()[0]["input_ids"]])
    with pytest.warns(UserWarning, match=r"tables stay as they are.*own_optimizers\(model\) moves them"):
        model(ids_BT, labels=ids_BT).loss.backward()
    after = numbers(model)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("table"))


def test_evaluation_between_steps_leaves_no_pass_behind(fresh):
    model = fresh()
    optimizer, _ = own_optimizers(model, CONFIG)
    ids_BT = torch.tensor([rows()[0]["input_ids"]])
    model.eval()(ids_BT, labels=ids_BT)
    with torch.no_grad():
        model.train()(ids_BT, labels=ids_BT)
    before = numbers(model)
    optimizer.step()
    assert all(torch.equal(before[name], now) for name, now in numbers(model).items() if name.endswith(".weight"))


def test_weights_without_their_tables_are_announced(fresh):
    """What `load_best_model_at_end` does: the weights of another step, and the tables of the last."""
    model = fresh()
    optimizer, _ = own_optimizers(model, CONFIG)
    ids_BT, older = torch.tensor([rows()[0]["input_ids"]]), model.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(older)
    model.train()(ids_BT, labels=ids_BT).loss.backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="beside tables that have learned since"):
        model.load_state_dict(older)


def test_the_best_checkpoint_comes_back_with_its_tables(strong, fresh, tmp_path):
    """At a rate that ruins the model the first checkpoint is the best one: after training the model is that checkpoint."""
    steep = TrainConfig(lr=0.5, warmup_steps=0)
    how = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 1}
    run = trainer(fresh(), tmp_path, steps=3, save=1, config=steep, **how)
    run.add_callback(BestTables())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="weights were loaded beside tables")
        run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-1")
    best = NengramForCausalLM.from_pretrained(run.state.best_model_checkpoint)
    mine, theirs = numbers(run.model), numbers(best)
    rows_moved = [name for name, tensor in numbers(fresh()).items() if not torch.equal(tensor, theirs[name])]
    assert any(name.startswith("table") for name in rows_moved)
    assert [name for name in theirs if not name.endswith(".step") and not torch.equal(mine[name], theirs[name])] == []


def test_best_tables_needs_our_optimiser_and_a_whole_file(fresh, tmp_path):
    run = trainer(fresh(), tmp_path, steps=1)
    run.optimizer = torch.optim.SGD(run.model.parameters())
    run.add_callback(BestTables())
    with pytest.raises(ConfigError, match="moves no tables"):
        run.train()

    class Damaged(BestTables):
        def on_save(self, args, state, control, **others):
            super().on_save(args, state, control, **others)
            file = Path(state.best_model_checkpoint, self.file)
            file.write_bytes(file.read_bytes()[:100])

    how = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 1}
    run = trainer(fresh(), tmp_path, steps=1, save=1, save_only_model=True, **how)
    run.add_callback(Damaged())
    with pytest.raises(CheckpointError, match=r"tables\.safetensors"):
        run.train()


def test_checkpointed_activations_give_the_same_run_with_less_kept(fresh, tmp_path):
    plain, checkpointed = (
        trainer(fresh(), tmp_path / str(on), gradient_checkpointing=on, steps=2) for on in (False, True)
    )
    for run in (plain, checkpointed):
        run.train()
    mine, theirs = numbers(checkpointed.model), numbers(plain.model)
    assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []
    assert checkpointed.model.model.gradient_checkpointing
    ids_BT, kept = torch.tensor([rows()[0]["input_ids"]]), []
    for run in (plain, checkpointed):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            run.model.train()(ids_BT, labels=ids_BT)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


def test_what_is_not_offered_says_so(fresh, strong):
    with pytest.raises(ConfigError, match="is not our model"):
        own_optimizers(strong.own)
