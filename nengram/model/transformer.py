"""The whole model: embed -> address -> blocks -> head.

Addresses of every memory layer are computed once, at the top, from token ids alone (`begin`); a block only reads the vectors that
its layer was promised. That is the wall of the house: integers before the first block, floats after it.

A memory layer's table is not a parameter: it lives in a store (`self.stores`), its vectors enter the graph as a leaf, and the
trainer hands their gradient back to the store. `state_dict()` therefore holds the backbone and the projections only.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from nengram.address import Addresser, AddressSpec
from nengram.config import MemoryConfig, ModelConfig
from nengram.errors import ConfigError
from nengram.memory import MemoryStep
from nengram.model.attention import View
from nengram.model.check import check_backbone
from nengram.model.cost import Cost
from nengram.model.hyper import residual
from nengram.model.init import Draws, normal_by_fan_in
from nengram.model.latent_attention import ATTENTIONS
from nengram.model.memories import (
    TRAINABLE,
    address_spec,
    check_compression,
    check_memory,
    layer_id_of,
    memory_layer,
    row_control,
)
from nengram.model.moe import MoE, SwiGLU
from nengram.model.rope import Rope
from nengram.store import Store


class Block(nn.Module):
    """Memory (in some blocks), attention, experts or one SwiGLU: each adds to the residual.

    The residual is streams_BTH: G streams side by side, H = G D. One stream is the hidden state of a plain Transformer.
    """

    def __init__(self, config: ModelConfig, index: int, memory: nn.Module | None, layer_id: int | None):
        super().__init__()
        self.memory, self.layer_id, self.width = memory, layer_id, config.width
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = ATTENTIONS[config.attention].of(config, rope_of(config))
        self.attention_residual = residual(config)
        self.moe_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        dense = index < config.dense_blocks
        self.moe = None if dense else MoE.of(config)
        self.dense = SwiGLU(config.width, config.dense_width) if dense else None
        self.moe_residual = residual(config)

    @property
    def feed_forward(self) -> MoE | SwiGLU:
        """The experts, or what a dense block has in their place."""
        return self.dense if self.moe is None else self.moe

    def forward(
        self,
        streams_BTH: Tensor,
        step: MemoryStep | None,
        cache: "BlockCache | None" = None,
        view: View | None = None,
    ) -> Tensor:
        """Memory comes first (paper, section 2.3): it reads the block's input, before attention. `step` holds its vectors."""
        if self.memory is not None:
            state = None if cache is None else cache.memory
            hidden_BTGD = streams_BTH.unflatten(2, (-1, self.width))
            vecs_BTSE = step.vectors(self.layer_id).to(streams_BTH.device)
            vecs_BTSE = vecs_BTSE.reshape(
                *streams_BTH.shape[:2], *vecs_BTSE.shape[2:]
            )  # a step may hold them token by token
            delta_BTGD = self.memory(vecs_BTSE, hidden_BTGD, blocked_BT=step.blocked_BT, state=state)
            streams_BTH = streams_BTH + delta_BTGD.flatten(2)
        past = None if cache is None else cache.attention
        streams_BTH = self.attention_residual(
            streams_BTH, lambda x_BTD: self.attention(self.attention_norm(x_BTD), past, view)
        )
        return self.moe_residual(streams_BTH, lambda x_BTD: self.feed_forward(self.moe_norm(x_BTD)))

    def init_weights(self, draws: Draws, out_share: float) -> None:
        """Everything but the norms, whose gains the model sets."""
        parts = {"attention": self.attention, "moe": self.moe, "dense": self.dense}
        for name, part in parts.items():
            if part is not None:
                part.init_weights(draws.under(name), out_share)
        for name, unit in (("attention_residual", self.attention_residual), ("moe_residual", self.moe_residual)):
            unit.init_weights(draws.under(name))
        if self.memory is not None:
            self.memory.init_weights(draws.generator("memory", self.attention_norm.weight.device))

    def cost(self, context: int) -> Cost:
        """Parameters and forward FLOPs a token, summed over what every part says of itself."""
        units = self.attention_residual.cost() + self.moe_residual.cost()
        norms = Cost(active=self.attention_norm.weight.numel() + self.moe_norm.weight.numel())
        whole = self.attention.cost(context) + self.feed_forward.cost() + units + norms
        if self.memory is None:
            return whole
        own = self.memory.cost()
        flops = own["flops_per_token"]
        return whole + Cost(active=own["parameters"], flops=flops, memory_flops=flops)


