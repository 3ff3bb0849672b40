"""Where in a stranger's model the memory goes: its blocks, and the module that is given the token ids.

transformers has hundreds of model types and nothing in common says where their blocks are: `model.layers`, `transformer.h`,
`backbone.layers`, and under LoRA all of these a few names deeper. What they share is the structure: a `ModuleList` of modules of one
class, as many as the config says. So blocks are found by that, and where it is not so, the caller gives the list's name.
"""

import inspect
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from nengram.errors import ConfigError, nearest

COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
CACHES = (
    "cache",
    "past_key_values",
    "cache_params",
)  # what transformers calls a cache: 5.24 and later, before, Mamba's before


@dataclass(frozen=True)
class Anatomy:
    """A model as a graft sees it.

    base: the transformers model, below any wrapper. blocks_at: dotted name of its blocks within `base`, and `blocks` they are.
    entry: the module nearest to the blocks whose forward takes `input_ids`; `arguments` are the names of that forward's parameters.
    """

    base: PreTrainedModel
    blocks_at: str
    blocks: nn.ModuleList
    entry: nn.Module
    arguments: tuple[str, ...]

    @property
    def config(self):
        """The config of the text model."""
        return self.base.config.get_text_config(decoder=True)

    @property
    def cache_name(self) -> str | None:
        """What the entry calls the cache it is given; None for a model without one."""
        return next((name for name in CACHES if name in self.arguments), None)


def anatomy(model: nn.Module, blocks_at: str | None = None) -> Anatomy:
    """Find what a graft needs in `model`, which may be wrapped (PEFT, DDP).

    blocks_at: dotted name of the list of blocks within the transformers model, e.g. "model.layers", where it is not found.
    Raises: ConfigError, saying what to pass, for a model that is not transformers', has no such list, or takes no token ids.
    """
    base = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if base is None:
        raise ConfigError(f"a {type(model).__name__} holds no transformers model: pass one, or a PEFT model of one")
    lists = {name: module for name, module in base.named_modules() if isinstance(module, nn.ModuleList)}
    if blocks_at is None:
        blocks_at = _found(base, lists)
    elif blocks_at not in lists:
        raise ConfigError(
            f'blocks_at "{blocks_at}" is no ModuleList of {type(base).__name__}{nearest(blocks_at, lists)}'
        )
    entry, arguments = _entry(base, blocks_at)
    return Anatomy(base, blocks_at, lists[blocks_at], entry, arguments)


def width_of(config) -> int:
    """The width of the hidden state. Raises ConfigError."""
    for name in ("hidden_size", "n_embd", "d_model"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    raise ConfigError(f"{type(config).__name__} says nothing of the hidden state's width (hidden_size)")


def _found(base: PreTrainedModel, lists: dict[str, nn.ModuleList]) -> str:
    config = base.config.get_text_config(decoder=True)
    count = next((getattr(config, name) for name in COUNTS if isinstance(getattr(config, name, None), int)), None)
    alike = [
        name for name, blocks in lists.items() if len(blocks) == count and len({type(block) for block in blocks}) == 1
    ]
    outer = [name for name in alike if not any(name.startswith(f"{other}.") for other in alike)]
    if len(outer) == 1:
        return outer[0]
    inner = [name for name in lists if any(name.startswith(f"{other}.") for other in lists)]
    choices = (
        ", ".join(f"{name} ({len(blocks)})" for name, blocks in lists.items() if name not in inner) or "it has none"
    )
    what = "none is" if not outer else f"{' and '.join(outer)} are"
    raise ConfigError(
        f"the blocks of {type(base).__name__} were not found: of its lists, {what} {count} modules of one class, as its config says; "
        f'pass blocks_at="<name>", one of: {choices[:300]}'
    )


def _entry(base: PreTrainedModel, blocks_at: str) -> tuple[nn.Module, tuple[str, ...]]:
    name = blocks_at
    while name:
        name = name.rpartition(".")[0]
        module = base.get_submodule(name)
        arguments = tuple(inspect.signature(module.forward).parameters)
        if "input_ids" in arguments:
            return module, arguments
    raise ConfigError(f"no module above {blocks_at} of {type(base).__name__} takes input_ids: memory needs token ids")
