"""The whole model: embed -> address -> blocks -> head.

Addresses of every memory layer are computed once, at the top, from token ids alone (`begin`); a block only reads the vectors that
its layer was promised. That is the wall of the house: integers before the first block, floats after it.

A memory layer's table is not a parameter: it lives in a store (`self.stores`), its vectors enter the graph as a leaf, and the
trainer hands their gradient back to the store. `state_dict()` therefore holds the backbone and the projections only.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from nengram.address import CONTROLS, Addresser, AddressSpec
from nengram.address.dialects import DIALECTS
from nengram.config import MemoryConfig, ModelConfig
from nengram.errors import ConfigError, nearest
from nengram.memory import GATES, MEMORIES, MemoryStep
from nengram.model.attention import Attention, KeyValues
from nengram.model.cost import Cost
from nengram.model.init import Draws, normal_by_fan_in
from nengram.model.moe import ALIGNMENT, MoE
from nengram.store import HostStore, ResidentStore, Store

TRAINABLE = {"resident": ResidentStore, "host": HostStore}


class Block(nn.Module):
    """Memory (in some blocks), attention, MoE: each adds to the residual stream hidden_BTD."""

    def __init__(self, config: ModelConfig, memory: nn.Module | None, layer_id: int | None):
        super().__init__()
        self.memory, self.layer_id = memory, layer_id
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config.width, config.heads, config.kv_heads, config.rope_theta)
        self.moe_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.moe = MoE(config.width, config.experts, config.experts_per_token, config.expert_width, config.shared_width)

    def forward(self, hidden_BTD: Tensor, step: MemoryStep | None, cache: "BlockCache | None" = None) -> Tensor:
        """Memory comes first (paper, section 2.3): it reads the block's input, before attention. `step` holds its vectors."""
        if self.memory is not None:
            state = None if cache is None else cache.memory
            delta_BTGD = self.memory(step.vectors(self.layer_id), hidden_BTD.unsqueeze(2), state=state)
            hidden_BTD = hidden_BTD + delta_BTGD.squeeze(2)
        keys_values = None if cache is None else cache.keys_values
        hidden_BTD = hidden_BTD + self.attention(self.attention_norm(hidden_BTD), keys_values)
        return hidden_BTD + self.moe(self.moe_norm(hidden_BTD))


class BlockCache:
    """What one block remembers between chunks: keys and values, and the inputs of the memory's convolution."""

    def __init__(self, block: Block, batch: int, length: int):
        attention = block.attention
        self.keys_values = KeyValues(batch, attention.kv_heads, length, attention.head_width, attention.out.weight)
        self.memory = block.memory.new_state(batch) if block.memory is not None else None


class DecodeCache:
    """Everything a model remembers of B sequences: per block, and the look-back ids of the addresses."""

    def __init__(self, model: "Transformer", batch: int, length: int):
        self.blocks = [BlockCache(block, batch, length) for block in model.blocks]
        self.addresses = model.addresser.new_state(batch) if model.addresser else None


