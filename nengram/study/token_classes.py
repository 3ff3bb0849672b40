"""What kind of token is it? Asked of the text alone, no model, so that every run is split alike.

A word is a run of tokens with letters; a token with white space before it, or after anything without letters, starts one (a fragment
of a character counts as a letter). It is capitalised when its first letter is. A sentence starts at a document's start, after a line
end, or after white space that follows . ! or ?. Each token falls in the first of these classes that fits:

    punctuation   no letter and no digit: marks, white space, separators
    number        digits and no letter
    inside name   a later token of a capitalised word that starts no sentence: "Bu|ceph|alus"
    phrase        the second or a later word of a name of several words (this word and the one before it both capitalised, white
                  space between them, the first starting no sentence), or of a set phrase: the pair stands at least `PAIR_TIMES`
                  times in the train split, and 2 ** `PAIR_BITS` times as often as its two words would meet by chance (pointwise
                  mutual information); words are compared by compressed ids, so neither case nor accents matter
    word start    the first token of any other word
    word rest     a later token of any other word

The rule is crude and stated: a name that opens a sentence is no name here, "the Great" is half of one, and initials hide what
follows them. Errors of the kind blur a difference between classes; they do not make one.
"""

import numpy as np
from tokenizers import Tokenizer

from nengram.text import Packed

CLASSES = ("inside name", "phrase", "word start", "word rest", "number", "punctuation")
PAIR_TIMES, PAIR_BITS = 5, 6.0
WORD_MARKS = "\u0120\u2581"  # how raw tokens write a space before them
FRAGMENT = "\ufffd"


class Words:
    """The words of a split.

    in_word_N, starts_N, digits_N: bool [N], which tokens belong to a word, start one, or are numbers.
    word_N: int64 [N], which of the W words a token in one is of.
    name_W: uint64 [W], equal for equal compressed ids. capital_W, opens_W, follows_W: bool [W], whether a word is capitalised, starts
    a sentence, and has a word before it with white space alone (no line end) between.
    """

    def __init__(self, packed: Packed, tokenizer: Tokenizer, cids_V: np.ndarray) -> None:
        pieces, ids_N = Pieces(tokenizer), packed.ids_N.astype(np.int64)
        begins_N = np.zeros(len(ids_N), dtype=bool)
        begins_N[packed.doc_starts_D] = True  # separators, which are no words
        self.in_word_N = pieces.letters_V[ids_N] & ~begins_N
        self.digits_N = pieces.digits_V[ids_N] & ~begins_N
        line_end_N = pieces.line_end_V[ids_N]
        spaced_N = pieces.spaced_V[ids_N] | _after(pieces.space_ends_V[ids_N])
        self.starts_N = self.in_word_N & (spaced_N | ~_after(self.in_word_N))
        self.word_N = np.cumsum(self.starts_N) - 1
        spoken_N = self.in_word_N | self.digits_N
        last_spoken_N = _last(spoken_N, before=True)
        stopped_N = _last(pieces.stops_V[ids_N] & ~spoken_N) > last_spoken_N
        opens_N = (_last(begins_N | line_end_N) > last_spoken_N) | (stopped_N & spaced_N)
        between_N = pieces.blank_V[ids_N] & ~line_end_N
        last_word_N = _last(self.in_word_N, before=True)
        follows_N = spaced_N & (last_word_N >= 0) & (last_word_N == _last(~between_N, before=True))
        first_W = np.flatnonzero(self.starts_N)
        self.capital_W = pieces.capital_V[ids_N[first_W]]
        self.opens_W, self.follows_W = opens_N[first_W], follows_N[first_W]
        self.name_W = _names(cids_V[ids_N], self.word_N, first_W, self.in_word_N)


