"""The hash in plain integers with every step replaceable: a known bug is one step replaced by a wrong one.

So the same few lines serve twice. Run with a wrong step they are a broken implementation, which the tests hand to the runner; and
when a stranger's rows differ, each bug says what it would have answered instead, and the one that gives the stranger's very numbers
is named. Bugs of different steps combine: one implementation in the wild has two at once.

With no step replaced this is `nengram.address.reference` again, spelled by steps; a test holds the two equal.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations
from operator import xor
from typing import Any

from nengram.address import reference
from nengram.address.dialects import Moduli, ascending_primes
from nengram.conform.vectors import Setting

Windows = list[list[int]]
Call = dict[str, list]


def look_back(
    cids: Sequence[int], starts: list | None, blocked: list | None, depth: int, pad: int, end: int
) -> Windows:
    """The ids each position may see, `depth` of them, the current one first."""
    return reference.windows(cids, max_order=depth, pad_cid=pad, starts=starts, blocked=blocked, end_cid=end_of(end))


def end_of(end_cid: int) -> int:
    """A spec's end of text for the reference: where there is none, what no id is, not even one of -1 that was hashed by mistake."""
    return end_cid if end_cid >= 0 else -(2**63)


def shared_primes(setting: Setting) -> list[Moduli]:
    """The moduli of every layer, as the vectors have them."""
    return [layer.moduli for layer in setting.spec.layers]


@dataclass(frozen=True)
class Steps:
    """One hash, step by step; the defaults are right.

    moduli: of every layer. drawn: a multiplier as it is kept. pad: the id that fills what cannot be seen. look_back: what a position
    may see. lags: which of that an order hashes, current first. weights: the multipliers of an order, current first. product: of
    id and multiplier. headed: the mix as a head takes it. remainder: by the modulus. first_row: of a slot in its table. order_of:
    the slots of a position, order-major. carried: whether a call goes on where the last one ended.
    """

    moduli: Callable[[Setting], list[Moduli]] = shared_primes
    drawn: Callable[[int], int] = int
    pad: Callable[[Setting], int] = lambda setting: setting.spec.pad_cid
    look_back: Callable[..., Windows] = look_back
    lags: Callable[[int, int], Sequence[int]] = lambda order, max_order: range(order)
    weights: Callable[[Sequence[int], int], Sequence[int]] = lambda multipliers, order: multipliers[:order]
    product: Callable[[int, int], int] = lambda cid, multiplier: cid * multiplier
    headed: Callable[[int, int], int] = lambda mix, head: mix
    remainder: Callable[[int, int], int] = lambda mix, modulus: mix % modulus
    first_row: Callable[[int], int] = int
    order_of: Callable[[list[int], int], list[int]] = lambda slots, heads: slots
    carried: bool = True


def numbers(setting: Setting, steps: Steps) -> list[dict[str, Any]]:
    """Layer id, multipliers and moduli of every layer, as these steps make them."""
    return [
        {"layer_id": layer.layer_id, "multipliers": [steps.drawn(m) for m in layer.multipliers], "moduli": moduli}
        for layer, moduli in zip(setting.spec.layers, steps.moduli(setting), strict=True)
    ]


def rows(
    setting: Setting, calls: Sequence[Call], steps: Steps, layers: list[dict] | None = None
) -> list[dict[str, list]]:
    """The rows of every call by layer, as these steps make them. `layers`: what `numbers` gave, made here if None."""
    layers = numbers(setting, steps) if layers is None else layers
    if not steps.carried or len(calls) == 1:
        return [_rows_of_call(setting, call, layers, steps) for call in calls]
    whole = _rows_of_call(setting, _joined(calls), layers, steps)
    parts, at = [], 0
    for call in calls:
        length = len(call["ids"][0])
        parts.append({id_: [seq[at : at + length] for seq in rows_BTS] for id_, rows_BTS in whole.items()})
        at += length
    return parts


def _joined(calls: Sequence[Call]) -> Call:
    """Several calls as one; a flag that only some of them set is false in the others."""
    joined: Call = {}
    for field in {field for call in calls for field in call}:
        blanks = ([[False] * len(ids) for ids in call["ids"]] for call in calls)
        parts = [call.get(field, blank) for call, blank in zip(calls, blanks, strict=True)]
        joined[field] = [sum((part[b] for part in parts), []) for b in range(len(calls[0]["ids"]))]
    return joined


def _rows_of_call(setting: Setting, call: Call, layers: list[dict], steps: Steps) -> dict[str, list]:
    spec, pad = setting.spec, steps.pad(setting)
    seen_BT = [
        steps.look_back(ids, starts, blocked, spec.max_order + 1, pad, spec.end_cid)
        for ids, starts, blocked in zip(call["ids"], *_flags(call), strict=True)
    ]
    return {
        str(layer["layer_id"]): [[_slots(window, layer, spec.max_order, steps) for window in seen] for seen in seen_BT]
        for layer in layers
    }


def _flags(call: Call) -> list[list]:
    nothing = [None] * len(call["ids"])
    return [call.get(field, nothing) for field in ("starts", "blocked")]


def _slots(window: list[int], layer: dict[str, Any], max_order: int, steps: Steps) -> list[int]:
    """The rows of one position in one layer, slot by slot."""
    found, offset = [], 0
    for order, heads in enumerate(layer["moduli"], start=2):
        lags = steps.lags(order, max_order)
        weighted = zip(lags, steps.weights(layer["multipliers"], order), strict=False)
        mix = reduce(xor, (steps.product(window[lag], multiplier) for lag, multiplier in weighted))
        for head, modulus in enumerate(heads):
            found.append(steps.first_row(offset) + steps.remainder(steps.headed(mix, head), modulus))
            offset += modulus
    return steps.order_of(found, len(layer["moduli"][0]))


