"""Which tokens share a compressed id, asked with a handful of strings instead of a tokenizer of megabytes.

A wrong class is worse than a wrong row: the number of classes is in the bound of every multiplier, so one merge more or fewer moves
every row of every table. The known slip is to drop accents (category Mn) and to keep the spacing and enclosing marks (Mc, Me): Bengali
and Devanagari vowel signs then stay, and a 128k vocabulary has 99,045 ids instead of 98,627.
"""

from collections.abc import Callable, Sequence

from nengram.conform.vectors import ClassCase
from nengram.text.compress_reference import number_by_first_appearance, token_key


def classes_of(tokens: Sequence[str]) -> tuple[int, ...]:
    """The compressed ids of a vocabulary of just these tokens."""
    return tuple(number_by_first_appearance([token_key(token, token) for token in tokens]))


def _with_marks(marks: tuple[str, ...]) -> Callable[[Sequence[str]], tuple[int, ...]]:
    def classes(tokens: Sequence[str]) -> tuple[int, ...]:
        return tuple(number_by_first_appearance([token_key(token, token, marks) for token in tokens]))

    return classes


CLASS_BUGS: dict[str, Callable[[Sequence[str]], tuple[int, ...]]] = {
    "combining marks: only Mn dropped": _with_marks(("Mn",)),
    "combining marks: all kept": _with_marks(()),
    "no compression": lambda tokens: tuple(number_by_first_appearance(list(tokens))),
}

_ASKED = (
    ("case and spaces", "upper and lower case, a leading and a trailing space", ("The", " the", "THE", "the ", "then")),
    ("accents", "marks of category Mn, composed and apart", ("cafe", "café", "cafe\u0301", "Café", "caf")),
    ("vowel signs", "marks of category Mc: Bengali and Devanagari", ("ক", "কি", "का", "क", "की", "কী")),
    ("enclosing marks", "marks of category Me", ("a", "a\u20dd", "a\u20e3", "b")),
    ("compatibility forms", "NFKC: ligatures, full width, circled", ("fi", "ﬁ", "Ａ", "a", "①", "1", "½", "x²", "x2")),
    (
        "white space",
        "runs become one space; VT and FF are not of them",
        (" ", "  ", "\t", "\n\n", " \r\n", "\x0b", "\x0c"),
    ),
    (
        "both ends",
        "stripped by White_Space, which U+001C is not",
        ("a", "\u3000a", "a\xa0", "\x1ca", "\u2003 a\n", " a b"),
    ),
    ("inner spaces", "runs inside a token", ("a b", "a  b", "a\tb", "a\n\nb", "ab")),
    ("final sigma", "lower case by character", ("ΟΔΟΣ", "οδος", "οδοσ", "Σ", "σ", "ς")),
    (
        "nothing left",
        "tokens that normalise to nothing keep their text",
        ("\u0301", "\u0302", "\u0301\u0302", "\u0301"),
    ),
    ("dotted i", "decomposed before its mark goes", ("İ", "i", "I", "ı")),
)


def class_cases() -> tuple[ClassCase, ...]:
    """All questions about classes, with the answers of the plain-Python chain."""
    return tuple(ClassCase(name, covers, tokens, classes_of(tokens)) for name, covers, tokens in _ASKED)
