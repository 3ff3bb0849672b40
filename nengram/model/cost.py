"""What a model costs, counted in one place: every module says its own share, the model sums.

Conventions. A multiply-add is 2 FLOPs; figures are for one token of the forward pass (training is three times that). A token at
position t of a context T attends to t + 1 keys, so scores count (T + 1) / 2 keys on average. ALL router rows are counted, also in
`active`: the router reads every one of them (counting only the chosen rows hides a difference). Section 3 of the paper names
the parts: total and active leave out the vocabulary matrices, sparse = total - active is the budget that rho divides.
"""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Cost:
    """Parameters and forward FLOPs per token. Instances add up."""

    active: int = 0  # parameters every token uses, without vocabulary matrices and tables
    experts_idle: int = 0  # parameters of routed experts that a token does not use
    table: int = 0  # table parameters, nominal: every row of every table
    vocabulary: int = 0  # embedding and head (once if tied)
    flops: int = 0  # per token, forward, head included
    memory_flops: int = 0  # the part of `flops` that the memory path takes

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def sparse(self) -> int:
        """P_sparse = P_tot - P_act (paper, section 3): idle experts and tables."""
        return self.experts_idle + self.table

    @property
    def total(self) -> int:
        """P_tot (paper, section 3): all trainable parameters without vocabulary matrices."""
        return self.active + self.sparse

    @property
    def total_with_vocabulary(self) -> int:
        """Everything that is trained."""
        return self.total + self.vocabulary

    def to_dict(self) -> dict[str, int]:
        """Fields and sums, for results files."""
        sums = {name: getattr(self, name) for name in ("sparse", "total", "total_with_vocabulary")}
        return {f.name: getattr(self, f.name) for f in fields(self)} | sums
