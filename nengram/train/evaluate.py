"""Loss of every held-out token, once, in the corpus's own order.

Windows do not overlap, so the first tokens of a window are judged with little context; all arms are judged alike. What comes back is
one float per token of the split, not a mean: every later question (per source, by history, paired by token) is asked of that array.
"""

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
        tokens: stop after about this many targets (0: all of them).
        control: row control to evaluate under, e.g. "permuted" (see `nengram.address.controls`).
    """
    was_training = model.training
    model.eval()
    nats_N = np.full(len(packed), np.nan, dtype=np.float32)
    done = 0
    for window in eval_windows(packed, batch=batch, context=context):
        ids_BT, targets_BT, start_BT = tensors_of(window, model.embed.weight.device)
        step = model.begin(ids_BT, start_BT=start_BT, control=control)
        logits_BTV = model(ids_BT, step=step)
        if step:
            step.release()
        loss = F.cross_entropy(
            logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=-100, reduction="none"
        )
        real = window.targets_BT.flatten() != -100
        nats_N[window.positions_BT.flatten()[real]] = loss.cpu().numpy()[real]
        done += int(real.sum())
        if tokens and done >= tokens:
            break
    model.train(was_training)
    return nats_N


def tensors_of(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids_BT, targets_BT and start_BT of a batch as tensors on a device (on the CPU they share its memory)."""
    return tuple(torch.from_numpy(array).to(device) for array in (batch.ids_BT, batch.targets_BT, batch.start_BT))
