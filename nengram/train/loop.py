"""Training as a generator of records: the command line, a sweep, a notebook and a test are plain `for` loops over it.

One step:  batch -> addresses -> forward -> backward -> clip -> update of backbone and rows -> balance experts -> record.

Stopping the loop between two records loses nothing that was checkpointed, and `resume=True` continues exactly: same batches, same
losses, bit for bit on the CPU. Learning rates, seeds and data order come from the config alone.
"""

import json
import platform
import resource
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from nengram.config import TABLE_TIERS, Config, TrainConfig, to_toml
from nengram.errors import CheckpointError, ConfigError, DataError, nearest
from nengram.files import write_atomic
from nengram.model import Transformer, resolve
from nengram.model.folder import check_identity, is_saved, load_model, open_folder, save_model
from nengram.text import Batches, Prepared
from nengram.train.checkpoint import identity_of, load_optimizer, optimizer_tensors
from nengram.train.evaluate import tensors_of, token_nats
from nengram.train.optim import backbone_optimizer, lr_share, row_optimizer, set_lr
from nengram.train.passes import FurtherPasses, RareNgrams


@dataclass(frozen=True)
class Record:
    """One line of metrics.jsonl. Losses are means over tokens, in nats."""

    step: int  # steps done
    steps: int  # in the whole run
    tokens: int  # seen so far
    loss_nats: float  # of this step's batch, before its update
    lr: float
    grad_norm: float  # of the backbone, before clipping
    expert_load_max: float  # heaviest expert of any block over the mean load, in this batch
    cpu_seconds: float  # of training so far, evaluation left out
    tokens_per_s: float  # per second of CPU time, this step
    dev_nats: float | None = None
    dev_nats_permuted: float | None = None  # the same tokens, with the rows of every slot in another order


def build_model(config: Config, data: Prepared) -> Transformer:
    """The model that a resolved config means for this data, on `train.device`; weights not yet set. Raises ConfigError."""
    try:
        device = torch.device(config.train.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f'train.device "{config.train.device}" cannot be used here: {str(error).splitlines()[0]}'
        ) from None
    return Transformer(config.model, config.memory, cids_V=data.compression.cids_V).to(device)


def training_tier(config: TrainConfig) -> str:
    """Where the tables live while they learn: in host memory if asked for, else beside the weights. Raises ConfigError."""
    if config.table_tier not in TABLE_TIERS:
        raise ConfigError(
            f'train.table_tier "{config.table_tier}" is unknown{nearest(config.table_tier, TABLE_TIERS)}; '
            f"tiers: {', '.join(TABLE_TIERS)}"
        )
    return "host" if config.table_tier == "host" else "resident"


def steps_of(config: Config, data: Prepared) -> int:
    """Optimiser steps of the run: `train.tokens`, or one pass. Raises DataError when the corpus is smaller than a batch."""
    per_step = config.train.batch * config.model.context
    available = len(data.splits["train"]) - 1
    if available < per_step:
        raise DataError(
            f"corpus: the train split has {available:,} tokens, one batch needs {per_step:,} "
            "(train.batch x model.context); add text or lower them"
        )
    return (config.train.tokens or available) // per_step


