"""This package as one implementation among others: its fast paths, from sizes and seeds to rows, asked by the same protocol.

Nothing is taken from the question but ids, sizes and seeds: multipliers and moduli are derived again.
"""

import json
import sys
from functools import lru_cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from nengram.address import Addresser, AddressSpec
from nengram.conform.cases import MAKERS
from nengram.conform.vectors import layer_numbers
from nengram.text.compress import CompressionMap


class Own:
    """The callable. `backend`: as `Addresser` takes it."""

    def __init__(self, backend: str = "numba") -> None:
        self._backend = backend

    def __call__(self, question: dict[str, Any]) -> dict[str, Any]:
        """The answer to any question of the protocol."""
        answers = {"about": self._about, "numbers": _numbers, "rows": self._rows, "classes": _classes}
        return answers[question["ask"]](question)

    def _about(self, question: dict[str, Any]) -> dict[str, Any]:
        return {"name": "nengram", "version": sys.modules["nengram"].__version__}  # loaded before any of its rooms

    def _rows(self, question: dict[str, Any]) -> dict[str, Any]:
        address = Addresser(_spec(question["setting"]), backend=self._backend)
        state, rows = address.new_state(len(question["calls"][0]["ids"])), []
        for call in question["calls"]:
            ids_BT = np.array(call["ids"], dtype=np.int64)
            starts_BT, blocked_BT = (
                np.array(call[name], dtype=bool) if name in call else None for name in ("starts", "blocked")
            )
            if (ids_BT[blocked_BT is None or ~blocked_BT] < 0).any():
                return {"not_offered": "an id below zero is refused, not hashed"}
            rows.append(address(ids_BT, start_BT=starts_BT, blocked_BT=blocked_BT, state=state))
        return {"rows": rows}


def _numbers(question: dict[str, Any]) -> dict[str, Any]:
    spec = _spec(question["setting"])
    return {"layers": [layer_numbers(spec, layer) for layer in spec.layers]}


def _classes(question: dict[str, Any]) -> dict[str, Any]:
    """A vocabulary of just these tokens has them as ids in their order; a token asked twice is one id."""
    ids = {token: at for at, token in enumerate(dict.fromkeys(question["tokens"]))}
    cids_V = CompressionMap.build(Tokenizer(WordLevel(ids, unk_token=question["tokens"][0]))).cids_V
    return {"classes": [int(cids_V[ids[token]]) for token in question["tokens"]]}


def _spec(setting: dict[str, Any]) -> AddressSpec:
    return _spec_of(setting["dialect"], json.dumps(setting["parameters"]))


@lru_cache(maxsize=8)
def _spec_of(dialect: str, parameters: str) -> AddressSpec:
    return MAKERS[dialect](**json.loads(parameters))
