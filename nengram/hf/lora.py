"""Low-rank updates of frozen linear modules, as hooks: put on, trained, taken off, and the model is as it was.

y = W x + scale U V x, V drawn as torch draws a linear module, U zero: what PEFT's LoRA computes, without becoming its model. It
is the rival that a graft is compared with, so its size must fit a budget to a few parts in ten thousand: ranks differ a
little between modules (`ranks_for`).
"""

import math
from collections.abc import Mapping

import torch
from torch import nn

from nengram.errors import ConfigError


class Lora(nn.Module):
    """Low-rank updates on `linears`, in force from construction to `remove`.

    linears: modules by name. ranks: the rank of each; 0 leaves a module alone. scale: PEFT's alpha / r.
    """

    def __init__(
        self, linears: Mapping[str, nn.Linear], ranks: Mapping[str, int], *, scale: float = 2.0, seed: int = 0
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.scale, self._hooks = scale, []
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, linear in linears.items():
            if not ranks[name]:
                continue
            key = name.replace(".", "_")
            weight = torch.empty(ranks[name], linear.in_features)
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
            self.down[key] = nn.Parameter(weight.to(linear.weight.device))
            self.up[key] = nn.Parameter(torch.zeros(linear.out_features, ranks[name], device=linear.weight.device))
            self._hooks.append(linear.register_forward_hook(self._hook(key)))

    def _hook(self, key: str):
        def add(_, args: tuple, output: torch.Tensor) -> torch.Tensor:
            low = nn.functional.linear(args[0].to(self.down[key].dtype), self.down[key])
            return output + (nn.functional.linear(low, self.up[key]) * self.scale).to(output.dtype)

        return add

    def remove(self) -> None:
        """Take the updates off their modules."""
        while self._hooks:
            self._hooks.pop().remove()


def linears_of(blocks: nn.Module) -> dict[str, nn.Linear]:
    """The linear modules of blocks by name, those of one block after those of the one before."""
    return {name: module for name, module in blocks.named_modules() if isinstance(module, nn.Linear)}


def ranks_for(linears: Mapping[str, nn.Linear], budget: int) -> dict[str, int]:
    """Ranks whose parameters are at most `budget`, and less than one more rank of the smallest module below it.

    The same rank everywhere, and one more for the first modules that it still pays for, until it pays for none; no rank is larger than
    its module's own. Raises: ConfigError for a budget below one rank.
    """
    cost = {name: linear.in_features + linear.out_features for name, linear in linears.items()}
    most = {name: min(linear.in_features, linear.out_features) for name, linear in linears.items()}
    if not cost or budget < min(cost.values()):
        raise ConfigError(f"{budget:,} parameters do not pay for a LoRA of rank 1 on any of {len(cost)} linear modules")
    ranks = {name: min(budget // sum(cost.values()), most[name]) for name in cost}
    left = budget - sum(ranks[name] * cost[name] for name in cost)
    while more := [name for name in cost if ranks[name] < most[name] and cost[name] <= left]:
        for name in more:
            if cost[name] <= left:
                ranks[name] += 1
                left -= cost[name]
    return ranks