class Transformer(nn.Module):
    """ids_BT -> logits_BTV.

    Args:
        model, memory: the sizes. `memory.kind` "none" gives a plain MoE model.
        cids_V: compressed id of every token id (the compression map), or None: raw ids are hashed.
    Raises: ConfigError for sizes that do not fit each other.
    """

    def __init__(self, model: ModelConfig, memory: MemoryConfig, cids_V: np.ndarray | None = None):
        super().__init__()
        _check(model, memory)
        self.config, self.memory_config = model, memory
        self.addresser: Addresser | None = None
        self.stores: dict[int, Store] = {}
        self.observer: Callable[[MemoryStep], None] | None = None  # is shown every memory step as it begins
        memories: dict[int, nn.Module] = {}
        if memory.kind != "none":
            if cids_V is not None and memory.compress:
                _check_compression(memory, int(np.max(cids_V)) + 1)
            cids_V = np.arange(model.vocab_size) if cids_V is None or not memory.compress else np.asarray(cids_V)
            self.register_buffer("cids_V", torch.from_numpy(cids_V.astype(np.int64)), persistent=False)
            self.addresser = Addresser(address_spec(memory, int(cids_V.max()) + 1, int(cids_V[memory.pad_id])))
            memories = {block: _memory_layer(model, memory) for block in memory.blocks}
        self.embed = nn.Embedding(model.vocab_size, model.width)
        self.blocks = nn.ModuleList(
            Block(model, memories.get(index), _layer_id(memory, index) if index in memories else None)
            for index in range(model.blocks)
        )
        self.norm = nn.RMSNorm(model.width, eps=model.norm_eps)

    @property
    def spec(self) -> AddressSpec | None:
        """The address spec of the memory layers, if there are any."""
        return self.addresser.spec if self.addresser else None

    def init_weights(self, seed: int, *, tier: str = "resident") -> None:
        """Weights and fresh tables from one seed. Tables N(0, table_std), convolutions zero, projections not."""
        draws = Draws(seed)
        out_share = (2 * len(self.blocks)) ** -0.5
        normal_by_fan_in(self.embed.weight, self.config.width, draws, "embed")
        for norm in (module for module in self.modules() if isinstance(module, nn.RMSNorm)):
            nn.init.ones_(norm.weight)
        for index, block in enumerate(self.blocks):
            own = draws.under(f"blocks.{index}")
            block.attention.init_weights(own.under("attention"), out_share)
            block.moe.init_weights(own.under("moe"), out_share)
            if block.memory is not None:
                block.memory.init_weights(own.generator("memory", self.embed.weight.device))
        self.create_tables(seed, tier=tier)

    def create_tables(self, seed: int, *, tier: str = "resident") -> None:
        """A fresh store per table: on the device of the weights, or in host memory (tier "host"). Raises ConfigError."""
        if tier not in TRAINABLE:
            raise ConfigError(f'tables are trained on tier {" or ".join(TRAINABLE)}, not "{tier}"')
        for layer_id in self.spec.layer_ids if self.spec else ():
            self.stores[layer_id] = TRAINABLE[tier](
                self.spec.num_rows(layer_id),
                self.memory_config.row_width,
                device=self.embed.weight.device,
                init_std=self.memory_config.table_std,
                seed=seed * 1000 + layer_id,
            )

    def begin(
        self,
        ids_BT: Tensor,
        *,
        start_BT: Tensor | None = None,
        cache: DecodeCache | None = None,
        control: Callable | str | None = None,
    ) -> MemoryStep | None:
        """Rows of all memory layers for this batch, and a ticket for each: the integers, before any float.

        `start_BT` is true where look-back begins anew. `control` replaces rows: a name from `nengram.address.CONTROLS`, "hashed"
        for the rows as they are, or a function of (rows_BTS, spec, layer_id); None is what the config says.
        Returns None for a model without memory. Raises: ConfigError for an unknown control, AddressError, StoreError.
        """
        if self.addresser is None:
            return None
        step = MemoryStep.begin(
            self.cids_V[ids_BT],
            self.addresser,
            self.stores,
            start_BT=start_BT,
            state=None if cache is None else cache.addresses,
            control=_control(control or self.memory_config.control),
            frozen=self.memory_config.frozen,
        )
        if self.observer is not None:
            self.observer(step)
        return step

    def forward(
        self,
        ids_BT: Tensor,
        *,
        step: MemoryStep | None = None,
        start_BT: Tensor | None = None,
        cache: DecodeCache | None = None,
    ) -> Tensor:
        """Logits [B, T, V] for ids_BT int64 [B, T].

        Give `step` (from `begin`) when the tables' gradients are needed afterwards; else it is made and released here. With a
        `cache`, `ids_BT` is the next chunk of the sequences that it remembers.
        Raises: IndexError for ids outside 0..V-1, ConfigError when the cache is full.
        """
        if step is None and self.addresser is not None:
            with self.begin(ids_BT, start_BT=start_BT, cache=cache) as step:
                return self.forward(ids_BT, step=step, cache=cache)
        hidden_BTD = self.embed(ids_BT)
        for index, block in enumerate(self.blocks):
            hidden_BTD = block(hidden_BTD, step, None if cache is None else cache.blocks[index])
        return self.norm(hidden_BTD) @ self.embed.weight.T

    def new_cache(self, batch: int, length: int) -> DecodeCache:
        """An empty cache for B sequences of at most `length` tokens."""
        return DecodeCache(self, batch, length)

    def memory_blocks(self) -> list[Block]:
        """The blocks that have a memory layer, in order. With a shared table all have one `layer_id`: walk `stores` for tables."""
        return [block for block in self.blocks if block.memory is not None]

    def rebalance(self) -> None:
        """The balancing step of every MoE; once per optimiser step."""
        for block in self.blocks:
            block.moe.rebalance(self.config.balance_rate)

    def cost(self) -> Cost:
        """Parameters and forward FLOPs per token, summed over what every module says of itself."""
        V, D, T = self.config.vocab_size, self.config.width, self.config.context
        whole = Cost(active=D, vocabulary=V * D, flops=2 * V * D)
        for block in self.blocks:
            whole += block.attention.cost(T) + block.moe.cost() + Cost(active=2 * D)
        for block in self.memory_blocks():
            own = block.memory.cost()
            flops = own["flops_per_token"]
            whole += Cost(active=own["parameters"], flops=flops, memory_flops=flops)
        rows = sum(self.spec.num_rows(layer_id) for layer_id in self.spec.layer_ids) if self.spec else 0
        return whole + Cost(table=rows * self.memory_config.row_width)

    def reachable_table_parameters(self) -> int:
        """Table parameters that some input could read: one row per slot under the `one_row` control, else every slot's rows."""
        if self.spec is None:
            return 0
        per_layer = (
            self.spec.slots if self.memory_config.control == "one_row" else int(sum(self.spec.moduli(layer)))
            for layer in self.spec.layer_ids
        )
        return sum(per_layer) * self.memory_config.row_width


