"""Our model as transformers sees it: the same modules and numbers, behind the calls that its generation, Trainer and servers make.

    input_ids, mask, cache ─▶ Lookback.begin ─▶ MemoryStep ─▶ Transformer.hidden(step, view, cache) ─▶ logits, loss

Nothing is computed here. Keys and values go to transformers' Cache through two small adapters (latents as one head of keys without
values); the past of the memory goes there through `nengram.hf.lookback`; padding and positions become a `View`. A table is no
Parameter: `to(dtype)`, `device_map` and `state_dict()` never see it. It lies in `stack.stores`, on the tier that it was opened on.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from nengram.address import Addresser
from nengram.errors import ConfigError
from nengram.hf.batch import check_history, check_inputs, view_of
from nengram.hf.configuration import NengramConfig
from nengram.hf.documents import Documents
from nengram.hf.hooks import can_learn
from nengram.hf.lookback import Lookback
from nengram.hf.notices import tables_stand_still, weights_came
from nengram.hf.pretrained import TablesBeside
from nengram.memory import MemoryStep
from nengram.model import Transformer
from nengram.model.memories import row_control

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"  # its name, by version


class CachedKeys:
    """What one block's grouped-query attention appends to, inside transformers' cache."""

    def __init__(self, cache: Cache, block: int, filled: int):
        self.cache, self.block, self.filled = cache, block, filled

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store a chunk [B, KV heads, T, head width]; all that the cache holds, in a static one empty places too."""
        return self.cache.update(keys, values, self.block)


class CachedLatents(CachedKeys):
    """The same for latent attention: a latent and its rotated key are one key of one head, and there are no values."""

    def append(self, latent_BTR: Tensor, key_BTP: Tensor) -> Tensor:
        """Store a chunk; all that the cache holds, [B, keys, R + P]."""
        both_BHTC = torch.cat((latent_BTR, key_BTP), dim=-1).unsqueeze(1)
        return self.cache.update(both_BHTC, both_BHTC[..., :0], self.block)[0][:, 0]


class BlockPast(NamedTuple):
    """Of one block: what attention appends to, and the state of the memory's convolution."""

    attention: CachedKeys
    memory: Any


class Past(NamedTuple):
    """Of all blocks, as `Transformer.hidden` takes it."""

    blocks: list[BlockPast]


class NengramPreTrainedModel(TablesBeside, PreTrainedModel):
    """What both classes share: weights, tables, and what of transformers applies."""

    config_class = NengramConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing, module by module: a fresh model is drawn as a whole, as ours are, and one that is loaded lacks nothing."""

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        """As torch's. Warns where tables have learned since: the weights may be older than they are."""
        weights_came(getattr(self.base_model, "learner", None))
        return super().load_state_dict(*arguments, **options)

    def resize_token_embeddings(self, *arguments: Any, **options: Any):
        """Not offered: raises ConfigError."""
        raise ConfigError("the vocabulary decides which rows an n-gram reads: it cannot be resized under a table")


