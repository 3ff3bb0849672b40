"""A memory trained on a local model and a local text: a generator of records, which stops and goes on exactly.

    <out>-training/
    ├── cache/          the text as the model's ids
    ├── graft/          checkpoint/ while training, adapter/ when done
    └── one_row/        the same for the control

One step:  windows -> forward (the hooks read the rows) -> backward -> clip -> one optimiser for parameters and rows -> record.

A checkpoint is an adapter with its optimiser's state beside it, and the model's own weights where those learn. Dropout draws from the
seed and the step, so a resumed run is the same run, bit for bit on the CPU.
"""

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nengram.errors import CheckpointError, DataError
from nengram.files import sha256_bytes
from nengram.hf.adapter import fingerprint, load_adapter, save_adapter
from nengram.hf.blocks import anatomy
from nengram.hf.grafting import graft
from nengram.hf.hooks import SITE
from nengram.hf.optim import optimizers
from nengram.hf.schedule import schedule
from nengram.model.folder import check_identity, is_saved, open_folder, read_tensors
from nengram.text import NO_TARGET, Batches, Packed, Prepared, eval_windows
from nengram.train.checkpoint import load_optimizer, optimizer_tensors
from nengram.train.optim import lr_share

OWN = "model."  # of the model's own weights among a checkpoint's tensors
FIRST_SHARE = 1 / 3  # of the steps, in schedule "first"


@dataclass(frozen=True)
class GraftPlan:
    """What decides a run. sizes: of `MemoryConfig`. steps: 0 is one pass over the text. schedule: "memory", "first" or "full"."""

    sizes: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 0
    batch: int = 4
    context: int = 128
    lr: float = 1e-3
    base_lr: float = 1e-4
    table_lr: float = 0.5
    warmup_steps: int = 20
    clip: float = 1.0
    schedule: str = "memory"
    seed: int = 0
    checkpoint_every: int = 50

    def steps_of(self, data: Prepared) -> int:
        """Optimiser steps. Raises DataError when the text is smaller than a batch."""
        available, per_step = len(data.splits["train"]) - 1, self.batch * self.context
        if available < per_step:
            raise DataError(
                f"the train split has {available:,} tokens, one batch needs {per_step:,} (batch x context): more text, or smaller ones"
            )
        return self.steps or available // per_step

    def digest(self, **more: str) -> str:
        """Hex SHA-256 of all that decides the numbers."""
        decisive = vars(self) | {"sizes": dict(self.sizes), "checkpoint_every": None} | more
        return sha256_bytes(json.dumps(decisive, sort_keys=True, default=list).encode())


@dataclass(frozen=True)
class GraftRecord:
    """One step: the loss of its batch before its update, in nats a token, and tokens a second of this process so far."""

    step: int
    steps: int
    loss_nats: float
    tokens_per_s: float


