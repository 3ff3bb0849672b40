"""Memory in a model that was trained without: any causal model of transformers, whose class and `generate` stay what they were.

    memory = nengram.hf.graft(model, tokenizer, blocks=(4,), rows_per_head=(20_000, 20_000))

A table of zeros makes a grafted model bit for bit the model it was, and an n-gram that was never trained on goes on adding nothing.
Nothing is dead at the start, for the projections are not zero: the first step moves rows, the second everything (decision 0025).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from nengram.address import Addresser, AddressSpec
from nengram.config import Config, MemoryConfig, ModelConfig
from nengram.errors import ConfigError
from nengram.hf.blocks import Anatomy, anatomy
from nengram.hf.hooks import OWNER, Adapter, Graft
from nengram.hf.lookback import Lookback
from nengram.hf.vocabulary import compression_of
from nengram.model.memories import TRAINABLE, address_spec, check_memory, layer_id_of, row_control
from nengram.store import Store
from nengram.text import CompressionMap


def graft(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    name: str = "default",
    blocks_at: str | None = None,
    tier: str = "resident",
    **sizes: Any,
) -> Graft:
    """Add a memory to a causal model of transformers, in place; the model then computes exactly what it did.

    tokenizer: the model's own: a fast tokenizer, a `tokenizers.Tokenizer` or the path of a tokenizer.json; none with compress=False.
    name: of this memory among several on one model, the newest of which is active.
    blocks_at: dotted name of the list of the model's blocks, where it cannot be found.
    tier: where the tables live: "resident", on the devices that their blocks are on now (so move the model first), or "host".
    sizes: fields of `nengram.config.MemoryConfig`: blocks, rows_per_head (one per order from 2 up), heads, row_width, dialect ...
        Here `table_std` is 0 and `pad_id` the config's pad, else end-of-text, id, if not given.
    Raises: ConfigError for a model whose blocks are not found, another model's tokenizer, or sizes that cannot be had.
    """
    place = anatomy(model, blocks_at)
    memory = _memory_config(place.config, sizes)
    vocab_size = place.config.vocab_size
    check_memory(ModelConfig(vocab_size=vocab_size, blocks=len(place.blocks)), memory)
    if tier not in TRAINABLE:
        raise ConfigError(f'a new table lives on tier {" or ".join(TRAINABLE)}, not "{tier}"')
    compression = compression_of(tokenizer, vocab_size) if memory.compress else CompressionMap.identity(vocab_size)
    spec = address_spec(memory, compression.compressed_vocab_size, int(compression.cids_V[memory.pad_id]))
    stores = {
        layer_id: TRAINABLE[tier](
            spec.num_rows(layer_id),
            memory.row_width,
            device=next(place.blocks[block].parameters()).device,
            init_std=memory.table_std,
            seed=memory.seed * 1000 + layer_id,
        )
        for block, layer_id in {block: layer_id_of(memory, block) for block in memory.blocks}.items()
    }
    owner = graft_of(place)
    owner.add(name, adapter_of(place, memory, compression, spec, stores))
    return owner


def grafted(model: nn.Module) -> Graft:
    """The graft of a model, wrapped or not. Raises ConfigError where there is none, or a wrapper has copied it."""
    found = {
        id(module.__dict__[OWNER]): module.__dict__[OWNER] for module in model.modules() if OWNER in module.__dict__
    }
    if not found:
        raise ConfigError(f"this {type(model).__name__} has no memory: nengram.hf.graft(model, tokenizer, ...) first")
    if len(found) > 1:
        raise ConfigError(
            "this model holds its memory more than once: modules_to_save has copied a part with tables in it, and would train "
            "a copy that is never read; leave the memory out of modules_to_save (nengram.hf saves it)"
        )
    return next(iter(found.values()))


def adapter_of(
    place: Anatomy, memory: MemoryConfig, compression: CompressionMap, spec: AddressSpec, stores: dict[int, Store]
) -> Adapter:
    """An adapter out of its parts."""
    lookback = Lookback(Addresser(spec), torch.from_numpy(np.array(compression.cids_V)), len(place.blocks))
    control = None if memory.control == "hashed" else row_control(memory.control)
    return Adapter(memory, compression, spec, lookback, stores, control)


def graft_of(place: Anatomy) -> Graft:
    """The graft of a model, made if there is none yet."""
    return place.entry.__dict__.get(OWNER) or Graft(place)


def _memory_config(config: Any, sizes: Mapping[str, Any]) -> MemoryConfig:
    given = {"kind": "engram", "table_std": 0.0} | {key: _plain(value) for key, value in sizes.items()}
    if isinstance(given.get("rows_per_head"), list):
        given.setdefault("max_order", len(given["rows_per_head"]) + 1)
    ends_text = given.get("dialect") == "qwen_ple"
    given.setdefault("pad_id", _special_id(config, "eos_token_id" if ends_text else "pad_token_id"))
    memory = Config().replace(memory=given).memory
    if memory.kind == "none":
        raise ConfigError('memory.kind "none" adds nothing: "engram", or "additive"')
    if memory.frozen and not memory.table_std:
        raise ConfigError("a frozen table of zeros can never add anything: table_std=0.02, or frozen=False")
    return memory


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | range) else value


def _special_id(config: Any, first: str) -> int:
    """The id that stands for no text, as the config has it; 0 if it has none."""
    for name in (first, "eos_token_id", "bos_token_id"):
        value = getattr(config, name, None)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and 0 <= value < config.vocab_size:
            return value
    return 0
