"""How much of a training step is memory? The memory path is run by itself, part by part, beside whole steps of the same model.

The parts are what a step does for its memory layers and for nothing else: hash, gather, the layers' forward and backward, the
coalesced update of the tables. Their sum over the step is the share. (The difference of two steps, one with its memory layers taken
out, is the purer figure and the noisier one: two long times subtracted. `benchmarks/memory_path.py` has both.)
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from nengram.config import Config
from nengram.memory import MemoryStep
from nengram.model import Transformer
from nengram.text import Batch, Batches, Prepared
from nengram.train import RowOptimizer
from nengram.train.loop import train_step
from nengram.train.optim import backbone_optimizer, row_optimizer

PARTS = ("hash", "gather", "forward", "backward", "coalesce + update")


def memory_share(model: Transformer, config: Config, data: Prepared, repeats: int = 10) -> float:
    """Share of a training step's CPU time that the memory path takes, 0..1: the median of `repeats` rounds.

    The model goes on learning meanwhile: call this last.
    """
    spent_s = time_parts(model, config, data, repeats)
    whole_s = spent_s.pop("step")
    return float(np.median(sum(spent_s.values()) / whole_s))


def time_parts(model: Transformer, config: Config, data: Prepared, repeats: int) -> dict[str, np.ndarray]:
    """CPU seconds of each part, summed over the memory layers, and of a whole step, `[repeats]` each; by turns."""
    batch = first_batch(config, data)
    ids_BT, start_BT = torch.from_numpy(batch.ids_BT), torch.from_numpy(batch.start_BT)
    hidden_BTGD = torch.randn(*ids_BT.shape, config.model.streams, config.model.width)
    adamw, rows = backbone_optimizer(model, config.train), row_optimizer(config.train)
    model.train()
    rounds = []
    for _ in range(repeats + 2):
        spent_s = dict.fromkeys((*PARTS, "step"), 0.0)
        with clocked(spent_s, "step"):
            train_step(model, batch, adamw, rows, config)
        one_round(model, ids_BT, start_BT, hidden_BTGD, rows, lambda part, spent_s=spent_s: clocked(spent_s, part))
        rounds.append(spent_s)
    return {part: np.array([spent_s[part] for spent_s in rounds[2:]]) for part in rounds[0]}


def one_round(
    model: Transformer,
    ids_BT: torch.Tensor,
    start_BT: torch.Tensor,
    hidden_BTGD: torch.Tensor,
    rows: RowOptimizer,
    clock: Callable,
) -> None:
    """What a training step does for its memory layers, in the same order, without the rest of the model."""
    with clock("hash"):
        found = model.addresser(model.cids_V[ids_BT], start_BT=start_BT)
    with clock("gather"):
        step = MemoryStep(found, model.stores, blocked_BT=None, frozen=model.memory_config.frozen)
    updates = []
    for block in model.memory_blocks():
        hidden_BTGD = hidden_BTGD.detach().requires_grad_()
        with clock("forward"):
            updates.append(block.memory(step.vectors(block.layer_id), hidden_BTGD))
    for update_BTGD in updates:
        with clock("backward"):
            update_BTGD.backward(torch.ones_like(update_BTGD))
    with clock("coalesce + update"):
        rows.take(step)
        rows.step()
    model.zero_grad(set_to_none=True)


@contextmanager
def clocked(spent_s: dict, part) -> Iterator[None]:
    """Add the CPU time of the body to `spent_s[part]`."""
    began = time.process_time()
    yield
    spent_s[part] += time.process_time() - began


def first_batch(config: Config, data: Prepared) -> Batch:
    """The first training batch of the run."""
    batches = Batches(
        data.splits["train"], batch=config.train.batch, context=config.model.context, seed=config.train.seed
    )
    return next(iter(batches))[0]
