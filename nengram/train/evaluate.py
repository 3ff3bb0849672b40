"""Loss of every held-out token, once, in the corpus's own order.

Windows do not overlap, so the first tokens of a window are judged with little context; all arms are judged alike. What comes back is
one float per token of the split, not a mean: every later question (per source, by history, paired by token) is asked of that array.
"""

import numpy as np
import torch
import torch.nn.functional as F

from nengram.text import Packed, eval_windows


@torch.no_grad()
def token_nats(model: torch.nn.Module, packed: Packed, *, batch: int, context: int, tokens: int = 0, control=None) -> np.ndarray:
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
        ids_BT, targets_BT = torch.from_numpy(window.ids_BT), torch.from_numpy(window.targets_BT)
        step = model.begin(ids_BT, start_BT=torch.from_numpy(window.start_BT), control=control)
        logits_BTV = model(ids_BT, step=step)
        if step:
            step.release()
        loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=-100, reduction="none")
        real = window.targets_BT.flatten() != -100
        nats_N[window.positions_BT.flatten()[real]] = loss.numpy()[real]
        done += int(real.sum())
        if tokens and done >= tokens:
            break
    model.train(was_training)
    return nats_N
