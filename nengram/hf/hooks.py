"""The hooks of a grafted model, and the memories that they read: what `graft` leaves behind.

Two kinds of hook do all of it. One, before the module that is given the token ids, makes the forward pass's MemoryStep: the rows of
all memory layers, with the past taken from the model's own cache. One before each block adds what was looked up to the hidden state,
where the active memory has a layer. Both look the memory's modules up by name when they are called, never before: PEFT replaces
modules, and a hook that held one would go on calling the copy that is not trained.
"""

import copy
import dataclasses
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from nengram.address import AddressSpec
from nengram.config import MemoryConfig, ModelConfig
from nengram.errors import ConfigError, nearest
from nengram.hf.blocks import CACHES, Anatomy, width_of
from nengram.hf.lookback import Lookback
from nengram.hf.notices import tables_stand_still, weights_came
from nengram.memory import MemoryStep
from nengram.model.memories import layer_id_of, memory_layer, row_control
from nengram.store import HostStore, ResidentStore, Store
from nengram.text import CompressionMap

SITE = "nengram"  # the attribute that holds the memory's modules
OWNER = "nengram_graft"  # and the one that holds the graft
SLACK = 64  # positions that a cache remembers beyond the needed: assisted decoding may take so many drafted tokens back


@dataclasses.dataclass
class Adapter:
    """One memory: its sizes, addresses and tables. Its modules are the model's, below `SITE`, so that they move and learn with it."""

    memory: MemoryConfig
    compression: CompressionMap
    spec: AddressSpec
    lookback: Lookback
    stores: dict[int, Store]
    control: Callable | None = None

    @property
    def layer_ids(self) -> dict[int, int]:
        """Whose rows each block with memory reads."""
        return {block: layer_id_of(self.memory, block) for block in self.memory.blocks}

    @property
    def learns(self) -> bool:
        """Whether its tables can be trained where they are, as they are coded."""
        return not self.memory.frozen and can_learn(self.stores)

    def __deepcopy__(self, memo: dict) -> "Adapter":
        """A memory that learns apart: tables that are only read are shared, the others copied."""
        stores = {layer_id: _copied(store) for layer_id, store in self.stores.items()}
        return dataclasses.replace(self, lookback=copy.copy(self.lookback), stores=stores)


class Learner(Protocol):
    """Who is told of passes that learn: the tables' optimiser."""

    stores: dict[int, Store]
    has_stepped: bool
    follows_weights: bool

    def take(self, memory_step: MemoryStep) -> None:
        """A forward pass has begun."""
        ...

    def watch(self, vecs_BTSE: Tensor) -> None:
        """These vectors go into a block."""
        ...


