"""Initial weights: N(0, 1 / fan-in), so that a layer's output is as large as its input at every width.

The common N(0, 0.02) equals it at a width of 2,500; at a width of 128 it is four times too small: tokens look alike to the router,
all choose the same experts, and a run of 200 steps ends 0.6 nats higher. Matrices that write to the residual stream are divided by
the square root of how many do.

Every tensor draws from a generator of its own, seeded by (seed, name). Two arms of a comparison therefore start from the same weights
wherever their shapes agree: the embedding, attention, and (nearly all of) the experts they share. With one generator for all, the
first tensor of another shape would shift every draw after it, and pairing runs by seed would pair nothing but the data.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Draws:
    """Random numbers by name. `Draws(seed).under("blocks.0")` names what is drawn for a part of the model."""

    seed: int
    path: str = ""

    def under(self, name: str) -> "Draws":
        """The draws of a part called `name`."""
        return Draws(self.seed, f"{self.path}{name}.")

    def generator(self, name: str, device: torch.device) -> torch.Generator:
        """A fresh generator for the tensor called `name`; the same for the same seed, path and name."""
        digest = hashlib.sha256(f"{self.seed} {self.path}{name}".encode()).digest()
        return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:7], "big"))


def normal_by_fan_in(weight: Tensor, fan_in: int, draws: Draws, name: str, share: float = 1.0) -> None:
    """Fill `weight` with N(0, share / sqrt(fan_in)) in place, from the draws called `name`."""
    nn.init.normal_(weight, std=share * fan_in**-0.5, generator=draws.generator(name, weight.device))
