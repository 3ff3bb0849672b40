"""The training loop: exact resume, refusal of what does not fit, and records that tell the truth."""

import json
import tomllib

import pytest
import tomli_w
import torch

from nengram.config import load_config, to_toml
from nengram.errors import CheckpointError, ConfigError, DataError
from nengram.files import sha256_bytes
from nengram.model.folder import read_tensors
from nengram.train import build_model, loop, train
from nengram.train.checkpoint import identity_of

ARMS = ("moe", "engram", "one_row", "additive")
RULES = ("rowwise_adagrad", "rowwise_rmsprop")


def losses(folder) -> list[float]:
    return [json.loads(line)["loss_nats"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final_tensors(folder) -> dict[str, torch.Tensor]:
    return {
        f"{path.name}:{name}": tensor
        for path in sorted((folder / "final").glob("*.safetensors"))
        for name, tensor in read_tensors(path).items()
    }


def run_until(config, data, folder, step: int, *, resume: bool = False) -> None:
    """Train and walk away after `step`, as a killed process would."""
    for record in train(config, data, folder, resume=resume):
        if record.step == step:
            return


@pytest.mark.parametrize(
    "arm, changes",
    [
        *((arm, {}) for arm in ARMS),
        *(("engram", {"train__table_rule": rule}) for rule in RULES),
        *((arm, {"train__optimizer": "muon", "train__schedule": "step"}) for arm in ("moe", "engram")),
    ],
)
def test_resume_continues_bit_for_bit(config, data, tmp_path, arm, changes):
    config = config.replace(budget__arm=arm, **changes)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    list(train(config, data, whole))
    run_until(config, data, cut, 7)  # two steps past the checkpoint at 5: they are done again
    run_until(config, data, cut, 11, resume=True)
    list(train(config, data, cut, resume=True))
    assert losses(cut) == losses(whole)
    mine, theirs = final_tensors(cut), final_tensors(whole)
    assert mine.keys() == theirs.keys() and len(mine) > 10
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


def test_resume_survives_a_metrics_line_cut_short_and_a_kill_between_renames(config, data, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    list(train(config, data, whole))
    run_until(config, data, cut, 7)
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "loss_n')
    (cut / "checkpoint").rename(cut / ".checkpoint.old")
    with pytest.warns(UserWarning, match="broken line"):
        list(train(config, data, cut, resume=True))
    assert losses(cut) == losses(whole)


def test_training_lowers_the_loss_and_the_seed_decides_the_run(config, data, tmp_path):
    config = config.replace(train__tokens=5120)
    first = [record.loss_nats for record in train(config, data, tmp_path / "a")]
    again = [record.loss_nats for record in train(config, data, tmp_path / "b")]
    other = [record.loss_nats for record in train(config.replace(train__seed=1), data, tmp_path / "c")]
    assert first == again != other
    assert sum(first[-3:]) / 3 < first[0] - 0.5


def test_the_meter_reads_dev_with_permuted_rows_and_changes_nothing_else(config, data, tmp_path):
    plain = list(train(config, data, tmp_path / "plain"))
    metered = list(train(config.replace(train__meter_every=5), data, tmp_path / "metered"))
    assert [record.loss_nats for record in metered] == [record.loss_nats for record in plain]
    mine, theirs = final_tensors(tmp_path / "metered"), final_tensors(tmp_path / "plain")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    read = [record.step for record in metered if record.dev_nats_permuted is not None]
    assert read == [5, 10, 12] == [record.step for record in metered if record.dev_nats is not None]
    assert metered[-1].dev_nats == plain[-1].dev_nats != metered[-1].dev_nats_permuted
    assert all(record.dev_nats_permuted is None for record in plain)


def test_muon_lowers_the_loss_and_is_another_run(config, data, tmp_path):
    config = config.replace(train__tokens=5120)
    adamw = [record.loss_nats for record in train(config, data, tmp_path / "adamw")]
    muon = [record.loss_nats for record in train(config.replace(train__optimizer="muon"), data, tmp_path / "muon")]
    assert muon[0] == adamw[0] and muon[-1] != adamw[-1]
    assert sum(muon[-3:]) / 3 < muon[0] - 0.5


def test_tables_and_backbone_follow_the_papers_schedule_together(config, data, tmp_path, monkeypatch):
    seen, step = [], loop.train_step

    def watch(model, batch, backbone, rows, *rest, **options):
        seen.append([group["lr"] for group in (*backbone.param_groups, *rows.param_groups)])
        return step(model, batch, backbone, rows, *rest, **options)

    monkeypatch.setattr(loop, "train_step", watch)
    config = config.replace(train__schedule="step", train__optimizer="muon", train__lr=0.01)
    told = [record.lr for record in train(config, data, tmp_path)]
    shares = [1 / 3, 2 / 3, *[1.0] * 8, 0.316, 0.1]
    assert told == pytest.approx([0.01 * share for share in shares])
    assert seen == [pytest.approx([*[0.01 * share] * 3, 0.05 * share]) for share in shares]


@pytest.mark.parametrize("key", ["optimizer", "schedule"])
def test_an_unknown_optimizer_or_schedule_is_refused_before_a_folder_is_begun(config, data, tmp_path, key):
    with pytest.raises(ConfigError, match=f'train.{key} "mouon" is unknown'):
        next(train(config.replace(**{f"train__{key}": "mouon"}), data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arm", ["moe", "one_row"])
def test_without_a_hashed_table_there_is_nothing_to_meter(config, data, tmp_path, arm):
    records = list(train(config.replace(budget__arm=arm, train__meter_every=6), data, tmp_path))
    assert all(record.dev_nats_permuted is None for record in records)
    assert [record.step for record in records if record.dev_nats is not None] == [12]


def test_a_frozen_table_ends_as_it_was_drawn_and_leaves_no_state(config, data, tmp_path):
    config = config.replace(budget__arm="frozen", budget__rho=0.0)
    run_until(config, data, tmp_path, 6)
    mid = read_tensors(tmp_path / "checkpoint" / "table-1.safetensors")
    list(train(config, data, tmp_path, resume=True))
    fresh = build_model(load_config(tmp_path), data)
    fresh.init_weights(config.train.seed)
    drawn = fresh.stores[1].tensors()["weight"]
    assert drawn.std().item() == pytest.approx(0.5, rel=0.02)
    assert not any(name.startswith("state") for name in mid) and int(mid["step"]) == 0
    assert torch.equal(final_tensors(tmp_path)["table-1.safetensors:weight"], drawn)
    final = final_tensors(tmp_path)["model.safetensors:model.blocks.1.memory.value_proj.weight"]
    assert not torch.equal(final, fresh.blocks[1].memory.value_proj.weight)


def test_resuming_a_finished_run_does_nothing(config, data, tmp_path):
    list(train(config, data, tmp_path))
    before = final_tensors(tmp_path)
    assert list(train(config, data, tmp_path, resume=True)) == []
    assert final_tensors(tmp_path).keys() == before.keys() and len(losses(tmp_path)) == 12


def test_a_device_that_is_not_there_is_refused(config, data, tmp_path):
    with pytest.raises(ConfigError, match='train.device "cudda"'):
        next(train(config.replace(train__device="cudda"), data, tmp_path))


def test_a_finished_or_begun_folder_is_not_overwritten_without_resume(config, data, tmp_path):
    run_until(config, data, tmp_path / "run", 2)
    with pytest.raises(CheckpointError, match="--resume"):
        next(train(config, data, tmp_path / "run"))


@pytest.mark.parametrize("name", ["model.safetensors", "table-1.safetensors"])
def test_a_flipped_byte_in_a_checkpoint_is_refused_by_file_name(config, data, tmp_path, name):
    run_until(config, data, tmp_path, 6)
    path = tmp_path / "checkpoint" / name
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: damaged"):
        next(train(config, data, tmp_path, resume=True))


def test_a_missing_file_of_a_checkpoint_is_named(config, data, tmp_path):
    run_until(config, data, tmp_path, 6)
    (tmp_path / "checkpoint" / "table-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="table-1.safetensors: missing"):
        next(train(config, data, tmp_path, resume=True))


def test_a_damaged_manifest_is_refused(config, data, tmp_path):
    run_until(config, data, tmp_path, 6)
    (tmp_path / "checkpoint" / "manifest.json").write_text('{"files": ')
    with pytest.raises(CheckpointError, match="manifest.json: damaged"):
        next(train(config, data, tmp_path, resume=True))


def test_another_config_is_refused_with_both_digests(config, data, tmp_path):
    run_until(config, data, tmp_path, 6)
    with pytest.raises(CheckpointError, match=r"another config \(\w{5}-\w{5}-\w{5}, now \w{5}-\w{5}-\w{5}\)"):
        next(train(config.replace(train__lr=0.001), data, tmp_path, resume=True))


def test_a_run_begun_before_a_key_existed_has_its_default_and_no_other_value(config, data, tmp_path):
    tree = tomllib.loads(to_toml(config))
    for key in ("optimizer", "schedule", "adam_eps"):
        del tree["train"][key]
    (tmp_path / "config.toml").write_text(tomli_w.dumps(tree))
    tree["name"], tree["data"]["cache"] = "", ""
    tree["train"] |= {"checkpoint_every": 0, "log_every": 0, "table_tier": ""}
    as_it_was = sha256_bytes(tomli_w.dumps(tree).encode())
    assert identity_of(config, data, tmp_path)["config"] == as_it_was
    assert identity_of(config, data, tmp_path / "new")["config"] != as_it_was
    for changed in ({"train__optimizer": "muon"}, {"train__schedule": "step"}, {"train__lr": 0.1}):
        assert identity_of(config.replace(**changed), data, tmp_path)["config"] != as_it_was


def test_a_run_begun_beside_an_older_config_is_known_by_its_own(config, data, tmp_path):
    tree = tomllib.loads(to_toml(config))
    del tree["train"]["optimizer"]
    (tmp_path / "config.toml").write_text(tomli_w.dumps(tree))
    run_until(config, data, tmp_path, 6)
    assert [record.step for record in train(config, data, tmp_path, resume=True)][0] == 6


def test_a_corpus_smaller_than_a_batch_is_refused_with_the_numbers(config, data, tmp_path):
    with pytest.raises(DataError, match=r"tokens, one batch needs 2,560,000"):
        next(train(config.replace(train__batch=80000), data, tmp_path))


def test_a_diverging_run_stops_with_one_line(config, data, tmp_path):
    config = config.replace(train__lr=1e30, train__clip=0.0)
    with pytest.raises(CheckpointError, match="lower train.lr"):
        list(train(config, data, tmp_path))


def test_a_second_pass_over_the_data_is_announced(config, data, tmp_path):
    tokens = 128 * (len(data.splits["train"]) // 128 + 2)
    with pytest.warns(UserWarning, match="about to repeat"):
        list(train(config.replace(train__tokens=tokens, budget__arm="moe"), data, tmp_path))


def test_disk_full_leaves_the_old_checkpoint(config, data, tmp_path, monkeypatch):
    run_until(config, data, tmp_path, 6)
    before = (tmp_path / "checkpoint" / "manifest.json").read_text()

    def no_space(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nengram.model.folder.save_file", no_space)
    with pytest.raises(OSError, match="No space"):
        list(train(config, data, tmp_path, resume=True))
    assert (tmp_path / "checkpoint" / "manifest.json").read_text() == before


def test_the_run_folder_says_what_ran(config, data, tmp_path):
    list(train(config, data, tmp_path))
    saved = load_config(tmp_path)
    assert saved.budget.scale == 0 and saved.model.vocab_size == data.tokenizer.get_vocab_size()
    assert {"date", "cpu", "torch", "python", "device"} <= json.loads((tmp_path / "env.json").read_text()).keys()
    assert not (tmp_path / "checkpoint").exists() and (tmp_path / "final" / "tokenizer.json").is_file()
