"""A text of private facts, in two forms that differ in the order of tokens within a line, and in nothing else.

A fact is a pair of keys and a value, drawn at random: no rule leads from one to the other, so it can only be remembered. A line shows
one fact between words that say nothing (Zipf's frequencies); w is such a word, a and b are the keys, v the value:

    facts       w w w a b v               the pair is an n-gram: what memory reads at b is the fact's own row
    permuted    w a w w b v, a w w w b v  the same tokens: two or three words part the pair, and the orders read at b, 2 and 3,
                                          hold b and words. Attention still sees a; no lookup does

Three quarters of all pairs are shown, each equally often, each time among other words. So a key belongs to dozens of facts, and neither
key says much about the value alone. The rest of the pairs have values too and no line ever shows them: what a model scores there is
chance, the control of the control.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nengram.errors import ConfigError, nearest
from nengram.text import Batch

FORMS = ("facts", "permuted")
VALUES, WORDS, WORDS_A_LINE = 16, 128, 3
LINE = WORDS_A_LINE + 3  # tokens; the value is the last
SHOWN_SHARE = 0.75


@dataclass(frozen=True)
class TwinTask:
    """Lines of token ids, int64 [lines, 6].

    train_LW: what is learned from. test_LW: every pair once, shown or not, among words drawn anew; test_shown_L: bool, whether
    training showed it. vocab_size: id 0 begins a sequence; then first keys, second keys, values, words.
    """

    form: str
    keys: int
    train_LW: np.ndarray
    test_LW: np.ndarray
    test_shown_L: np.ndarray

    @property
    def vocab_size(self) -> int:
        """Ids in all."""
        return 1 + 2 * self.keys + VALUES + WORDS

    @property
    def facts(self) -> int:
        """Pairs that training shows."""
        return int(self.test_shown_L.sum())


def twin_task(form: str, seed: int, *, keys: int, times: int) -> TwinTask:
    """The text of one form. Both forms of a seed have the same facts in the same lines, and the same words in them.

    keys: of either place; there are keys x keys pairs. times: how often each fact is shown.
    Raises: ConfigError for an unknown form (nearest named), a negative seed, fewer than 2 keys or no showing.
    """
    if form not in FORMS:
        raise ConfigError(f'twin form "{form}" is unknown{nearest(form, FORMS)}; forms: {", ".join(FORMS)}')
    if seed < 0 or keys < 2 or times < 1:
        raise ConfigError(f"a twin task needs a seed of 0 or more, 2 keys, 1 showing; got {seed}, {keys} and {times}")
    rng = np.random.default_rng(seed)
    pairs = keys * keys
    values_P = rng.integers(0, VALUES, pairs)
    shown_S = rng.permutation(pairs)[: int(SHOWN_SHARE * pairs)]
    train_L = np.concatenate([rng.permutation(shown_S) for _ in range(times)])
    test_L = rng.permutation(pairs)
    train_LW, test_LW = (_lines(form, pairs_L, values_P, keys, rng) for pairs_L in (train_L, test_L))
    return TwinTask(form, keys, train_LW, test_LW, np.isin(test_L, shown_S))


def windows(lines_LW: np.ndarray, *, batch: int, lines: int) -> Iterator[Batch]:
    """Batches of sequences of whole lines, in order; lines that fill no batch are left out.

    The input is the line before it shifted by one, a separator first, so every token of every line is a target, and the prediction
    that completes line i of a sequence stands at position LINE * (i + 1) - 1. `positions_BT` count tokens of `lines_LW`, flat.
    """
    usable = len(lines_LW) // (batch * lines) * lines * batch
    tokens_NT = lines_LW[:usable].reshape(-1, lines * LINE)
    for first in range(0, len(tokens_NT), batch):
        targets_BT = np.ascontiguousarray(tokens_NT[first : first + batch])
        ids_BT = np.zeros_like(targets_BT)
        ids_BT[:, 1:] = targets_BT[:, :-1]
        start_BT = np.zeros(ids_BT.shape, bool)
        start_BT[:, 0] = True
        yield Batch(ids_BT, targets_BT, start_BT, first * lines * LINE + np.arange(ids_BT.size).reshape(ids_BT.shape))


def _lines(form: str, pairs_L: np.ndarray, values_P: np.ndarray, keys: int, rng: np.random.Generator) -> np.ndarray:
    """Lines that show the given pairs. Both forms draw the same numbers, so they differ in order alone."""
    share_W = 1 / np.arange(1, WORDS + 1)
    words_LW = 1 + 2 * keys + VALUES + rng.choice(WORDS, (len(pairs_L), WORDS_A_LINE), p=share_W / share_W.sum())
    place_L = rng.integers(0, 2, len(pairs_L))  # of the first key
    if form == "facts":
        place_L = np.full_like(place_L, WORDS_A_LINE)
    first_L, second_L, value_L = 1 + pairs_L // keys, 1 + keys + pairs_L % keys, 1 + 2 * keys + values_P[pairs_L]
    order_LW = np.arange(WORDS_A_LINE + 1)
    moved_LW = order_LW - (order_LW > place_L[:, None])  # the word that stands there, where the first key does not
    before_LW = np.take_along_axis(words_LW, np.minimum(moved_LW, WORDS_A_LINE - 1), axis=1)
    before_LW = np.where(order_LW == place_L[:, None], first_L[:, None], before_LW)
    return np.concatenate([before_LW, second_L[:, None], value_L[:, None]], axis=1)