class Pieces:
    """Of every id of a tokenizer, as bool [V]: what its text holds, how it begins and ends. Special tokens have no text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        size = tokenizer.get_vocab_size()
        texts = ["" if i in special else tokenizer.decode([i], skip_special_tokens=False) for i in range(size)]
        raws = [tokenizer.id_to_token(i) or "" for i in range(size)]

        def flags(rule) -> np.ndarray:
            return np.array([rule(text) for text in texts], dtype=bool)

        self.letters_V = flags(lambda text: any(char.isalpha() or char == FRAGMENT for char in text))
        self.digits_V = flags(lambda text: any(char.isdigit() for char in text)) & ~self.letters_V
        self.capital_V = flags(lambda text: next((char for char in text if char.isalpha()), "").isupper())
        self.stops_V = flags(lambda text: any(char in ".!?" for char in text))
        self.line_end_V = flags(lambda text: "\n" in text)
        self.blank_V = flags(lambda text: text.isspace())
        self.space_ends_V = flags(lambda text: text[-1:].isspace())
        self.spaced_V = flags(lambda text: text[:1].isspace()) | np.array([raw[:1] in WORD_MARKS for raw in raws])


def token_classes(packed: Packed, tokenizer: Tokenizer, cids_V: np.ndarray, train: Packed) -> np.ndarray:
    """The class of each token of a split, an index into `CLASSES`: int64 [N].

    Args:
        cids_V: compressed id of every token id; by these words are compared.
        train: the split in which set phrases are counted, whole.
    """
    words = Words(packed, tokenizer, cids_V)
    before_W = np.arange(len(words.name_W)) - 1
    named_W = words.capital_W & ~words.opens_W
    of_a_name_W = words.follows_W & words.capital_W & named_W[before_W]
    in_phrase_W = of_a_name_W | (words.follows_W & set_pairs(words, Words(train, tokenizer, cids_V)))
    found_N = np.full(len(packed), CLASSES.index("punctuation"))
    found_N[words.digits_N] = CLASSES.index("number")
    inside_N = words.in_word_N
    later_N = inside_N & ~words.starts_N
    found_N[words.starts_N] = CLASSES.index("word start")
    found_N[later_N] = CLASSES.index("word rest")
    found_N[inside_N & in_phrase_W[words.word_N]] = CLASSES.index("phrase")
    found_N[later_N & named_W[words.word_N]] = CLASSES.index("inside name")
    return found_N


def set_pairs(words: Words, train: Words) -> np.ndarray:
    """Whether each word and the one before it are a set phrase of the train split: bool [W]."""
    numbers = np.unique(np.concatenate([train.name_W, words.name_W]), return_inverse=True)[1]
    train_W, word_W = numbers[: len(train.name_W)], numbers[len(train.name_W) :]
    times_U = np.bincount(train_W, minlength=int(numbers.max(initial=0)) + 1)
    pairs_P, times_P = np.unique(_pairs(train_W)[train.follows_W], return_counts=True)
    asked_W = _pairs(word_W)
    if not len(pairs_P):
        return np.zeros(len(asked_W), dtype=bool)
    place_W = np.minimum(np.searchsorted(pairs_P, asked_W), len(pairs_P) - 1)
    together_W = np.where(pairs_P[place_W] == asked_W, times_P[place_W], 0)
    by_chance_W = times_U[np.roll(word_W, 1)] * (times_U[word_W] / len(train_W))
    return (together_W >= PAIR_TIMES) & (together_W >= 2**PAIR_BITS * by_chance_W)


def _pairs(word_W: np.ndarray) -> np.ndarray:
    """The word before and the word, packed into one number; the first has the last before it, and nothing follows that."""
    return (np.roll(word_W, 1) << 32) + word_W


def _names(cids_N: np.ndarray, word_N: np.ndarray, first_W: np.ndarray, in_word_N: np.ndarray) -> np.ndarray:
    """A 64-bit number for each word: the sum over its tokens of a mix of compressed id and place. Equal for equal words; two others
    share one with a probability of about 1e-19.
    """
    tokens = np.flatnonzero(in_word_N)
    if not len(tokens):
        return np.zeros(0, dtype=np.uint64)
    word_X = word_N[tokens]
    mixed_X = _mixed(cids_N[tokens].astype(np.uint64) + ((tokens - first_W[word_X]).astype(np.uint64) << np.uint64(32)))
    return np.add.reduceat(mixed_X, np.searchsorted(tokens, first_W))


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: a bijection of 64 bits, arithmetic modulo 2**64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _after(flag_N: np.ndarray) -> np.ndarray:
    """Whether the token before each has the flag; nothing is before the first."""
    return np.concatenate([[False], flag_N[:-1]])


def _last(flag_N: np.ndarray, before: bool = False) -> np.ndarray:
    """The last place at or before each token that has the flag, -1 if none; with `before`, strictly before it."""
    places_N = np.maximum.accumulate(np.where(flag_N, np.arange(len(flag_N)), -1))
    return np.concatenate([[-1], places_N[:-1]]) if before else places_N
