"""Three ways to take the information out of an address and leave everything else as it is.

A memory layer adds parameters, a path and a lookup. To know what the lookup is worth, replace the rows and
nothing else: `one_row` keeps the path and looks up a constant, `misaligned` keeps the row frequencies and
destroys their meaning, `permuted` asks whether a trained table's content sits where the hash put it.
"""

from collections.abc import Callable
from math import gcd
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from nengram.address.bounds import integer
from nengram.address.inputs import check_ids, is_tensor
from nengram.address.spec import AddressSpec
from nengram.errors import AddressError

if TYPE_CHECKING:
    from torch import Tensor

Rows = TypeVar("Rows", "np.ndarray", "Tensor")
PERMUTED_BELOW = 2**31


def one_row(rows_BTS: Rows, spec: AddressSpec, layer_id: int) -> Rows:
    """Every address of a slot becomes that slot's first row; int64 [B, T, S] in and out, NumPy or torch.

    Raises AddressError if the rows do not belong to the spec.
    """
    _check_slots(rows_BTS, spec)
    offsets_S = _alike(spec.offsets(layer_id), rows_BTS)
    return rows_BTS * 0 + offsets_S


def misaligned(rows_BTS: Rows) -> Rows:
    """Each position gets the rows of the same position in the sequence before it in the batch (cyclically).

    The batch reads the same rows as often as before; [B, T, S] in and out. Raises AddressError if B < 2.
    """
    check_ids("rows", rows_BTS, "BTS")
    if len(rows_BTS) < 2:
        raise AddressError(f"misaligned rows need another sequence: the batch has {len(rows_BTS)}, give at least 2")
    return rows_BTS.roll(1, dims=0) if is_tensor(rows_BTS) else np.roll(rows_BTS, 1, axis=0)


def permuted(rows_BTS: Rows, spec: AddressSpec, layer_id: int, seed: int) -> Rows:
    """Rows permuted within each slot, by a permutation that (seed, layer_id) fixes; [B, T, S] in and out.

    For evaluating a TRAINED table only. Fixed before training, a permutation of a hash is just another hash:
    nothing would be taken away. Each slot of p rows maps z to (a z + b) mod p, a prime to p and b not 0: a
    bijection that needs no memory and leaves at most one row of a prime slot in place. Raises AddressError if
    the rows do not belong to the spec or a slot has 2**31 rows or more.
    """
    _check_slots(rows_BTS, spec)
    moduli_S, offsets_S = spec.moduli(layer_id), spec.offsets(layer_id)
    if moduli_S.max() >= PERMUTED_BELOW:
        raise AddressError(f"permuted needs slots below 2**31 rows, layer {layer_id} has one of {moduli_S.max()}")
    rng = np.random.default_rng([integer("seed", seed, 0, 2**63), layer_id])
    factors_S, shifts_S = np.array([_bijection(int(modulus), rng) for modulus in moduli_S]).T
    moduli_S, offsets_S, factors_S, shifts_S = (
        _alike(values_S, rows_BTS) for values_S in (moduli_S, offsets_S, factors_S, shifts_S)
    )
    return ((rows_BTS - offsets_S) * factors_S + shifts_S) % moduli_S + offsets_S


CONTROLS: dict[str, Callable] = {"one_row": one_row, "misaligned": misaligned, "permuted": permuted}


def _bijection(modulus: int, rng: np.random.Generator) -> tuple[int, int]:
    shift = int(rng.integers(1, modulus)) if modulus > 1 else 0
    factor = int(rng.integers(1, modulus)) if modulus > 1 else 1
    while gcd(factor, modulus) != 1:
        factor = int(rng.integers(1, modulus))
    return factor, shift


def _alike(values_S: np.ndarray, rows_BTS: Rows) -> Rows:
    return rows_BTS.new_tensor(values_S.tolist()) if is_tensor(rows_BTS) else values_S


def _check_slots(rows_BTS: Rows, spec: AddressSpec) -> None:
    check_ids("rows", rows_BTS, "BTS")
    if not str(rows_BTS.dtype).endswith("int64"):
        raise AddressError(f"rows must be int64, got {rows_BTS.dtype}")
    if rows_BTS.shape[2] != spec.slots:
        raise AddressError(f"rows have {rows_BTS.shape[2]} slots, the address spec {spec.slots}")
