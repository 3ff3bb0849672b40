"""The Engram layer as loops over sequences, positions and branches, from the equations: read this first.

Slow on purpose. Every number is a float64 scalar or a 1-D tensor over one axis that is named, so a line can
be held against the paper. `nengram.memory.engram` must agree with it, outputs and gradients (which autograd
takes through these loops too).
"""

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from nengram.memory.engram import Engram


def engram_reference(
    layer: "Engram", vecs_BTM: torch.Tensor, hidden_BTGD: torch.Tensor, blocked_BT: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The update `[B, T, G, D]` and the gates `[B, T, G]` of `layer`, of which only the weights are read.

    vecs_BTM: looked-up vectors side by side, float64. hidden_BTGD: float64. blocked_BT: where the gate is 0.
    """
    batch, length, branches, width = hidden_BTGD.shape
    eps = layer.gate_eps if layer.gate_eps is not None else torch.finfo(hidden_BTGD.dtype).eps
    _, _, value_weight, value_bias = layer.projections()
    gates, updates = [], []
    for b in range(batch):
        gated = {}  # (position, branch) -> u
        for t in range(length):
            e_M = vecs_BTM[b, t]
            value_D = value_weight @ e_M
            if value_bias is not None:
                value_D = value_D + value_bias
            for g in range(branches):
                gate = torch.ones((), dtype=e_M.dtype)
                if layer.gate != "open":
                    gate = torch.sigmoid(gate_argument(layer, e_M, hidden_BTGD[b, t, g], g, eps))
                if blocked_BT is not None and blocked_BT[b, t]:
                    gate = torch.zeros_like(gate)
                gates.append(gate)
                gated[t, g] = gate * value_D
        for t in range(length):
            for g in range(branches):
                updates.append(gated[t, g] + short_conv(layer, gated, t, g) if layer.conv else gated[t, g])
    return torch.stack(updates).view(hidden_BTGD.shape), torch.stack(gates).view(batch, length, branches)


def gate_argument(layer: "Engram", e_M: torch.Tensor, hidden_D: torch.Tensor, g: int, eps: float) -> torch.Tensor:
    """The score of one branch, as a signed root or ("plain") as it is."""
    key_weight, key_bias, _, _ = layer.projections()
    key_D = key_weight.view(layer.branches, layer.width, -1)[g] @ e_M
    if key_bias is not None:
        key_D = key_D + key_bias.view(layer.branches, layer.width)[g]
    query_D = rms_norm(hidden_D, layer.query_gain[g], eps)
    score = (query_D * rms_norm(key_D, layer.key_gain[g], eps)).sum() / math.sqrt(layer.width)
    return score if layer.gate == "plain" else signed_root(score, layer.gate)


def short_conv(layer: "Engram", gated: dict, t: int, g: int) -> torch.Tensor:
    """silu of the sum over i of w_i * rms(u at t - i * dilation), per channel; nothing before the start."""
    heard_D = torch.zeros_like(gated[t, g])
    for i in range(layer.kernel):
        if t - i * layer.dilation >= 0:
            normed_D = rms_norm(gated[t - i * layer.dilation, g], layer.conv_gain[g], layer.conv_eps)
            heard_D = heard_D + layer.conv_weight[layer.kernel - 1 - i, g] * normed_D
    return heard_D * torch.sigmoid(heard_D)


def rms_norm(x_D: torch.Tensor, gain_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * gain."""
    return x_D / torch.sqrt((x_D * x_D).mean() + eps) * gain_D


def signed_root(score: torch.Tensor, gate: str) -> torch.Tensor:
    """sqrt(max(|s|, 1e-6)) with the sign of s; at s = 0 that is 0 for "sign" and +0.001 for "copysign"."""
    if score == 0 and gate == "sign":
        return score * 0.0
    root = torch.sqrt(torch.clamp(abs(score), min=1e-6))
    return -root if math.copysign(1.0, score.item()) < 0 else root
