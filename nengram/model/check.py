"""Backbone sizes that cannot be built are refused before anything is, in one line that names the fields that disagree."""

from nengram.config import ModelConfig
from nengram.errors import ConfigError, nearest
from nengram.model.latent_attention import ATTENTIONS
from nengram.model.moe import ALIGNMENT


def check_backbone(model: ModelConfig) -> None:
    """Raises ConfigError for a `[model]` that no Transformer can be made from."""
    if model.vocab_size < 1:
        raise ConfigError("model.vocab_size is not set: it comes from the tokenizer, or must be at least 1")
    _at_least(model, 1, "width", "blocks", "heads", "kv_heads", "context", "streams")
    _at_least(model, 0, "dense_blocks", "dense_width", "head_width", "rope_width", "kv_rank", "query_rank")
    _aligned(model, "width")
    _check_attention(model)
    _check_feed_forward(model)
    _check_rope(model)


def _check_attention(model: ModelConfig) -> None:
    if model.attention not in ATTENTIONS:
        raise ConfigError(
            f'model.attention "{model.attention}" is unknown{nearest(model.attention, ATTENTIONS)}; '
            f"attentions: {', '.join(ATTENTIONS)}"
        )
    if model.attention == "mla":
        return _check_latent(model)
    for name in ("head_width", "rope_width", "kv_rank", "query_rank"):
        if given := getattr(model, name):
            raise ConfigError(f'model.{name} {given} is of model.attention "mla", which is "{model.attention}"')
    if model.width % model.heads or (model.width // model.heads) % 2:
        raise ConfigError(f"model.width {model.width} must be model.heads ({model.heads}) times an even head width")
    if model.heads % model.kv_heads:
        raise ConfigError(f"model.heads {model.heads} must be a multiple of model.kv_heads ({model.kv_heads})")


def _check_latent(model: ModelConfig) -> None:
    if model.kv_rank < 1:
        raise ConfigError(f'model.attention "mla" needs model.kv_rank of at least 1, got {model.kv_rank}')
    if model.rope_width < 2 or model.rope_width % 2:
        raise ConfigError(f'model.attention "mla" needs an even model.rope_width, at least 2, got {model.rope_width}')
    if not model.head_width and model.width % model.heads:
        raise ConfigError(
            f"model.width {model.width} is no multiple of model.heads ({model.heads}): set model.head_width"
        )


def _check_feed_forward(model: ModelConfig) -> None:
    if model.dense_blocks > model.blocks:
        raise ConfigError(f"model.dense_blocks {model.dense_blocks} must lie in 0..{model.blocks} (model.blocks)")
    if bool(model.dense_blocks) != bool(model.dense_width):
        raise ConfigError(
            f"model.dense_blocks {model.dense_blocks} and model.dense_width {model.dense_width}: set both or none"
        )
    if model.dense_blocks == model.blocks:
        return
    _at_least(model, 1, "expert_width", "shared_width")
    _aligned(model, "expert_width")
    if not 1 <= model.experts_per_token <= model.experts:
        raise ConfigError(
            f"model.experts_per_token {model.experts_per_token} must lie in 1..{model.experts} (model.experts)"
        )
    if model.routed_scale <= 0:
        raise ConfigError(f"model.routed_scale must be above 0, got {model.routed_scale:g}")


def _check_rope(model: ModelConfig) -> None:
    if model.rope_scale < 1:
        raise ConfigError(f"model.rope_scale must be at least 1, got {model.rope_scale:g}")
    if model.rope_scale == 1:
        return
    if model.rope_original_context < 1:
        raise ConfigError(
            f"model.rope_scale {model.rope_scale:g} needs model.rope_original_context: the positions trained on before"
        )
    if not 0 < model.rope_alpha < model.rope_beta:
        raise ConfigError(
            f"model.rope_alpha {model.rope_alpha:g} must be above 0 and below model.rope_beta ({model.rope_beta:g})"
        )


def _at_least(model: ModelConfig, least: int, *names: str) -> None:
    for name in names:
        if (given := getattr(model, name)) < least:
            raise ConfigError(f"model.{name} must be at least {least}, got {given}")


def _aligned(model: ModelConfig, name: str) -> None:
    if (given := getattr(model, name)) % ALIGNMENT:
        raise ConfigError(f"model.{name} must be a multiple of {ALIGNMENT}, got {given}")
