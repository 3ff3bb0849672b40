"""Ids may be NumPy arrays or torch tensors; asking which must not import torch: hashing does without."""

import sys
from typing import Any

import numpy as np

from nengram.errors import AddressError


def is_tensor(values: Any) -> bool:
    """Whether `values` is a torch tensor (nothing can be one before torch is imported)."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(values, torch.Tensor)


def as_numpy(values: Any) -> np.ndarray:
    """A NumPy view where possible, a copy from an accelerator."""
    return values.cpu().numpy() if is_tensor(values) else np.asarray(values)


def check_ids(name: str, values: Any, axes: str) -> None:
    """Require an integer array with one dimension per letter of `axes`. Raises AddressError."""
    if not isinstance(values, np.ndarray) and not is_tensor(values):
        kind = type(values).__name__
        raise AddressError(f"{name} must be a NumPy array or torch tensor [{', '.join(axes)}], got {kind}")
    if not _is_integer(values):
        raise AddressError(f"{name} must be integers, got {_dtype(values)}")
    if values.ndim != len(axes):
        raise AddressError(f"{name} must be [{', '.join(axes)}], got shape {list(values.shape)}")


def check_flags(name: str, values: Any, shape: tuple[int, ...]) -> None:
    """Require a bool array of the ids' shape, or None. Raises AddressError."""
    if values is None:
        return
    if not isinstance(values, np.ndarray) and not is_tensor(values):
        raise AddressError(f"{name} must be a NumPy array or torch tensor of bool, got {type(values).__name__}")
    if _dtype(values) != "bool":
        raise AddressError(f"{name} must be bool, got {_dtype(values)}")
    if tuple(values.shape) != tuple(shape):
        raise AddressError(f"{name} has shape {list(values.shape)}, the ids {list(shape)}")


def _is_integer(values: Any) -> bool:
    # NumPy spells out a dtype's name anew at every request, which took 5 % of the time of hashing a batch
    return _dtype(values).startswith(("int", "uint")) if is_tensor(values) else values.dtype.kind in "iu"


def _dtype(values: Any) -> str:
    return str(values.dtype).removeprefix("torch.") if is_tensor(values) else values.dtype.name
