"""How many rows a training budget can teach: n-grams met, rows touched, and how often, predicted from a corpus.

A row learns from what reads it. With U distinct n-grams falling into p rows at random, V_c of them met c times, the reads of a row are
a compound Poisson number: the share of rows never read is exp(-U/p), and P(r reads) follows from the V_c alone (`read_shares`). So
three things must be known of N tokens: U, and V_1 .. V_7 for the share of rows read at least 8 times.

**Inside the corpus** (N up to its train split) they are counted, on documents in random order, as training meets them.

**Beyond it** U is extrapolated. Were each document kept with probability x, an n-gram that stands in d documents would be met with
probability 1 - (1 - x)^d: the growth curve of U up to the corpus is known without noise, burstiness included. Its log-log slope
falls as text grows (Heaps' law with a falling exponent); the slope at the corpus's end and its rate of fall over the last three
halvings carry it on. V_c / U, which changes slowly, goes on along its own log-log line. docs/decisions/0019-plan.md has the errors.

The recommendation is the largest table of which half of the rows are read at least 8 times.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from nengram.address import ngram_counts, ngrams_of
from nengram.address.census import WELL_TOUCHED
from nengram.errors import ConfigError, DataError

TAUGHT_SHARE = 0.5  # of the rows are to be read at least WELL_TOUCHED times
HALVINGS = 3  # of the corpus, over which growth is measured
FAR = 16  # an extrapolation beyond so many corpora is a guess
MOST_ROWS = 2**40


@dataclass(frozen=True, eq=False)
class Spectrum:
    """N-grams of one order in `tokens` tokens: `distinct` ones, of which `few_C[c]` were met c times, c = 0..WELL_TOUCHED - 1.

    beyond: how many times the corpus this is; 0 where it was counted.
    """

    order: int
    tokens: int
    distinct: float
    few_C: np.ndarray
    beyond: float


@dataclass(frozen=True)
class RowsFor:
    """What `rows` rows a head would see of one order. taught: rows read at least WELL_TOUCHED times."""

    order: int
    rows: int
    distinct_ngrams: int
    touched: float
    taught: float
    ngrams_per_row: float
    lookups_per_row: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


class Growth:
    """How the n-grams of one order grow with text: a corpus as one stream of ids, and where its documents begin.

    Documents are put in a random order once. Raises: DataError for a corpus of fewer than 16 documents.
    """

    def __init__(self, cids_T: np.ndarray, start_T: np.ndarray, order: int) -> None:
        begins_D = np.flatnonzero(start_T)
        if len(begins_D) < 16:
            raise DataError(f"the train split has {len(begins_D)} documents: growth needs 16 at least, better hundreds")
        ends_D = np.append(begins_D[1:], len(start_T))
        shuffled_D = np.random.default_rng(0).permutation(len(begins_D))
        lengths_D = (ends_D - begins_D)[shuffled_D]
        firsts_D = np.cumsum(lengths_D) - lengths_D
        self._from_T = np.arange(lengths_D.sum()) + np.repeat(begins_D[shuffled_D] - firsts_D, lengths_D)
        self.order, self.cids_T, self.start_T = order, cids_T[self._from_T], start_T[self._from_T]

    def spectrum(self, tokens: int) -> Spectrum:
        """The n-grams of `tokens` tokens like these: counted inside the corpus, extrapolated beyond it."""
        if tokens <= len(self.cids_T):
            return self._counted(tokens)
        decline, slope = self._slopes
        last, ln_beyond = self._counted(len(self.cids_T)), np.log(tokens / len(self.cids_T))
        gain = slope * (np.expm1(decline * ln_beyond) / decline if decline < -1e-9 else ln_beyond)
        distinct = last.distinct * np.exp(gain)
        shares_C = last.few_C / last.distinct * np.exp(self._share_slopes_C * ln_beyond)
        shares_C /= max(1.0, shares_C.sum())
        return Spectrum(self.order, tokens, float(distinct), distinct * shares_C, tokens / len(self.cids_T))

    def _counted(self, tokens: int) -> Spectrum:
        counts = ngram_counts(self.cids_T[:tokens], self.start_T[:tokens], self.order)
        few_C = np.bincount(np.minimum(counts.counts_U, WELL_TOUCHED), minlength=WELL_TOUCHED + 1)[:WELL_TOUCHED]
        return Spectrum(self.order, tokens, len(counts), few_C.astype(float), 0.0)

    @cached_property
    def _slopes(self) -> tuple[float, float]:
        """The log-log slope of U at the corpus's end, and how fast its logarithm falls with ln N (never above 0)."""
        met_in_D = self._ngrams_by_documents
        documents_D, kept = np.arange(len(met_in_D)), 0.5 ** np.arange(HALVINGS + 1)
        distinct = [(met_in_D * -np.expm1(documents_D * np.log1p(-x))).sum() for x in kept[1:]]
        distinct = np.log([met_in_D.sum(), *distinct])
        slopes = (distinct[:-1] - distinct[1:]) / np.log(2)
        middles = -(np.arange(HALVINGS) + 0.5) * np.log(2)
        decline = np.polyfit(middles, np.log(slopes), 1)[0]
        return min(float(decline), 0.0), float(met_in_D[1] / met_in_D.sum())

    @cached_property
    def _ngrams_by_documents(self) -> np.ndarray:
        """How many n-grams stand in exactly 0, 1, 2, ... documents: float [1 + most]."""
        number_T = np.zeros(len(self.cids_T), np.int64)
        for column_T in ngrams_of(self.cids_T, self.start_T, self.order).T:
            number_T = np.unique((number_T << 32) + column_T + 1, return_inverse=True)[1]
        document_T = np.cumsum(self.start_T)
        met = np.unique(number_T * (document_T[-1] + 1) + document_T) // (document_T[-1] + 1)
        return np.bincount(np.bincount(met), minlength=2).astype(float)

    @cached_property
    def _share_slopes_C(self) -> np.ndarray:
        """Log-log slopes of V_c / U over the last two halvings of the corpus; 0 where there was nothing to count."""
        whole, quarter = (self._counted(len(self.cids_T) >> halvings) for halvings in (0, 2))
        now_C, then_C = whole.few_C / whole.distinct, quarter.few_C / quarter.distinct
        known_C = (now_C > 0) & (then_C > 0)
        return np.log(np.where(known_C, now_C, 1) / np.where(known_C, then_C, 1)) / np.log(4)