class BlockCache:
    """What one block remembers between chunks: of attention, and the inputs of the memory's convolution."""

    def __init__(self, block: Block, batch: int, length: int):
        self.attention = block.attention.new_cache(batch, length)
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
        check_backbone(model)
        check_memory(model, memory)
        self.config, self.memory_config = model, memory
        self.addresser: Addresser | None = None
        self.stores: dict[int, Store] = {}
        self.observer: Callable[[MemoryStep], None] | None = None  # is shown every memory step as it begins
        memories: dict[int, nn.Module] = {}
        if memory.kind != "none":
            if cids_V is not None and memory.compress:
                check_compression(memory, int(np.max(cids_V)) + 1)
            cids_V = np.arange(model.vocab_size) if cids_V is None or not memory.compress else np.asarray(cids_V)
            self.register_buffer("cids_V", torch.from_numpy(cids_V.astype(np.int64)), persistent=False)
            self.addresser = Addresser(address_spec(memory, int(cids_V.max()) + 1, int(cids_V[memory.pad_id])))
            memories = {block: memory_layer(model, memory) for block in memory.blocks}
        self.embed = nn.Embedding(model.vocab_size, model.width)
        self.blocks = nn.ModuleList(
            Block(model, index, memories.get(index), layer_id_of(memory, index) if index in memories else None)
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
            block.init_weights(draws.under(f"blocks.{index}"), out_share)
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
        blocked_BT: Tensor | None = None,
        cache: DecodeCache | None = None,
        control: Callable | str | None = None,
    ) -> MemoryStep | None:
        """Rows of all memory layers for this batch, and a ticket for each: the integers, before any float.

        `start_BT` is true where look-back begins anew, `blocked_BT` where a position is no text (an image, padding): it breaks
        n-grams and its gates are 0. `control` replaces rows: a name from `nengram.address.CONTROLS`, "hashed"
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
            blocked_BT=blocked_BT,
            state=None if cache is None else cache.addresses,
            control=row_control(control or self.memory_config.control),
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
        return self.hidden(ids_BT, step=step, cache=cache) @ self.embed.weight.T

    def hidden(
        self,
        ids_BT: Tensor,
        *,
        step: MemoryStep | None = None,
        cache: DecodeCache | None = None,
        view: View | None = None,
        around: Callable | None = None,
    ) -> Tensor:
        """What the head reads, [B, T, D]: ids_BT through all blocks and the last norm.

        `step` as of `begin`. `view`: positions and padding of the batch, where they are not those of texts side by side.
        `around`: called as (block, *its arguments) in each block's place, as `torch.utils.checkpoint.checkpoint` is.
        """
        streams = (self.config.streams, self.config.width)
        streams_BTH = self.embed(ids_BT).unsqueeze(2).expand(-1, -1, *streams).flatten(2)
        for index, block in enumerate(self.blocks):
            given = (streams_BTH, step, None if cache is None else cache.blocks[index], view)
            streams_BTH = block(*given) if around is None else around(block, *given)
        return self.norm(streams_BTH.unflatten(2, streams).mean(2))

    def new_cache(self, batch: int, length: int) -> DecodeCache:
        """An empty cache for B sequences of at most `length` tokens."""
        return DecodeCache(self, batch, length)

    def memory_blocks(self) -> list[Block]:
        """The blocks that have a memory layer, in order. With a shared table all have one `layer_id`: walk `stores` for tables."""
        return [block for block in self.blocks if block.memory is not None]

    def rebalance(self) -> None:
        """The balancing step of every MoE; once per optimiser step."""
        for moe in self.moes():
            moe.rebalance(self.config.balance_rate)

    def moes(self) -> list[MoE]:
        """The mixtures of experts, in order; dense blocks have none."""
        return [block.moe for block in self.blocks if block.moe is not None]

    def expert_load_max(self) -> float:
        """Load of the heaviest expert of any block over the mean, since the last `rebalance`; 0 without experts."""
        return max((float(moe.load_X.max() / moe.load_X.mean()) for moe in self.moes()), default=0.0)

    def cost(self) -> Cost:
        """Parameters and forward FLOPs per token, summed over what every module says of itself."""
        V, D, T = self.config.vocab_size, self.config.width, self.config.context
        whole = Cost(active=D, vocabulary=V * D, flops=2 * V * D)
        for block in self.blocks:
            whole += block.cost(T)
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


def rope_of(model: ModelConfig) -> Rope:
    """How positions rotate in a model."""
    return Rope(
        theta=model.rope_theta,
        scale=model.rope_scale,
        original_context=model.rope_original_context,
        alpha=model.rope_alpha,
        beta=model.rope_beta,
        mscale=model.rope_mscale,
    )
