"""Integers from outside are checked one by one: a mistake is reported by field, bound and value, and never
reaches arithmetic, where it would be silent.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from operator import index
from typing import Any

from nengram.errors import AddressError


def bounded(name: str, value: Any, low: int, below: int) -> int:
    """`value` itself, if it is a Python int (not a bool) with low <= value < below. Raises AddressError."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < below:
        raise AddressError(f"{name} must be an integer in {low}..{below - 1}, got {shown(value)}")
    return value


def integer(name: str, value: Any, low: int, below: int) -> int:
    """As `bounded`, but any integer type (NumPy's, say) is converted first."""
    with suppress(TypeError):  # `bounded` names the field and the value
        value = value if isinstance(value, bool) else index(value)
    return bounded(name, value, low, below)


def integers(name: str, values: Iterable[int], low: int, below: int, need: str) -> tuple[int, ...]:
    """A non-empty list of integers; `need` says what an empty one lacks. Raises AddressError."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise AddressError(f"{name} must be a list of integers ({need}), got {shown(values)}")
    checked = tuple(integer(f"{name}[{place}]", value, low, below) for place, value in enumerate(values))
    if not checked:
        raise AddressError(f"{name} is empty: give {need}")
    return checked


def entries(name: str, values: Any, expected: int, what: str) -> None:
    """Require a tuple of `expected` entries. Raises AddressError."""
    if not isinstance(values, tuple) or len(values) != expected:
        raise AddressError(f"{name} must have {expected} entries ({what}), got {shown(values)}")


def distinct(name: str, values: Sequence[int]) -> None:
    """Require that no value appears twice. Raises AddressError."""
    seen: set[int] = set()
    for value in values:
        if value in seen:
            raise AddressError(f"{name}: {value} appears twice; each memory layer needs its own")
        seen.add(value)


def shown(value: Any) -> str:
    """A value as it goes into a one-line message."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
