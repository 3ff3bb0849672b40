"""The border with transformers: the only room that imports it. Importing the room makes our models known to the Auto classes."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nengram.hf.adapter import load_adapter, save_adapter
    from nengram.hf.auto import register
    from nengram.hf.configuration import NengramConfig
    from nengram.hf.conform_qwen import reply as conform_qwen_reply
    from nengram.hf.export import export as export_run
    from nengram.hf.export import from_run
    from nengram.hf.grafting import graft, grafted
    from nengram.hf.harness import evaluate
    from nengram.hf.loading import opened
    from nengram.hf.modeling import NengramForCausalLM, NengramModel
    from nengram.hf.optim import BestTables, optimizers, param_groups
    from nengram.hf.released import load_with_table, with_table
    from nengram.hf.schedule import MemoryFirst, train_all, train_jointly, train_memory
    from nengram.hf.serve import served
    from nengram.hf.training import own_optimizers

_HOME = {
    "BestTables": ("optim", "BestTables"),
    "MemoryFirst": ("schedule", "MemoryFirst"),
    "NengramConfig": ("configuration", "NengramConfig"),
    "NengramForCausalLM": ("modeling", "NengramForCausalLM"),
    "NengramModel": ("modeling", "NengramModel"),
    "conform_qwen_reply": ("conform_qwen", "reply"),
    "evaluate": ("harness", "evaluate"),
    "export_run": ("export", "export"),
    "from_run": ("export", "from_run"),
    "graft": ("grafting", "graft"),
    "grafted": ("grafting", "grafted"),
    "load_adapter": ("adapter", "load_adapter"),
    "load_with_table": ("released", "load_with_table"),
    "opened": ("loading", "opened"),
    "optimizers": ("optim", "optimizers"),
    "own_optimizers": ("training", "own_optimizers"),
    "param_groups": ("optim", "param_groups"),
    "register": ("auto", "register"),
    "save_adapter": ("adapter", "save_adapter"),
    "served": ("serve", "served"),
    "train_all": ("schedule", "train_all"),
    "train_jointly": ("schedule", "train_jointly"),
    "train_memory": ("schedule", "train_memory"),
    "with_table": ("released", "with_table"),
}

__all__ = [
    "BestTables",
    "MemoryFirst",
    "NengramConfig",
    "NengramForCausalLM",
    "NengramModel",
    "conform_qwen_reply",
    "evaluate",
    "export_run",
    "from_run",
    "graft",
    "grafted",
    "load_adapter",
    "load_with_table",
    "opened",
    "optimizers",
    "own_optimizers",
    "param_groups",
    "register",
    "save_adapter",
    "served",
    "train_all",
    "train_jointly",
    "train_memory",
    "with_table",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    file, own_name = _HOME[name]
    return getattr(import_module(f"{__name__}.{file}"), own_name)


def __dir__() -> list[str]:
    return __all__


if find_spec("transformers"):
    __getattr__("register")()
