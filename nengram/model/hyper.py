"""Manifold-constrained hyper-connections: G residual streams, and maps between them that can neither grow nor fade.

A plain residual adds what a layer says to the one stream it read. Hyper-connections (Zhu et al., 2409.19606) keep G streams X [G, D];
a layer F reads a mix of them, writes to all of them, and the streams themselves are mixed, by maps that depend on the token:

    x      = RMSNorm(vec X)                                 over all G D numbers
    read   = sigmoid(a_read (x phi_read) + b_read)          [G]
    write  = 2 sigmoid(a_write (x phi_write) + b_write)     [G]
    mix    = sinkhorn(a_mix (x phi_mix) + b_mix)            [G, G], rows and columns sum to one
    X next = mix X + write^T F(read X)

The constraint is what was added (mHC, Xie et al., 2512.24880): a product of free mixes over sixty layers explodes or dies, a product
of doubly stochastic ones is doubly stochastic, so the mean of the streams goes through untouched. Sinkhorn-Knopp: exp, then columns
and rows are divided by their sums in turn, `SINKHORN_STEPS` times.

At the start every stream is a copy of the embedding, a layer reads their mean (read = 1 / G), writes once to each (write = 1), and mix
is all but the identity: the plain residual model, up to a_* = 0.01 times the token's part, which is what tells the streams apart.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nengram.config import ModelConfig
from nengram.model.cost import Cost
from nengram.model.init import Draws, normal_by_fan_in

SINKHORN_STEPS = 20
TOKEN_SHARE = 0.01  # a_* at the start
STAY = 8.0  # b_mix on the diagonal at the start: a stream keeps 0.999 of itself where G = 4


class PlainResidual(nn.Module):
    """One stream: what the layer says is added to what it read."""

    def forward(self, hidden_BTD: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        """The hidden state after `layer` (hidden_BTD -> hidden_BTD)."""
        return hidden_BTD + layer(hidden_BTD)

    def init_weights(self, draws: Draws) -> None:
        """Nothing to set."""

    def cost(self) -> Cost:
        """An addition, which is not counted."""
        return Cost()


class HyperConnection(nn.Module):
    """One unit: the maps around one layer. width: D. streams: G, at least 2."""

    def __init__(self, width: int, streams: int, norm_eps: float = 1e-6):
        super().__init__()
        self.width, self.streams = width, streams
        self.norm = nn.RMSNorm(streams * width, eps=norm_eps)
        self.maps = nn.Linear(streams * width, sum(self._parts), bias=False)  # phi: to read, write and mix
        self.token_share = nn.Parameter(torch.empty(3))  # a
        self.bias = nn.Parameter(torch.empty(sum(self._parts)))  # b

    @property
    def _parts(self) -> tuple[int, int, int]:
        return self.streams, self.streams, self.streams**2

    @torch.no_grad()
    def init_weights(self, draws: Draws) -> None:
        """Reads the mean of the streams, writes once to each, leaves them where they are; see the head of the file."""
        normal_by_fan_in(self.maps.weight, self.maps.in_features, draws, "maps")
        nn.init.ones_(self.norm.weight)
        self.token_share.fill_(TOKEN_SHARE)
        read, write, mix = self.bias.split(self._parts)
        read.fill_(-math.log(self.streams - 1))
        write.zero_()
        mix.view(self.streams, -1).copy_(STAY * torch.eye(self.streams))

    def forward(self, streams_BTH: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        """The streams [B, T, G D], one after the other, after `layer` (hidden_BTD -> hidden_BTD)."""
        B, T, H = streams_BTH.shape
        read_NG, write_NG, mix_NGG = self.connections(streams_BTH.flatten(0, 1))
        hidden_NGD = streams_BTH.reshape(B * T, self.streams, self.width)
        both_NGD = torch.cat((read_NG.unsqueeze(1), mix_NGG), dim=1) @ hidden_NGD  # one pass over the streams, not two
        heard, mixed_NGD = both_NGD.split((1, self.streams), dim=1)
        said_BTD = layer(heard.reshape(B, T, self.width))
        out_NGD = torch.baddbmm(mixed_NGD, write_NG.unsqueeze(2), said_BTD.reshape(B * T, 1, self.width))
        return out_NGD.view(B, T, H)

    def connections(self, streams_NH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three maps of every position: read and write [N, G], mix [N, G, G].

        The norm is not written out: its gain goes to phi and its one number a position to the product. Positions come last while
        the maps are made, for sums over four numbers are slow and sums of long rows are not.
        """
        inverse_N = torch.rsqrt(torch.linalg.vecdot(streams_NH, streams_NH) / streams_NH.shape[1] + self.norm.eps)
        said_PN = (self.maps.weight * self.norm.weight) @ streams_NH.T * inverse_N
        read, write, mix = (
            a * own + b[:, None]
            for a, own, b in zip(
                self.token_share, said_PN.split(self._parts), self.bias.split(self._parts), strict=True
            )
        )
        mix_GGN = sinkhorn(mix.unflatten(0, (self.streams, -1)))
        return read.sigmoid().T, 2 * write.sigmoid().T, mix_GGN.permute(2, 0, 1)

    def cost(self) -> Cost:
        """phi as a product; then reading, mixing and writing, and Sinkhorn's sums and divisions. The norm is parameters only."""
        G, D = self.streams, self.width
        applied = 2 * G * D + 2 * G * G * D + 2 * G * D
        parameters = sum(p.numel() for p in self.parameters())
        return Cost(active=parameters, flops=2 * self.maps.weight.numel() + applied + SINKHORN_STEPS * 4 * G * G)


