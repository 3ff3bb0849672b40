"""Text at both ends of a model: encoded as its training text was, decoded while it is still being written.

Byte-level tokenizers cut where they like, also inside a character, and half a character decodes to U+FFFD. So a piece of text is
given out only once it ends on a whole character; what is incomplete waits for the tokens that complete it.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer

from nengram.errors import DataError

REPLACEMENT = "\ufffd"


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text as a packed corpus has them: no special token is added, and one that is spelt out is plain text.

    Raises: DataError for text that is not Unicode (a lone surrogate, as undecodable bytes on a command line become).
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the text is not valid Unicode at character {error.start}: give it as UTF-8") from None
    as_found = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    finally:
        tokenizer.encode_special_tokens = as_found


class TextPieces:
    """Token ids in, pieces of text out; the pieces and the `rest` together are what all tokens decode to at once.

    before: the tokens in front of the first one. Some decoders look at them (a leading space, a word's continuation); their own
    text is not given out.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._known, self._waiting = list(before), []

    def add(self, token: int) -> str:
        """The text that `token` completes: empty while a character is incomplete."""
        self._waiting.append(token)
        text = self._text()
        if text.endswith(REPLACEMENT):
            return ""
        self._known, self._waiting = self._waiting, []
        return text

    def rest(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed."""
        return self._text() if self._waiting else ""

    def _text(self) -> str:
        known = self._tokenizer.decode(self._known, skip_special_tokens=False)
        return self._tokenizer.decode(self._known + self._waiting, skip_special_tokens=False)[len(known) :]
