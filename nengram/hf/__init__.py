"""The border with transformers: the only room that imports it, and only when something of it is used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nengram.hf.conform_qwen import reply as conform_qwen_reply

_HOME = {"conform_qwen_reply": ("conform_qwen", "reply")}

__all__ = ["conform_qwen_reply"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    file, own_name = _HOME[name]
    return getattr(import_module(f"{__name__}.{file}"), own_name)


def __dir__() -> list[str]:
    return __all__
