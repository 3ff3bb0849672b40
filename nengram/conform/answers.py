"""An answer is believed only after its shape is: every list as long as asked, every number an integer, no layer missing.

What is wrong is said by name and place, as `sequence 0, position 3: 4 slots expected, got 8`, because a wrong shape is a finding too.
"""

import re
from typing import Any

from nengram.conform.protocol import NoAnswer, one_line
from nengram.conform.vectors import Case, ClassCase, Setting


class NotOffered(Exception):
    """The implementation says that it does not do this; its reason."""


def rows_of(answer: Any, setting: Setting, case: Case) -> list[dict[str, list]]:
    """The rows of each call by layer. Raises NoAnswer, NotOffered."""
    calls = _list(_field(answer, "rows"), "rows", len(case.calls), "calls")
    return [_call(f"call {at}", *pair, setting) for at, pair in enumerate(zip(calls, case.calls, strict=True))]


def numbers_of(answer: Any, setting: Setting) -> list[dict[str, Any]]:
    """Layer id, multipliers, moduli and num_rows of each layer. Raises NoAnswer, NotOffered."""
    spec = setting.spec
    layers = _list(_field(answer, "layers"), "layers", len(spec.layers), "layers")
    return [_layer(f"layers[{at}]", layer, spec.max_order, spec.heads) for at, layer in enumerate(layers)]


def classes_of(answer: Any, case: ClassCase) -> list[int]:
    """The class of each token. Raises NoAnswer, NotOffered."""
    classes = _list(_field(answer, "classes"), "classes", len(case.tokens), "tokens")
    return [_integer(one, f"classes[{at}]") for at, one in enumerate(classes)]


def about_of(answer: Any) -> dict[str, str]:
    """Name and version, as far as they are given as text."""
    given = answer if isinstance(answer, dict) else {}
    return {key: one_line(given[key])[:60] for key in ("name", "version") if isinstance(given.get(key), str)}


def _field(answer: Any, name: str) -> Any:
    if not isinstance(answer, dict):
        raise NoAnswer(f"an answer is a JSON object, got {_shown(answer)}")
    if "not_offered" in answer:
        raise NotOffered(one_line(str(answer["not_offered"])))
    if name not in answer:
        raise NoAnswer(f'the answer has no "{name}", only {_shown(list(answer))}')
    return answer[name]


def _call(where: str, layers: Any, call: dict[str, list], setting: Setting) -> dict[str, list]:
    wanted = [str(layer_id) for layer_id in setting.spec.layer_ids]
    if not isinstance(layers, dict) or sorted(layers) != sorted(wanted):
        found = list(layers) if isinstance(layers, dict) else layers
        raise NoAnswer(f"{where}: rows by layer {', '.join(wanted)} expected, got {_shown(found)}")
    return {
        layer: _layer_rows(f"{where}, layer {layer}", layers[layer], call["ids"], setting.spec.slots)
        for layer in wanted
    }


def _layer_rows(where: str, rows_BTS: Any, ids_BT: list, slots: int) -> list:
    for b, ids in enumerate(ids_BT):
        rows_TS = _list(
            _list(rows_BTS, where, len(ids_BT), "sequences")[b], f"{where}, sequence {b}", len(ids), "positions"
        )
        for t, row_S in enumerate(rows_TS):
            place = f"{where}, sequence {b}, position {t}"
            for slot, row in enumerate(_list(row_S, place, slots, "slots")):
                _integer(row, f"{place}, slot {slot}")
    return rows_BTS


def _layer(where: str, layer: Any, max_order: int, heads: int) -> dict[str, Any]:
    wanted = ("layer_id", "multipliers", "moduli", "num_rows")
    if not isinstance(layer, dict) or not all(key in layer for key in wanted):
        raise NoAnswer(f"{where}: an object with {', '.join(wanted)} expected, got {_shown(layer)}")
    multipliers = _list(layer["multipliers"], f"{where}.multipliers", max_order, "orders")
    moduli = _list(layer["moduli"], f"{where}.moduli", max_order - 1, "orders")
    return {
        "layer_id": _integer(layer["layer_id"], f"{where}.layer_id"),
        "multipliers": [_decimal(one, f"{where}.multipliers[{at}]") for at, one in enumerate(multipliers)],
        "moduli": [
            [_integer(one, f"{where}.moduli[{at}]") for one in _list(order, f"{where}.moduli[{at}]", heads, "heads")]
            for at, order in enumerate(moduli)
        ],
        "num_rows": _integer(layer["num_rows"], f"{where}.num_rows"),
    }


def _list(value: Any, where: str, length: int, of: str) -> list:
    if not isinstance(value, list):
        raise NoAnswer(f"{where}: a list of {length} {of} expected, got {_shown(value)}")
    if len(value) != length:
        raise NoAnswer(f"{where}: {length} {of} expected, got {len(value)}")
    return value


def _integer(value: Any, where: str) -> int:
    if type(value) is not int:
        raise NoAnswer(f"{where}: an integer expected, got {_shown(value)}")
    return value


def _decimal(value: Any, where: str) -> int:
    if isinstance(value, str) and re.fullmatch("-?[0-9]{1,20}", value):
        return int(value)
    return _integer(value, where)


def _shown(value: Any) -> str:
    text = one_line(repr(value) if not isinstance(value, list | dict) or len(value) < 50 else f"{len(value)} entries")
    return text if len(text) <= 60 else f"{text[:57]}..."
