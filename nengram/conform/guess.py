"""Which known bug would have given exactly these numbers.

Every bug, and every pair of bugs in different steps, is run on the questions that were answered wrongly. One that gives the very
numbers found is named; nothing here looks at names or code, so a guess is a calculation. The simplest explanation of most answers wins.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from nengram.conform import bugs
from nengram.conform.classes import CLASS_BUGS
from nengram.conform.vectors import Case, ClassCase, Setting


@dataclass(frozen=True)
class Observation:
    """A question that was answered: a case of a setting, the setting's numbers (case None) or classes (setting None)."""

    setting: Setting | None
    case: Case | ClassCase | None
    expected: Any
    got: Any

    @property
    def wrong(self) -> bool:
        """Whether the answer is not the expected one."""
        return self.expected != self.got


@dataclass(frozen=True)
class Guess:
    """A known bug, and how many of the wrong answers it reproduces to the last number."""

    bug: str
    explained: int
    wrong: int

    def __str__(self) -> str:
        return f"{self.bug} (gives {self.explained} of {self.wrong} wrong answers exactly)"


def guess(observed: Iterable[Observation]) -> Guess | None:
    """The bug that explains most wrong answers, or None if there are none or no known bug explains one."""
    observed = list(observed)
    rows = _best_of_hash([one for one in observed if one.setting is not None])
    classes = _best_of_classes([one for one in observed if one.setting is None])
    found = [one for one in (rows, classes) if one is not None]
    if not found:
        return None
    wrong = sum(one.wrong for one in observed)
    return Guess("; ".join(one.bug for one in found), sum(one.explained for one in found), wrong)


def _best_of_hash(observed: list[Observation]) -> Guess | None:
    """The best single bug; if that is not all, the best pair; if that is not all, the best that one more makes of it."""
    wrong, right = ([one for one in observed if one.wrong is flag] for flag in (True, False))
    if not wrong:
        return None
    best = _best(bugs.SINGLE, wrong, right, None)
    if best is None or best.wrong_explained < len(wrong):
        best = _best(bugs.pairs(), wrong, right, best)
    if best is not None and best.wrong_explained < len(wrong):
        more = (best.hypothesis.joined(one) for one in bugs.SINGLE)
        best = _best([one for one in more if one is not None], wrong, right, best)
    return None if best is None else Guess(" + ".join(best.hypothesis.bugs), best.wrong_explained, len(wrong))


@dataclass(frozen=True)
class _Scored:
    """A hypothesis, the wrong answers that it gives, and the right ones that it leaves right."""

    hypothesis: bugs.Hypothesis
    wrong_explained: int
    right_explained: int

    @property
    def score(self) -> tuple[int, int]:
        return self.wrong_explained, self.right_explained


def _best(
    hypotheses: Iterable[bugs.Hypothesis], wrong: list[Observation], right: list[Observation], best: _Scored | None
) -> _Scored | None:
    """The first of the highest score, or `best` if none is higher."""
    for hypothesis in hypotheses:
        explained = _explained(wrong, hypothesis.steps)
        if not explained or (best is not None and explained < best.wrong_explained):
            continue
        scored = _Scored(hypothesis, explained, _explained(right, hypothesis.steps))
        if best is None or scored.score > best.score:
            best = scored
        if best.score == (len(wrong), len(right)):
            break
    return best


def _explained(observed: list[Observation], steps: bugs.Steps) -> int:
    """How many answers these steps give exactly; the first wrong rows of a setting end that setting, to save time."""
    explained = 0
    for _, group in groupby(observed, key=lambda one: one.setting.name):
        group = list(group)
        layers = bugs.numbers(group[0].setting, steps)
        for one in group:
            same = _same_numbers(one, layers) if one.case is None else _same_rows(one, steps, layers)
            explained += same
            if not same and one.case is not None:
                break
    return explained


def _same_rows(one: Observation, steps: bugs.Steps, layers: list[dict]) -> bool:
    return bugs.rows(one.setting, one.case.calls, steps, layers) == one.got


def _same_numbers(one: Observation, layers: list[dict]) -> bool:
    return all(
        layer["multipliers"] == found["multipliers"] and [list(heads) for heads in layer["moduli"]] == found["moduli"]
        for layer, found in zip(layers, one.got, strict=True)
    )


def _best_of_classes(observed: list[Observation]) -> Guess | None:
    wrong = [one for one in observed if one.wrong]
    counts = {
        bug: sum(list(classes(one.case.tokens)) == one.got for one in wrong) for bug, classes in CLASS_BUGS.items()
    }
    bug = max(counts, key=counts.get)
    return Guess(bug, counts[bug], len(wrong)) if counts[bug] else None