def read_shares(spectrum: Spectrum, rows: int) -> tuple[float, float]:
    """Shares of `rows` rows that are read at all, and at least WELL_TOUCHED times (the module's argument has the law)."""
    rates_C = spectrum.few_C / rows
    reads_R = np.zeros(WELL_TOUCHED)
    reads_R[0] = np.exp(-spectrum.distinct / rows)
    for reads in range(1, WELL_TOUCHED):
        met = np.arange(1, reads + 1)
        reads_R[reads] = (met * rates_C[met] * reads_R[reads - met]).sum() / reads
    return float(1 - reads_R[0]), float(max(0.0, 1 - reads_R.sum()))


def largest_rows(spectrum: Spectrum, taught: float = TAUGHT_SHARE) -> int:
    """The most rows of a head of which a share of `taught` is read at least WELL_TOUCHED times; 0 if not even one is."""
    low, high = 0, 1
    while high < MOST_ROWS and read_shares(spectrum, high)[1] >= taught:
        low, high = high, high * 2
    while high - low > max(1, low // 1000):
        middle = (low + high) // 2
        low, high = (middle, high) if read_shares(spectrum, middle)[1] >= taught else (low, middle)
    return low


def rows_for(spectrum: Spectrum, rows: int) -> RowsFor:
    """What a head of `rows` rows would see."""
    touched, taught = read_shares(spectrum, rows)
    return RowsFor(
        order=spectrum.order,
        rows=rows,
        distinct_ngrams=round(spectrum.distinct),
        touched=touched,
        taught=taught,
        ngrams_per_row=spectrum.distinct / rows,
        lookups_per_row=spectrum.tokens / rows,
    )


def recommend_rows(cids_T: np.ndarray, start_T: np.ndarray, *, tokens: int, max_order: int) -> tuple[Spectrum, ...]:
    """The spectrum of every order from 2 up at a budget of `tokens`.

    Raises: ConfigError for a budget below 1, and one so small that no row is taught; DataError as `Growth`.
    """
    if tokens < 1:
        raise ConfigError(f"--tokens must be 1 or more, got {tokens}")
    spectra = tuple(Growth(cids_T, start_T, order).spectrum(tokens) for order in range(2, max_order + 1))
    if any(largest_rows(spectrum) < 2 for spectrum in spectra):
        raise ConfigError(f"--tokens {tokens:,} teaches no table: not two rows would be read {WELL_TOUCHED} times")
    return spectra