def _left_of_longest(order: int, max_order: int) -> Sequence[int]:
    return range(max_order - order, max_order)


def _primes_by_layer(setting: Setting) -> list[Moduli]:
    return [ascending_primes(1, rows_per_head=_nominal(setting), heads=setting.spec.heads)[0]] * len(
        setting.spec.layers
    )


def _primes_by_order(setting: Setting) -> list[Moduli]:
    heads = setting.spec.heads
    alone = [ascending_primes(1, rows_per_head=[rows], heads=heads)[0][0] for rows in _nominal(setting)]
    return [tuple(alone)] * len(setting.spec.layers)


def _primes_by_sorted_layers(setting: Setting) -> list[Moduli]:
    ids, moduli = setting.spec.layer_ids, shared_primes(setting)
    return [moduli[sorted(ids).index(layer_id)] for layer_id in ids]


def _nominal(setting: Setting) -> list[int]:
    rows_per_head = setting.parameters["rows_per_head"]
    orders = setting.spec.max_order - 1
    return [rows_per_head] * orders if isinstance(rows_per_head, int) else list(rows_per_head)


def _truncated(mix: int, modulus: int) -> int:
    return mix % modulus if mix >= 0 else -(-mix % modulus)


def _without_starts(cids, starts, blocked, depth, pad, end):
    return look_back(cids, None, blocked, depth, pad, end)


def _without_blocks(cids, starts, blocked, depth, pad, end):
    return look_back(cids, starts, None, depth, pad, end)


def _beyond_blocks(cids, starts, blocked, depth, pad, end):
    """A blocked position reads as pad, but later windows go on looking beyond it."""
    hidden = blocked if blocked is not None else [False] * len(cids)
    padded = [pad if flag else cid for cid, flag in zip(cids, hidden, strict=True)]
    return look_back(padded, starts, None, depth, pad, end)


def _without_ends(cids, starts, blocked, depth, pad, end):
    return look_back(cids, starts, blocked, depth, pad, -1)


def _ends_hide_their_text(cids, starts, blocked, depth, pad, end):
    begins = starts if starts is not None else [False] * len(cids)
    begins = [flag or cid == end_of(end) for cid, flag in zip(cids, begins, strict=True)]
    return look_back(cids, begins, blocked, depth, pad, end)


def _head_major(slots: list[int], heads: int) -> list[int]:
    return [slots[at] for head in range(heads) for at in range(head, len(slots), heads)]


BUGS: dict[str, tuple[dict[str, Any], ...]] = {
    "window off by one": (
        {"lags": lambda order, max_order: range(1, order + 1)},
        {"lags": lambda order, max_order: range(order - 1)},
    ),
    "short n-grams at the left end of the longest window": ({"lags": _left_of_longest},),
    "reversed multipliers": (
        {"weights": lambda multipliers, order: multipliers[:order][::-1]},
        {"weights": lambda multipliers, order: multipliers[::-1][:order]},
    ),
    "pad not compressed": ({"pad": lambda setting: setting.pad_id},),
    "pad is zero": ({"pad": lambda setting: 0},),
    "primes restarted per layer": ({"moduli": _primes_by_layer},),
    "primes restarted per order": ({"moduli": _primes_by_order},),
    "primes handed out by ascending layer id": ({"moduli": _primes_by_sorted_layers},),
    "rounded multipliers": (
        {"drawn": lambda multiplier: int(float(multiplier))},
        {"product": lambda cid, multiplier: int(float(cid) * float(multiplier))},
    ),
    "signed modulo": ({"remainder": _truncated},),
    "mixed-in head index": (
        {"headed": lambda mix, head: mix ^ head},
        {"headed": lambda mix, head: mix + head},
        {"headed": lambda mix, head: mix ^ (head + 1)},
        {"headed": lambda mix, head: mix + head + 1},
    ),
    "offsets of the slots missing": ({"first_row": lambda offset: 0},),
    "slots head-major": ({"order_of": _head_major},),
    "document starts ignored": ({"look_back": _without_starts},),
    "blocked positions ignored": ({"look_back": _without_blocks},),
    "look-back goes on beyond a blocked position": ({"look_back": _beyond_blocks},),
    "end of text ignored": ({"look_back": _without_ends},),
    "end of text does not see its own text": ({"look_back": _ends_hide_their_text},),
    "state not carried from call to call": ({"carried": False},),
}
"""Each bug's ways to be wrong. One more, "combining marks", is of the compression: `classes.py`."""


def broken(bug: str, way: int = 0) -> Steps:
    """The hash with one known bug."""
    return replace(Steps(), **BUGS[bug][way])


@dataclass(frozen=True)
class Hypothesis:
    """One known bug or several at once: their names, and the steps that they replace."""

    bugs: tuple[str, ...]
    change: tuple[tuple[str, Any], ...]

    @property
    def steps(self) -> Steps:
        """The hash that has them."""
        return replace(Steps(), **dict(self.change))

    def joined(self, other: "Hypothesis") -> "Hypothesis | None":
        """Both at once, or None where they replace the same step."""
        if dict(self.change).keys() & dict(other.change).keys():
            return None
        return Hypothesis(self.bugs + other.bugs, self.change + other.change)


SINGLE = tuple(Hypothesis((bug,), tuple(change.items())) for bug, ways in BUGS.items() for change in ways)


def pairs() -> Iterator[Hypothesis]:
    """Every two bugs that touch different steps."""
    both = (one.joined(other) for one, other in combinations(SINGLE, 2))
    return (hypothesis for hypothesis in both if hypothesis is not None)