class Graft:
    """The memories of one model, of which one is active, or none. Made by `graft`; `grafted` finds it.

    step: the MemoryStep of the latest forward pass; released already if it was made without gradients. A loop of one's own may take
        its `grads()` after the backward pass.
    held: parameters that learned before `train_memory` stopped them.
    """

    def __init__(self, place: Anatomy) -> None:
        self.place = place
        self.adapters: dict[str, Adapter] = {}
        self.active: str | None = None
        self.step: MemoryStep | None = None
        self.held: list[nn.Parameter] = []
        self._cache: Any = None
        self._learner: weakref.ref | None = None
        self._compiled = _compiles(place.base, False)
        place.entry.add_module(SITE, nn.ModuleDict())
        place.entry.get_submodule(SITE).register_load_state_dict_pre_hook(self._before_load)
        setattr(place.entry, OWNER, self)
        entry, blocks = place.entry, enumerate(place.blocks)
        self._hooks = [
            entry.register_forward_pre_hook(self._begin, with_kwargs=True),
            entry.register_forward_hook(self._end, always_call=True),
            *(block.register_forward_pre_hook(_BeforeBlock(self, index), with_kwargs=True) for index, block in blocks),
        ]

    def __getstate__(self) -> dict[str, Any]:
        """What a deep copy of the model takes along: no pass that is under way, and nobody who learns from it."""
        return self.__dict__ | {"step": None, "_cache": None, "_learner": None}

    def layer(self, block: int, name: str | None = None) -> nn.Module:
        """The memory module before a block, as it is now: PEFT may have put another in its place."""
        return self.place.entry.get_submodule(f"{SITE}.{name or self.active}.block_{block}")

    def layers(self, name: str | None = None) -> dict[int, nn.Module]:
        """All memory modules of an adapter by block."""
        return {block: self.layer(block, name) for block in self.adapters[name or self.active].memory.blocks}

    def add(self, name: str, adapter: Adapter) -> None:
        """Take in another memory and make it the active one. Raises ConfigError for a name that is taken or cannot be one."""
        if not re.fullmatch(r"[A-Za-z]\w*", name) or hasattr(nn.ModuleDict(), name):
            raise ConfigError(
                f'"{name}" cannot be the name of an adapter: letters, digits and underscores, e.g. "facts"'
            )
        if name in self.adapters:
            raise ConfigError(f'there is an adapter "{name}" already: give another name, or remove the graft first')
        modules = nn.ModuleDict()
        model = ModelConfig(width=width_of(self.place.config), norm_eps=_epsilon(self.place.config))
        for block in adapter.memory.blocks:
            weight = next(self.place.blocks[block].parameters())
            modules[f"block_{block}"] = memory_layer(model, adapter.memory)
            modules[f"block_{block}"].init_weights(torch.Generator().manual_seed(adapter.memory.seed * 1000 + block))
            modules[f"block_{block}"].to(weight.device)
        self.place.entry.get_submodule(SITE)[name] = modules
        self.adapters[name] = adapter
        self.set_adapter(name)

    def adapter(self, name: str | None = None) -> Adapter:
        """The memory called `name`, else the active one. Raises ConfigError if there is none (nearest named)."""
        name = self.active if name is None else name
        if name is None:
            raise ConfigError("no memory is active: set_adapter(name) first")
        if name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise ConfigError(f'there is no adapter "{name}"{nearest(name, self.adapters)}; there are: {known}')
        return self.adapters[name]

    def set_adapter(self, name: str) -> None:
        """Make one memory the active one; the others do not learn. Raises ConfigError for an unknown name."""
        self.adapter(name)
        self.active = name
        for other in self.adapters:
            for module in self.layers(other).values():
                module.requires_grad_(other == name)

    def discard(self, name: str) -> None:
        """Take one memory out; none is active afterwards if it was. Raises ConfigError for an unknown name."""
        self.adapter(name)
        del self.adapters[name], self.place.entry.get_submodule(SITE)[name]
        self.active = None if self.active == name else self.active

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the one it was before the graft, bit for bit."""
        active, self.active = self.active, None
        try:
            yield
        finally:
            self.active = active

    @contextmanager
    def controlled(self, control: Callable | str) -> Iterator[None]:
        """Inside, the active memory's rows are replaced: "one_row", "permuted", "misaligned", or a function as `MemoryStep.begin`'s."""
        adapter = self.adapter()
        before, adapter.control = adapter.control, row_control(control)
        try:
            yield
        finally:
            adapter.control = before

    def remove(self) -> None:
        """Take every memory out: what is left is the model that there was before."""
        _compiles(self.place.base, self._compiled)
        for hook in self._hooks:
            hook.remove()
        delattr(self.place.entry, SITE)
        delattr(self.place.entry, OWNER)

    def tables_learn(self) -> bool:
        """Tables learn with the layer that reads them: whoever freezes its parameters, PEFT for one, has frozen the tables."""
        own = (p for module in self.layers().values() for name, p in module.named_parameters() if "lora_" not in name)
        return self.adapter().learns and any(parameter.requires_grad for parameter in own)

    def learn_by(self, learner: "Learner") -> None:
        """Tell `learner` of every pass that is to learn from here on, for as long as it exists."""
        self._learner = weakref.ref(learner)

    def _begin(self, entry: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        before, self.step = self.step, None
        if self.active is None:
            return None
        adapter = self.adapter()
        given = dict(zip(self.place.arguments, args, strict=False)) | kwargs
        start_BT = given.pop("start_BT", None)
        caches = [given.pop(name, None) for name in CACHES]
        cache = next((cache for cache in caches if cache is not None), None)
        made = cache is None and self._makes_cache(entry, given)
        if made:
            cache = DynamicCache(config=self.place.config)
        ids_BT = given.pop("input_ids", None)
        if ids_BT is not None and ids_BT.device != adapter.lookback.cids_V.device:
            adapter.lookback.cids_V = adapter.lookback.cids_V.to(ids_BT.device)
        learns = torch.is_grad_enabled() and self.tables_learn()
        how = {"start_BT": start_BT, "control": adapter.control, "frozen": not learns}
        if cache is not None and ids_BT is not None:
            adapter.lookback.states_of(cache).activate_past_recording()
        self.step = adapter.lookback.begin(adapter.stores, ids_BT, cache=cache, **how, **given)
        self._cache = cache
        learner = self._learner_of(adapter) if learns else None
        if learner is not None:
            learner.take(self.step)
        elif learns and before is not None and before.has_grads() and not before.asked:
            tables_stand_still("nengram.hf.optimizers(model)")
        if not made and start_BT is None:
            return None
        return (), given | {"input_ids": ids_BT} | ({self.place.cache_name: cache} if cache is not None else {})

    def _learner_of(self, adapter: Adapter) -> "Learner | None":
        """Who trains these very tables: not those of another adapter, nor of the model that this one is a deep copy of."""
        learner = self._learner and self._learner()
        return learner if learner is not None and learner.stores is adapter.stores else None

    def _before_load(self, *_: Any) -> None:
        weights_came(None if self.active is None else self._learner_of(self.adapter()))

    def _makes_cache(self, entry: nn.Module, given: Mapping[str, Any]) -> bool:
        """Whether the model will make a cache itself, which then has to be one that the memory knows."""
        if self.place.cache_name is None:
            return False
        asked = given.get("use_cache")
        if asked is None:
            asked = getattr(self.place.config, "use_cache", False) and not entry.training
        checkpoints = getattr(entry, "gradient_checkpointing", False) and entry.training and torch.is_grad_enabled()
        return bool(asked) and not checkpoints

    def _end(self, entry: nn.Module, args: tuple, output: Any) -> None:
        if self.step is not None and not torch.is_grad_enabled():
            self.step.release()
        if self._cache is not None and self.step is not None:
            # `generate` asks a cache to record before its first forward, when the memory's layer is not in it yet: so all record
            self.adapter().lookback.states_of_begun(self._cache).forget_beyond(SLACK)
        self._cache = None

    def before_block(self, block: int, hidden_BTD: Tensor) -> Tensor:
        """The hidden state that a block is to see, `[B, T, D]`."""
        adapter = None if self.active is None or self.step is None else self.adapter()
        if adapter is None or block not in adapter.memory.blocks:
            return hidden_BTD
        layer_id, memory = adapter.layer_ids[block], self.layer(block)
        vecs_BTSE = self.step.vectors(layer_id)
        if vecs_BTSE.requires_grad and (learner := self._learner_of(adapter)):
            learner.watch(vecs_BTSE)
        past = adapter.lookback.conv_state(self._cache, block, memory)
        delta_BTGD = memory(
            vecs_BTSE.to(hidden_BTD.device), hidden_BTD.unsqueeze(2), blocked_BT=self.step.blocked_BT, state=past
        )
        return hidden_BTD + delta_BTGD.squeeze(2).to(hidden_BTD.dtype)


class _BeforeBlock:
    """The hook of one block. An object, not a closure, so that a deep copy of a model has a graft of its own."""

    def __init__(self, owner: Graft, block: int) -> None:
        self.owner, self.block = owner, block

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (self.owner.before_block(self.block, args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self.owner.before_block(self.block, kwargs["hidden_states"])}


def _compiles(base: nn.Module, allowed: bool) -> bool:
    """Say whether `generate` may compile a model's steps (which it does by itself, with a static cache on a GPU), and what was said
    before. Rows are hashed outside of any graph.
    """
    generation = getattr(base, "generation_config", None)
    if generation is None:
        return True
    before = not generation.disable_compile
    generation.disable_compile = not allowed
    return before


def _epsilon(config: Any) -> float:
    """The epsilon of the model's norms, which Qwen's dialect shares."""
    return next((getattr(config, n) for n in ("rms_norm_eps", "layer_norm_epsilon") if getattr(config, n, None)), 1e-6)


def can_learn(stores: Mapping[int, Store]) -> bool:
    """Whether all these tables can be trained where they are, as they are coded."""
    return all(isinstance(store, ResidentStore | HostStore) and store.codec.plain for store in stores.values())


def _copied(store: Store) -> Store:
    if not can_learn({0: store}):
        return store
    sizes = store.num_rows, store.row_width
    twin = type(store)(*sizes, device=store.device, dtype=store.dtype, init_std=0.0)
    twin.load_tensors(store.tensors())
    return twin
