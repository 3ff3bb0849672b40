"""Vectors are questions with known answers, in files that any language can read: `conformance/v1/<dialect>.json`.

A *setting* is one set of sizes and seeds with the numbers that follow from them: an implementation may build itself from the
former or take the latter. Each *case* is one question in that setting: ids, in one or several calls with what is remembered between
them, and the row of every position and slot. A third kind of question, *classes*, asks which tokens share a compressed id.

Multipliers are decimal strings, because they exceed the 53 bits that many JSON readers keep of a number; all other numbers fit. A
format that is published does not change: other questions are another folder beside `v1`.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nengram.address import AddressSpec, LayerSpec
from nengram.config import shipped
from nengram.errors import DataError, nearest

FORMAT = 1
DIALECTS = ("engram", "deepseek_v41", "qwen_ple")
ABILITIES = ("starts", "blocked", "state", "negative_ids")
"""What a case may need beside plain ids. An implementation without it says so; such a case is never counted as passed."""

Rows = list[list[list[int]]]  # [B][T][S]


@dataclass(frozen=True)
class Case:
    """One question about rows. `calls`: each has `ids` [B][T] and, where needed, `starts` and `blocked` of the same shape.

    `rows`: of each call, the rows [B][T][S] of every layer, by layer id in decimal.
    """

    name: str
    covers: str
    calls: tuple[dict[str, list], ...]
    rows: tuple[dict[str, Rows], ...]

    @property
    def needs(self) -> tuple[str, ...]:
        """The abilities that the question takes for granted."""
        used = {
            "starts": any("starts" in call for call in self.calls),
            "blocked": any("blocked" in call for call in self.calls),
            "state": len(self.calls) > 1,
            "negative_ids": any(_has_negative(call) for call in self.calls),
        }
        return tuple(ability for ability in ABILITIES if used[ability])


@dataclass(frozen=True)
class Setting:
    """Sizes and seeds, and the numbers that they make.

    `parameters`: as the dialect's constructor of `AddressSpec` takes them. `pad_id`: the raw id whose compressed id fills what
    cannot be seen; `lookup`: the compressed id of every raw id, where raw and compressed ids differ.
    """

    name: str
    covers: str
    parameters: dict[str, Any]
    spec: AddressSpec
    pad_id: int
    lookup: tuple[int, ...]
    cases: tuple[Case, ...]

    def described(self) -> dict[str, Any]:
        """The setting as a question carries it: plain JSON."""
        spec = self.spec
        return {
            "name": self.name,
            "dialect": spec.dialect,
            "parameters": self.parameters,
            "compressed_vocab_size": spec.compressed_vocab_size,
            "max_order": spec.max_order,
            "heads": spec.heads,
            "pad_id": self.pad_id,
            "pad_cid": spec.pad_cid,
            "end_cid": spec.end_cid if spec.end_cid >= 0 else None,  # not -1, which a hash may meet as an id
            "lookup": list(self.lookup),
            "layers": [layer_numbers(spec, layer) for layer in spec.layers],
        }


@dataclass(frozen=True)
class ClassCase:
    """Which of these tokens share a compressed id: classes numbered 0, 1, ... by first appearance."""

    name: str
    covers: str
    tokens: tuple[str, ...]
    classes: tuple[int, ...]


@dataclass(frozen=True)
class Vectors:
    """All questions of one dialect."""

    dialect: str
    settings: tuple[Setting, ...]
    classes: tuple[ClassCase, ...]

    def __len__(self) -> int:
        """Questions in all; the numbers of each setting are one."""
        return sum(1 + len(setting.cases) for setting in self.settings) + len(self.classes)


def layer_numbers(spec: AddressSpec, layer: LayerSpec) -> dict[str, Any]:
    """The numbers of one layer as plain JSON."""
    return {
        "layer_id": layer.layer_id,
        "block_index": layer.block_index,
        "multipliers": [str(multiplier) for multiplier in layer.multipliers],
        "moduli": [list(heads) for heads in layer.moduli],
        "offsets": spec.offsets(layer.layer_id).tolist(),
        "num_rows": layer.num_rows,
    }


def folder() -> Path:
    """Where the vectors of this format are."""
    return shipped("conformance") / f"v{FORMAT}"


def load(dialect: str) -> Vectors:
    """The vectors of a dialect. Raises DataError if there are none, or the file is damaged."""
    if dialect not in DIALECTS:
        raise DataError(
            f'no vectors of dialect "{dialect}"{nearest(dialect, DIALECTS)}; there are {", ".join(DIALECTS)}'
        )
    path = folder() / f"{dialect}.json"
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"conformance vectors {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"conformance vectors {path}: damaged: {error}") from None


def parse(text: str) -> Vectors:
    """Vectors from their file's text. Raises ValueError, KeyError, TypeError or AddressError where it is not one."""
    content = json.loads(text)
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']} is not known, this program reads {FORMAT}")
    settings = tuple(_setting(content["dialect"], one) for one in content["settings"])
    return Vectors(content["dialect"], settings, tuple(_class_case(one) for one in content["classes"]))


def dump(vectors: Vectors) -> str:
    """The text of a vectors file: a line for every question, so that a change is one line of a diff."""
    settings = [_setting_text(setting) for setting in vectors.settings]
    classes = [_compact(vars(case)) for case in vectors.classes]
    head = f'"format": {FORMAT},\n"dialect": {_compact(vectors.dialect)},\n'
    return f'{{{head}"settings": [\n{_lines(settings)}\n],\n"classes": [\n{_lines(classes)}\n]}}\n'


def _setting_text(setting: Setting) -> str:
    content = {"name": setting.name, "covers": setting.covers} | setting.described()
    lines = [f"{_compact(key)}: {_compact(value)}" for key, value in content.items() if key != "dialect"]
    cases = _lines(_compact(vars(case) | {"needs": case.needs}) for case in setting.cases)
    return "{" + ",\n".join([*lines, f'"cases": [\n{cases}\n]']) + "}"


def _setting(dialect: str, content: dict[str, Any]) -> Setting:
    spec = AddressSpec(
        version=1,
        dialect=dialect,
        compressed_vocab_size=content["compressed_vocab_size"],
        max_order=content["max_order"],
        heads=content["heads"],
        pad_cid=content["pad_cid"],
        boundary="sequence" if content["end_cid"] is None else "eos",
        layers=tuple(_layer(layer) for layer in content["layers"]),
    )
    cases = tuple(
        Case(case["name"], case["covers"], tuple(case["calls"]), tuple(case["rows"])) for case in content["cases"]
    )
    plain = (content["name"], content["covers"], content["parameters"])
    return Setting(*plain, spec, content["pad_id"], tuple(content["lookup"]), cases)


def _layer(content: dict[str, Any]) -> LayerSpec:
    multipliers, moduli = map(int, content["multipliers"]), map(tuple, content["moduli"])
    return LayerSpec(
        content["layer_id"], content["block_index"], tuple(multipliers), tuple(moduli), content["num_rows"]
    )


def _class_case(content: dict[str, Any]) -> ClassCase:
    return ClassCase(content["name"], content["covers"], tuple(content["tokens"]), tuple(content["classes"]))


def _has_negative(call: dict[str, list]) -> bool:
    """Whether an id that is read is negative; what is blocked is not."""
    nothing = [[False] * len(ids) for ids in call["ids"]]
    pairs = zip(call["ids"], call.get("blocked", nothing), strict=True)
    return any(one < 0 and not hidden for ids, flags in pairs for one, hidden in zip(ids, flags, strict=True))


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _lines(parts: Iterable[str]) -> str:
    return ",\n".join(parts)
