"""Rotary positions (RoPE, Su et al., 2104.09864), and YaRN, which stretches them to a longer context (Peng et al., 2309.00071).

Pair i of a vector turns by theta^(-2 i / width) at every position. A model trained on L positions has seen the fast pairs turn many
times and the slow ones never once; on longer texts the slow pairs reach angles that it never met. YaRN keeps every pair that turned
more than `beta` times in L, slows those that turned less than `alpha` times by `scale`, and goes from one to the other in a
straight line over the pairs between. Attention over more keys is flatter, so scores are multiplied by (0.1 mscale ln(scale) + 1)^2.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """How positions rotate. scale 1: plain RoPE, and nothing below `scale` is read."""

    theta: float = 10000.0
    scale: float = 1.0  # how many times longer the context became
    original_context: int = 0  # L
    alpha: float = 1.0
    beta: float = 32.0
    mscale: float = 1.0

    def inverse(self, width: int, device: torch.device | None = None) -> Tensor:
        """Radians a position, float32 [width / 2], fastest pair first."""
        turn = self.theta ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
        if self.scale == 1:
            return turn
        first, last = max(math.floor(self._pair(self.beta, width)), 0), math.ceil(self._pair(self.alpha, width))
        last = max(min(last, width - 1), first + 0.001)
        slowed = ((torch.arange(width // 2, device=device, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
        return turn * (1 - slowed) + turn / self.scale * slowed

    def _pair(self, turns: float, width: int) -> float:
        """The (fractional) pair that turns so many times in the original context."""
        return width * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

    @property
    def sharpening(self) -> float:
        """What attention scores are multiplied by."""
        return (0.1 * self.mscale * math.log(self.scale) + 1) ** 2

    def rotations(self, past: int, length: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, width / 2] for positions past .. past + T - 1."""
        return self.at(torch.arange(past, past + length, device=like.device, dtype=torch.float32), width, like)

    def at(self, positions: Tensor, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [..., width / 2] for any positions [...]."""
        angles = positions.float().unsqueeze(-1) * self.inverse(width, like.device)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of the last axis as pairs; x is [..., T, width]."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
