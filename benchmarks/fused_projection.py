"""Is one projection of the looked-up vectors cheaper than two? Keys and value by `kv_proj` against `key_proj` and `value_proj`.

The same numbers of multiplications either way: G x D key columns and D value columns of one matrix, or of two. What fusing can
save is a second pass over the input, a second call, and in the backward pass the sum of two gradients of the input. So it is timed
where calls count (one token) and where arithmetic does (a training batch, forward and backward, gradients made anew), at one branch
and at four, with the shapes of a small model and 1/8 of DeepSeek-V4.1's.
"""

from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.gates import require_all_close
from benchmarks.measure import interleave
from benchmarks.report import figure, result
from nengram.memory import Engram
from nengram.memory.layer_layouts import fuse


@dataclass(frozen=True)
class Shape:
    """One memory layer."""

    memory_width: int
    width: int
    branches: int

    @property
    def words(self) -> str:
        return f"{self.memory_width} -> ({self.branches} + 1) x {self.width}"


@dataclass(frozen=True)
class Sizes:
    """Shapes, tokens of a training batch, and pairs of timings."""

    shapes: tuple[Shape, ...] = (Shape(64, 128, 1), Shape(64, 128, 4), Shape(768, 640, 4))
    tokens: int = 1024
    calls: int = 50  # of one token, timed together: one is too short for the clock
    pairs: int = 40


FULL = Sizes()


def run(sizes: Sizes = FULL) -> dict:
    """The result of this benchmark. Raises RedGate."""
    figures, absolute = [], {}
    for shape in sizes.shapes:
        fused, apart = layers_of(shape)
        generator = torch.Generator().manual_seed(1)
        vecs_BTM = torch.randn(1, sizes.tokens, shape.memory_width, generator=generator)
        check_projections(fused, apart, vecs_BTM[:, :64])
        grad_BTN = torch.randn(1, sizes.tokens, (shape.branches + 1) * shape.width, generator=generator)
        works = {"one token": (decode, (vecs_BTM[:, :1], sizes.calls)), "training": (train, (vecs_BTM, grad_BTN))}
        for name, (work, given) in works.items():
            timings = interleave(
                lambda given, work=work, layer=fused: work(layer, *given),
                lambda given, work=work, layer=apart: work(layer, *given),
                lambda given=given: given,
                sizes.pairs,
            )
            figures.append(figure(f"fused / separate, {name}, {shape.words}", timings.cost, "x", ("<=", 1.05)))
            place = f"{name.replace(' ', '_')}_{shape.memory_width}_{shape.width}_{shape.branches}"
            absolute |= {
                f"fused_ms_{place}": 1e3 * np.median(timings.ours_s),
                f"separate_ms_{place}": 1e3 * np.median(timings.theirs_s),
            }
    what = f"memory projections: {sizes.calls} calls of one token; {sizes.tokens:,} tokens forward + backward"
    gate = "keys, value and all gradients agree with those of the separate projections"
    return result("fused_projection", what, gate, figures, absolute)


def layers_of(shape: Shape) -> tuple[Engram, Engram]:
    """The same layer with one projection, and with two."""
    apart = Engram(shape.memory_width, shape.width, branches=shape.branches, conv=False)
    apart.init_weights(torch.Generator().manual_seed(0))
    fused = Engram(shape.memory_width, shape.width, branches=shape.branches, conv=False, fused=True)
    fused.load_state_dict(fuse(apart.state_dict()))
    return fused, apart


def check_projections(fused: Engram, apart: Engram, vecs_BTM: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Numbers and gradients are the same. Raises RedGate."""
    found, expected = (projected(layer, vecs_BTM) for layer in (fused, apart))
    require_all_close("fused projection", found, expected, tolerance)


def projected(layer: Engram, vecs_BTM: torch.Tensor) -> dict[str, torch.Tensor]:
    """Keys and value side by side, and the gradients of the input and of all weights under a fixed weighting."""
    vecs_BTM = vecs_BTM.detach().clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    key_BTGD, value_BTD = layer._projected(vecs_BTM)
    both_BTN = torch.cat([key_BTGD.flatten(2), value_BTD], -1)
    both_BTN.backward(torch.linspace(-1, 1, both_BTN.numel()).view_as(both_BTN))
    grads = {name: p.grad for name, p in layer.named_parameters() if name.endswith("_proj.weight")}
    weight_NM = (
        grads["kv_proj.weight"] if layer.fused else torch.cat([grads["key_proj.weight"], grads["value_proj.weight"]])
    )
    return {"numbers": both_BTN.detach(), "gradient of the input": vecs_BTM.grad, "gradient of the weights": weight_NM}


@torch.no_grad()
def decode(layer: Engram, vecs_BTM: torch.Tensor, calls: int) -> None:
    """As in generation: one token at a time."""
    for _ in range(calls):
        layer._projected(vecs_BTM)


def train(layer: Engram, vecs_BTM: torch.Tensor, grad_BTN: torch.Tensor) -> None:
    """One pass in each direction, gradients starting from nothing."""
    layer.zero_grad(set_to_none=True)
    key_BTGD, value_BTD = layer._projected(vecs_BTM.detach().requires_grad_())
    key_grad, value_grad = grad_BTN.split([layer.branches * layer.width, layer.width], -1)
    torch.autograd.backward((key_BTGD, value_BTD), (key_grad.unflatten(-1, key_BTGD.shape[2:]), value_grad))
