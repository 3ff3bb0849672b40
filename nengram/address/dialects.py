"""A dialect is how one family of models turns sizes and a seed into the numbers of a spec, and nothing else.

Hashing itself never asks for a dialect: it reads multipliers, moduli, pad id and boundary rule from the
spec, because those are what a trained table depends on. So a dialect is consulted once, when a spec is
born, and a new family is one class and one entry below. `layer_ids` are passed together since families
differ in what a layer's numbers depend on: its id, or its place in the list.

All families known so far hand out primes alike: ascending, from one set that a whole model shares.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nengram.address.primes import take_primes

BOUNDARIES = ("sequence", "eos")
"""Where look-back stops of itself; all else is flagged by the caller. `sequence`: at the sequence start.
`eos`: there, and at the pad id, which is the end-of-text token: it sees its own text, what follows it does not."""

Moduli = tuple[tuple[int, ...], ...]


def half_bound(compressed_vocab_size: int) -> int:
    """The exclusive bound of a draw r, so that the odd number 2 r + 1 times any id stays below 2**63."""
    return max(1, (2**63 - 1) // compressed_vocab_size // 2)


def ascending_primes(layers: int, *, rows_per_head: Sequence[int], heads: int) -> list[Moduli]:
    """Each layer and order searches from its nominal size again, skipping what any earlier slot took.

    With one nominal size for all orders this is the (j x H + h + 1)-th prime at or above it, for head h of H
    in the j-th layer.
    """
    seen: set[int] = set()
    return [tuple(take_primes(rows, heads, seen) for rows in rows_per_head) for _ in range(layers)]


class Dialect(Protocol):
    """Arguments arrive checked; one result per layer, in the order of `layer_ids`."""

    name: str
    boundary: str

    def multipliers(
        self, layer_ids: Sequence[int], *, compressed_vocab_size: int, max_order: int, seed: int
    ) -> list[tuple[int, ...]]:
        """One multiplier per n-gram position, the current id's first."""

    def moduli(self, layer_ids: Sequence[int], *, rows_per_head: Sequence[int], heads: int) -> list[Moduli]:
        """One tuple of `heads` moduli per order, from order 2 up."""

    def num_rows(self, moduli: Moduli) -> int:
        """Rows of a layer's table, padding included."""


@dataclass(frozen=True)
class Engram:
    """The Engram paper's public demo (arXiv 2601.07372, section 2.2), and the release that followed it:
    PCG64 multipliers, ascending primes, no padding rows.
    """

    name: str = "engram"
    boundary: str = "sequence"

    def multipliers(
        self, layer_ids: Sequence[int], *, compressed_vocab_size: int, max_order: int, seed: int
    ) -> list[tuple[int, ...]]:
        """Odd, and small enough that no product with an id reaches 2**63; a layer's place does not matter."""
        below = half_bound(compressed_vocab_size)
        drawn = (np.random.default_rng(seed + 10_007 * layer_id) for layer_id in layer_ids)
        return [
            tuple(2 * int(draw) + 1 for draw in rng.integers(0, below, size=max_order, dtype=np.int64)) for rng in drawn
        ]

    def moduli(self, layer_ids: Sequence[int], *, rows_per_head: Sequence[int], heads: int) -> list[Moduli]:
        """Ascending primes."""
        return ascending_primes(len(layer_ids), rows_per_head=rows_per_head, heads=heads)

    def num_rows(self, moduli: Moduli) -> int:
        """Exactly the slots."""
        return sum(map(sum, moduli))


@dataclass(frozen=True)
class QwenPle:
    """Qwen's per-layer embedding (`qwen4_exp`): splitmix64 multipliers by a layer's place, rows rounded up.

    A layer's id IS its place among the memory layers, so adding one layer re-addresses the later ones.
    """

    divisible_by: int = 128
    name: str = "qwen_ple"
    boundary: str = "eos"

    def multipliers(
        self, layer_ids: Sequence[int], *, compressed_vocab_size: int, max_order: int, seed: int
    ) -> list[tuple[int, ...]]:
        """Odd, with no generator but integers modulo 2**64."""
        below = half_bound(compressed_vocab_size)
        states = (
            [(seed + 10_007 * place + GOLDEN * lag) % 2**64 for lag in range(1, max_order + 1)] for place in layer_ids
        )
        return [tuple(2 * (splitmix64(state) % below) + 1 for state in lags) for lags in states]

    def moduli(self, layer_ids: Sequence[int], *, rows_per_head: Sequence[int], heads: int) -> list[Moduli]:
        """Ascending primes."""
        return ascending_primes(len(layer_ids), rows_per_head=rows_per_head, heads=heads)

    def num_rows(self, moduli: Moduli) -> int:
        """The slots, rounded up; no n-gram reads the padding rows."""
        return -(-sum(map(sum, moduli)) // self.divisible_by) * self.divisible_by


GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(state: int) -> int:
    """One output of the splitmix64 generator (Steele, Lea, Flood 2014), integers modulo 2**64."""
    mixed = (state + GOLDEN) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return mixed ^ (mixed >> 31)


DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in (Engram(), Engram(name="deepseek_v41"), QwenPle())}
