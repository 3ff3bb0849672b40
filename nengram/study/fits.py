"""Curves through a sweep, and what they may be trusted with: shapes fixed before the run, errors taken from the seeds.

Losses come as a matrix, a row per seed and a column per point. All points of a seed share their first weights and the order of their
text, so a seed moves a whole row up or down; that common shift says nothing about the shape. Seeds are therefore blocks: each seed's
mean is taken out first, and what is left of a point about the mean of its column is the pure error,

    loss[s, p] = seed[s] + shape(x[p]) + error[s, p]        variance from (S - 1)(P - 1) degrees of freedom

Two shapes are fitted to the column means: a quadratic, and a monotone curve (isotonic regression, falling or rising, whichever is
nearer). A shape is refused when it leaves the column means by more than the seeds disagree (lack of fit, an F test). Where the law of
the paper (section 3) holds, the monotone curve is refused and the quadratic is not.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from nengram.errors import NengramError

LEVEL = 0.05  # below this a shape is refused
DRAWS = 10_000


@dataclass(frozen=True)
class Blocks:
    """A matrix of losses with its seeds' shifts taken out. error_variance is None with one seed."""

    means_P: np.ndarray
    error_variance: float | None  # of one run, nats squared
    seeds: int
    degrees: int  # of error_variance

    @property
    def error_of_mean(self) -> float | None:
        """Standard error of a column mean, the seeds' common shifts aside; nats."""
        return None if self.error_variance is None else math.sqrt(self.error_variance / self.seeds)


@dataclass(frozen=True)
class LackOfFit:
    """How far a shape is from the column means, against the seeds' disagreement. `p` is None without an error to judge by."""

    f: float | None
    shape_degrees: int
    error_degrees: int
    p: float | None

    @property
    def refused(self) -> bool | None:
        """Whether the shape is too far off to be believed; None where that cannot be said."""
        return None if self.p is None else self.p < LEVEL


@dataclass(frozen=True)
class Quadratic:
    """The parabola c0 + c1 x + c2 x^2 nearest to the column means, and where on the range it is lowest."""

    coefficients: tuple[float, float, float]
    optimum: float  # within the range, so perhaps one of its ends
    edge: str  # "low" or "high" when the optimum is an end of the range, else ""
    loss: float  # at the optimum
    fitted_P: np.ndarray
    lack_of_fit: LackOfFit


@dataclass(frozen=True)
class Monotone:
    """The falling or rising steps nearest to the column means."""

    direction: str  # "falling" or "rising" with x
    fitted_P: np.ndarray
    levels: int
    lack_of_fit: LackOfFit


@dataclass(frozen=True)
class Optimum:
    """Where the quadratic is lowest, with its interval (`low`..`high`, 95 %), and how often a draw found it at an end.

    by_seeds: the interval from resampled seeds; distinct: how many different samples of seeds there are at all.
    grid: the points between which the lowest one lies, 95 %, whatever the shape.
    """

    value: float
    low: float
    high: float
    share_low_edge: float
    share_high_edge: float
    by_seeds: tuple[float, float]
    grid: tuple[float, float]
    distinct: int
    draws: int


@dataclass(frozen=True)
class LogRows:
    """loss = intercept + slope x log2(rows): nats for each doubling of the rows, with its 95 % interval over seeds."""

    intercept: float
    slope: float
    low: float | None
    high: float | None
    r2: float
    lack_of_fit: LackOfFit


def blocks_of(losses_SP: np.ndarray) -> Blocks:
    """Column means, and the variance of what is left when seeds and columns are taken out. Raises NengramError when not finite."""
    losses_SP = np.atleast_2d(np.asarray(losses_SP, dtype=np.float64))
    if not np.isfinite(losses_SP).all():
        raise NengramError("a fit needs a finite loss at every point of every seed")
    (S, P), means_P = losses_SP.shape, losses_SP.mean(axis=0)
    degrees = (S - 1) * (P - 1)
    if not degrees:
        return Blocks(means_P, None, S, 0)
    left_SP = losses_SP - means_P - losses_SP.mean(axis=1, keepdims=True) + losses_SP.mean()
    variance = float((left_SP**2).sum()) / degrees
    return Blocks(means_P, variance if variance > 1e-24 else 0.0, S, degrees)


