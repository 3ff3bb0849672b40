"""No speed number on a red gate: every fast thing is held against its slow twin before it is timed.

The test suite does this more thoroughly. Here it is done once more on the machine and on the inputs that are about to be timed (a
reference too slow for all of them gets a slice), because a wrong answer is often a fast one.
"""

import copy
from collections.abc import Callable

import numpy as np
import torch

from nengram.address import AddressSpec, reference
from nengram.memory import Engram
from nengram.memory.reference import engram_reference
from nengram.model.moe import MoE, moe_reference
from nengram.store import ResidentStore, Rule, coalesce
from nengram.store.coalesce import coalesce_torch


class RedGate(Exception):
    """A fast path and its reference disagree; the text says which, and by how much."""


def require_equal(what: str, found: np.ndarray, expected: np.ndarray) -> None:
    """Raises RedGate unless both arrays are the same, number for number."""
    if not np.array_equal(found, expected):
        raise RedGate(f"{what}: {int((found != expected).sum()):,} of {expected.size:,} numbers differ")


def require_close(what: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Raises RedGate unless the largest difference is within `tolerance` x the largest expected number."""
    worst = float((found - expected).abs().max() / expected.abs().max())
    if not worst <= tolerance:
        raise RedGate(f"{what}: off by {worst:.1e} of the largest number, {tolerance:.0e} is allowed")


def require_all_close(
    what: str, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    """`require_close` for every name of `expected`."""
    for name, tensor in expected.items():
        require_close(f"{what}: {name}", found[name], tensor, tolerance)


def check_rows(
    rows: dict[int, np.ndarray], cids_BT: np.ndarray, spec: AddressSpec, start_BT: np.ndarray | None = None
) -> None:
    """The rows of every layer equal those of the plain-integer reference. Raises RedGate."""
    for layer in spec.layers:
        expected_BTS = [
            reference.table_rows(
                cids_T.tolist(),
                multipliers=layer.multipliers,
                moduli=layer.moduli,
                pad_cid=spec.pad_cid,
                starts=None if start_BT is None else start_BT[b].tolist(),
            )
            for b, cids_T in enumerate(cids_BT)
        ]
        require_equal(f"rows of layer {layer.layer_id}", np.asarray(rows[layer.layer_id]), np.array(expected_BTS))


def check_moe(moe: MoE, hidden_BTD: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Output and gradients of the grouped layer agree with the loop over tokens. Raises RedGate."""
    found, expected = (outcome(layer, moe, hidden_BTD) for layer in (MoE.forward, moe_reference))
    require_all_close("MoE", found, expected, tolerance)


def check_engram(layer: Engram, vecs_BTM: torch.Tensor, hidden_BTGD: torch.Tensor, tolerance: float = 1e-3) -> None:
    """Update and gradients of a copy of `layer` agree with the loops over positions, in float64. Raises RedGate.

    The copy gets a convolution that does something: a fresh one is all zeros.
    """
    layer = copy.deepcopy(layer)
    if layer.conv:
        torch.nn.init.normal_(layer.conv_weight, generator=torch.Generator().manual_seed(1))
    found = outcome(Engram.forward, layer, vecs_BTM, hidden_BTGD)
    layer.gate_eps = torch.finfo(hidden_BTGD.dtype).eps  # float32's own, also where float64 judges
    expected = outcome(
        lambda *given: engram_reference(*given)[0], layer.double(), vecs_BTM.double(), hidden_BTGD.double()
    )
    require_all_close("Engram", found, expected, tolerance)


def outcome(function: Callable, module: torch.nn.Module, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output of `function(module, *inputs)`, and the gradients of inputs and parameters under a fixed weighting of it."""
    leaves = {f"input {place}": given.detach().clone().requires_grad_() for place, given in enumerate(inputs)}
    output = function(module, *leaves.values())
    weighting = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    leaves |= dict(module.named_parameters())
    grads = torch.autograd.grad((output * weighting).sum(), list(leaves.values()))
    return {"output": output.detach()} | {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def check_update(rule: Rule, rows_N: torch.Tensor, grads_NE: torch.Tensor, num_rows: int) -> None:
    """Coalescing and three steps of the store's update agree with the torch twins and the rule itself. Raises RedGate."""
    store = ResidentStore(num_rows, grads_NE.shape[1])
    weight = store.weight.clone()
    state = {name: torch.zeros(shape) for name, shape in rule.state_shapes(*weight.shape).items()}
    rows_U, grads_UE = coalesce(rows_N, grads_NE)
    for name, found, expected in zip(
        ("rows", "sums"), (rows_U, grads_UE), coalesce_torch(rows_N, grads_NE), strict=True
    ):
        require_equal(f"coalesced {name}", found.numpy(), expected.numpy())
    for step in (1, 2, 3):
        store.update(rows_U, grads_UE, rule, lr=0.01)
        read = {name: whole[rows_U] for name, whole in state.items()}
        weight[rows_U], kept = rule.apply(weight[rows_U], grads_UE, read, lr=0.01, step=step)
        for name, rows in kept.items():
            state[name][rows_U] = rows
    require_close(f"table after {rule.name}", store.weight, weight, 1e-5)