class NengramModel(NengramPreTrainedModel):
    """ids in, hidden states out.

    stack: our `Transformer`, weights, map and tables with it; None: one that the config means, fresh, of raw ids.
    cids_V: the compression map, saved with the weights. learner: whoever updates the tables, and is handed the memory steps of
    training forwards; None: tables are read only. table_files: where tables that lie in files were opened.
    """

    def __init__(self, config: NengramConfig, stack: Transformer | None = None):
        super().__init__(config)
        self.stack = Transformer(*config.sections()) if stack is None else stack
        if self.stack.spec is not None:
            if stack is None and config.spec is not None:
                self.stack.addresser = Addresser(config.spec)
            cids_V = torch.arange(config.vocab_size) if stack is None else stack.cids_V
            self.register_buffer("cids_V", cids_V)
        if stack is None and not self.stack.embed.weight.is_meta:
            _check_fresh(config)
            self.stack.init_weights(seed=0)
        self.learner: Any = None
        self.gradient_checkpointing = False
        self.table_files: dict[int, Path] = {}
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        """The embedding, which is the head, too."""
        return self.stack.embed

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        """Put another embedding of the same size there."""
        self.stack.embed = value

    @property
    def lookback(self) -> Lookback | None:
        """Ids, mask and cache into memory steps, documents kept apart; None without memory."""
        addresser, separator = self.stack.addresser, self.config.doc_token_id
        if addresser is None:
            return None
        if separator is not None:
            addresser = Documents(addresser, int(self.cids_V[separator]))
        return Lookback(addresser, self.cids_V, len(self.stack.blocks))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        start_BT: Tensor | None = None,
        lookback_ids: Tensor | None = None,
        control: Callable | str | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, T, D] behind the last norm.

        input_ids, attention_mask, position_ids, cache (or by its old name past_key_values): as in any model of transformers.
        start_BT: true where a text begins inside a row. lookback_ids: as `Lookback.begin` has it. control: rows in the place of the
        hashed ones, as `Transformer.begin` has it.
        Raises: AddressError without ids, ConfigError for packed rows without start_BT, unknown caches, and outputs not offered.
        """
        cache = past_key_values if cache is None else cache
        check_inputs(input_ids, inputs_embeds, cache, others)
        says_history = start_BT is not None or lookback_ids is not None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not says_history
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        seen = 0 if cache is None else int(cache.get_seq_length())
        if not seen and not says_history:
            check_history(position_ids, attention_mask, input_ids.shape[1])
        if lookback_ids is not None and any(getattr(block.memory, "conv", False) for block in self.stack.blocks):
            raise ConfigError(
                "rows without any order (lookback_ids) do not say what a convolution hears: memory.kernel=0"
            )
        view = view_of(input_ids, attention_mask, position_ids, seen)
        places = {"attention_mask": attention_mask, "position_ids": position_ids, "start_BT": start_BT}
        step = self._begin(input_ids, cache, control, lookback_ids=lookback_ids, **places, **others)
        around = self._gradient_checkpointing_func if self.gradient_checkpointing and self.training else None
        hidden_BTD = self.stack.hidden(input_ids, step=step, cache=self._past(cache, seen), view=view, around=around)
        if step is not None and not torch.is_grad_enabled():
            step.release()  # else it goes with the graph that holds its vectors, or with the update
        output = BaseModelOutputWithPast(last_hidden_state=hidden_BTD, **{CACHE: cache})
        return output.to_tuple() if return_dict is False else output

    def _begin(
        self, ids_BT: Tensor, cache: Cache | None, control: Callable | str | None, **how: Any
    ) -> MemoryStep | None:
        if self.stack.addresser is None:
            return None
        memory, training = self.stack.memory_config, self.training and torch.is_grad_enabled()
        if training and self.learner is None and not memory.frozen and can_learn(self.stack.stores):
            tables_stand_still("nengram.hf.own_optimizers(model)")
        step = self.lookback.begin(
            self.stack.stores,
            ids_BT,
            cache=cache,
            control=row_control(control or memory.control),
            frozen=memory.frozen or self.learner is None or not training,
            **how,
        )
        if not step.frozen:
            self.learner.take(step)
            for layer_id in step.rows:
                self.learner.watch(step.vectors(layer_id))
        if self.stack.observer is not None:
            self.stack.observer(step)
        return step

    def _past(self, cache: Cache | None, seen: int) -> Past | None:
        if cache is None:
            return None
        adapter = CachedLatents if self.config.is_latent else CachedKeys
        return Past(
            [BlockPast(adapter(cache, at, seen), self._conv(cache, at)) for at in range(len(self.stack.blocks))]
        )

    def _conv(self, cache: Cache, block: int) -> Any:
        memory = self.stack.blocks[block].memory
        return None if memory is None else self.lookback.conv_state(cache, block, memory)  # layers may share an id


def _check_fresh(config: NengramConfig) -> None:
    """A config holds the digest of a compression map, not the map. Raises ConfigError where a fresh model would need it."""
    if config.spec is not None and config.spec.compressed_vocab_size != config.vocab_size:
        raise ConfigError(
            f"the config's addresses ({config.spec.word_code}) are of compressed ids, and their map lies with the weights: "
            "from_pretrained(folder), or bring a Transformer(model, memory, cids_V=map) as stack"
        )


class NengramForCausalLM(NengramPreTrainedModel, GenerationMixin):
    """`NengramModel` and its tied head: logits, loss, and all that `generate` does."""

    def __init__(self, config: NengramConfig, stack: Transformer | None = None):
        super().__init__(config)
        self.model = NengramModel(config, stack)
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        """The embedding, which is the head, too."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        """Put another embedding of the same size there."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> None:
        """None: the head is the embedding."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        start_BT: Tensor | None = None,
        lookback_ids: Tensor | None = None,
        control: Callable | str | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V], of the last `logits_to_keep` positions (0: all; or those of an index), and the loss where labels are given.

        labels: as the ids, -100 where nothing is to be predicted; shifted inside. The rest, and errors, as `NengramModel.forward`.
        """
        hidden = self.model(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            inputs_embeds,
            use_cache,
            past_key_values,
            start_BT=start_BT,
            lookback_ids=lookback_ids,
            control=control,
            **others,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = hidden.last_hidden_state[:, kept] @ self.model.stack.embed.weight.T
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **others)
        output = CausalLMOutputWithPast(loss=loss, logits=logits_BTV, **{CACHE: hidden.get(CACHE)})
        return output.to_tuple() if return_dict is False else output

    @staticmethod
    def create_masks_for_generate(config: Any, attention_mask: Tensor | None = None, **others: Any) -> Tensor | None:
        """The mask as it is: `View` makes of it what attention needs, for every kind of cache."""
        return attention_mask

    def _valid_auto_compile_criteria(self, *_: Any, **others: Any) -> bool:
        """Never: rows are hashed outside of any graph."""
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, *others: Any, **more: Any
    ) -> Any:
        """With the memory's layer in it before anything is recorded, so that assisted decoding can take back what it holds."""
        made = super()._prepare_cache_for_generation(generation_config, model_kwargs, *others, **more)
        if model_kwargs.get(CACHE) is not None and self.model.lookback is not None:
            states = self.model.lookback.states_of(model_kwargs[CACHE])
            if getattr(generation_config, "is_assistant", False):
                states.activate_past_recording()
        return made
