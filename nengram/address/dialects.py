"""A dialect is how one family of models turns sizes and a seed into the numbers of a spec, and nothing else.

Hashing itself never asks for a dialect: it reads multipliers, moduli, pad id and boundary rule from the
spec, because those are what a trained table depends on. So a dialect is consulted once, when a spec is
born, and a new family is one class and one entry below. `layer_ids` are passed together since families
differ in what a layer's numbers depend on: its id, or its place in the list.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from nengram.address.primes import take_primes

BOUNDARIES = ("sequence",)
"""Where look-back stops of itself. `sequence`: at the sequence start; all else is flagged by the caller."""


def half_bound(compressed_vocab_size: int) -> int:
    """The exclusive bound of a draw r, so that the odd number 2 r + 1 times any id stays below 2**63."""
    return max(1, (2**63 - 1) // compressed_vocab_size // 2)


class Dialect(Protocol):
    """Arguments arrive checked; one result per layer, in the order of `layer_ids`."""

    name: str
    boundary: str

    def multipliers(
        self, layer_ids: Sequence[int], *, compressed_vocab_size: int, max_order: int, seed: int
    ) -> list[tuple[int, ...]]:
        """One multiplier per n-gram position, the current id's first."""

    def moduli(
        self, layer_ids: Sequence[int], *, rows_per_head: Sequence[int], heads: int
    ) -> list[tuple[tuple[int, ...], ...]]:
        """One tuple of `heads` moduli per order, from order 2 up."""

    def num_rows(self, moduli: tuple[tuple[int, ...], ...]) -> int:
        """Rows of a layer's table, padding included."""


class Engram:
    """The Engram paper's public demo (arXiv 2601.07372, section 2.2): PCG64 multipliers, ascending primes."""

    name = "engram"
    boundary = "sequence"

    def multipliers(
        self, layer_ids: Sequence[int], *, compressed_vocab_size: int, max_order: int, seed: int
    ) -> list[tuple[int, ...]]:
        """Odd, and small enough that no product with an id reaches 2**63; a layer's place does not matter."""
        below = half_bound(compressed_vocab_size)
        drawn = (np.random.default_rng(seed + 10_007 * layer_id) for layer_id in layer_ids)
        return [
            tuple(2 * int(draw) + 1 for draw in rng.integers(0, below, size=max_order, dtype=np.int64)) for rng in drawn
        ]

    def moduli(
        self, layer_ids: Sequence[int], *, rows_per_head: Sequence[int], heads: int
    ) -> list[tuple[tuple[int, ...], ...]]:
        """Each layer and order searches from its nominal size again, skipping what any earlier slot took."""
        seen: set[int] = set()
        return [tuple(take_primes(rows, heads, seen) for rows in rows_per_head) for _ in layer_ids]

    def num_rows(self, moduli: tuple[tuple[int, ...], ...]) -> int:
        """Exactly the slots: no padding rows."""
        return sum(map(sum, moduli))


DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in (Engram(),)}
