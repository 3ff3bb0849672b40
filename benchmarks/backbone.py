"""What does the paper's backbone cost to train here? Against transformers' DeepSeek-V3, and with four residual streams against one.

Latent attention and experts, one leading dense block, a plain residual: the same shapes and weights in both, one loss, forward and
backward, gradients made anew as after `zero_grad(set_to_none=True)`; no optimiser, which would be the same. transformers has several
ways to run its experts; every one that the CPU has is timed briefly, and the fastest is the opponent. Its experts are stored
as [X, out, in], ours as [X, in, out], each as its grouped product likes it. The second figure is ours against ours: hyper-connections
with `streams` residual streams, attention and experts being the same.
"""

import dataclasses
import importlib.util
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.gates import require_all_close, require_close
from benchmarks.measure import Timings, interleave
from benchmarks.report import figure, result
from nengram.config import MemoryConfig, ModelConfig
from nengram.model import Transformer
from nengram.model.hyper import HyperConnection

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
MODEL = ModelConfig(
    vocab_size=2048,
    width=256,
    blocks=3,
    heads=8,
    context=128,
    experts=32,
    experts_per_token=2,
    expert_width=128,
    shared_width=128,
    attention="mla",
    head_width=32,
    rope_width=16,
    kv_rank=64,
    dense_blocks=1,
    dense_width=384,
)


@dataclass(frozen=True)
class Sizes:
    """A step of 512 tokens takes about an eighth of a second, so that all pairs take less than a minute."""

    model: ModelConfig = MODEL
    batch: int = 4
    streams: int = 4
    pairs: int = 20
    trial_pairs: int = 3  # to find the fastest of transformers' ways


FULL = Sizes()


def run(sizes: Sizes = FULL) -> dict:
    """The result of this benchmark; without transformers, what the streams cost only. Raises RedGate."""
    given = random_batch(sizes)
    tokens = given[0].numel()
    plain, wide = built(sizes.model, 1), built(sizes.model, sizes.streams)
    check_start(plain, wide, given[0])
    figures, absolute = [], {}
    gate = "the wide model without its token part gives the plain model's logits"
    if importlib.util.find_spec("transformers") is None:
        gate += "; transformers is not installed"
    else:
        tried = {name: against_transformers(plain, given, name, sizes.trial_pairs) for name in IMPLEMENTATIONS}
        fastest = min(tried, key=lambda name: np.median(tried[name].theirs_s))
        timed = against_transformers(plain, given, fastest, sizes.pairs)
        name = f"transformers ({fastest}, its fastest) / nengram, training step"
        figures.append(figure(name, timed.speedup, "x", (">=", 1.0)))
        absolute |= {f"transformers_{name}_tokens_per_s": tokens / np.median(t.theirs_s) for name, t in tried.items()}
        absolute[f"transformers_{fastest}_tokens_per_s"] = tokens / np.median(timed.theirs_s)
        absolute["nengram_tokens_per_s"] = tokens / np.median(timed.ours_s)
        gate = f"loss and all gradients are those of transformers, for {', '.join(IMPLEMENTATIONS)}; {gate}"
    timings = interleave(lambda given: step(wide, given), lambda given: step(plain, given), lambda: given, sizes.pairs)
    figures.append(figure(f"{sizes.streams} residual streams / one, training step", timings.cost, "x", ("<=", 1.5)))
    absolute["streams_tokens_per_s"] = tokens / np.median(timings.ours_s)
    what = (
        f"MLA + MoE, {sizes.model.blocks} blocks of width {sizes.model.width}, forward + backward of {tokens:,} tokens"
    )
    return result("backbone", what, gate, figures, absolute)


