"""The compression key of one token, step by step in plain Python: the slow, obvious twin of `compress.py`.

It needs the standard library only, so it also says exactly which Unicode facts an address depends on: normal
forms, the three mark categories, lower case by character, and the White_Space property. The tests hold the
twins equal on whole vocabularies. They part on some 440 marks that newer versions of Unicode added, which
Python knows and the library's StripAccents does not: there the library decides, and for a trained table its
saved map.
"""

import re
import unicodedata

MARKS = ("Mn", "Mc", "Me")  # dropping Mn alone would leave the vowel signs of Bengali and Devanagari in place
# White_Space=yes. Python's own str.strip() would also take U+001C..U+001F, which do not have the property.
WHITE_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
WHITE_SPACE += "".join(chr(code) for code in range(0x2000, 0x200B))  # the spaces by width
LONE_SPACE = "\ue000"  # keeps a token that is nothing but white space from being stripped to nothing
REPLACEMENT = "\ufffd"


def normalised(text: str, marks: tuple[str, ...] = MARKS) -> str:
    """NFKC, NFD, marks off, lower case, white-space runs to one space, both ends stripped unless all is one
    space. Other `marks` than the three are a known bug, which the conformance kit looks for.
    """
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    text = "".join(char for char in text if unicodedata.category(char) not in marks)
    text = "".join(char.lower() for char in text)
    text = re.sub(r"[ \t\r\n]+", " ", text)
    text = LONE_SPACE if text == " " else text
    return text.strip(WHITE_SPACE).replace(LONE_SPACE, " ")


def token_key(text: str, raw: str, marks: tuple[str, ...] = MARKS) -> str:
    """The key under which a token is merged; `text` is the token decoded, `raw` its vocabulary string."""
    if REPLACEMENT in text:  # a fragment of a UTF-8 sequence: only its raw string tells it apart from others
        return raw
    return normalised(text, marks) or text


def number_by_first_appearance(keys: list[str]) -> list[int]:
    """0, 1, 2, … in the order in which each distinct key is first met."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]
