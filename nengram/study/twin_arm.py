"""One arm of the twin task: trained as every model here is, and asked for the value of each pair on the way and at the end.

python -m nengram.study.twin_arm FOLDER      one form and seed, all arms, in a process of its own (reads FOLDER/job.json)
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from nengram.config import Config, MemoryConfig, ModelConfig, TrainConfig
from nengram.errors import ConfigError, NengramError
from nengram.files import write_atomic
from nengram.model import Split, Transformer, split_budget
from nengram.study.processes import stop_on_terminate
from nengram.study.twin_task import LINE, TwinTask, twin_task, windows
from nengram.train.evaluate import tensors_of
from nengram.train.loop import train_step
from nengram.train.optim import backbone_optimizer, lr_share, row_optimizer, set_lr


@dataclass(frozen=True)
class Size:
    """How much is to be learned, how often it is shown, by how large a model; the defaults take 20 seconds on two cores."""

    keys: int = 48
    times: int = 10
    batch: int = 8
    lines: int = 16  # in a sequence
    scale: int = 2
    rho: float = 0.4
    table_lr_multiplier: float = 40.0  # a run of a hundred steps does not get far with the default 5
    warmup_steps: int = 15
    looks: int = 12  # at the test text, the last at the end
    look_lines: int = (
        384  # of the test text, on the way; judged as one batch, and the whole text in as many as it fills
    )

    def task(self, form: str, seed: int) -> TwinTask:
        """The text of this size. Raises: ConfigError, also when it fills no batch."""
        task = twin_task(form, seed, keys=self.keys, times=self.times)
        for lines_LW, needed in ((task.train_LW, self.batch * self.lines), (task.test_LW, self.look_lines)):
            if len(lines_LW) < needed:
                raise ConfigError(f"twin: {needed} lines are needed, {self.keys} keys give {len(lines_LW)}; give more")
        return task

    def steps(self, task: TwinTask) -> int:
        """Optimiser steps that the training text gives."""
        return len(task.train_LW) // (self.batch * self.lines)

    def split(self, task: TwinTask, arm: str) -> Split:
        """The arm's sizes, at equal total parameters and forward FLOPs. Raises: ConfigError."""
        model, memory = ModelConfig(context=self.lines * LINE), MemoryConfig()
        return split_budget(self.scale, self.rho, vocab_size=task.vocab_size, arm=arm, model=model, memory=memory)


def train_arm(task: TwinTask, arm: str, lr: float, seed: int, size: Size, tell: Callable[[dict], None]) -> dict:
    """Train one arm on a task and judge it.

    tell: given {"step", "loss_nats", "tokens_per_s"} at every look.
    Returns what `judge` says of the whole test text, the CPU seconds of training, and the curve of accuracy on shown pairs.
    """
    split, steps = size.split(task, arm), size.steps(task)
    training = TrainConfig(lr=lr, table_lr_multiplier=size.table_lr_multiplier, warmup_steps=size.warmup_steps)
    config = Config(model=split.model, memory=split.memory, train=training)
    model = Transformer(split.model, split.memory)
    model.init_weights(seed)
    optimizers = [backbone_optimizer(model, training), row_optimizer(training)]
    looks = {round(steps * look / size.looks) for look in range(1, size.looks)}
    curve, cpu_seconds = {0: judge(model, task, size, size.look_lines)["shown_accuracy"]}, 0.0
    for step, batch in enumerate(windows(task.train_LW, batch=size.batch, lines=size.lines)):
        began = time.process_time()
        share = lr_share(step, steps, training.warmup_steps, training.final_lr_share)
        set_lr(optimizers, [lr, lr * training.table_lr_multiplier], share)
        loss_nats, _, _ = train_step(model.train(), batch, *optimizers, config)
        spent = time.process_time() - began
        cpu_seconds += spent
        if step + 1 in looks:
            curve[step + 1] = judge(model, task, size, size.look_lines)["shown_accuracy"]
            tell({"step": step + 1, "loss_nats": loss_nats, "tokens_per_s": batch.ids_BT.size / max(spent, 1e-9)})
    final = judge(model, task, size)
    curve[steps] = final["shown_accuracy"]
    return final | {"lr": lr, "cpu_seconds": cpu_seconds, "steps": list(curve), "curve": list(curve.values())}


@torch.no_grad()
def judge(model: Transformer, task: TwinTask, size: Size, lines: int | None = None) -> dict[str, float]:
    """How often the value of a pair is right, and its mean loss in nats, over the test text's first `lines` (None: all).

    Returns `shown_accuracy`, `shown_nats`, and for pairs that training never showed `unshown_accuracy`, `unshown_nats`.
    """
    model.eval()
    right, nats = [], []
    for batch in windows(task.test_LW[:lines], batch=size.look_lines // size.lines, lines=size.lines):
        ids_BT, targets_BT, start_BT = tensors_of(batch, model.embed.weight.device)
        logits_NV = model(ids_BT, start_BT=start_BT)[:, LINE - 1 :: LINE].flatten(0, 1)
        values_N = targets_BT[:, LINE - 1 :: LINE].flatten()
        right.append(logits_NV.argmax(-1) == values_N)
        nats.append(F.cross_entropy(logits_NV, values_N, reduction="none"))
    right_L, nats_L = torch.cat(right).numpy(), torch.cat(nats).numpy()
    shown_L = task.test_shown_L[: len(right_L)]
    return {
        f"{name}_{what}": float(figures_L[mask_L].mean())
        for name, mask_L in (("shown", shown_L), ("unshown", ~shown_L))
        for what, figures_L in (("accuracy", right_L), ("nats", nats_L))
    }


def run_job(folder: Path) -> None:
    """Train the arms that FOLDER/job.json names with their rates, and write what each came to into FOLDER/done.json."""
    job = json.loads((folder / "job.json").read_text())
    size = Size(**job["size"])
    task = size.task(job["form"], job["seed"])
    done: dict[str, dict] = {}
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as metrics:

        def tell(record: dict) -> None:
            before = len(done) * size.steps(task)
            metrics.write(json.dumps(record | {"step": before + record["step"]}) + "\n")
            metrics.flush()

        for arm, lr in job["rates"].items():
            done[arm] = train_arm(task, arm, lr, job["seed"], size, tell)
    write_atomic(folder / "done.json", json.dumps(done))


def main() -> None:
    """The process that `nengram.study.twin` starts. Errors go to stderr as one line."""
    stop_on_terminate()
    torch.set_num_threads(1)
    try:
        run_job(Path(sys.argv[1]))
    except NengramError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
