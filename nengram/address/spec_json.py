"""The shape of a spec file. A spec arrives inside checkpoints and table files that strangers wrote, so
nothing in it is believed.

This file checks keys and JSON types and gives back plain values; `AddressSpec` itself checks every bound.
Multipliers are decimal strings because they exceed the 53 bits that many JSON readers keep of a number.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from nengram.address.bounds import shown
from nengram.errors import AddressError, nearest


def parse(text: str, *, version: int, spec_keys: Sequence[str], layer_keys: Sequence[str]) -> dict[str, Any]:
    """The content of a spec file: arrays as tuples, multipliers as ints. Raises AddressError."""
    try:
        content = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, TypeError, RecursionError) as error:
        raise AddressError(f"the address spec is not valid JSON: {' '.join(str(error).split())}") from error
    if isinstance(content, dict) and "version" in content:
        check_version(content["version"], version)
    _require_keys("address spec", content, spec_keys)
    layers = _array("layers", content["layers"])
    return content | {"layers": [_layer(f"layers[{place}]", layer, layer_keys) for place, layer in enumerate(layers)]}


def check_version(found: Any, known: int) -> None:
    """Refuse any version but the one this program writes. Raises AddressError."""
    if type(found) is not int or found != known:
        raise AddressError(f"address spec version {shown(found)} is not known; this program reads version {known}")


def _layer(where: str, content: Any, keys: Sequence[str]) -> dict[str, Any]:
    _require_keys(where, content, keys)
    multipliers = _array(f"{where}.multipliers", content["multipliers"])
    moduli = _array(f"{where}.moduli", content["moduli"])
    return content | {
        "multipliers": tuple(_decimal(f"{where}.multipliers[{lag}]", digits) for lag, digits in enumerate(multipliers)),
        "moduli": tuple(tuple(_array(f"{where}.moduli[{place}]", heads)) for place, heads in enumerate(moduli)),
    }


def _decimal(where: str, digits: Any) -> int:
    if not isinstance(digits, str) or not re.fullmatch("[1-9][0-9]{0,18}", digits):
        raise AddressError(f"{where} must be a decimal string below 2**63, got {shown(digits)}")
    return int(digits)


def _array(where: str, content: Any) -> list[Any]:
    if not isinstance(content, list):
        raise AddressError(f"{where} must be a JSON array, got {shown(content)}")
    return content


def _require_keys(where: str, content: Any, known: Sequence[str]) -> None:
    if not isinstance(content, dict):
        raise AddressError(f"{where} must be a JSON object, got {shown(content)}")
    for name in content:
        if name not in known:
            raise AddressError(f"{where} has an unknown key {shown(name)}{nearest(name[:60], known)}")
    for name in known:
        if name not in content:
            raise AddressError(f"{where} lacks the key {name!r}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return content