def address_spec(memory: MemoryConfig, compressed_vocab_size: int, pad_cid: int) -> AddressSpec:
    """The AddressSpec that a memory config means. Blocks are the layer ids that seed the hash (Qwen: their places do).

    With a shared table there is one layer, the first block's: one hash, one table, whoever reads it.

    Raises: ConfigError for an unknown dialect, or one that has a single size for all orders and was given several; AddressError.
    """
    sizes = {"heads": memory.heads, "seed": memory.seed}
    readers = list(memory.blocks[:1] if memory.shared_table else memory.blocks)
    if memory.dialect == "engram":
        return AddressSpec.engram(
            compressed_vocab_size=compressed_vocab_size,
            rows_per_head=list(memory.rows_per_head),
            layer_ids=readers,
            block_indices=readers,
            pad_cid=pad_cid,
            **sizes,
        )
    if memory.dialect not in DIALECTS:
        known = ", ".join(DIALECTS)
        raise ConfigError(
            f'memory.dialect "{memory.dialect}" is unknown{nearest(memory.dialect, DIALECTS)}; dialects: {known}'
        )
    if len(set(memory.rows_per_head)) != 1:
        raise ConfigError(
            f'memory.rows_per_head {list(memory.rows_per_head)}: dialect "{memory.dialect}" has one size for all orders'
        )
    sizes |= {"rows_per_head": memory.rows_per_head[0], "max_order": memory.max_order}
    if memory.dialect == "qwen_ple":
        blocks = [block + 1 for block in readers]
        return AddressSpec.qwen_ple(vocab_size=compressed_vocab_size, eos_id=pad_cid, ple_layer_ids=blocks, **sizes)
    return AddressSpec.deepseek_v41(
        compressed_vocab_size=compressed_vocab_size, layer_ids=readers, pad_cid=pad_cid, **sizes
    )


