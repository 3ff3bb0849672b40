"""Loss of every held-out token, once, in the corpus's own order.

Windows do not overlap, so the first tokens of a window are judged with little context; all arms are judged alike. What comes back is
one float per token of the split, not a mean: every later question (per source, by history, paired by token) is asked of that array.
"""

from collections import deque
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F

from nengram.text import Batch, Packed, eval_windows


@torch.no_grad()
def token_nats(
    model: torch.nn.Module, packed: Packed, *, batch: int, context: int, tokens: int = 0, control=None
) -> np.ndarray:
    """Negative log-likelihood in nats of each token of a split, float32 [N]; NaN where a token was never a target.

    Args:
        tokens: judge about this many targets, evenly spread over the split (0: all of them).
        control: row control to evaluate under, e.g. "permuted" (see `nengram.address.controls`).
    """
    was_training = model.training
    model.eval()
    nats_N = np.full(len(packed), np.nan, dtype=np.float32)
    windows = _spread(eval_windows(packed, batch=batch, context=context), tokens, batch * context, len(packed))
    for window, (ids_BT, targets_BT, step) in _asked_ahead(model, windows, control):
        logits_BTV = model(ids_BT, step=step)
        loss = F.cross_entropy(
            logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=-100, reduction="none"
        )
        real = window.targets_BT.flatten() != -100
        nats_N[window.positions_BT.flatten()[real]] = loss.cpu().numpy()[real]
    model.train(was_training)
    return nats_N


def _spread(windows: Iterator[Batch], tokens: int, batch_tokens: int, available: int) -> Iterator[Batch]:
    """Every k-th batch, so that about `tokens` targets of the `available` are judged; all batches for 0."""
    return islice(windows, 0, None, max(1, available // max(tokens, batch_tokens)) if tokens else 1)


def _asked_ahead(model, windows: Iterator[Batch], control) -> Iterator[tuple[Batch, tuple]]:
    """Each window with its ids, targets and memory step, the rows of the NEXT window being requested before this one is given out.

    So a slow tier has a whole forward pass to fetch them in. Steps are released here, whatever happens.
    """

    def ask(window: Batch) -> tuple:
        ids_BT, targets_BT, start_BT = tensors_of(window, model.embed.weight.device)
        return ids_BT, targets_BT, model.begin(ids_BT, start_BT=start_BT, control=control)

    asked: deque[tuple[Batch, tuple]] = deque()
    try:
        for window in windows:
            asked.append((window, ask(window)))
            if len(asked) == 2:
                yield asked[0]
                _release(asked.popleft())
        while asked:
            yield asked[0]
            _release(asked.popleft())
    finally:
        for one in asked:
            _release(one)


def _release(asked: tuple[Batch, tuple]) -> None:
    if step := asked[1][2]:
        step.release()


def tensors_of(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids_BT, targets_BT and start_BT of a batch as tensors on a device (on the CPU they share its memory)."""
    return tuple(torch.from_numpy(array).to(device) for array in (batch.ids_BT, batch.targets_BT, batch.start_BT))
