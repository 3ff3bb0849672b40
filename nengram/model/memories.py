"""What a `[memory]` section means in a model: addresses, layers and controls of one. And which sections mean nothing, and are refused.

A model of ours and a graft on somebody else's build their memory from the same section, by the same functions.
"""

from collections.abc import Callable
from functools import partial

from torch import nn

from nengram.address import CONTROLS, AddressSpec
from nengram.address.dialects import DIALECTS
from nengram.config import MemoryConfig, ModelConfig
from nengram.errors import ConfigError, nearest
from nengram.memory import GATES, MEMORIES, Engram
from nengram.store import HostStore, ResidentStore

TRAINABLE = {"resident": ResidentStore, "host": HostStore}  # tiers that a table can be trained on


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


def layer_id_of(memory: MemoryConfig, block: int) -> int:
    """Whose rows a memory block reads: its own, or the first block's where all share one table. Qwen's ids are places."""
    owner = memory.blocks[0] if memory.shared_table else block
    return memory.blocks.index(owner) if memory.dialect == "qwen_ple" else owner


def memory_layer(model: ModelConfig, memory: MemoryConfig) -> nn.Module:
    """A memory layer as `memory` asks for it, for hidden states of `model`'s width, streams and epsilon."""
    memory_width = (memory.max_order - 1) * memory.heads * memory.row_width
    if memory.kind != "engram":
        return MEMORIES[memory.kind](memory_width, model.width, branches=model.streams)
    options = {"conv": memory.kernel > 0, "kernel": memory.kernel or 1, "dilation": memory.max_order}
    if memory.gate != "sign":  # that is the signed root as the family has it
        options["gate"] = memory.gate
    if memory.gate == "open":
        options["fused"] = False
    if memory.dialect == "qwen_ple":
        options |= {"gate_eps": model.norm_eps, "conv_eps": model.norm_eps}
    return Engram.family(memory.dialect, memory_width, model.width, branches=model.streams, **options)


def row_control(control: Callable | str) -> Callable | None:
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


def check_memory(model: ModelConfig, memory: MemoryConfig) -> None:
    """Raise ConfigError for memory layers that are not to be had in `model`, of which vocabulary and blocks are read."""
    if memory.kind not in ("none", *MEMORIES):
        raise ConfigError(
            f'memory.kind "{memory.kind}" is unknown{nearest(memory.kind, MEMORIES)}; kinds: {", ".join(MEMORIES)}, none'
        )
    if memory.kind != "none":
        row_control(memory.control)
        if memory.gate not in GATES:
            raise ConfigError(
                f'memory.gate "{memory.gate}" is unknown{nearest(memory.gate, GATES)}; gates: {", ".join(GATES)}'
            )
        _check_dialect(memory)
        if memory.codec != "fp32":
            raise ConfigError(
                f'memory.codec "{memory.codec}": a model is built with "fp32" only, so far; nengram plan takes it'
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


def _check_dialect(memory: MemoryConfig) -> None:
    """What a dialect rules out is refused, never ignored. An unknown dialect is `address_spec`'s to refuse."""
    if memory.dialect == "deepseek_v41" and memory.kind == "engram" and memory.kernel > 0:
        raise ConfigError(
            f'memory.kernel {memory.kernel}: layers of dialect "deepseek_v41" have no convolution; memory.kernel=0'
        )
    if memory.dialect == "qwen_ple" and memory.compress:
        raise ConfigError('memory.compress: dialect "qwen_ple" hashes raw ids; memory.compress=false')


def check_compression(memory: MemoryConfig, compressed: int) -> None:
    """Raise ConfigError where a tokenizer gives another number of compressed ids than the section was written for."""
    if memory.compressed_vocab_size not in (0, compressed):
        raise ConfigError(
            f"memory.compressed_vocab_size is {memory.compressed_vocab_size}, this tokenizer gives {compressed}: "
            "the rows would belong to other n-grams"
        )
