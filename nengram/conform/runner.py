"""Ask every question, compare every answer, and say where the first difference is and which known bug gives exactly those numbers.

An implementation that cannot express a question says so, and that is counted apart: it neither passes nor fails. One that
crashes, hangs or babbles loses that question and gets the next; after a few such losses the rest is not asked, because by then the
finding is made.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from nengram.conform import answers
from nengram.conform.guess import Guess, Observation, guess
from nengram.conform.protocol import Implementation, NoAnswer
from nengram.conform.vectors import Case, ClassCase, Setting, Vectors

MOST_LOSSES = 3


@dataclass(frozen=True)
class Difference:
    """The first place where an answer is not the expected one: `place` names layer, sequence, position, slot and the like."""

    place: dict[str, Any]
    expected: Any
    got: Any


@dataclass(frozen=True)
class Outcome:
    """How one question went. `kind`: rows, numbers, classes. `status`: passed, differs, no answer, not offered, not asked; `said`:
    the reason of the last three. `right` of `compared` row numbers are the expected ones, where rows were answered.
    """

    setting: str
    case: str
    kind: str
    status: str
    needs: tuple[str, ...] = ()
    said: str = ""
    difference: Difference | None = None
    right: int = 0
    compared: int = 0


@dataclass(frozen=True)
class Report:
    """All outcomes of one dialect, and the guess if something differs."""

    dialect: str
    outcomes: tuple[Outcome, ...]
    guess: Guess | None = None

    def count(self, status: str, kind: str = "") -> int:
        """How many questions ended so; only those of one kind, if given."""
        return sum(outcome.status == status and kind in ("", outcome.kind) for outcome in self.outcomes)

    @property
    def asked(self) -> int:
        """Questions that the implementation had to answer."""
        return len(self.outcomes) - self.count("not offered")

    @property
    def passed(self) -> int:
        """Questions answered rightly."""
        return self.count("passed")

    @property
    def clean(self) -> bool:
        """Whether something was asked and all of it was answered rightly."""
        return 0 < self.asked == self.passed

    def first(self, status: str) -> Outcome | None:
        """The first question that ended so."""
        return next((outcome for outcome in self.outcomes if outcome.status == status), None)


@dataclass
class _Run:
    """What is known so far."""

    outcomes: list[Outcome] = field(default_factory=list)
    observed: list[Observation] = field(default_factory=list)
    losses: int = 0


@dataclass(frozen=True)
class _Question:
    """One question: what to send, how to read the answer, what it should be, and where two such differ."""

    setting: Setting | None
    case: Case | ClassCase | None
    name: str
    needs: tuple[str, ...]
    sent: dict[str, Any]
    read: Callable[[Any], Any]
    expected: Any
    differs: Callable[[Any, Any], Difference]


def about(implementation: Implementation) -> dict[str, str]:
    """What the implementation calls itself; empty if it does not say."""
    try:
        return answers.about_of(implementation.ask({"ask": "about"}))
    except NoAnswer:
        return {}


def conform(implementation: Implementation, vectors: Vectors) -> Report:
    """Ask all questions of a dialect. Raises ConfigError if a command cannot be started at all."""
    run = _Run()
    for question in _questions(vectors):
        if run.losses >= MOST_LOSSES:
            run.outcomes.append(_outcome(question, "not asked", f"{MOST_LOSSES} questions before got no answer"))
        else:
            _ask(implementation, question, run)
    return Report(vectors.dialect, tuple(run.outcomes), guess(run.observed))


def _ask(implementation: Implementation, question: _Question, run: _Run) -> None:
    try:
        raw = implementation.ask(question.sent)
    except NoAnswer as lost:
        run.losses += 1
        run.outcomes.append(_outcome(question, "no answer", str(lost)))
        return
    try:
        found = question.read(raw)
    except answers.NotOffered as reason:
        run.outcomes.append(_outcome(question, "not offered", str(reason)))
    except NoAnswer as wrong:
        run.outcomes.append(_outcome(question, "no answer", str(wrong)))
    else:
        same = found == question.expected
        difference = None if same else question.differs(question.expected, found)
        right = _rows_alike(question.expected, found) if question.sent["ask"] == "rows" else (0, 0)
        run.outcomes.append(_outcome(question, "passed" if same else "differs", "", difference, right))
        run.observed.append(Observation(question.setting, question.case, question.expected, found))


def _outcome(
    question: _Question,
    status: str,
    said: str = "",
    difference: Difference | None = None,
    right: tuple[int, int] = (0, 0),
) -> Outcome:
    setting = question.setting.name if question.setting else "classes"
    return Outcome(setting, question.name, question.sent["ask"], status, question.needs, said, difference, *right)


def _rows_alike(expected: list[dict], got: list[dict]) -> tuple[int, int]:
    """How many row numbers are the expected ones, and how many there are."""
    pairs = [
        (row, found)
        for right, answer in zip(expected, got, strict=True)
        for layer, rows_BTS in right.items()
        for sequences in zip(rows_BTS, answer[layer], strict=True)
        for positions in zip(*sequences, strict=True)
        for row, found in zip(*positions, strict=True)
    ]
    return sum(row == found for row, found in pairs), len(pairs)


def _questions(vectors: Vectors) -> Iterator[_Question]:
    for setting in vectors.settings:
        described = setting.described()
        yield _numbers_question(setting, described)
        for case in setting.cases:
            yield _rows_question(setting, described, case)
    for case in vectors.classes:
        yield _classes_question(case)


def _numbers_question(setting: Setting, described: dict[str, Any]) -> _Question:
    expected = [
        {
            "layer_id": layer.layer_id,
            "multipliers": list(layer.multipliers),
            "moduli": [list(heads) for heads in layer.moduli],
            "num_rows": layer.num_rows,
        }
        for layer in setting.spec.layers
    ]
    without = {key: value for key, value in described.items() if key != "layers"}
    sent = {"ask": "numbers", "setting": without}
    return _Question(
        setting, None, "numbers", (), sent, lambda raw: answers.numbers_of(raw, setting), expected, _numbers_differ
    )


def _rows_question(setting: Setting, described: dict[str, Any], case: Case) -> _Question:
    sent = {"ask": "rows", "setting": described, "calls": list(case.calls)}
    return _Question(
        setting,
        case,
        case.name,
        case.needs,
        sent,
        lambda raw: answers.rows_of(raw, setting, case),
        list(case.rows),
        lambda expected, got: _rows_differ(expected, got, setting),
    )


def _classes_question(case: ClassCase) -> _Question:
    def differs(expected: list[int], got: list[int]) -> Difference:
        at = next(at for at, pair in enumerate(zip(expected, got, strict=True)) if pair[0] != pair[1])
        return Difference({"token": at, "text": case.tokens[at]}, expected[at], got[at])

    sent = {"ask": "classes", "tokens": list(case.tokens)}
    return _Question(
        None, case, case.name, (), sent, lambda raw: answers.classes_of(raw, case), list(case.classes), differs
    )


def _rows_differ(expected: list[dict], got: list[dict], setting: Setting) -> Difference:
    """The first differing row: by call, then position, then sequence, so that the earliest place in a text comes first."""
    for call, (right, found) in enumerate(zip(expected, got, strict=True)):
        places = (
            (t, b, layer, slot)
            for layer, rows_BTS in right.items()
            for b, rows_TS in enumerate(rows_BTS)
            for t, row_S in enumerate(rows_TS)
            for slot, row in enumerate(row_S)
            if row != found[layer][b][t][slot]
        )
        first = min(places, key=lambda place: (place[0], place[1], int(place[2]), place[3]), default=None)
        if first is not None:
            t, b, layer, slot = first
            place = {"call": call} if len(expected) > 1 else {}
            order, head = 2 + slot // setting.spec.heads, slot % setting.spec.heads
            place |= {"layer": int(layer), "sequence": b, "position": t, "slot": slot, "order": order, "head": head}
            return Difference(place, right[layer][b][t][slot], found[layer][b][t][slot])
    raise AssertionError("equal rows have no difference")


def _numbers_differ(expected: list[dict], got: list[dict]) -> Difference:
    for right, found in zip(expected, got, strict=True):
        layer = {"layer": right["layer_id"]}
        if right["layer_id"] != found["layer_id"]:
            return Difference(layer | {"number": "layer_id"}, right["layer_id"], found["layer_id"])
        for lag, pair in enumerate(zip(right["multipliers"], found["multipliers"], strict=True)):
            if pair[0] != pair[1]:
                return Difference(layer | {"number": "multiplier", "lag": lag}, *pair)
        for order, heads in enumerate(zip(right["moduli"], found["moduli"], strict=True), start=2):
            for head, pair in enumerate(zip(*heads, strict=True)):
                if pair[0] != pair[1]:
                    return Difference(layer | {"number": "modulus", "order": order, "head": head}, *pair)
        if right["num_rows"] != found["num_rows"]:
            return Difference(layer | {"number": "num_rows"}, right["num_rows"], found["num_rows"])
    raise AssertionError("equal numbers have no difference")
