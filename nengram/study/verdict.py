"""When may one say that memory wins? A rule fixed before the run.

Runs are paired by seed: the same initial weights where shapes agree, the same tokens in the same order. Of the paired differences
(memory minus baseline, in nats; negative is better) the mean and its 95 % interval (Student's t) are taken over at least three seeds:

    memory wins              the whole interval lies below zero
    memory loses             the whole interval lies above zero
    no difference shown      it holds zero; `detectable` says how small a difference this run could have shown

`detectable` is the difference that n seeds with this spread would have shown four times in five: (t_.975 + t_.80) s / sqrt(n). With
fewer than three seeds there is no verdict. The interval is over seeds, not over tokens: token noise is several times smaller and
would call almost any difference real.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np

SEEDS_NEEDED = 3


@dataclass(frozen=True)
class Paired:
    """A paired difference over seeds, in nats. Bounds and `detectable` are None below three seeds."""

    differences: tuple[float, ...]
    mean: float
    low: float | None
    high: float | None
    detectable: float | None

    @property
    def verdict(self) -> str:
        """The words of the rule."""
        if self.low is None or self.high is None:
            return f"no verdict ({len(self.differences)} of {SEEDS_NEEDED} seeds)"
        if self.high < 0:
            return "memory wins"
        return "memory loses" if self.low > 0 else "no difference shown"

    def to_dict(self) -> dict:
        """For results.json."""
        return asdict(self) | {"verdict": self.verdict}


def paired(differences: Sequence[float]) -> Paired:
    """Mean, 95 % interval and smallest detectable difference of one difference per seed."""
    values = np.asarray(differences, dtype=np.float64)
    n, mean = len(values), float(values.mean())
    if n < SEEDS_NEEDED:
        return Paired(tuple(values.tolist()), mean, None, None, None)
    error = float(values.std(ddof=1)) / math.sqrt(n)
    half = t_quantile(0.975, n - 1) * error
    detectable = (t_quantile(0.975, n - 1) + t_quantile(0.8, n - 1)) * error
    return Paired(tuple(values.tolist()), mean, mean - half, mean + half, detectable)


def prediction_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Where one more seed's difference would fall 95 times in 100, given these (at least two)."""
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    half = t_quantile(0.975, n - 1) * float(values.std(ddof=1)) * math.sqrt(1 + 1 / n)
    return float(values.mean()) - half, float(values.mean()) + half


@cache
def t_quantile(probability: float, degrees: int) -> float:
    """Quantile (probability > 0.5) of Student's t, by bisection on its integral; good to 1e-6 for degrees >= 2."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 + _t_mass(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _t_mass(x: float, degrees: int) -> float:
    """Probability mass of Student's t in (0, x): with t = sqrt(v) tan(a) the density becomes a power of a cosine."""
    angle = math.atan(x / math.sqrt(degrees))
    grid = np.linspace(0.0, angle, 2001)
    values = np.cos(grid) ** (degrees - 1)
    weights = np.ones(2001)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    integral = float((weights * values).sum()) * (angle / 2000) / 3
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)
    return scale * integral