def fit_quadratic(x_P: np.ndarray, losses_SP: np.ndarray) -> Quadratic:
    """Least squares through the column means. Raises NengramError below three different x."""
    x_P, blocks = np.asarray(x_P, dtype=np.float64), blocks_of(losses_SP)
    c_3 = _solver(x_P) @ blocks.means_P
    fitted_P = np.vander(x_P, 3, increasing=True) @ c_3
    optimum = float(_lowest(c_3[None], x_P)[0])
    edge = {float(x_P.min()): "low", float(x_P.max()): "high"}.get(optimum, "")
    squares = blocks.seeds * float(((blocks.means_P - fitted_P) ** 2).sum())
    return Quadratic(
        tuple(c_3.tolist()),
        optimum,
        edge,
        float(c_3 @ optimum ** np.arange(3)),
        fitted_P,
        _f_test(squares, len(x_P) - 3, blocks),
    )


def fit_monotone(x_P: np.ndarray, losses_SP: np.ndarray) -> Monotone:
    """Isotonic regression of the column means over x, both ways; the nearer one.

    Its F test is the classical one of order-restricted inference (Robertson, Wright and Dykstra 1988): the number of steps that noise
    about a flat line would give is random, with chances made of Stirling numbers, and the flat line is the monotone curve that noise
    breaks most easily. So the test is exact for one direction there, and careful everywhere else.
    """
    from scipy.optimize import isotonic_regression

    blocks, order_P = blocks_of(losses_SP), np.argsort(x_P, kind="stable")
    fits = {}
    for direction in ("falling", "rising"):
        found = isotonic_regression(blocks.means_P[order_P], increasing=direction == "rising")
        fitted_P = np.empty(len(order_P))
        fitted_P[order_P] = found.x
        fits[direction] = float(((blocks.means_P - fitted_P) ** 2).sum()), fitted_P, len(found.blocks) - 1
    direction = min(fits, key=lambda name: fits[name][0])
    squares, fitted_P, levels = fits[direction]
    return Monotone(direction, fitted_P, levels, _monotone_test(blocks.seeds * squares, len(order_P), levels, blocks))


