"""What a sweep may claim: an optimum inside the range, a part of the gain, an advantage at equal time; and what it would take.

Every figure is a paired one: differences are taken within a seed, and their spread over seeds is the error (`verdict`).

The law's claim (paper, section 3: a mixture beats both pure experts and pure tables) is made only if a point inside the range beats
BOTH ends by more than twice the standard error of the paired difference. That bar is fixed, and with three seeds it is low: chance
clears one of the two 9 times in 100. So the 95 % interval (Student's t) stands beside it, and two things guard the choice of the
point: it is the grid point nearest to the quadratic's optimum, not the luckiest one; and each seed is also judged at the point that
the OTHER seeds choose, where it cannot have had a say. Both ways must clear the bar. In simulated studies without an interior optimum
(flat, or falling to one end; three and five seeds) the claim was then made at most 4 times in 100.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from nengram.errors import NengramError
from nengram.study.fits import fit_quadratic
from nengram.study.verdict import SEEDS_NEEDED, Paired, paired, t_quantile

BAR = 2.0  # standard errors
MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Claim:
    """An interior point against the two ends of the range; differences are point minus end, below zero is better.

    held_out_*: each seed's difference at the point chosen without it, `held_out_points` by seed. Where these are all the same point,
    the choice changed nothing.
    """

    point: float
    low_end: float
    high_end: float
    against_low: Paired
    against_high: Paired
    held_out_low: Paired
    held_out_high: Paired
    held_out_points: tuple[float, ...]

    @property
    def claimed(self) -> bool:
        """Whether both ends are beaten, by the whole study and by the seeds held out."""
        readings = (self.against_low, self.against_high, self.held_out_low, self.held_out_high)
        return len(self.held_out_points) >= SEEDS_NEEDED and all(map(beats, readings))

    @property
    def words(self) -> str:
        """The claim, or why there is none."""
        seeds = len(self.held_out_points)
        if seeds < SEEDS_NEEDED:
            return f"no claim ({seeds} of {SEEDS_NEEDED} seeds)"
        if self.claimed:
            safe = all(reading.high < 0 for reading in (self.against_low, self.against_high))
            return "interior optimum" if safe else "interior optimum by the bar, not by the 95 % interval"
        lost = [
            f"{end:.0%}"
            for end, whole, held in (
                (self.low_end, self.against_low, self.held_out_low),
                (self.high_end, self.against_high, self.held_out_high),
            )
            if not (beats(whole) and beats(held))
        ]
        return f"none shown: not better than {' and '.join(lost)}"


@dataclass(frozen=True)
class Power:
    """How many seeds would show the difference seen, four times in five, and how small a difference given seeds would show.

    seeds_needed is None when no number of seeds would: no difference, or one lost in its spread.
    """

    seen: float
    spread: float  # standard deviation of one seed's difference, nats
    seeds: int
    seeds_needed: int | None
    detectable: dict[int, float]


@dataclass(frozen=True)
class Kept:
    """What share of the gain a control keeps. The interval is None where the gain itself is not shown."""

    share: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class EqualCpu:
    """A memory arm's run against the baseline at the same CPU seconds; differences by seed, None where it would extrapolate."""

    seconds: float  # the memory arm's, mean
    differences: tuple[float | None, ...]
    paired: Paired | None  # None unless every seed has its difference


def interior_claim(x_P: np.ndarray, losses_SP: np.ndarray) -> Claim:
    """Judge the law's claim. Raises NengramError below three different x, or when a loss is not finite."""
    x_P, losses_SP = np.asarray(x_P, dtype=np.float64), np.atleast_2d(np.asarray(losses_SP, dtype=np.float64))
    low, high = int(x_P.argmin()), int(x_P.argmax())
    chosen = _interior(x_P, losses_SP)
    S = len(losses_SP)
    blind = [_interior(x_P, np.delete(losses_SP, s, axis=0)) if S > 1 else chosen for s in range(S)]
    readings = [
        paired([losses_SP[s, points[s]] - losses_SP[s, end] for s in range(S)])
        for points in ([chosen] * S, blind)
        for end in (low, high)
    ]
    return Claim(float(x_P[chosen]), float(x_P[low]), float(x_P[high]), *readings, tuple(x_P[blind].tolist()))


def beats(difference: Paired) -> bool:
    """Below zero by more than `BAR` standard errors of the mean."""
    values = np.array(difference.differences)
    return len(values) > 1 and difference.mean + BAR * float(values.std(ddof=1)) / math.sqrt(len(values)) < 0


def power(differences: Sequence[float], *, seeds: Sequence[int] = (3, 5, 10)) -> Power:
    """Seeds for the difference seen, by the rule of `verdict`, if its mean and spread are true. Raises NengramError below two seeds."""
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2:
        raise NengramError("the spread over seeds needs at least two of them")
    seen, spread = float(values.mean()), float(values.std(ddof=1))
    shown = {n: _half_power(n) * spread for n in sorted({*seeds, len(values)}) if n >= SEEDS_NEEDED}
    return Power(seen, spread, len(values), _seeds_for(abs(seen), spread), shown)


