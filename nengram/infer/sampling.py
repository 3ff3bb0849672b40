"""Logits into one token. The generator is the sampler's own, so a seed gives the same text whatever else draws numbers.

Drawing happens on the CPU in float32, also for a model elsewhere: a few thousand numbers a token, and the same draw on every device.
"""

import math

import torch
from torch import Tensor

from nengram.errors import ConfigError

GREEDY_BELOW = 1e-6


class Sampler:
    """logits_V [V] -> a token id.

    temperature: divides the logits; 0, or less than float32 can tell from it, takes the likeliest.
    top_k: draw among the k likeliest; 0: among all. seed: 0..2**63 - 1.
    Raises: ConfigError for a setting out of its range.
    """

    def __init__(self, temperature: float = 0.0, top_k: int = 0, seed: int = 0):
        if not 0 <= temperature < math.inf:
            raise ConfigError(f"temperature must be a number from 0 up, got {temperature}")
        if top_k < 0:
            raise ConfigError(f"top_k must be at least 1, or 0 for all tokens, got {top_k}")
        if not 0 <= seed < 2**63:
            raise ConfigError(f"the seed must lie in 0..2**63 - 1, got {seed}")
        self.temperature, self.top_k = temperature, top_k
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits_V: Tensor) -> int:
        """The next token id; what is drawn depends on the seed and on the calls before."""
        logits_V = logits_V.detach().float().cpu()
        if self.temperature < GREEDY_BELOW:
            return int(logits_V.argmax())
        kept, ids = logits_V.topk(min(self.top_k or len(logits_V), len(logits_V)))
        shares = ((kept - kept[0]) / self.temperature).softmax(-1)
        return int(ids[torch.multinomial(shares, 1, generator=self._generator)])