def train(config: Config, data: Prepared, folder: str | Path, *, resume: bool = False) -> Iterator[Record]:
    """Train one model into a run folder and yield a record per step.

    Args:
        config: sizes may be a budget; they are resolved against the tokenizer here.
        folder: the run folder; see `nengram.train.checkpoint`. An unfinished run there is continued only with `resume`,
            and a finished one then yields nothing.
    A further pass over the text, when `train.tokens` asks for one, is what `nengram.train.passes` makes of it.
    Raises: CheckpointError when the folder holds another run; DataError when the data is too small; ConfigError.
    """
    folder = Path(folder)
    config = resolve(config, data.tokenizer.get_vocab_size())
    steps = steps_of(config, data)
    identity = identity_of(config, data, folder)
    model = build_model(config, data)
    backbone, rows = backbone_optimizer(model, config.train), row_optimizer(config.train)
    hashed = model.spec is not None and config.memory.control == "hashed"
    meter_every = config.train.meter_every if hashed else 0  # elsewhere there is no lookup to take away
    tier = training_tier(config.train)
    passes = FurtherPasses(model, config, data.splits["train"], tier=tier)
    base_lr = [config.train.lr, config.train.lr * config.train.table_lr_multiplier]
    if resume and is_saved(folder / "final"):
        check_identity(open_folder(folder / "final"), identity, folder / "final")
        return
    checkpoint = folder / "checkpoint"
    start, cpu_seconds, data_state = 0, 0.0, None
    if resume and is_saved(checkpoint):
        facts = open_folder(checkpoint)
        check_identity(facts, identity, checkpoint)
        load_optimizer(backbone, load_model(model, checkpoint, tier=tier))
        start, cpu_seconds, data_state = facts["step"], facts["cpu_seconds"], facts["data_state"]
        _keep_metrics(folder / "metrics.jsonl", start)
    else:
        _begin_folder(folder, config, resume)
        identity = identity_of(config, data, folder)
        model.init_weights(config.train.seed, tier=tier)
    model.train()
    order = Batches(
        data.splits["train"],
        batch=config.train.batch,
        context=config.model.context,
        seed=config.train.seed,
        state=data_state,
        passes=None,
    )
    batches = iter(order)
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as metrics:
        for step in range(start, steps):
            batch, data_state = next(batches)
            began = time.process_time()
            rare = passes.before(batch.pass_index, begins=step % order.steps_in_one_pass == 0)
            share = lr_share(step, steps, config.train.warmup_steps, config.train.final_lr_share, config.train.schedule)
            set_lr([backbone, rows], base_lr, share)
            loss_nats, grad_norm, load_max = train_step(model, batch, backbone, rows, config, rare=rare)
            spent = time.process_time() - began
            cpu_seconds += spent
            if not np.isfinite(loss_nats):
                raise CheckpointError(
                    f"{folder}: the loss is {loss_nats} at step {step + 1}; lower train.lr (now {config.train.lr})"
                )
            done = step + 1
            meters = _due(meter_every, done, steps)
            looks = meters or done == steps or _due(config.train.eval_every, done, steps)
            record = Record(
                step=done,
                steps=steps,
                tokens=done * batch.ids_BT.size,
                loss_nats=loss_nats,
                lr=config.train.lr * share,
                grad_norm=grad_norm,
                expert_load_max=load_max,
                cpu_seconds=cpu_seconds,
                tokens_per_s=batch.ids_BT.size / max(spent, 1e-9),
                dev_nats=_dev_nats(model, data, config) if looks else None,
                dev_nats_permuted=_dev_nats(model, data, config, control="permuted") if meters else None,
            )
            metrics.write(json.dumps(asdict(record)) + "\n")
            metrics.flush()
            if done % config.train.checkpoint_every == 0 and done < steps:
                facts = {"step": done, "cpu_seconds": cpu_seconds, "data_state": data_state, **identity}
                save_model(checkpoint, model, facts, optimizer=optimizer_tensors(backbone))
            yield record
    _finish(folder, model, data, {"step": steps, "cpu_seconds": cpu_seconds, **identity})


def train_step(
    model, batch, backbone, rows, config: Config, *, rare: RareNgrams | None = None
) -> tuple[float, float, float]:
    """One optimiser step: (loss in nats, gradient norm of the backbone, heaviest expert's load over the mean).

    rare: n-grams that are not read, in a further pass over the text.
    """
    ids_BT, targets_BT, start_BT = tensors_of(batch, model.embed.weight.device)
    memory_step = model.begin(ids_BT, start_BT=start_BT)
    if rare is not None:
        memory_step.mask(rare.keep(memory_step.rows))
    logits_BTV = model(ids_BT, step=memory_step)
    loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=-100)
    backbone.zero_grad(set_to_none=True)
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip or float("inf"))
    rows.take(memory_step)
    backbone.step()
    rows.step()
    load_max = model.expert_load_max()
    model.rebalance()
    return loss.item(), grad_norm.item(), load_max


def _due(every: int, done: int, steps: int) -> bool:
    """Whether something done every so many steps (0: never), and at the end, is due."""
    return every > 0 and (done % every == 0 or done == steps)


def _dev_nats(model, data: Prepared, config: Config, control: str | None = None) -> float:
    nats_N = token_nats(
        model,
        data.splits["dev"],
        batch=config.train.batch,
        context=config.model.context,
        tokens=config.train.eval_tokens,
        control=control,
    )
    return float(np.nanmean(nats_N))


def _begin_folder(folder: Path, config: Config, resume: bool) -> None:
    if not resume and (folder / "metrics.jsonl").exists():
        raise CheckpointError(f"{folder}: holds a run already; continue it with --resume, or choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    shutil.rmtree(folder / "final", ignore_errors=True)
    write_atomic(folder / "config.toml", to_toml(config))
    write_atomic(folder / "env.json", json.dumps(environment(), indent=1))


def _keep_metrics(path: Path, step: int) -> None:
    """Drop records past the checkpoint, and a last line that a kill cut short."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            warnings.warn(f"{path}: dropped a broken line", stacklevel=2)
    write_atomic(path, "".join(f"{line}\n" for line in kept))


def _finish(folder: Path, model: Transformer, data: Prepared, facts: dict) -> None:
    def add_text(beside: Path) -> None:
        shutil.copy(folder / "config.toml", beside)
        write_atomic(beside / "tokenizer.json", data.tokenizer.to_str())
        data.compression.save(beside / "compression.safetensors")

    facts = facts | {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    save_model(folder / "final", model, facts, add=add_text)
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)


def environment() -> dict[str, str]:
    """Hardware, versions and date, for every file that holds a measurement."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": cpu,
        "cores": str(torch.multiprocessing.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "device": "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