def kept_share(baseline_S: Sequence[float], memory_S: Sequence[float], control_S: Sequence[float]) -> Kept:
    """(baseline - control) / (baseline - memory) with Fieller's 95 % interval over seeds.

    Fieller's and not a bootstrap: it is exact for paired normal differences at any number of seeds, and three seeds can be resampled
    in ten ways only. It has no end where the gain in the denominator may be zero; then there is no interval.
    """
    baseline_S, memory_S, control_S = (np.asarray(v, dtype=np.float64) for v in (baseline_S, memory_S, control_S))
    part_S, gain_S, n = baseline_S - control_S, baseline_S - memory_S, len(baseline_S)
    part, gain = float(part_S.mean()), float(gain_S.mean())
    share = part / gain if gain else math.nan
    if n < SEEDS_NEEDED:
        return Kept(share, None, None)
    (part_var, both), (_, gain_var) = np.cov(part_S, gain_S) * _t(0.975, n - 1) ** 2 / n
    a, b, c = gain**2 - gain_var, part * gain - both, part**2 - part_var
    if a <= 0:
        return Kept(share, None, None)
    root = math.sqrt(max(0.0, b * b - a * c))
    return Kept(share, float(b - root) / float(a), float(b + root) / float(a))


def equal_cpu(
    seconds_BS: np.ndarray, losses_BS: np.ndarray, baseline_seconds_BS: np.ndarray, baseline_losses_BS: np.ndarray
) -> list[EqualCpu]:
    """Second reading: the same CPU time instead of the same tokens, budget by budget (rows) and seed by seed (columns).

    The baseline's loss at the memory arm's CPU seconds is read off a straight line over log seconds between its own budgets, each of
    which ran its whole learning-rate schedule. Losses bend the other way (a chord lies above such a curve), so between two budgets
    the baseline is judged a little too harshly. Outside its budgets nothing is said.
    """
    found = []
    for seconds_S, losses_S in zip(np.asarray(seconds_BS), np.asarray(losses_BS), strict=True):
        differences = []
        for s, (seconds, loss) in enumerate(zip(seconds_S, losses_S, strict=True)):
            order = np.argsort(np.asarray(baseline_seconds_BS)[:, s])
            known, values = np.asarray(baseline_seconds_BS)[order, s], np.asarray(baseline_losses_BS)[order, s]
            inside = len(known) > 1 and known[0] <= seconds <= known[-1]
            differences.append(float(loss - np.interp(math.log(seconds), np.log(known), values)) if inside else None)
        whole = paired(differences) if None not in differences else None
        found.append(EqualCpu(float(np.mean(seconds_S)), tuple(differences), whole))
    return found


def tokens_to_show(tokens_B: Sequence[int], differences_BS: np.ndarray) -> float | None:
    """Training tokens at which this many seeds would show the difference, four times in five, if its trend in log tokens goes on.

    The trend is a straight line through the budgets' mean differences and the spread that of all budgets together. None below two
    budgets or three seeds, or when the difference does not grow downwards with tokens. An extrapolation: two points test no line.
    """
    differences_BS = np.asarray(differences_BS, dtype=np.float64)
    (B, S), logs_B = differences_BS.shape, np.log(np.asarray(tokens_B, dtype=np.float64))
    if B < 2 or S < SEEDS_NEEDED:
        return None
    slope, start = np.polyfit(logs_B, differences_BS.mean(axis=1), 1)
    wanted = -_half_power(S) * math.sqrt(float(differences_BS.var(axis=1, ddof=1).mean()))
    return float(np.exp((wanted - start) / slope)) if slope < 0 else None


def _interior(x_P: np.ndarray, losses_SP: np.ndarray) -> int:
    """The grid point inside the range that is nearest to the quadratic's optimum; of two as near, the one with the lower loss."""
    fitted = fit_quadratic(x_P, losses_SP)
    inside = [p for p in range(len(x_P)) if x_P.min() < x_P[p] < x_P.max()]
    mean_P = losses_SP.mean(axis=0)
    return min(inside, key=lambda p: (round(abs(float(x_P[p]) - fitted.optimum), 9), mean_P[p]))


def _seeds_for(size: float, spread: float) -> int | None:
    low, high = SEEDS_NEEDED, MOST_SEEDS
    if not size or _half_power(high) * spread > size:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _half_power(middle) * spread <= size else (middle + 1, high)
    return low


@cache
def _half_power(seeds: int) -> float:
    """Smallest difference shown four times in five, in standard deviations of one seed's difference (as `Paired.detectable`)."""
    return (_t(0.975, seeds - 1) + _t(0.8, seeds - 1)) / math.sqrt(seeds)


_t = cache(t_quantile)