def bootstrap_optimum(x_P: np.ndarray, losses_SP: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> Optimum:
    """The quadratic's optimum with a 95 % interval; drawn twice, and the residual draws are the ones the interval is taken from.

    Residual draws add normal noise to the column means, with the pure error's variance, itself drawn anew each time from what its
    degrees of freedom leave open (so the noise is Student's t). Seed draws take S seeds with replacement. Three seeds can be drawn in
    ten different ways only and their variance is too small by (S - 1) / S: in simulated studies that interval held the true optimum
    72 times in 100 with three seeds and 83 with five, the residual one 93 to 96. It is reported beside the other. Optima outside the
    range become its ends, and how often is reported. Where the quadratic is refused, its optimum is that of the nearest parabola and
    its interval says nothing about the curve's; `grid` still does.

    Raises: NengramError below two seeds or three different x.
    """
    x_P, losses_SP, blocks = np.asarray(x_P, dtype=np.float64), np.atleast_2d(losses_SP), blocks_of(losses_SP)
    if blocks.error_variance is None:
        raise NengramError("an interval needs at least two seeds; this study has one")
    rng, solve_3P, S = np.random.default_rng(seed), _solver(x_P), blocks.seeds
    widen_N = np.sqrt(blocks.degrees / rng.chisquare(blocks.degrees, draws))
    drawn_NP = blocks.means_P + rng.standard_normal((draws, len(x_P))) * (blocks.error_of_mean * widen_N)[:, None]
    by_noise_N = _lowest(drawn_NP @ solve_3P.T, x_P)
    picks_NS = rng.integers(S, size=(draws, S))
    by_seed_N = _lowest(losses_SP[picks_NS].mean(axis=1) @ solve_3P.T, x_P)
    low, high = np.quantile(by_noise_N, (0.025, 0.975))
    return Optimum(
        float(_lowest((solve_3P @ blocks.means_P)[None], x_P)[0]),
        float(low),
        float(high),
        float((by_noise_N == x_P.min()).mean()),
        float((by_noise_N == x_P.max()).mean()),
        tuple(np.quantile(by_seed_N, (0.025, 0.975)).tolist()),
        tuple(np.quantile(x_P[drawn_NP.argmin(axis=1)], (0.025, 0.975), method="inverted_cdf").tolist()),
        math.comb(2 * S - 1, S),
        draws,
    )


def fit_log_rows(rows_P: np.ndarray, losses_SP: np.ndarray) -> LogRows:
    """A straight line over log2(rows), as the paper finds for slots (section 3). Raises NengramError below two sizes."""
    from scipy import special

    rows_P, blocks = np.asarray(rows_P, dtype=np.float64), blocks_of(losses_SP)
    if (rows_P <= 0).any() or len(np.unique(rows_P)) < 2:
        raise NengramError("loss against rows needs at least two different numbers of rows, none of them 0")
    x_P = np.log2(rows_P)
    apart_P = x_P - x_P.mean()
    spread = float(apart_P @ apart_P)
    slope = float(apart_P @ blocks.means_P) / spread
    left_P = blocks.means_P - blocks.means_P.mean() - slope * apart_P
    whole = float(((blocks.means_P - blocks.means_P.mean()) ** 2).sum())
    half = None
    if blocks.error_of_mean is not None:
        half = float(special.stdtrit(blocks.degrees, 0.975)) * blocks.error_of_mean / math.sqrt(spread)
    return LogRows(
        float(blocks.means_P.mean()) - slope * float(x_P.mean()),
        slope,
        None if half is None else slope - half,
        None if half is None else slope + half,
        1 - float(left_P @ left_P) / whole if whole else 1.0,
        _f_test(blocks.seeds * float(left_P @ left_P), len(x_P) - 2, blocks),
    )


def half_width(losses_SP: np.ndarray) -> float | None:
    """Half of a column mean's 95 % interval, the seeds' common shifts aside; nats. None with one seed."""
    from scipy import special

    blocks = blocks_of(losses_SP)
    return (
        None if blocks.error_of_mean is None else float(special.stdtrit(blocks.degrees, 0.975)) * blocks.error_of_mean
    )


def _solver(x_P: np.ndarray) -> np.ndarray:
    if len(np.unique(x_P)) < 3:
        raise NengramError(f"a quadratic needs at least 3 different shares, got {len(np.unique(x_P))}")
    return np.linalg.pinv(np.vander(x_P, 3, increasing=True))


def _lowest(c_N3: np.ndarray, x_P: np.ndarray) -> np.ndarray:
    """Where each parabola is lowest between the ends of x."""
    low, high = x_P.min(), x_P.max()
    _, c1_N, c2_N = c_N3.T
    better_end_N = np.where(c1_N * (high - low) + c2_N * (high**2 - low**2) < 0, high, low)
    bowl_N = c2_N > 0
    return np.where(bowl_N, np.clip(-c1_N / np.where(bowl_N, 2 * c2_N, 1.0), low, high), better_end_N)


def _f_test(squares: float, degrees: int, blocks: Blocks) -> LackOfFit:
    from scipy import special

    if degrees < 1 or not blocks.error_variance:
        return LackOfFit(None, max(0, degrees), blocks.degrees, None)
    f = squares / degrees / blocks.error_variance
    return LackOfFit(f, degrees, blocks.degrees, float(special.fdtrc(degrees, blocks.degrees, f)))


def _monotone_test(squares: float, points: int, levels: int, blocks: Blocks) -> LackOfFit:
    from scipy import special

    if not blocks.error_variance:
        return LackOfFit(None, points - levels, blocks.degrees, None)
    ratio, degrees = squares / blocks.error_variance, max(1, points - levels)
    if squares < 1e-24:
        return LackOfFit(0.0, points - levels, blocks.degrees, 1.0)
    p = sum(
        _stirling(points, count) / math.factorial(points) * special.fdtrc(less, blocks.degrees, ratio / less)
        for count in range(1, points)
        if (less := points - count)
    )
    return LackOfFit(ratio / degrees, points - levels, blocks.degrees, float(p))


@cache
def _stirling(n: int, k: int) -> int:
    """Unsigned Stirling numbers of the first kind: permutations of n with k cycles."""
    if n == k:
        return 1
    return 0 if k < 1 or k > n else _stirling(n - 1, k - 1) + (n - 1) * _stirling(n - 1, k)
