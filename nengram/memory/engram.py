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

Three published families are this layer under different options; `FAMILIES` has them as data. DeepSeek-V4.1 makes keys
and value with one matrix (`fused`) and dropped the convolution, Qwen's PLE kept it.

`nengram.memory.reference` is this file as loops, and the better first read.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nengram.errors import ConfigError, nearest
from nengram.memory.short_conv import ConvPast, ConvState, dilated_taps, taps_within
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
    fused: one projection `kv_proj`, G x D keys and then D values, instead of `key_proj` and `value_proj`: the same numbers.
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
        fused: bool = False,
        gate_eps: float | None = None,
        conv_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if min(memory_width, width, branches, kernel, dilation) < 1:
            raise ConfigError("memory_width, width, branches, kernel and dilation must all be at least 1")
        if gate not in GATES:
            raise ConfigError(f'unknown gate "{gate}"{nearest(gate, GATES)}; there are {", ".join(GATES)}')
        if fused and gate == "open":
            raise ConfigError('gate "open" has no keys to fuse with the value: fused=False')
        self.memory_width, self.width, self.branches = memory_width, width, branches
        self.kernel, self.dilation, self.conv = kernel, dilation, conv
        self.gate, self.gate_eps, self.conv_eps = gate, gate_eps, conv_eps
        self.gated, self.fused = gate != "open", fused
        if fused:
            self.kv_proj = nn.Linear(memory_width, (branches + 1) * width, bias=bias)
        else:
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

    @classmethod
    def family(cls, name: str, memory_width: int, width: int, *, branches: int = 1, **options) -> "Engram":
        """The layer as one published family has it: an entry of `FAMILIES`, and `options` over it.

        qwen_ple: give `dilation` if the highest order is not 3, and its config's `rms_norm_eps` as gate_eps and conv_eps.
        Raises: ConfigError for an unknown family, and as the class does.
        """
        if name not in FAMILIES:
            raise ConfigError(f'unknown family "{name}"{nearest(name, FAMILIES)}; there are {", ".join(FAMILIES)}')
        return cls(memory_width, width, branches=branches, **FAMILIES[name] | options)

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
        """The update of every branch, `[B, T, G, D]`; the caller adds it to the residual stream.

        vecs: `[B, T, S, E]` or `[B, T, M]`.
        blocked_BT: true where the gate is 0; the convolution of earlier positions is still heard there.
        start_BT: true where a text begins that is to hear nothing before it; None: the convolution hears across texts, as in
            every public code.
        state: of `new_state`, or a `ConvPast` of the caller's, for decoding in chunks; updated in place.
        Raises: ConfigError when the shapes do not fit this layer.
        """
        vecs_BTM = self._side_by_side(vecs, hidden_BTGD)
        gated_BTGD = self._gated(vecs_BTM, hidden_BTGD, blocked_BT)
        if not self.conv:
            return gated_BTGD
        return gated_BTGD + F.silu(self._short_conv(gated_BTGD, start_BT, state))

    def gates(self, vecs: Tensor, hidden_BTGD: Tensor, *, blocked_BT: Tensor | None = None) -> Tensor:
        """How far each position and branch believes what it looked up, `[B, T, G]` in [0, 1]."""
        key_BTGD, _ = self._projected(self._side_by_side(vecs, hidden_BTGD))
        return self._gates(key_BTGD, hidden_BTGD, blocked_BT)

    def new_state(self, batch: int) -> ConvState:
        """The convolution's memory before the first token of `batch` sequences."""
        past = (self.kernel - 1) * self.dilation if self.conv else 0
        return ConvState(self.projections()[2].new_zeros(batch, past, self.branches, self.width))

    def projections(self) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
        """Weight and bias of the keys, `[G D, M]` and `[G D]`, then of the value; None for what is not there."""
        if not self.fused:
            keys = (self.key_proj.weight, self.key_proj.bias) if self.gated else (None, None)
            return *keys, self.value_proj.weight, self.value_proj.bias
        sizes = [self.branches * self.width, self.width]
        biases = (None, None) if self.kv_proj.bias is None else self.kv_proj.bias.split(sizes)
        key_weight, value_weight = self.kv_proj.weight.split(sizes)
        return key_weight, biases[0], value_weight, biases[1]

    def _projected(self, vecs_BTM: Tensor) -> tuple[Tensor | None, Tensor]:
        """Keys `[B, T, G, D]`, if there are any, and the value `[B, T, D]`."""
        if self.fused:
            key, value_BTD = self.kv_proj(vecs_BTM).split([self.branches * self.width, self.width], dim=-1)
        else:
            key, value_BTD = self.key_proj(vecs_BTM) if self.gated else None, self.value_proj(vecs_BTM)
        return None if key is None else key.unflatten(-1, (self.branches, self.width)), value_BTD

    def _gated(self, vecs_BTM: Tensor, hidden_BTGD: Tensor, blocked_BT: Tensor | None) -> Tensor:
        """The value as each branch believes it, before the convolution."""
        key_BTGD, value_BTD = self._projected(vecs_BTM)
        if self.gated:
            gate_BTG = self._gates(key_BTGD, hidden_BTGD, blocked_BT)
            return gate_BTG.to(value_BTD.dtype).unsqueeze(-1) * value_BTD.unsqueeze(2)
        if blocked_BT is not None:
            value_BTD = value_BTD.masked_fill(blocked_BT.unsqueeze(-1), 0.0)
        return value_BTD.unsqueeze(2).expand(-1, -1, self.branches, -1)

    def _gates(self, key_BTGD: Tensor | None, hidden_BTGD: Tensor, blocked_BT: Tensor | None) -> Tensor:
        ones = hidden_BTGD.shape[:3]
        gate_BTG = hidden_BTGD.new_ones(ones) if key_BTGD is None else self._opened(key_BTGD, hidden_BTGD)
        return gate_BTG if blocked_BT is None else gate_BTG.masked_fill(blocked_BT.unsqueeze(-1), 0.0)

    def _opened(self, key_BTGD: Tensor, hidden_BTGD: Tensor) -> Tensor:
        # Neither norm is written out: each is one number per branch, and the gains meet in their product.
        eps = torch.finfo(hidden_BTGD.dtype).eps if self.gate_eps is None else self.gate_eps
        hidden, key = _at_least_float32(hidden_BTGD), _at_least_float32(key_BTGD)
        dot_BTG = torch.linalg.vecdot(hidden * (self.query_gain * self.key_gain), key)
        score_BTG = dot_BTG * _inverse_rms(hidden, eps) * _inverse_rms(key, eps) * self.width**-0.5
        return torch.sigmoid(GATES[self.gate](score_BTG))

    def _short_conv(self, gated_BTGD: Tensor, start_BT: Tensor | None, state: ConvPast | None) -> Tensor:
        wide = _at_least_float32(gated_BTGD)
        normed_BTGD = (wide * _inverse_rms(wide, self.conv_eps).unsqueeze(-1)).to(gated_BTGD.dtype)
        past = (self.kernel - 1) * self.dilation
        heard = F.pad(normed_BTGD, (0, 0, 0, 0, past, 0)) if state is None else state.extend(normed_BTGD, start_BT)
        # per channel both, so the gain may wait for the tap
        taps_KGD = (self.conv_weight * self.conv_gain).to(heard.dtype)
        if start_BT is None:
            return dilated_taps(heard, taps_KGD, self.dilation)
        return taps_within(heard, taps_KGD, self.dilation, start_BT)

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
        return vecs_BTM.to(self.projections()[2].dtype)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Projections N(0, 1 / M), biases and convolution 0, gains 1.

        The value then has the scale of the table's rows, whatever the widths. Only the convolution may start
        at zero: a zero projection on a zero table has no gradient at all. Fused or not, a generator gives the same layer.
        """
        key_weight, key_bias, value_weight, value_bias = self.projections()
        for weight, bias in ((key_weight, key_bias), (value_weight, value_bias)):
            if weight is not None:
                weight.normal_(std=self.memory_width**-0.5, generator=generator)
            if bias is not None:
                bias.zero_()
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
        bias = key_width + self.width if self.projections()[3] is not None else 0
        gate = (4 + 4 + 2 + 1) * key_width  # two norms, a dot product, gate x value
        conv = (4 + 2 * self.kernel + 4 + 1) * branch_width if self.conv else 0  # norm, taps, silu, sum
        parameters = sum(p.numel() for p in self.parameters())
        return {"parameters": parameters, "flops_per_token": proj + bias + gate + conv}

    def extra_repr(self) -> str:
        conv = f"kernel={self.kernel}, dilation={self.dilation}" if self.conv else "conv=False"
        widths = f"memory_width={self.memory_width}, width={self.width}, branches={self.branches}"
        return f"{widths}, gate={self.gate}, {conv}{', fused' if self.fused else ''}"


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

# What each published family makes of the options; docs/math.md has the table with reasons.
FAMILIES: dict[str, dict] = {
    "engram": {},
    "deepseek_v41": {"conv": False, "gate": "copysign", "gate_eps": 1e-20, "fused": True},
    "qwen_ple": {"gate": "sign", "kernel": 4, "dilation": 3, "gate_eps": 1e-6, "conv_eps": 1e-6, "bias": False},
}
