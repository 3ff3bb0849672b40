"""A memory, or a rival of it, trained on a local model and a local text: a generator of records, which stops and goes on exactly.

    <out>-training/
    ├── cache/          the text as the model's ids
    ├── graft/          checkpoint/ while training, done/ afterwards
    ├── one_row/        the same for a memory that looks nothing up
    └── lora/           the same for LoRA of as many parameters

One step:  windows -> forward (the hooks read the rows) -> backward -> clip -> one optimiser for parameters and rows -> record.

A checkpoint is an adapter with its optimiser's state beside it, and the model's own weights where those learn. Dropout draws from the
seed and the step, so a resumed run is the same run, bit for bit on the CPU.
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nengram.errors import CheckpointError
from nengram.files import sha256_bytes
from nengram.hf.adapter import fingerprint
from nengram.hf.blocks import anatomy
from nengram.hf.graft_arms import Arm, GraftPlan
from nengram.model.folder import check_identity, is_saved, open_folder
from nengram.text import NO_TARGET, Batches, Packed, Prepared, eval_windows
from nengram.train.optim import lr_share

CHECKPOINT, DONE = "checkpoint", "done"


@dataclass(frozen=True)
class GraftRecord:
    """One step: the loss of its batch before its update, in nats a token, and tokens a second of this process so far."""

    step: int
    steps: int
    loss_nats: float
    tokens_per_s: float


def train(arm: Arm, data: Prepared, plan: GraftPlan, folder: Path, *, resume: bool = False) -> Iterator[GraftRecord]:
    """Put `arm` on its model, train it, and leave it in `folder/done`; a finished run yields nothing and is put on.

    resume: go on from `folder/checkpoint`.
    Raises: CheckpointError for a folder of another run, or a loss that is not finite; DataError; ConfigError as the arm.
    """
    steps, identity = plan.steps_of(data), _identity(arm, data, plan)
    began, data_state, optimizer = 0, None, None
    if resume and is_saved(folder / DONE):
        check_identity(open_folder(folder / DONE), identity, folder / DONE)
        arm.load(folder / DONE)
        return
    if resume and is_saved(folder / CHECKPOINT):
        facts = open_folder(folder / CHECKPOINT)
        check_identity(facts, identity, folder / CHECKPOINT)
        began, data_state = facts["step"], facts["data_state"]
        optimizer = arm.load(folder / CHECKPOINT)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        optimizer = arm.begin()
    rates = [group["lr"] for group in optimizer.param_groups]
    order = Batches(
        data.splits["train"], batch=plan.batch, context=plan.context, seed=plan.seed, state=data_state, passes=None
    )
    batches, started = iter(order), time.monotonic()
    arm.model.train()
    for step in range(began, steps):
        learning = arm.learning(step / steps)
        batch, data_state = next(batches)
        share = lr_share(step, steps, plan.warmup_steps, 0.1)
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr * share
        torch.manual_seed(plan.seed * 1_000_003 + step)
        loss = _loss(arm.model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(learning, plan.clip)
        optimizer.step()
        optimizer.zero_grad()
        if not torch.isfinite(loss):
            raise CheckpointError(f"{folder}: the loss is {float(loss)} at step {step + 1}: lower the rates")
        done = step + 1
        if done % plan.checkpoint_every == 0 and done < steps:
            facts = {"step": done, "data_state": data_state, **identity}
            arm.save(folder / CHECKPOINT, optimizer, facts, done=False)
        seen = (done - began) * batch.ids_BT.size
        yield GraftRecord(done, steps, loss.item(), seen / max(time.monotonic() - started, 1e-9))
    arm.save(folder / DONE, optimizer, {"steps": steps, **identity}, done=True)
    shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)


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


def _identity(arm: Arm, data: Prepared, plan: GraftPlan) -> dict[str, str]:
    base = json.dumps(fingerprint(anatomy(arm.model)), sort_keys=True)
    return {"base": sha256_bytes(base.encode()), "text": data.digest, "settings": plan.digest(control=arm.control)}
