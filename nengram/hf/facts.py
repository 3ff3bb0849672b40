"""Questions whose answers a memory may hold: named entities of the bundled dictionary, asked in words they were not told in.

Training text says "Aalto, Alvar Aalto: Finnish architect and designer of furniture (1898-1976)." Asked is "Aalto is", with four
endings to choose from, and the years that belong to "The life dates of Alvar Aalto:". No n-gram of the question stands in the
training text as it is asked, so verbatim continuation does not answer it.

A model may guess from the sound of a name, or from how long a gloss is. What that is worth is measured, not argued: the same questions
are made of entries that fell in the test split, which no training has shown. Recall is what the shown ones have above these.
"""

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from nengram.errors import DataError
from nengram.files import sha256_bytes
from nengram.text import Entry, read_corpus, split_of

SOURCE = "wordnet"
DATES = re.compile(r" \((\d{4}-\d{4})\)")
CHOICES, MOST, NEAR = 4, 200, 12
PARTS = {"shown": "train", "never": "test"}  # what a question is called, and the split its entry is in


@dataclass(frozen=True)
class Fact:
    """One named entity. dates: years of birth and death, where they are known."""

    names: tuple[str, ...]
    gloss: str
    dates: str | None

    @property
    def full_name(self) -> str:
        """The first name of two or more words, else the first."""
        return next((name for name in self.names if " " in name), self.names[0])


def facts_of(entries: Iterable[Entry], split: str) -> list[Fact]:
    """The facts of one split, in an order that has nothing to do with their names, so that the first n are a sample.

    Raises: DataError when there are fewer than a question has choices.
    """
    found = {}
    for entry in entries:
        if entry.source == SOURCE and split_of(entry.source, entry.key) == split and (fact := _fact(entry)):
            found[sha256_bytes(entry.key.encode())] = fact
    if len(found) < CHOICES:
        raise DataError(f'{len(found)} facts in the {split} split: questions need the entries of source "{SOURCE}"')
    return [found[digest] for digest in sorted(found)]


def choice_questions(facts: list[Fact], most: int = MOST) -> Iterator[dict[str, Any]]:
    """`{question, choices, answer}`: the gloss of a name among three others of the same kind and about the same length."""
    rng = random.Random(0)
    glosses = {
        known: sorted({f.gloss for f in facts if (f.dates is not None) == known}, key=_length)
        for known in (True, False)
    }
    for fact in facts[:most]:
        others = glosses[fact.dates is not None]
        at = others.index(fact.gloss)
        near = others[max(0, at - NEAR) : at] + others[at + 1 : at + 1 + NEAR]
        if len(near) < CHOICES - 1:
            continue
        choices = [fact.gloss, *rng.sample(near, CHOICES - 1)]
        rng.shuffle(choices)
        yield {"question": f"{fact.names[0]} is", "choices": choices, "answer": choices.index(fact.gloss)}


def date_questions(facts: list[Fact], most: int = MOST) -> Iterator[dict[str, Any]]:
    """`{question, answer}`: the years of a person's life."""
    dated = [fact for fact in facts if fact.dates]
    for fact in dated[:most]:
        yield {"question": f"The life dates of {fact.full_name}:", "answer": fact.dates}


@cache
def bundled_entries() -> tuple[Entry, ...]:
    """The text that comes along. Raises: DataError when it is not installed."""
    return tuple(read_corpus("bundled"))


def _fact(entry: Entry) -> Fact | None:
    names, colon, gloss = entry.text.partition("\n")[0].partition(": ")
    dates = DATES.search(gloss)
    gloss = DATES.sub("", gloss).split(";")[0].strip().rstrip(".")
    if not colon or not gloss or gloss.startswith("("):
        return None
    return Fact(tuple(names.split(", ")), gloss, dates[1] if dates else None)


def _length(gloss: str) -> tuple[int, str]:
    return len(gloss), gloss
