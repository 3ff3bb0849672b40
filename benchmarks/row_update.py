"""What does it cost to train a table? One update of the rows that a batch touched, against torch's own sparse optimiser.

Ours is all that follows the backward pass: sum the gradients of rows looked up more than once, then apply the rule. Theirs is
`torch.optim.SparseAdam.step()` on an uncoalesced sparse gradient, which it coalesces itself; building that gradient is not counted.
The row-wise rules keep one number a row, SparseAdam two a weight: the first compares what we offer with what torch offers, the last
line, where both run the same rule, the code alone. Every page of every table and state is written before the clock starts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from benchmarks.gates import check_update, require_close
from benchmarks.measure import interleave
from benchmarks.report import figure, result
from nengram.store import ResidentStore, RowwiseAdagrad, RowwiseRMSprop, Rule, SparseAdam, coalesce

Draw = Callable[["Sizes", np.random.Generator], np.ndarray]
BETAS, LR = (0.9, 0.95), 1e-3


@dataclass(frozen=True)
class Sizes:
    """1,024 tokens of 16 slots; `checked_rows`: rows of the small table on which updates are held against their twins."""

    num_rows: int = 1_000_000
    row_width: int = 64
    lookups: int = 16_384
    checked_rows: int = 10_000
    pairs: int = 24


FULL = Sizes()


def run(sizes: Sizes = FULL) -> dict:
    """The result of this benchmark. Raises RedGate."""
    figures, absolute = [], {}
    theirs = TorchSparseAdam(sizes)
    draws = {"uniform": uniform_rows, "Zipf": ZipfRows(sizes)}
    for rule, goal in ((RowwiseAdagrad(), (">=", 4.0)), (RowwiseRMSprop(), (">=", 4.0)), (SparseAdam(BETAS), None)):
        ours = OurUpdate(sizes, rule)
        for rows, draw in draws.items():
            inputs = partial(fresh, sizes, draw, np.random.default_rng(0))
            verify(sizes, rule, *inputs()[:2])
            timings = interleave(ours, theirs, inputs, sizes.pairs)
            figures.append(figure(f"torch SparseAdam / {rule.name}, {rows} rows", timings.speedup, "x", goal))
            absolute[f"{rule.name}_ms_{rows.lower()}"] = 1e3 * np.median(timings.ours_s)
            absolute[f"torch_sparse_adam_ms_{rows.lower()}"] = 1e3 * np.median(timings.theirs_s)
    what = (
        f"update of {sizes.num_rows:,} x {sizes.row_width} float32 rows, {sizes.lookups:,} lookups, coalescing included"
    )
    gate = "coalescing and update agree with their torch twins; our SparseAdam agrees with torch's"
    return result("row_update", what, gate, figures, absolute)


class OurUpdate:
    """`coalesce` and `store.update` on a table whose state is in memory."""

    def __init__(self, sizes: Sizes, rule: Rule) -> None:
        self.rule = rule
        self.store = ResidentStore(sizes.num_rows, sizes.row_width)
        self.store.update(torch.tensor([0]), torch.zeros(1, sizes.row_width), rule, LR)
        touch(self.store.state.values())

    def __call__(self, given: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        rows_N, grads_NE, _ = given
        self.store.update(*coalesce(rows_N, grads_NE), self.rule, LR)


class TorchSparseAdam:
    """`torch.optim.SparseAdam` on a table of the same size; the opponent."""

    def __init__(self, sizes: Sizes) -> None:
        self.weight = torch.nn.Parameter(ResidentStore(sizes.num_rows, sizes.row_width).weight)
        self.optimizer = torch.optim.SparseAdam([self.weight], lr=LR, betas=BETAS)
        self((None, None, sparse_gradient(sizes, torch.tensor([0]), torch.zeros(1, sizes.row_width))))
        touch(value for value in self.optimizer.state[self.weight].values() if isinstance(value, torch.Tensor))

    def __call__(self, given: tuple) -> None:
        self.weight.grad = given[2]
        self.optimizer.step()


def verify(sizes: Sizes, rule: Rule, rows_N: torch.Tensor, grads_NE: torch.Tensor) -> None:
    """The batch that will be timed, folded into a small table. Raises RedGate."""
    sizes = replace(sizes, num_rows=sizes.checked_rows)
    rows_N = rows_N % sizes.num_rows
    check_update(rule, rows_N, grads_NE, sizes.num_rows)
    if isinstance(rule, SparseAdam):
        ours, theirs = OurUpdate(sizes, rule), TorchSparseAdam(sizes)
        given = rows_N, grads_NE, sparse_gradient(sizes, rows_N, grads_NE)
        for update in (ours, theirs):
            update(given)
        require_close("SparseAdam against torch's", ours.store.weight, theirs.weight.detach(), 1e-5)


def fresh(sizes: Sizes, draw: Draw, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One batch: rows `[N]`, gradients `[N, E]`, and both as torch's uncoalesced sparse gradient."""
    rows_N = torch.from_numpy(draw(sizes, rng))
    grads_NE = torch.from_numpy(rng.standard_normal((sizes.lookups, sizes.row_width), dtype=np.float32))
    return rows_N, grads_NE, sparse_gradient(sizes, rows_N, grads_NE)


def sparse_gradient(sizes: Sizes, rows_N: torch.Tensor, grads_NE: torch.Tensor) -> torch.Tensor:
    """What the backward of `nn.Embedding(sparse=True)` leaves: every lookup, repeats not summed."""
    size = (sizes.num_rows, sizes.row_width)
    return torch.sparse_coo_tensor(rows_N[None], grads_NE, size, check_invariants=False)


def uniform_rows(sizes: Sizes, rng: np.random.Generator) -> np.ndarray:
    """int64 [N], every row equally likely."""
    return rng.integers(0, sizes.num_rows, sizes.lookups)


class ZipfRows:
    """int64 [N], the row of rank r as likely as 1 / r, ranks scattered over the table as a hash scatters them."""

    def __init__(self, sizes: Sizes) -> None:
        self.until_R = np.cumsum(1 / np.arange(1, sizes.num_rows + 1))
        self.row_of_rank_R = np.random.default_rng(1).permutation(sizes.num_rows)

    def __call__(self, sizes: Sizes, rng: np.random.Generator) -> np.ndarray:
        return self.row_of_rank_R[np.searchsorted(self.until_R, rng.random(sizes.lookups) * self.until_R[-1])]


def touch(tensors) -> None:
    """Write zeros over tensors of zeros: memory that was never written is not there yet, and its first use is slow."""
    for tensor in tensors:
        tensor.zero_()
