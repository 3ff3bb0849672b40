"""Multi-head latent attention: what is cached is what all heads share (DeepSeek-V2, 2405.04434, section 2.1).

A token leaves behind one short vector, the latent c = RMSNorm(W_down h), and one rotated key r that all heads use; keys and values of
head i are made from c, so a position costs kv_rank + rope_width numbers in the cache, whatever the number of heads:

    k_i = [W_k,i c, r]     v_i = W_v,i c     q_i = [content, rotated]     scores q_i . k_i / sqrt(head_width + rope_width)

Rotation is kept apart from content because it does not commute with W_k. Where it is not in the way, W_k moves to the other side of
the product: q_i . W_k,i c = (W_k,i^T q_i) . c. That is the absorbed form: all heads attend to the cached vectors as they are, and W_v
is applied once to each head's mix of latents. It does (kv_rank / head_width) times more arithmetic a pair of positions and no
expansion, so whole sequences are expanded and chunks that follow a cache are absorbed.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nengram.config import ModelConfig
from nengram.errors import ConfigError
from nengram.model.attention import Attention, View
from nengram.model.cost import Cost
from nengram.model.init import Draws, normal_by_fan_in
from nengram.model.rope import Rope, rotate


class Latents:
    """What one block remembers of B sequences of at most `length` tokens: latent and rotated key side by side, [B, length, R + P]."""

    def __init__(self, batch: int, length: int, kv_rank: int, rope_width: int, like: Tensor):
        self.both = like.new_empty(batch, length, kv_rank + rope_width)
        self.kv_rank, self.filled = kv_rank, 0

    def append(self, latent_BTR: Tensor, key_BTP: Tensor) -> Tensor:
        """Store a chunk and return everything up to its end. Raises ConfigError when it is full."""
        end = self.filled + latent_BTR.shape[1]
        if end > self.both.shape[1]:
            raise ConfigError(f"the cache holds {self.both.shape[1]} tokens, {end} are needed: make a longer one")
        self.both[:, self.filled : end, : self.kv_rank] = latent_BTR
        self.both[:, self.filled : end, self.kv_rank :] = key_BTP
        self.filled = end
        return self.both[:, :end]


class LatentAttention(nn.Module):
    """hidden_BTD -> [B, T, D].

    head_width: of the content part of queries and keys, and of values. rope_width: of the rotated part (even). kv_rank: R, of the
    latent. query_rank: queries are made from a normed latent of this width; 0: straight from the hidden state.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        rope_width: int,
        kv_rank: int,
        *,
        query_rank: int = 0,
        norm_eps: float = 1e-6,
        rope: Rope | None = None,
    ):
        super().__init__()
        self.heads, self.head_width, self.rope_width, self.kv_rank = heads, head_width, rope_width, kv_rank
        self.rope = rope or Rope()
        self.score_scale = self.rope.sharpening / math.sqrt(head_width + rope_width)
        self.query_down = nn.Linear(width, query_rank, bias=False) if query_rank else None
        self.query_norm = nn.RMSNorm(query_rank, eps=norm_eps) if query_rank else None
        self.query = nn.Linear(query_rank or width, heads * (head_width + rope_width), bias=False)
        self.down = nn.Linear(width, kv_rank + rope_width, bias=False)
        self.latent_norm = nn.RMSNorm(kv_rank, eps=norm_eps)
        self.key_value = nn.Linear(kv_rank, heads * 2 * head_width, bias=False)  # per head: its key, then its value
        self.out = nn.Linear(heads * head_width, width, bias=False)

    @classmethod
    def of(cls, config: ModelConfig, rope: Rope) -> "LatentAttention":
        """The layer that a config means."""
        return cls(
            config.width,
            config.heads,
            config.head_width or config.width // config.heads,
            config.rope_width,
            config.kv_rank,
            query_rank=config.query_rank,
            norm_eps=config.norm_eps,
            rope=rope,
        )

    def init_weights(self, draws: Draws, out_share: float) -> None:
        """N(0, 1 / fan-in), gains 1; the matrix that writes to the residual stream times `out_share`."""
        for name, linear in self.named_children():
            if isinstance(linear, nn.Linear):
                share = out_share if name == "out" else 1.0
                normal_by_fan_in(linear.weight, linear.in_features, draws, name, share)
            elif linear is not None:
                nn.init.ones_(linear.weight)

    def new_cache(self, batch: int, length: int) -> Latents:
        """An empty cache for B sequences of at most `length` tokens."""
        return Latents(batch, length, self.kv_rank, self.rope_width, self.out.weight)

    def forward(self, hidden_BTD: Tensor, cache: Latents | None = None, view: View | None = None) -> Tensor:
        """With a cache, `hidden_BTD` is the next chunk and attends to everything cached before it, or to what `view` shows of it.

        Beside a view, a cache may hand out more latents than are filled.
        """
        T, past = hidden_BTD.shape[1], 0 if cache is None else cache.filled
        if view is None:
            cos, sin = self.rope.rotations(past, T, self.rope_width, hidden_BTD)
        else:
            cos, sin = view.rotations(self.rope, self.rope_width, hidden_BTD)
        content_BHTW, turned_BHTP = self._queries(hidden_BTD, cos, sin)
        latent_BTR, key_BTP = self.down(hidden_BTD).split((self.kv_rank, self.rope_width), dim=-1)
        latent_BTR, key_BTP = self.latent_norm(latent_BTR), rotate(key_BTP, cos, sin)
        cached = None if cache is None else cache.append(latent_BTR, key_BTP)
        if past:
            mixed_BHTW = self._absorbed(content_BHTW, turned_BHTP, cached, view)
        else:
            mixed_BHTW = self._expanded(content_BHTW, turned_BHTP, latent_BTR, key_BTP, view)
        return self.out(mixed_BHTW.transpose(1, 2).flatten(2))

    def _queries(self, hidden_BTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        read = hidden_BTD if self.query_down is None else self.query_norm(self.query_down(hidden_BTD))
        q_BHTQ = self.query(read).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        content_BHTW, turned_BHTP = q_BHTQ.split((self.head_width, self.rope_width), dim=-1)
        return content_BHTW, rotate(turned_BHTP, cos.unsqueeze(-3), sin.unsqueeze(-3))

    def _expanded(
        self, content_BHTW: Tensor, turned_BHTP: Tensor, latent_BTR: Tensor, key_BTP: Tensor, view: View | None
    ) -> Tensor:
        """Every head's own keys and values, through the fused kernel."""
        k, v = self.key_value(latent_BTR).unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(2, dim=-1)
        k = torch.cat((k, key_BTP.unsqueeze(1).expand(-1, self.heads, -1, -1)), dim=-1)
        q = torch.cat((content_BHTW, turned_BHTP), dim=-1)
        v = F.pad(v, (0, self.rope_width))  # the kernel wants one width for all
        visible = None if view is None else view.visible(q.shape[2], k.shape[2])
        is_causal = visible is None and q.shape[2] > 1
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=is_causal, scale=self.score_scale)
        return mixed[..., : self.head_width]

    def _absorbed(self, content_BHTW: Tensor, turned_BHTP: Tensor, cached_BSC: Tensor, view: View | None) -> Tensor:
        """All heads over the cached vectors, the heads laid out as further positions of one sequence."""
        to_key_HWR, to_value_HWR = self.key_value.weight.unflatten(0, (self.heads, 2, -1)).unbind(1)
        q_BHTC = torch.cat((content_BHTW @ to_key_HWR, turned_BHTP), dim=-1)
        (T, S), H = (q_BHTC.shape[2], cached_BSC.shape[1]), self.heads
        scores = (q_BHTC.flatten(1, 2) @ cached_BSC.transpose(1, 2) * self.score_scale).unflatten(1, (H, T))
        visible = None if view is None else view.visible(T, S)
        hidden = (
            torch.ones(T, S, dtype=torch.bool, device=scores.device).triu(S - T + 1) if visible is None else ~visible
        )
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        latents_BHTR = (weights.flatten(1, 2) @ cached_BSC[..., : self.kv_rank]).unflatten(1, (H, T))
        return latents_BHTR @ to_value_HWR.transpose(1, 2)

    def cost(self, context: int) -> Cost:
        """Projections in the expanded form, and scores and mixing over (context + 1) / 2 keys on average. Norms are parameters only."""
        parameters = sum(p.numel() for p in self.parameters())
        multiplied = sum(p.numel() for p in self.parameters() if p.ndim == 2)
        pair = self.heads * (2 * self.head_width + self.rope_width)
        return Cost(active=parameters, flops=2 * multiplied + pair * (context + 1))


ATTENTIONS = {"gqa": Attention, "mla": LatentAttention}
