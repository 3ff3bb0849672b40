"""One gradient per distinct row: the sum over every lookup that landed there.

A batch looks up many rows more than once (common n-grams, colliding ones), and an update rule must see each
row once, with the whole of its gradient. Rows are sorted, so the result is strictly ascending; on the CPU the
terms of each sum are added in lookup order, so it is the same on every run, and the compiled form and the
torch form agree bit for bit. A GPU adds them in the order its threads arrive.
"""

import torch

from nengram.errors import StoreError
from nengram.store.base import check_rows


def coalesce(rows: torch.Tensor, grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the gradients of equal rows.

    rows: int64, any shape. grads: `[*rows.shape, E]`, any float dtype. To add up several micro-batches,
        concatenate.
    Returns `rows_U` `[U]`, strictly ascending, and `grads_UE` `[U, E]`, float32.
    Raises: StoreError when the shapes disagree, or rows are negative or not int64.
    """
    if grads.shape[:-1] != rows.shape:
        raise StoreError(f"gradients {tuple(grads.shape)} do not belong to rows {tuple(rows.shape)}")
    rows_N = rows.detach().reshape(-1).contiguous()
    grads_NE = grads.detach().reshape(rows_N.numel(), grads.shape[-1]).float().contiguous()
    check_rows(rows_N, torch.iinfo(torch.int64).max)
    if rows_N.device.type != "cpu" or grads_NE.device.type != "cpu":
        return coalesce_torch(rows_N, grads_NE)
    from nengram.store import kernels  # compiles at first use

    rows_U, grads_UE = kernels.coalesce(rows_N.numpy(), grads_NE.numpy())
    return torch.from_numpy(rows_U), torch.from_numpy(grads_UE)


def coalesce_torch(rows_N: torch.Tensor, grads_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`coalesce` in torch operations, for any device: rows `[N]`, gradients `[N, E]` float32."""
    rows_U, place_N = torch.unique(rows_N.to(grads_NE.device), return_inverse=True)
    grads_UE = grads_NE.new_zeros(rows_U.numel(), grads_NE.shape[-1])
    return rows_U, grads_UE.index_add_(0, place_N, grads_NE)
