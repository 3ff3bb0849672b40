"""Ratios instead of seconds: two things timed by turns, in one process, on one core.

What a machine does to a timing (clock, caches, neighbours) drifts by more than most differences worth knowing, but slowly. Two calls
one right after the other share it, so their quotient survives; the median over pairs forgets the odd interruption, and p10..p90 show
what is left. CPU time of the whole process, so that waiting for a core that others use is not counted.

One thing does not cancel: fresh memory. Until a process has freed a large block, glibc gives freed memory back to the system at once,
and outputs of a megabyte are timed as page faults, which here cost more than hashing them. A process that trains has long left that
state, so both sides are timed outside it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")


LARGE_BLOCK_BYTES = 24 * 2**20  # glibc's thresholds follow the largest block freed, up to 32 MiB


@dataclass(frozen=True)
class Timings:
    """CPU seconds of each pair, `[pairs]` each."""

    ours_s: np.ndarray
    theirs_s: np.ndarray

    @property
    def speedup(self) -> np.ndarray:
        """theirs / ours of each pair: above 1, ours is faster."""
        return self.theirs_s / self.ours_s

    @property
    def cost(self) -> np.ndarray:
        """ours / theirs of each pair: below 1, ours is cheaper."""
        return self.ours_s / self.theirs_s


def cpu_seconds(function: Callable[[T], object], given: T) -> float:
    """CPU time of one call, all threads of this process together."""
    began = time.process_time()
    function(given)
    return time.process_time() - began


def interleave(
    ours: Callable[[T], object],
    theirs: Callable[[T], object],
    inputs: Callable[[], T],
    pairs: int,
    warmup: int = 3,
) -> Timings:
    """Time `ours` and `theirs` by turns on the same fresh input; making it is not timed, `warmup` pairs are dropped."""
    keep_freed_memory()
    spent_s = np.empty((warmup + pairs, 2))
    for pair in spent_s:
        given = inputs()
        pair[:] = cpu_seconds(ours, given), cpu_seconds(theirs, given)
    return Timings(*spent_s[warmup:].T)


def keep_freed_memory() -> None:
    """Free one large block, so that the allocator keeps what is freed from now on, as in any process that trains."""
    np.ones(LARGE_BLOCK_BYTES, dtype=np.uint8)
