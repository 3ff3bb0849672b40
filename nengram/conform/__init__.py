"""Whether an implementation of hashed n-gram memory computes the published addresses: vectors, a runner, and known bugs by name.

Any implementation can be asked, through a Python callable or a command that reads JSON lines: docs/conformance.md. `check` asks a
callable, `nengram conform` the rest.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nengram.conform.bugs import BUGS
    from nengram.conform.protocol import Command, Function, NoAnswer
    from nengram.conform.runner import Difference, Outcome, Report, conform
    from nengram.conform.vectors import DIALECTS, Case, Setting, Vectors, load
    from nengram.conform.verb import check

_FILES = {
    "bugs": ("BUGS",),
    "protocol": ("Command", "Function", "NoAnswer"),
    "runner": ("Difference", "Outcome", "Report", "conform"),
    "vectors": ("DIALECTS", "Case", "Setting", "Vectors", "load"),
    "verb": ("check",),
}
_HOME = {name: file for file, names in _FILES.items() for name in names}

__all__ = [
    "BUGS",
    "DIALECTS",
    "Case",
    "Command",
    "Difference",
    "Function",
    "NoAnswer",
    "Outcome",
    "Report",
    "Setting",
    "Vectors",
    "check",
    "conform",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
