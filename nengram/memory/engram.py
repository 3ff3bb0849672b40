"""The Engram layer: what a token looked up, gated by what the model is thinking (paper, equations 3-6).

The vectors of a position's n-grams were chosen by token ids alone, so they know nothing of context: the same
bigram brings the same vectors into a recipe and into a proof, and colliding n-grams bring each other's. The
hidden state decides how much of them to believe. Per position t and residual branch g, with e_t the looked-up
vectors side by side:

    k = W_key[g] e_t            a key for every branch          (equation 3)
    v = W_value e_t             ONE value, shared by all
    s = <rms(h) , rms(k)> / sqrt(D)                             (equation 4)
    gate = sigmoid(sign(s) sqrt(|s|))
    u = gate v
    y = u + silu(conv(rms(u)))                                  (equation 5)

and y is added to the residual stream before attention. The signed square root is in every public
implementation and in no paper; it steepens the gate around indifference. `GATES` names it, its like, and the
two that ask what it is worth: the paper's equation as printed, and no gate at all. The convolution, depthwise and
causal, lets a position use what the last few positions found. Its weights start at zero, so at first y = u; u
itself is never zero at the start, or nothing would learn.

`nengram.memory.reference` is this file as loops, and the better first read.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nengram.errors import ConfigError, nearest
from nengram.memory.short_conv import ConvState, dilated_taps
from nengram.shapes import Bool, Float, shaped

ROOT_FLOOR = 1e-6  # |s| below this counts as this much: the slope of the root is at most 500


class Engram(nn.Module):
    """Looked-up vectors and hidden states into an update of every residual branch.

    memory_width: M, slots x row width. width: D. branches: G, the residual streams (1 = a plain Transformer).
    kernel, dilation: the convolution reads t, t - dilation, ... `kernel` of them; the paper's dilation is its
        highest n-gram order. conv=False leaves it out (DeepSeek-V4.1).
    bias: biases in both projections (the public demo has them, the paper and its successors do not).
    gate: one of `GATES`. "sign" (the demo, Qwen) and "copysign" (DeepSeek-V4.1) differ at s = 0 only, where the
        gate is one half, or a little above. "plain": sigmoid(s), equation 4 without a root. "open": the gate is
        1 and there is no key: no projection, no gains, hidden state unread; with conv=False that is `Additive`.
    gate_eps: inside the root of the query and key norms; None is the epsilon of the hidden state's dtype.
    conv_eps: the same for the convolution's input norm.
    Raises: ConfigError for an option that does not exist or a size below one.
    """

    def __init__(
        self,
        memory_width: int,
        width: int,
        *,
        branches: int = 1,
        kernel: int = 4,
        dilation: int = 3,
        conv: bool = True,
        bias: bool = False,
        gate: str = "sign",
        gate_eps: float | None = None,
        conv_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if min(memory_width, width, branches, kernel, dilation) < 1:
            raise ConfigError("memory_width, width, branches, kernel and dilation must all be at least 1")
        if gate not in GATES:
            raise ConfigError(f'unknown gate "{gate}"{nearest(gate, GATES)}; there are {", ".join(GATES)}')
        self.memory_width, self.width, self.branches = memory_width, width, branches
        self.kernel, self.dilation, self.conv = kernel, dilation, conv
        self.gate, self.gate_eps, self.conv_eps = gate, gate_eps, conv_eps
        self.gated = gate != "open"
        if self.gated:
            self.key_proj = nn.Linear(memory_width, branches * width, bias=bias)
        self.value_proj = nn.Linear(memory_width, width, bias=bias)
        if self.gated:
            self.query_gain = nn.Parameter(torch.empty(branches, width))
            self.key_gain = nn.Parameter(torch.empty(branches, width))
        if conv:
            self.conv_gain = nn.Parameter(torch.empty(branches, width))
            self.conv_weight = nn.Parameter(torch.empty(kernel, branches, width))
        self.init_weights()

    @shaped
    def forward(
        self,
        vecs: Float[Tensor, "B T *S_E"],
        hidden_BTGD: Float[Tensor, "B T G D"],
        *,
        blocked_BT: Bool[Tensor, "B T"] | None = None,
        state: ConvState | None = None,
    ) -> Float[Tensor, "B T G D"]:
        """The update of every branch, `[B, T, G, D]`; the caller adds it to the residual stream.

        vecs: `[B, T, S, E]` or `[B, T, M]`.
        blocked_BT: true where the gate is 0; the convolution of earlier positions is still heard there.
        state: of `new_state`, for decoding in chunks; updated in place.
        Raises: ConfigError when the shapes do not fit this layer.
        """
        vecs_BTM = self._side_by_side(vecs, hidden_BTGD)
        gated_BTGD = self._gated(vecs_BTM, hidden_BTGD, blocked_BT)
        if not self.conv:
            return gated_BTGD
        return gated_BTGD + F.silu(self._short_conv(gated_BTGD, state))

    def gates(self, vecs: Tensor, hidden_BTGD: Tensor, *, blocked_BT: Tensor | None = None) -> Tensor:
        """How far each position and branch believes what it looked up, `[B, T, G]` in [0, 1]."""
        return self._gates(self._side_by_side(vecs, hidden_BTGD), hidden_BTGD, blocked_BT)

    def new_state(self, batch: int) -> ConvState:
        """The convolution's memory before the first token of `batch` sequences."""
        past = (self.kernel - 1) * self.dilation if self.conv else 0
        return ConvState(self.value_proj.weight.new_zeros(batch, past, self.branches, self.width))

    def _gated(self, vecs_BTM: Tensor, hidden_BTGD: Tensor, blocked_BT: Tensor | None) -> Tensor:
        """The value as each branch believes it, before the convolution."""
        gate_BTG = self._gates(vecs_BTM, hidden_BTGD, blocked_BT) if self.gated else None
        value_BTD = self.value_proj(vecs_BTM)
        if gate_BTG is not None:
            return gate_BTG.to(value_BTD.dtype).unsqueeze(-1) * value_BTD.unsqueeze(2)
        if blocked_BT is not None:
            value_BTD = value_BTD.masked_fill(blocked_BT.unsqueeze(-1), 0.0)
        return value_BTD.unsqueeze(2).expand(-1, -1, self.branches, -1)

    def _gates(self, vecs_BTM: Tensor, hidden_BTGD: Tensor, blocked_BT: Tensor | None) -> Tensor:
        gate_BTG = self._opened(vecs_BTM, hidden_BTGD) if self.gated else hidden_BTGD.new_ones(hidden_BTGD.shape[:3])
        return gate_BTG if blocked_BT is None else gate_BTG.masked_fill(blocked_BT.unsqueeze(-1), 0.0)

    def _opened(self, vecs_BTM: Tensor, hidden_BTGD: Tensor) -> Tensor:
        # Neither norm is written out: each is one number per branch, and the gains meet in their product.
        eps = torch.finfo(hidden_BTGD.dtype).eps if self.gate_eps is None else self.gate_eps
        hidden = _at_least_float32(hidden_BTGD)
        key = _at_least_float32(self.key_proj(vecs_BTM).view(hidden_BTGD.shape))
        dot_BTG = torch.linalg.vecdot(hidden * (self.query_gain * self.key_gain), key)
        score_BTG = dot_BTG * _inverse_rms(hidden, eps) * _inverse_rms(key, eps) * self.width**-0.5
        return torch.sigmoid(GATES[self.gate](score_BTG))

    def _short_conv(self, gated_BTGD: Tensor, state: ConvState | None) -> Tensor:
        wide = _at_least_float32(gated_BTGD)
        normed_BTGD = (wide * _inverse_rms(wide, self.conv_eps).unsqueeze(-1)).to(gated_BTGD.dtype)
        past = (self.kernel - 1) * self.dilation
        heard = F.pad(normed_BTGD, (0, 0, 0, 0, past, 0)) if state is None else state.extend(normed_BTGD)
        taps_KGD = self.conv_weight * self.conv_gain  # per channel both, so the gain may wait for the tap
        return dilated_taps(heard, taps_KGD.to(heard.dtype), self.dilation)

    def _side_by_side(self, vecs: Tensor, hidden_BTGD: Tensor) -> Tensor:
        vecs_BTM = vecs.flatten(2)
        if hidden_BTGD.dim() != 4 or hidden_BTGD.shape[2:] != (self.branches, self.width):
            raise ConfigError(
                f"hidden state {tuple(hidden_BTGD.shape)} is not [B, T, {self.branches}, {self.width}]: "
                "batch, position, branch, width"
            )
        if vecs_BTM.shape != (*hidden_BTGD.shape[:2], self.memory_width):
            raise ConfigError(
                f"vectors {tuple(vecs.shape)} do not give {self.memory_width} numbers to each of "
                f"{hidden_BTGD.shape[0]} x {hidden_BTGD.shape[1]} positions"
            )
        return vecs_BTM.to(self.value_proj.weight.dtype)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Projections N(0, 1 / M), biases and convolution 0, gains 1.

        The value then has the scale of the table's rows, whatever the widths. Only the convolution may start
        at zero: a zero projection on a zero table has no gradient at all.
        """
        for proj in (self.key_proj, self.value_proj) if self.gated else (self.value_proj,):
            proj.weight.normal_(std=self.memory_width**-0.5, generator=generator)
            if proj.bias is not None:
                proj.bias.zero_()
        if self.gated:
            self.query_gain.fill_(1.0)
            self.key_gain.fill_(1.0)
        if self.conv:
            self.conv_gain.fill_(1.0)
            self.conv_weight.zero_()

    def param_groups(self) -> list[dict]:
        """The projections as kind "matrix" (for Muon, weight decay), all else as kind "vector"."""
        return by_kind(self.named_parameters())

    def cost(self, context: int = 0) -> dict[str, int]:
        """`parameters` (the table's are not among them) and `flops_per_token` of a forward pass.

        Counted on the equations, a multiply-add as 2, any other operation on a number as 1. `context` is for
        symmetry with attention: nothing here depends on it.
        """
        branch_width = self.branches * self.width
        key_width = branch_width if self.gated else 0
        proj = 2 * self.memory_width * (key_width + self.width)
        bias = key_width + self.width if self.value_proj.bias is not None else 0
        gate = (4 + 4 + 2 + 1) * key_width  # two norms, a dot product, gate x value
        conv = (4 + 2 * self.kernel + 4 + 1) * branch_width if self.conv else 0  # norm, taps, silu, sum
        parameters = sum(p.numel() for p in self.parameters())
        return {"parameters": parameters, "flops_per_token": proj + bias + gate + conv}

    def extra_repr(self) -> str:
        conv = f"kernel={self.kernel}, dilation={self.dilation}" if self.conv else "conv=False"
        widths = f"memory_width={self.memory_width}, width={self.width}, branches={self.branches}"
        return f"{widths}, gate={self.gate}, {conv}"


def by_kind(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict]:
    """Optimiser groups `{"kind", "params"}`: "matrix" for projection weights, "vector" for all else."""
    groups: dict[str, list[nn.Parameter]] = {"matrix": [], "vector": []}
    for name, parameter in named_parameters:
        groups["matrix" if name.endswith("_proj.weight") else "vector"].append(parameter)
    return [{"kind": kind, "params": params} for kind, params in groups.items() if params]


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis."""
    return torch.rsqrt(torch.linalg.vecdot(x, x) / x.shape[-1] + eps)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _sign_root(score: Tensor) -> Tensor:
    return score.sign() * score.abs().clamp_min(ROOT_FLOOR).sqrt()


def _copysign_root(score: Tensor) -> Tensor:
    return torch.copysign(score.abs().clamp_min(ROOT_FLOOR).sqrt(), score)


def _plain(score: Tensor) -> Tensor:
    return score


GATES: dict[str, Callable[[Tensor], Tensor] | None] = {
    "sign": _sign_root,
    "copysign": _copysign_root,
    "plain": _plain,
    "open": None,
}
