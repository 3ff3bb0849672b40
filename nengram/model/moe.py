"""Mixture of experts in DeepSeek's manner: one shared expert, many routed ones, balanced by a bias instead of a loss.

Scores are sigmoids; a bias per expert is added for the choice only, never for the weights, and is nudged after every step towards
even load (Wang et al., 2408.15664). Weights of the chosen K are normalised to sum to one (DeepSeek-V3, 2412.19437, eqs. 12-16).

Tokens are sorted by expert and go through torch's grouped matmul over the stacked `[X, D, F]` weights: one call for all experts.
`moe_reference` below is the same layer as a loop over tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nengram.config import ModelConfig
from nengram.model.cost import Cost
from nengram.model.init import Draws, normal_by_fan_in

ALIGNMENT = 4  # widths are multiples of this: the grouped matmul wants rows that are multiples of 16 bytes


class SwiGLU(nn.Module):
    """Dense gated feed-forward, hidden [..., D] -> [..., D]; also the shared expert."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def init_weights(self, draws: Draws, out_share: float) -> None:
        """N(0, 1 / fan-in); the matrix that writes to the residual stream times `out_share`."""
        normal_by_fan_in(self.gate_up.weight, self.gate_up.in_features, draws, "gate_up")
        normal_by_fan_in(self.down.weight, self.down.in_features, draws, "down", out_share)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> [..., D]."""
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    def cost(self) -> Cost:
        """Three matrices, all used by every token."""
        parameters = sum(p.numel() for p in self.parameters())
        return Cost(active=parameters, flops=2 * parameters)


class MoE(nn.Module):
    """hidden_BTD -> [B, T, D]: the shared expert plus the K chosen of X routed experts.

    width: D. experts: X. per_token: K. expert_width, shared_width: inner widths F of a routed and of the shared expert. `width` and
    `expert_width` are multiples of ALIGNMENT. routed_scale: what the weights of a token's routed experts sum to.
    """

    def __init__(
        self, width: int, experts: int, per_token: int, expert_width: int, shared_width: int, routed_scale: float = 1.0
    ):
        super().__init__()
        self.routed_scale = routed_scale
        self.experts, self.per_token, self.expert_width, self.width = experts, per_token, expert_width, width
        self.router = nn.Linear(width, experts, bias=False)
        self.gate_up_XDF = nn.Parameter(torch.empty(experts, width, 2 * expert_width))
        self.down_XFD = nn.Parameter(torch.empty(experts, expert_width, width))
        self.shared = SwiGLU(width, shared_width)
        self.register_buffer("bias_X", torch.zeros(experts))
        self.register_buffer("load_X", torch.zeros(experts), persistent=False)

    @classmethod
    def of(cls, config: ModelConfig) -> "MoE":
        """The layer that a config means."""
        sizes = (config.width, config.experts, config.experts_per_token, config.expert_width, config.shared_width)
        return cls(*sizes, routed_scale=config.routed_scale)

    def init_weights(self, draws: Draws, out_share: float) -> None:
        """N(0, 1 / fan-in); matrices that write to the residual stream times `out_share`.

        The router too: at N(0, 0.02) all tokens of a small model choose the same experts for its first hundred steps.
        """
        normal_by_fan_in(self.router.weight, self.width, draws, "router")
        normal_by_fan_in(self.gate_up_XDF, self.width, draws, "gate_up")
        normal_by_fan_in(self.down_XFD, self.expert_width, draws, "down", out_share)
        self.shared.init_weights(draws.under("shared"), out_share)
        self.bias_X.zero_()
        self.load_X.zero_()

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """In training, the load of every expert is counted for `rebalance`."""
        x_ND = hidden_BTD.reshape(-1, self.width)
        weights_NK, chosen_NK = self.route(x_ND)
        slots = chosen_NK.flatten()
        order = slots.argsort(stable=True)
        load_X = torch.bincount(slots, minlength=self.experts)
        if self.training:
            self.load_X += load_X
        token = order // self.per_token
        ends_X = load_X.cumsum(0).int()
        gate, up = by_expert(x_ND.index_select(0, token), self.gate_up_XDF, ends_X).chunk(2, dim=-1)
        out = by_expert(F.silu(gate) * up, self.down_XFD, ends_X) * weights_NK.flatten()[order, None]
        routed_ND = torch.zeros_like(x_ND).index_add(0, token, out)
        return self.shared(hidden_BTD) + routed_ND.view_as(hidden_BTD)

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [N, K] that sum to `routed_scale` per token, and the chosen experts [N, K], for tokens x_ND."""
        scores_NX = self.router(x_ND).sigmoid()
        chosen_NK = (scores_NX.detach() + self.bias_X).topk(self.per_token, dim=-1).indices
        weights_NK = scores_NX.gather(1, chosen_NK)
        return self.routed_scale * weights_NK / weights_NK.sum(-1, keepdim=True), chosen_NK

    @torch.no_grad()
    def rebalance(self, rate: float) -> None:
        """Loss-free balancing: move each bias by `rate` towards even load, then forget the load. Once per optimiser step.

        Biases are compared with sigmoids, so `rate` is a share of the scores' whole range.
        """
        self.bias_X += rate * torch.sign(self.load_X.mean() - self.load_X)
        self.load_X.zero_()

    def cost(self) -> Cost:
        """All router rows, the shared expert and K experts are active; X - K experts are idle."""
        one_expert = 3 * self.width * self.expert_width
        chosen = self.per_token * one_expert
        routed = Cost(
            active=self.router.weight.numel() + chosen,
            experts_idle=(self.experts - self.per_token) * one_expert,
            flops=2 * (self.router.weight.numel() + chosen),
        )
        return routed + self.shared.cost()


def by_expert(x_ND: Tensor, weights_XDF: Tensor, ends_X: Tensor) -> Tensor:
    """Rows sorted by expert times each expert's matrix, [N, F]; `ends_X` is where each expert's rows end.

    torch documents its grouped matmul on CUDA for bfloat16 only; other dtypes there take one product per expert.
    """
    if x_ND.device.type == "cpu" or x_ND.dtype == torch.bfloat16:
        return F.grouped_mm(x_ND, weights_XDF, offs=ends_X)
    return one_by_one(x_ND, weights_XDF, ends_X)


def one_by_one(x_ND: Tensor, weights_XDF: Tensor, ends_X: Tensor) -> Tensor:
    """`by_expert` as a product per expert; waits for the device to learn how many rows each has."""
    counts = ends_X.diff(prepend=ends_X.new_zeros(1)).tolist()
    return torch.cat([x @ weights for x, weights in zip(x_ND.split(counts), weights_XDF.unbind(0), strict=True)])


def moe_reference(moe: MoE, hidden_BTD: Tensor) -> Tensor:
    """The layer as a loop over tokens and their experts: slow, obvious, the judge of `MoE.forward`."""
    out = moe.shared(hidden_BTD).reshape(-1, moe.width).clone()
    x_ND = hidden_BTD.reshape(-1, moe.width)
    weights_NK, chosen_NK = moe.route(x_ND)
    for n in range(len(x_ND)):
        for weight, expert in zip(weights_NK[n], chosen_NK[n].tolist(), strict=True):
            gate, up = (x_ND[n] @ moe.gate_up_XDF[expert]).chunk(2)
            out[n] = out[n] + weight * ((F.silu(gate) * up) @ moe.down_XFD[expert])
    return out.view_as(hidden_BTD)
