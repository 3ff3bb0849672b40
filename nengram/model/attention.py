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

    def forward(self, hidden_BTD: Tensor, cache: KeyValues | None = None) -> Tensor:
        """With a cache, `hidden_BTD` is the next chunk and attends to everything cached before it."""
        B, T, D = hidden_BTD.shape
        past = 0 if cache is None else cache.filled
        q = self.query(hidden_BTD).view(B, T, self.heads, self.head_width).transpose(1, 2)
        k, v = self.key_value(hidden_BTD).view(B, T, 2, self.kv_heads, self.head_width).unbind(2)
        cos, sin = self.rope.rotations(past, T, self.head_width, hidden_BTD)
        q, k, v = rotate(q, cos, sin), rotate(k.transpose(1, 2), cos, sin), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        group = self.heads // self.kv_heads
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        if past == 0 or T == 1:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, scale=self.score_scale)
        else:
            visible = torch.ones(T, past + T, dtype=torch.bool, device=q.device).tril(past)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=self.score_scale)
        return self.out(mixed.transpose(1, 2).reshape(B, T, D))

    def cost(self, context: int) -> Cost:
        """Projections, and scores and mixing over (context + 1) / 2 keys on average."""
        parameters = sum(p.numel() for p in self.parameters())
        return Cost(active=parameters, flops=2 * parameters + 2 * self.heads * self.head_width * (context + 1))