def train_graft(
    model: nn.Module,
    tokenizer: Any,
    data: Prepared,
    plan: GraftPlan,
    folder: Path,
    *,
    control: str = "hashed",
    resume: bool = False,
) -> Iterator[GraftRecord]:
    """Graft a memory onto `model`, train it, and leave it in `folder/adapter`; a finished run yields nothing and is put on.

    control: what the rows are, "hashed" or "one_row". resume: go on from `folder/checkpoint`.
    Raises: CheckpointError for a folder of another run, or a loss that is not finite; DataError, ConfigError as `graft`.
    """
    steps, identity = plan.steps_of(data), _identity(model, data, plan, control)
    if resume and is_saved(folder / "adapter"):
        check_identity(open_folder(folder / "adapter"), identity, folder / "adapter")
        load_adapter(model, folder / "adapter")
        if plan.schedule != "memory":
            _restore_model(model, read_tensors(folder / "adapter" / "optimizer.safetensors"))
        return
    began, data_state, tensors = 0, None, {}
    if resume and is_saved(folder / "checkpoint"):
        facts = open_folder(folder / "checkpoint")
        check_identity(facts, identity, folder / "checkpoint")
        began, data_state = facts["step"], facts["data_state"]
        load_adapter(model, folder / "checkpoint")
        tensors = read_tensors(folder / "checkpoint" / "optimizer.safetensors")
    else:
        shutil.rmtree(folder, ignore_errors=True)
        graft(model, tokenizer, **plan.sizes, control=control, seed=plan.seed)
    schedule(model, "full" if plan.schedule == "full" else "memory")
    optimizer, _ = optimizers(model, plan.lr, base_lr=plan.base_lr, table_lr=plan.table_lr)
    _restore_model(model, tensors)
    if state := {name: tensor for name, tensor in tensors.items() if not name.startswith(OWN)}:
        load_optimizer(optimizer, state)  # as a whole: its groups are its parts'
    rates = [group["lr"] for group in optimizer.param_groups]
    order = Batches(
        data.splits["train"], batch=plan.batch, context=plan.context, seed=plan.seed, state=data_state, passes=None
    )
    batches, started = iter(order), time.monotonic()
    model.train()
    for step in range(began, steps):
        if plan.schedule == "first" and step >= steps * FIRST_SHARE:
            schedule(model, "joint")
        batch, data_state = next(batches)
        share = lr_share(step, steps, plan.warmup_steps, 0.1)
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr * share
        torch.manual_seed(plan.seed * 1_000_003 + step)
        loss = _loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], plan.clip)
        optimizer.step()
        model.zero_grad()
        if not torch.isfinite(loss):
            raise CheckpointError(f"{folder}: the loss is {float(loss)} at step {step + 1}: lower --lr and --table-lr")
        done = step + 1
        if done % plan.checkpoint_every == 0 and done < steps:
            facts = {"step": done, "data_state": data_state, **identity}
            state = _state(model, optimizer, whole=plan.schedule != "memory")
            save_adapter(model, folder / "checkpoint", optimizer=state, facts=facts)
        seen = (done - began) * batch.ids_BT.size
        yield GraftRecord(done, steps, loss.item(), seen / max(time.monotonic() - started, 1e-9))
    state = None if plan.schedule == "memory" else _state(model, optimizer, whole=True)
    save_adapter(model, folder / "adapter", optimizer=state, facts={"steps": steps, **identity})
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)


@torch.no_grad()
def held_out_nats(model: nn.Module, packed: Packed, *, batch: int, context: int, tokens: int = 0) -> float:
    """Mean loss of the tokens of a split, in nats; of about `tokens` of them, evenly spread, if given."""
    was_training = model.training
    model.eval()
    windows = list(eval_windows(packed, batch=batch, context=context))
    every = max(1, len(packed) // max(tokens, batch * context)) if tokens else 1
    total, count = 0.0, 0
    for window in windows[::every]:
        real = int((window.targets_BT != NO_TARGET).sum())
        total, count = total + float(_loss(model, window)) * real, count + real
    model.train(was_training)
    return total / count


def _loss(model: nn.Module, batch) -> Tensor:
    device = next(model.parameters()).device
    ids_BT, targets_BT = (torch.from_numpy(array).to(device) for array in (batch.ids_BT, batch.targets_BT))
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=NO_TARGET)


def _identity(model: nn.Module, data: Prepared, plan: GraftPlan, control: str) -> dict[str, str]:
    base = json.dumps(fingerprint(anatomy(model)), sort_keys=True)
    return {"base": sha256_bytes(base.encode()), "text": data.digest, "settings": plan.digest(control=control)}


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, *, whole: bool) -> dict[str, Tensor]:
    """AdamW's state, and the model's own weights if they learn (`whole`); the tables' state lies with the tables."""
    own = {f"{OWN}{name}": p.detach() for name, p in model.named_parameters() if whole and f"{SITE}." not in name}
    return optimizer_tensors(optimizer.optimizers[0]) | own


def _restore_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the model's own weights back, where a checkpoint has them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"{OWN}{name}" in tensors:
                parameter.copy_(tensors[f"{OWN}{name}"])
