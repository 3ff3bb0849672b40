"""Our attentions on vLLM's paged cache: the same projections and rotations, its kernels between them.

Every token of a flat row is a sequence of one, hidden_BTD [T, 1, D]; who may see whom is vLLM's to know. Latent attention is
served in its absorbed form, as one head of keys that are their own values: the cache then holds each latent twice, and any kernel
will do.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention as VllmAttention

from nengram.model.attention import Attention, View
from nengram.model.latent_attention import LatentAttention
from nengram.model.rope import rotate

HEAD_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # what all of vLLM's kernels have


class Paged(nn.Module):
    """vLLM's attention for heads of any width: zeros make up the difference to the next one that its kernels have."""

    def __init__(self, heads: int, kv_heads: int, head_width: int, scale: float, config: VllmConfig, name: str) -> None:
        super().__init__()
        self.heads, self.head_width = heads, head_width
        self.padding = next((width for width in HEAD_WIDTHS if width >= head_width), head_width) - head_width
        self.attend = VllmAttention(
            heads,
            head_width + self.padding,
            scale,
            num_kv_heads=kv_heads,
            cache_config=config.cache_config,
            prefix=name,
        )

    def forward(self, q_THW: Tensor, k_TKW: Tensor, v_TKW: Tensor) -> Tensor:
        """What every head mixes, [T, heads, head width]."""
        q, k, v = (F.pad(x, (0, self.padding)).flatten(1) for x in (q_THW, k_TKW, v_TKW))
        return self.attend(q, k, v).unflatten(1, (self.heads, -1))[..., : self.head_width]


class PagedAttention(nn.Module):
    """Grouped-query attention in the place of `own`, whose weights it uses."""

    def __init__(self, own: Attention, config: VllmConfig, name: str) -> None:
        super().__init__()
        self.own = own
        self.paged = Paged(own.heads, own.kv_heads, own.head_width, own.score_scale, config, name)

    def forward(self, hidden_BTD: Tensor, cache: None = None, view: View | None = None) -> Tensor:
        """hidden_BTD [T, 1, D] -> the same; `view` has the positions."""
        own, T = self.own, len(hidden_BTD)
        q_THW = own.query(hidden_BTD).view(T, own.heads, own.head_width)
        k_TKW, v_TKW = own.key_value(hidden_BTD).view(T, 2, own.kv_heads, own.head_width).unbind(1)
        cos, sin = view.rotations(own.rope, own.head_width, hidden_BTD)
        mixed_THW = self.paged(rotate(q_THW, cos, sin), rotate(k_TKW, cos, sin), v_TKW)
        return own.out(mixed_THW.reshape(T, 1, -1))


class PagedLatents(nn.Module):
    """Latent attention in the place of `own`, absorbed: all heads over latent and rotated key as one head of the cache."""

    def __init__(self, own: LatentAttention, config: VllmConfig, name: str) -> None:
        super().__init__()
        self.own = own
        self.paged = Paged(own.heads, 1, own.kv_rank + own.rope_width, own.score_scale, config, name)

    def forward(self, hidden_BTD: Tensor, cache: None = None, view: View | None = None) -> Tensor:
        """hidden_BTD [T, 1, D] -> the same; `view` has the positions."""
        own = self.own
        cos, sin = view.rotations(own.rope, own.rope_width, hidden_BTD)
        content_BHTW, turned_BHTP = own._queries(hidden_BTD, cos, sin)
        latent_BTR, key_BTP = own.down(hidden_BTD).split((own.kv_rank, own.rope_width), dim=-1)
        both_BTC = torch.cat((own.latent_norm(latent_BTR), rotate(key_BTP, cos, sin)), dim=-1)
        to_key_HWR, to_value_HWR = own.key_value.weight.unflatten(0, (own.heads, 2, -1)).unbind(1)
        q_BHTC = torch.cat((content_BHTW @ to_key_HWR, turned_BHTP), dim=-1)
        mixed_BHTR = self.paged(q_BHTC[:, :, 0], both_BTC, both_BTC)[..., : own.kv_rank].unsqueeze(2)
        return own.out((mixed_BHTR @ to_value_HWR.transpose(1, 2)).transpose(1, 2).flatten(2))


PAGED = {Attention: PagedAttention, LatentAttention: PagedLatents}