def random_batch(sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and the ids that follow them, int64 [B, T]."""
    shape = (sizes.batch, sizes.model.context + 1)
    ids_BT = torch.randint(0, sizes.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous()


def built(config: ModelConfig, streams: int) -> Transformer:
    """A model in training, with fresh weights."""
    model = Transformer(dataclasses.replace(config, streams=streams), MemoryConfig())
    model.init_weights(0)
    return model.train()


def step(model: nn.Module, given: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The loss of one batch, after a pass in each direction; gradients start from nothing."""
    ids_BT, targets_BT = given
    model.zero_grad(set_to_none=True)
    found = model(ids_BT)
    logits_BTV = found if isinstance(found, torch.Tensor) else found.logits
    loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
    loss.backward()
    return loss.detach()


def check_start(plain: Transformer, wide: Transformer, ids_BT: torch.Tensor, tolerance: float = 1e-3) -> None:
    """A fresh model of several streams is the plain one as long as its maps do not look at the token. Raises RedGate."""
    units = [module for module in wide.modules() if isinstance(module, HyperConnection)]
    with torch.no_grad():
        kept = [unit.token_share.clone() for unit in units]
        for unit in units:
            unit.token_share.zero_()
        require_close("logits of several streams", wide(ids_BT), plain(ids_BT), tolerance)
        for unit, share in zip(units, kept, strict=True):
            unit.token_share.copy_(share)


def against_transformers(
    plain: Transformer, given: tuple[torch.Tensor, torch.Tensor], implementation: str, pairs: int
) -> Timings:
    """Timings of a step of ours and of transformers' with the same weights, after both gave the same. Raises RedGate."""
    theirs = as_transformers(plain, implementation)
    found, expected = ({"loss": step(model, given)} for model in (plain, theirs))
    found |= renamed({name: p.grad for name, p in plain.named_parameters()}, plain.config)
    expected |= {name: p.grad for name, p in theirs.named_parameters()}
    require_all_close(f"backbone ({implementation})", found, expected, 1e-3)
    return interleave(
        lambda given: step(plain, given), lambda given: step(theirs, given), lambda: given, pairs, warmup=1
    )


def as_transformers(plain: Transformer, implementation: str) -> nn.Module:
    """transformers' model of the same shapes, with the same weights."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    model = plain.config
    config = DeepseekV3Config(
        vocab_size=model.vocab_size,
        hidden_size=model.width,
        intermediate_size=model.dense_width,
        moe_intermediate_size=model.expert_width,
        num_hidden_layers=model.blocks,
        num_attention_heads=model.heads,
        num_key_value_heads=model.heads,
        n_shared_experts=model.shared_width // model.expert_width,
        n_routed_experts=model.experts,
        num_experts_per_tok=model.experts_per_token,
        routed_scaling_factor=model.routed_scale,
        n_group=1,
        topk_group=1,
        kv_lora_rank=model.kv_rank,
        q_lora_rank=None,
        qk_rope_head_dim=model.rope_width,
        qk_nope_head_dim=model.head_width,
        v_head_dim=model.head_width,
        first_k_dense_replace=model.dense_blocks,
        rms_norm_eps=model.norm_eps,
        rope_interleave=False,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    theirs = DeepseekV3ForCausalLM(config).float().train()
    theirs.set_experts_implementation(implementation)
    with torch.no_grad():
        for name, tensor in renamed(dict(plain.named_parameters()), model).items():
            theirs.get_parameter(name).copy_(tensor)
    return theirs


def renamed(tensors: dict[str, torch.Tensor], model: ModelConfig) -> dict[str, torch.Tensor]:
    """Our parameters, or their gradients, under transformers' names and in its shapes."""
    found = {"model.embed_tokens.weight": tensors["embed.weight"], "model.norm.weight": tensors["norm.weight"]}
    for index in range(model.blocks):
        ours, theirs = f"blocks.{index}", f"model.layers.{index}"
        for mine, other in NAMES.items():
            found[f"{theirs}.{other}"] = tensors[f"{ours}.{mine}"]
        if index < model.dense_blocks:
            found |= swiglu(tensors, f"{ours}.dense", f"{theirs}.mlp")
            continue
        found[f"{theirs}.mlp.gate.weight"] = tensors[f"{ours}.moe.router.weight"]
        found[f"{theirs}.mlp.experts.gate_up_proj"] = tensors[f"{ours}.moe.gate_up_XDF"].transpose(1, 2)
        found[f"{theirs}.mlp.experts.down_proj"] = tensors[f"{ours}.moe.down_XFD"].transpose(1, 2)
        found |= swiglu(tensors, f"{ours}.moe.shared", f"{theirs}.mlp.shared_experts")
    return found


def swiglu(tensors: dict[str, torch.Tensor], mine: str, other: str) -> dict[str, torch.Tensor]:
    """Three matrices of two."""
    gate, up = tensors[f"{mine}.gate_up.weight"].chunk(2)
    down = tensors[f"{mine}.down.weight"]
    return {f"{other}.gate_proj.weight": gate, f"{other}.up_proj.weight": up, f"{other}.down_proj.weight": down}


NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "moe_norm.weight": "post_attention_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.down.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.latent_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attention.key_value.weight": "self_attn.kv_b_proj.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
}
