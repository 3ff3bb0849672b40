"""Small random models of many families, and memories strong enough that a lost look-back changes what they say."""

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from nengram.hf import graft

V = 96
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ATTENTION = SIZES | {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
CONFIGS = {
    "llama": lambda: LlamaConfig(**ATTENTION),
    "qwen2": lambda: Qwen2Config(**ATTENTION),
    "qwen3": lambda: Qwen3Config(**ATTENTION, head_dim=16),
    "mistral": lambda: MistralConfig(**ATTENTION, sliding_window=8),
    "gemma2": lambda: Gemma2Config(**ATTENTION, head_dim=16, sliding_window=8),
    "gemma3": lambda: Gemma3TextConfig(**ATTENTION, head_dim=16, sliding_window=8),
    "gpt2": lambda: GPT2Config(
        vocab_size=V, n_embd=32, n_layer=3, n_head=2, n_positions=128, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **ATTENTION | {"num_key_value_heads": 2}, **LATENT, **EXPERTS, first_k_dense_replace=1
    ),
    "mamba": lambda: MambaConfig(**SIZES, state_size=4, intermediate_size=64),
    "mamba2": lambda: Mamba2Config(**SIZES, state_size=4, num_heads=8, head_dim=8, n_groups=1, chunk_size=4),
}
FAMILIES = sorted(CONFIGS)
MEMORY = {"blocks": (1, 2), "rows_per_head": (500, 700), "heads": 2, "row_width": 8, "compress": False}


def model_of(family: str, seed: int = 0) -> PreTrainedModel:
    """A model whose random weights are spread widely enough for its words to depend on its input."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    spread = 1.0 if family == "mamba" else 4.0  # its products of weights grow too large for a memory to be heard
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(spread)
    return model


def strong(model: nn.Module, std: float = 1.0, **sizes):
    """Graft a memory whose rows and convolution were drawn instead of learned; returns the graft."""
    memory = graft(model, **MEMORY | sizes)
    draws = torch.Generator().manual_seed(0)
    for store in memory.adapter().stores.values():
        store.weight.normal_(std=std, generator=draws)
    with torch.no_grad():
        for layer in memory.layers().values():
            if getattr(layer, "conv", False):
                layer.conv_weight.normal_(std=0.5, generator=draws)
    return memory


def some_ids(batch: int = 2, length: int = 20, seed: int = 0) -> Tensor:
    """Token ids without special ones."""
    return torch.randint(3, V, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: nn.Module, ids_BT: Tensor, **how) -> Tensor:
    """The logits of a whole pass, without a cache."""
    return model(ids_BT, use_cache=False, **how).logits


@torch.no_grad()
def greedy_by_whole_passes(model: nn.Module, ids_BT: Tensor, tokens: int) -> Tensor:
    """What greedy generation has to give: every token by a pass over all that came before it."""
    for _ in range(tokens):
        ids_BT = torch.cat([ids_BT, logits_of(model, ids_BT)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids_BT
