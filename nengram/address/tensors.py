"""The same addresses on whatever device the ids are on: no loop over positions, so barriers become masks.

Position t may look one step back unless t is a start, t is blocked, or t-1 is blocked. A look-back of i
steps needs all i links in a row: a running AND over shifted views of one [B, T] mask. What lies before the
chunk is history, which already reads as pad beyond any barrier, so its links always hold.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def placed(values: Any, device: Any, dtype: torch.dtype = torch.int64) -> Tensor:
    """An array or tensor as a tensor of `dtype` on `device`; arrays are copied (they may be read-only)."""
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(np.array(values, dtype=np.int64 if dtype == torch.int64 else None))
    return values.to(device=device, dtype=dtype)


def inputs(cids_BT: Any, start_BT: Any, blocked_BT: Any, device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Ids int64 and both flags bool, all [B, T] on `device`; a missing flag is false everywhere."""
    none_BT = torch.zeros(tuple(cids_BT.shape), dtype=torch.bool, device=device)
    flags = (none_BT if flag is None else placed(flag, device, torch.bool) for flag in (start_BT, blocked_BT))
    return placed(cids_BT, device), *flags


def first_out_of_range(cids_BT: Tensor, blocked_BT: Tensor, vocab: int) -> int:
    """The flat position of the first unblocked id outside 0..vocab - 1, or -1."""
    wrong_BT = ((cids_BT < 0) | (cids_BT >= vocab)) & ~blocked_BT
    return int(wrong_BT.flatten().nonzero()[0]) if wrong_BT.any() else -1


def look_back(cids_BT: Tensor, start_BT: Tensor, blocked_BT: Tensor, history_BH: Tensor, pad_cid: int) -> list[Tensor]:
    """The ids each position sees, current first: H + 1 tensors [B, T]. `history_BH` is most recent first."""
    positions, lags = cids_BT.shape[1], history_BH.shape[1]
    known_BX = torch.cat([history_BH.flip(1), cids_BT], dim=1)
    link_BT = ~(start_BT | blocked_BT)
    link_BT[:, 1:] &= ~blocked_BT[:, :-1]
    seen = [cids_BT.masked_fill(blocked_BT, pad_cid)]
    visible_BT = torch.ones_like(blocked_BT)
    for lag in range(1, lags + 1):
        visible_BT = visible_BT & torch.nn.functional.pad(link_BT, (lag - 1, 0), value=True)[:, :positions]
        shifted_BT = known_BX[:, lags - lag : lags - lag + positions]
        seen.append(shifted_BT.masked_fill(~visible_BT, pad_cid))
    return seen


def starts_after(cids_BT: Tensor, start_BT: Tensor, end_cid: int) -> Tensor:
    """The starts, and every position after an `end_cid` in this chunk; what came before it is in the history."""
    if end_cid < 0:
        return start_BT
    return start_BT | torch.nn.functional.pad(cids_BT[:, :-1] == end_cid, (1, 0))[:, : cids_BT.shape[1]]


def next_history(seen: list[Tensor], history_BH: Tensor, end_cid: int) -> Tensor:
    """What the position after the chunk would see: the last position's own view, one step older; only ends
    (which are pad, too) if that position is one.
    """
    if seen[0].shape[1] == 0:
        return history_BH
    after_BH = torch.stack([cids_BT[:, -1] for cids_BT in seen[:-1]], dim=1)
    return after_BH.masked_fill(after_BH[:, :1] == end_cid, end_cid)


def rows_of_layer(seen: list[Tensor], multipliers_N: list[int], moduli_S: Tensor, offsets_S: Tensor) -> Tensor:
    """int64 [B, T, S] of one layer. Products stay below 2**63, so the mix is never negative."""
    mix_BT = seen[0] * multipliers_N[0]
    rows = []
    by_order = moduli_S.chunk(len(seen) - 1)
    for cids_BT, multiplier, moduli_K in zip(seen[1:], multipliers_N[1:], by_order, strict=True):
        mix_BT = mix_BT ^ (cids_BT * multiplier)
        rows.append(mix_BT.unsqueeze(-1) % moduli_K)
    return torch.cat(rows, dim=-1) + offsets_S