def _control(control: Callable | str) -> Callable | None:
    """A row control by name, as a function of (rows_BTS, spec, layer_id); None for "hashed". Raises ConfigError."""
    if callable(control):
        return control
    if control == "hashed":
        return None
    if control not in CONTROLS:
        raise ConfigError(
            f'memory.control "{control}" is unknown{nearest(control, CONTROLS)}; controls: hashed, {", ".join(CONTROLS)}'
        )
    if control == "misaligned":
        return lambda rows_BTS, spec, layer_id: CONTROLS[control](rows_BTS)
    return partial(CONTROLS[control], seed=0) if control == "permuted" else CONTROLS[control]


def _layer_id(memory: MemoryConfig, block: int) -> int:
    """Whose rows a memory block reads: its own, or the first block's where all share one table."""
    return memory.blocks[0] if memory.shared_table else block


def _memory_layer(model: ModelConfig, memory: MemoryConfig) -> nn.Module:
    memory_width = (memory.max_order - 1) * memory.heads * memory.row_width
    if memory.kind == "engram":
        return MEMORIES["engram"](
            memory_width,
            model.width,
            conv=memory.kernel > 0,
            kernel=memory.kernel or 1,
            dilation=memory.max_order,
            gate=memory.gate,
        )
    return MEMORIES[memory.kind](memory_width, model.width)


def _check_compression(memory: MemoryConfig, compressed: int) -> None:
    if memory.compressed_vocab_size not in (0, compressed):
        raise ConfigError(
            f"memory.compressed_vocab_size is {memory.compressed_vocab_size}, this tokenizer gives {compressed}: "
            "the rows would belong to other n-grams"
        )


def _check(model: ModelConfig, memory: MemoryConfig) -> None:
    if model.vocab_size < 1:
        raise ConfigError("model.vocab_size is not set: it comes from the tokenizer, or must be at least 1")
    for name in ("width", "blocks", "heads", "kv_heads", "context", "expert_width", "shared_width"):
        if getattr(model, name) < 1:
            raise ConfigError(f"model.{name} must be at least 1, got {getattr(model, name)}")
    for name in ("width", "expert_width"):
        if getattr(model, name) % ALIGNMENT:
            raise ConfigError(f"model.{name} must be a multiple of {ALIGNMENT}, got {getattr(model, name)}")
    if model.width % model.heads or (model.width // model.heads) % 2:
        raise ConfigError(f"model.width {model.width} must be model.heads ({model.heads}) times an even head width")
    if model.heads % model.kv_heads:
        raise ConfigError(f"model.heads {model.heads} must be a multiple of model.kv_heads ({model.kv_heads})")
    if not 1 <= model.experts_per_token <= model.experts:
        raise ConfigError(
            f"model.experts_per_token {model.experts_per_token} must lie in 1..{model.experts} (model.experts)"
        )
    if memory.kind not in ("none", *MEMORIES):
        raise ConfigError(
            f'memory.kind "{memory.kind}" is unknown{nearest(memory.kind, MEMORIES)}; kinds: {", ".join(MEMORIES)}, none'
        )
    if memory.kind != "none":
        _control(memory.control)
        if memory.gate not in GATES:
            raise ConfigError(
                f'memory.gate "{memory.gate}" is unknown{nearest(memory.gate, GATES)}; gates: {", ".join(GATES)}'
            )
        for name, only in (("dialect", "engram"), ("codec", "fp32")):
            if (given := getattr(memory, name)) != only:
                raise ConfigError(
                    f'memory.{name} "{given}": a model is built with "{only}" only, so far; nengram plan takes it'
                )
        if not 0 <= memory.pad_id < model.vocab_size:
            raise ConfigError(
                f"memory.pad_id {memory.pad_id} is no token id: the vocabulary is 0..{model.vocab_size - 1}"
            )
        if not memory.blocks or not all(0 <= block < model.blocks for block in memory.blocks):
            raise ConfigError(f"memory.blocks {list(memory.blocks)} must be blocks of 0..{model.blocks - 1}")
        if len(memory.rows_per_head) != memory.max_order - 1:
            raise ConfigError(
                f"memory.rows_per_head needs one number per order 2..{memory.max_order}, got {list(memory.rows_per_head)}"
            )
