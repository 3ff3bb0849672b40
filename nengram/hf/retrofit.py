"""Train an arm beside a frozen model, from hidden states computed once, and judge it.

A window is T + 1 ids: T that are read and T that are predicted. Every arm sees the same windows in the same order for the same seed, at
the same schedule, and differs in what is trained alone (`nengram.hf.arms`).
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from nengram.errors import ConfigError
from nengram.hf.arms import Arm
from nengram.hf.suffix import Suffix
from nengram.train import RowOptimizer, lr_share
from nengram.train.optim import set_lr

WARMUP_STEPS, FINAL_SHARE = 10, 0.1


@dataclass(frozen=True)
class Windows:
    """Windows of text, int64 `[N, T + 1]`, their hidden states before the block, float32 `[N, T, D]`, and the source of each."""

    ids_NT: np.ndarray
    hidden_NTD: np.ndarray
    sources: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids_NT)


def train_arm(
    arm: Arm,
    suffix: Suffix,
    windows: Windows,
    *,
    lr: float,
    tokens: int,
    table_lr: float = 0.0,
    batch: int = 4,
    seed: int = 0,
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> float:
    """One pass over `tokens` of the windows in the order that `seed` draws; the mean loss of the last tenth, in nats.

    lr, table_lr: as `Arm.optimizers`.
    progress: called after every step with steps done, steps in all, and the loss.
    Raises: ConfigError when there are fewer windows than `tokens` ask for.
    """
    steps = tokens // (batch * (windows.ids_NT.shape[1] - 1))
    if not 0 < steps * batch <= len(windows):
        raise ConfigError(f"{tokens:,} tokens are {steps} steps of {batch} windows; there are {len(windows)} windows")
    order = np.random.default_rng(seed).permutation(len(windows))[: steps * batch].reshape(steps, batch)
    optimizers, rates = arm.optimizers(lr, table_lr)
    losses = []
    for step, places in enumerate(order):
        set_lr(optimizers, rates, lr_share(step, steps, WARMUP_STEPS, FINAL_SHARE))
        losses.append(_step(arm, suffix, windows, places, optimizers))
        progress(step + 1, steps, losses[-1])
    return float(np.mean(losses[-math.ceil(steps / 10) :]))


def _step(arm: Arm, suffix: Suffix, windows: Windows, places: np.ndarray, optimizers: list) -> float:
    device = next(suffix.parameters()).device
    ids_BT = torch.from_numpy(windows.ids_NT[places])
    memory_step = arm.begin(ids_BT[:, :-1])
    logits_BTV = suffix(arm(torch.from_numpy(windows.hidden_NTD[places]).to(device), memory_step))
    loss = F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten().to(device))
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for optimizer in optimizers:
        if isinstance(optimizer, RowOptimizer):
            optimizer.take(memory_step)
        optimizer.step()
    return loss.item()


@torch.no_grad()
def window_nats(arm: Arm, suffix: Suffix, windows: Windows, *, batch: int = 8) -> np.ndarray:
    """Mean loss of every window, nats a token, `[N]`."""
    device, found = next(suffix.parameters()).device, []
    for places in chunks(len(windows), batch):
        ids_BT = torch.from_numpy(windows.ids_NT[places])
        hidden_BTD = torch.from_numpy(windows.hidden_NTD[places]).to(device)
        with arm.begin(ids_BT[:, :-1]) or nullcontext() as step:
            logits_BTV = suffix(arm(hidden_BTD, step))
        targets_BT = ids_BT[:, 1:].to(device)
        found.append(F.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, reduction="none").mean(1).cpu().numpy())
    return np.concatenate(found)


def by_source(nats_N: np.ndarray, sources: Sequence[str]) -> dict[str, float]:
    """Mean over the windows of each source."""
    names = np.array(sources)
    return {name: float(nats_N[names == name].mean()) for name in sorted(set(sources))}


def chunks(count: int, batch: int) -> list[np.ndarray]:
    """0 .. count - 1 in order, in as few chunks of at most `batch` as do it, their sizes alike: none has one where two could be."""
    return np.array_split(np.arange(count), math.ceil(count / batch))
