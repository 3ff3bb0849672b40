"""What an Engram is compared with: the same lookups, without the machinery.

`Additive` is the plain n-gram embedding of the literature: whatever was looked up is projected and added, in
every context. What an Engram gains over it at equal rows is what the gate and the convolution are worth.
"""

import torch
from torch import Tensor, nn

from nengram.errors import ConfigError
from nengram.memory.engram import Engram, by_kind
from nengram.memory.short_conv import ConvPast, ConvState
from nengram.shapes import Bool, Float, shaped


class Additive(nn.Module):
    """An ungated n-gram table: one projection of the looked-up vectors, added to every branch alike.

    The same calls as `Engram`, so a model takes either. memory_width: M. width: D. branches: G.
    """

    def __init__(self, memory_width: int, width: int, *, branches: int = 1, bias: bool = False) -> None:
        super().__init__()
        if min(memory_width, width, branches) < 1:
            raise ConfigError("memory_width, width and branches must all be at least 1")
        self.memory_width, self.width, self.branches = memory_width, width, branches
        self.value_proj = nn.Linear(memory_width, width, bias=bias)
        self.init_weights()

    @shaped
    def forward(
        self,
        vecs: Float[Tensor, "B T *S_E"],
        hidden_BTGD: Float[Tensor, "B T G D"],
        *,
        blocked_BT: Bool[Tensor, "B T"] | None = None,
        start_BT: Bool[Tensor, "B T"] | None = None,
        state: ConvPast | None = None,
    ) -> Float[Tensor, "B T G D"]:
        """The update of every branch, `[B, T, G, D]`: 0 where blocked. `start_BT` and `state` are accepted and left alone."""
        vecs_BTM = vecs.flatten(2)
        if vecs_BTM.shape != (*hidden_BTGD.shape[:2], self.memory_width):
            raise ConfigError(f"vectors {tuple(vecs.shape)} do not give {self.memory_width} numbers to each position")
        value_BTD = self.value_proj(vecs_BTM.to(self.value_proj.weight.dtype))
        if blocked_BT is not None:
            value_BTD = value_BTD.masked_fill(blocked_BT.unsqueeze(-1), 0.0)
        return value_BTD.unsqueeze(2).expand(-1, -1, self.branches, -1)

    def new_state(self, batch: int) -> ConvState:
        """An empty state: nothing here looks back."""
        return ConvState(self.value_proj.weight.new_zeros(batch, 0, self.branches, self.width))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """The projection as `Engram`'s value: N(0, 1 / M)."""
        self.value_proj.weight.normal_(std=self.memory_width**-0.5, generator=generator)
        if self.value_proj.bias is not None:
            self.value_proj.bias.zero_()

    def param_groups(self) -> list[dict]:
        """As `Engram.param_groups`."""
        return by_kind(self.named_parameters())

    def cost(self, context: int = 0) -> dict[str, int]:
        """As `Engram.cost`: the projection, and one addition per bias."""
        parameters = sum(p.numel() for p in self.parameters())
        bias = self.width if self.value_proj.bias is not None else 0
        return {"parameters": parameters, "flops_per_token": 2 * self.memory_width * self.width + bias}


MEMORIES: dict[str, type[nn.Module]] = {"engram": Engram, "additive": Additive}
