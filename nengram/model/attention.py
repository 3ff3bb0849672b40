"""Causal grouped-query attention with rotary positions, through torch's fused kernel.

Query heads share key/value heads in groups, which shrinks the KV cache (Ainslie et al., 2305.13245). Shared heads are repeated
before the kernel: on the CPU the fused kernel has no grouped form, and its unfused fallback costs more than the copy.
Documents packed into one window can see each other, as in most pre-training code; only the memory's look-back stops at a document.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nengram.config import ModelConfig
from nengram.errors import ConfigError
from nengram.model.cost import Cost
from nengram.model.init import Draws, normal_by_fan_in
from nengram.model.rope import Rope, rotate


class KeyValues:
    """The keys and values of one block for B sequences of at most `length` tokens: [B, KV heads, length, head width]."""

    def __init__(self, batch: int, heads: int, length: int, head_width: int, like: Tensor):
        self.keys = like.new_empty(batch, heads, length, head_width)
        self.values = like.new_empty(batch, heads, length, head_width)
        self.filled = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store a chunk [B, KV heads, T, head width] and return everything up to its end. Raises ConfigError when it is full."""
        end = self.filled + keys.shape[2]
        if end > self.keys.shape[2]:
            raise ConfigError(f"the cache holds {self.keys.shape[2]} tokens, {end} are needed: make a longer one")
        self.keys[:, :, self.filled : end] = keys
        self.values[:, :, self.filled : end] = values
        self.filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class View:
    """Where the tokens of a chunk stand and which keys they may see, for batches that are not just texts side by side.

    positions_BT: int64 [B or 1, T], what rotation sees. past: how many keys lie before the chunk. shown: bool, which keys may be seen
    at all (false: padding), [B, keys], or [B, T, keys] by query; keys beyond its end are not seen. None: all of them. A token sees no
    key after it, and itself always, or a row of padding would have no mean to take.
    """

    def __init__(self, positions_BT: Tensor, past: int = 0, shown: Tensor | None = None):
        self.positions_BT, self.past = positions_BT, past
        self.shown = shown.unsqueeze(1) if shown is not None and shown.dim() == 2 else shown
        self._visible: dict[tuple[int, int], Tensor | None] = {}

    def rotations(self, rope: Rope, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B or 1, T, width / 2]."""
        return rope.at(self.positions_BT, width, like)

    def visible(self, length: int, keys: int) -> Tensor | None:
        """Which of `keys` keys each of the chunk's tokens sees, bool [B or 1, 1, T, keys]; None: those up to itself, and no more."""
        if (length, keys) not in self._visible:
            self._visible[length, keys] = self._made(length, keys)
        return self._visible[length, keys]

    def _made(self, length: int, keys: int) -> Tensor | None:
        if self.shown is None and keys == self.past + length and (self.past == 0 or length == 1):
            return None
        own_T = torch.arange(self.past, self.past + length, device=self.positions_BT.device)
        key_S = torch.arange(keys, device=own_T.device)
        visible_TS = key_S <= own_T[:, None]
        if self.shown is None:
            return visible_TS[None, None]
        shown = F.pad(self.shown, (0, max(0, keys - self.shown.shape[2])))[..., :keys]
        return (visible_TS & shown | (key_S == own_T[:, None])).unsqueeze(1)


class Attention(nn.Module):
    """hidden_BTD -> [B, T, D].

    width: D, `heads` times an even head width. kv_heads: divides `heads`; each serves heads / kv_heads query heads in a row.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, rope: Rope | None = None):
        super().__init__()
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, width // heads
        self.query = nn.Linear(width, heads * self.head_width, bias=False)
        self.key_value = nn.Linear(width, 2 * kv_heads * self.head_width, bias=False)
        self.out = nn.Linear(heads * self.head_width, width, bias=False)
        self.rope = rope or Rope()
        self.score_scale = self.rope.sharpening / math.sqrt(self.head_width)

    @classmethod
    def of(cls, config: ModelConfig, rope: Rope) -> "Attention":
        """The layer that a config means."""
        return cls(config.width, config.heads, config.kv_heads, rope)

    def new_cache(self, batch: int, length: int) -> KeyValues:
        """An empty cache for B sequences of at most `length` tokens."""
        return KeyValues(batch, self.kv_heads, length, self.head_width, self.out.weight)

    def init_weights(self, draws: Draws, out_share: float) -> None:
        """N(0, 1 / fan-in); the matrix that writes to the residual stream times `out_share`."""
        normal_by_fan_in(self.query.weight, self.query.in_features, draws, "query")
        normal_by_fan_in(self.key_value.weight, self.key_value.in_features, draws, "key_value")
        normal_by_fan_in(self.out.weight, self.out.in_features, draws, "out", out_share)

    def forward(self, hidden_BTD: Tensor, cache: KeyValues | None = None, view: View | None = None) -> Tensor:
        """With a cache, `hidden_BTD` is the next chunk and attends to everything cached before it, or to what `view` shows of it.

        Beside a view, a cache may hand out more keys than are filled.
        """
        B, T, D = hidden_BTD.shape
        past = 0 if cache is None else cache.filled
        q = self.query(hidden_BTD).view(B, T, self.heads, self.head_width).transpose(1, 2)
        k, v = self.key_value(hidden_BTD).view(B, T, 2, self.kv_heads, self.head_width).unbind(2)
        if view is None:
            cos, sin = self.rope.rotations(past, T, self.head_width, hidden_BTD)
        else:
            cos, sin = (turn.unsqueeze(1) for turn in view.rotations(self.rope, self.head_width, hidden_BTD))
        q, k, v = rotate(q, cos, sin), rotate(k.transpose(1, 2), cos, sin), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        group = self.heads // self.kv_heads
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        visible = _causal(T, past, q.device) if view is None else view.visible(T, k.shape[2])
        is_causal = visible is None and T > 1
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=is_causal, scale=self.score_scale)
        return self.out(mixed.transpose(1, 2).reshape(B, T, D))

    def cost(self, context: int) -> Cost:
        """Projections, and scores and mixing over (context + 1) / 2 keys on average."""
        parameters = sum(p.numel() for p in self.parameters())
        return Cost(active=parameters, flops=2 * parameters + 2 * self.heads * self.head_width * (context + 1))


def _causal(length: int, past: int, device: torch.device) -> Tensor | None:
    """What a chunk behind `past` keys sees, bool [T, past + T]; None where the kernel knows it by itself."""
    if past == 0 or length == 1:
        return None
    return torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)