def sinkhorn(scores: Tensor, steps: int = SINKHORN_STEPS) -> Tensor:
    """exp(scores) [G, G, ...] with columns, then rows, divided by their sums, `steps` times; rows sum to one exactly.

    Differentiable once.
    """
    positive = (scores - scores.amax((0, 1), keepdim=True).detach()).exp()  # a common factor divides out
    return _Balanced.apply(positive, steps)


class _Balanced(torch.autograd.Function):
    """The divisions, and the way back through them.

    Recorded one by one they would keep 3.3 kB a position where G = 4, this keeps 0.8 kB: y = x / sum(x) is undone by the sums, so
    x = y sum(x), and dL/dx = (dL/dy - <dL/dy, y>) / sum(x), the product along the sum.
    """

    @staticmethod
    def forward(ctx, positive: Tensor, steps: int) -> Tensor:
        sums, balanced = [], positive.clone()
        for half in range(2 * steps):
            sums.append(balanced.sum(half % 2, keepdim=True))
            balanced /= sums[-1]
        ctx.save_for_backward(balanced, *sums)
        return balanced

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        balanced, *sums = ctx.saved_tensors
        grad, balanced = grad.clone(), balanced.clone()
        for half in reversed(range(len(sums))):
            grad -= (grad * balanced).sum(half % 2, keepdim=True)
            grad /= sums[half]
            balanced *= sums[half]
        return grad, None


def residual(config: ModelConfig) -> PlainResidual | HyperConnection:
    """What joins a layer to the residual stream or streams of a model."""
    return HyperConnection(config.width, config.streams, config.norm_eps) if config.streams > 1 else PlainResidual()


def hyper_reference(unit: HyperConnection, streams_BTH: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
    """The unit as loops over positions, streams and entries, from the equations: slow, obvious, the judge of `forward`.

    `layer` must treat positions apart: it is called with one position at a time.
    """
    G, D = unit.streams, unit.width
    phi, (a_read, a_write, a_mix), b = unit.maps.weight, unit.token_share, unit.bias
    out = []
    for X_H in streams_BTH.flatten(0, 1):
        X = [X_H[g * D : (g + 1) * D] for g in range(G)]
        x = X_H * torch.rsqrt((X_H * X_H).sum() / (G * D) + unit.norm.eps) * unit.norm.weight
        read = [torch.sigmoid(a_read * (phi[g] @ x) + b[g]) for g in range(G)]
        write = [2 * torch.sigmoid(a_write * (phi[G + g] @ x) + b[G + g]) for g in range(G)]
        at = [[2 * G + i * G + j for j in range(G)] for i in range(G)]
        mix = [[torch.exp(a_mix * (phi[n] @ x) + b[n]) for n in row] for row in at]
        for _ in range(SINKHORN_STEPS):
            columns = [sum(mix[i][j] for i in range(G)) for j in range(G)]
            mix = [[mix[i][j] / columns[j] for j in range(G)] for i in range(G)]
            mix = [[entry / sum(row) for entry in row] for row in mix]
        said_D = layer(sum(read[g] * X[g] for g in range(G)).view(1, 1, D)).view(D)
        out += [sum(mix[i][j] * X[j] for j in range(G)) + write[i] * said_D for i in range(G)]
    return torch.stack(out).view_as(streams_BTH)
