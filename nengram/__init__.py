"""nengram: conditional memory (Engram, arXiv 2601.07372) for language models.

The names below are imported on first use, so that `import nengram` costs nothing beside torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nengram.address import Addresser, AddressSpec
    from nengram.config import Config, load_config
    from nengram.memory import Additive, Engram, MemoryStep
    from nengram.model import Transformer, split_budget
    from nengram.store import ResidentStore
    from nengram.text import CompressionMap, prepare
    from nengram.train import RowOptimizer

__version__ = "0.1.0"

_ROOM = {
    "AddressSpec": "address",
    "Addresser": "address",
    "Config": "config",
    "load_config": "config",
    "Additive": "memory",
    "Engram": "memory",
    "MemoryStep": "memory",
    "Transformer": "model",
    "split_budget": "model",
    "ResidentStore": "store",
    "CompressionMap": "text",
    "prepare": "text",
    "RowOptimizer": "train",
}

__all__ = [
    "Additive",
    "AddressSpec",
    "Addresser",
    "CompressionMap",
    "Config",
    "Engram",
    "MemoryStep",
    "ResidentStore",
    "RowOptimizer",
    "Transformer",
    "__version__",
    "load_config",
    "prepare",
    "split_budget",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOM:
        raise AttributeError(f"module 'nengram' has no attribute {name!r}")
    return getattr(import_module(f"nengram.{_ROOM[name]}"), name)
