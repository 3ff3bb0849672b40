"""Our model's sizes as a transformers config: the two sections of our own page, and the numbers that rows are addressed by.

    config.json
    ├── backbone       `[model]` of a run, every size written out
    ├── memory         `[memory]` of a run
    ├── address_spec   the AddressSpec as numbers: what a table's rows mean, never derived again from a seed
    └── compression    digests of the compression map (whose numbers lie with the weights) and of its tokenizer

What transformers and its servers call otherwise (`hidden_size`, `num_hidden_layers`, ...) are views of `backbone`.
"""

import json
from typing import Any

from transformers import PreTrainedConfig

from nengram.address import AddressSpec
from nengram.config import Config, MemoryConfig, ModelConfig, as_dict
from nengram.errors import ConfigError


class NengramConfig(PreTrainedConfig):
    """What `NengramForCausalLM` is built from.

    backbone, memory: keys of `nengram.config.ModelConfig` and `MemoryConfig`; what is left out has their defaults.
    address_spec: `AddressSpec.to_json()`, as text or parsed; None: the one that `memory` means.
    compression: `{"digest", "tokenizer_digest"}` of the compression map; None: raw ids.
    doc_token_id: the token that separates documents: n-grams begin anew wherever it stands; None: nowhere.
    Raises: ConfigError for unknown keys (nearest named) and wrong types, AddressError for a damaged spec.
    """

    model_type = "nengram"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        memory: dict[str, Any] | None = None,
        address_spec: str | dict[str, Any] | None = None,
        compression: dict[str, str] | None = None,
        doc_token_id: int | None = None,
        use_cache: bool = True,
        **others: Any,
    ):
        self.backbone, self.memory = map(as_dict, _sections(backbone or {}, memory or {}))
        if isinstance(address_spec, dict):
            address_spec = json.dumps(address_spec)
        self.address_spec = None if address_spec is None else json.loads(AddressSpec.from_json(address_spec).to_json())
        self.compression, self.doc_token_id, self.use_cache = compression, doc_token_id, use_cache
        super().__init__(**{"tie_word_embeddings": True} | others)

    def sections(self) -> tuple[ModelConfig, MemoryConfig]:
        """The two sections as our own classes."""
        return _sections(self.backbone, self.memory)

    @property
    def spec(self) -> AddressSpec | None:
        """The address spec, if it was saved."""
        return None if self.address_spec is None else AddressSpec.from_json(json.dumps(self.address_spec))

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.backbone["vocab_size"]

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.backbone["width"]

    @property
    def num_hidden_layers(self) -> int:
        """Blocks."""
        return self.backbone["blocks"]

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""
        return self.backbone["heads"]

    @property
    def num_key_value_heads(self) -> int:
        """Heads of the cache: one where latents are cached."""
        return 1 if self.is_latent else self.backbone["kv_heads"]

    @property
    def head_dim(self) -> int:
        """Numbers of one cached key."""
        if self.is_latent:
            return self.backbone["kv_rank"] + self.backbone["rope_width"]
        return self.backbone["width"] // self.backbone["heads"]

    @property
    def qk_head_dim(self) -> int | None:
        """As `head_dim` where cached keys and values differ in width, which keeps caches from guessing; else None."""
        return self.head_dim if self.is_latent else None

    @property
    def is_latent(self) -> bool:
        """Whether latents are cached in the place of keys and values."""
        return self.backbone["attention"] == "mla"

    @property
    def max_position_embeddings(self) -> int:
        """Positions seen in training."""
        return self.backbone["context"]


def _sections(backbone: dict[str, Any], memory: dict[str, Any]) -> tuple[ModelConfig, MemoryConfig]:
    keys = {f"model__{key}": value for key, value in backbone.items()}
    keys |= {f"memory__{key}": value for key, value in memory.items()}
    try:
        config = Config().replace(**keys)
    except ConfigError as error:
        raise ConfigError(f"config of a nengram model{str(error).removeprefix('replace')}") from None
    return config.model, config.memory
