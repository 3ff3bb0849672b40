"""Compressed ids into table rows: integers, exact, known before the forward pass.

Names are resolved on first use (PEP 562), so that reading a spec needs no torch, hashing a NumPy batch
needs no torch either, and `python -m nengram.address.reference` needs nothing but Python. Read
`reference.py` first: it is the definition; `hashing.py` is the same thing fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nengram.address.census import Census, OrderCensus, take_census
    from nengram.address.controls import CONTROLS, misaligned, one_row, permuted
    from nengram.address.hashing import Addresser, StreamState
    from nengram.address.ngrams import NgramCounts, count_of, ngram_counts, ngrams_of, text_starts
    from nengram.address.spec import AddressSpec, LayerSpec

_FILES = {
    "spec": ("AddressSpec", "LayerSpec"),
    "hashing": ("Addresser", "StreamState"),
    "controls": ("CONTROLS", "misaligned", "one_row", "permuted"),
    "ngrams": ("NgramCounts", "count_of", "ngram_counts", "ngrams_of", "text_starts"),
    "census": ("Census", "OrderCensus", "take_census"),
}
_HOME = {name: file for file, names in _FILES.items() for name in names}

__all__ = [
    "CONTROLS",
    "AddressSpec",
    "Addresser",
    "Census",
    "LayerSpec",
    "NgramCounts",
    "OrderCensus",
    "StreamState",
    "count_of",
    "misaligned",
    "ngram_counts",
    "ngrams_of",
    "one_row",
    "permuted",
    "take_census",
    "text_starts",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
