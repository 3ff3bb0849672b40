"""What goes wrong without an error where a table, which is no Parameter, meets a loop that knows parameters alone: two warnings.

A loop whose optimiser was not made by us moves the memory's projections and leaves its rows where they are. And a loop that loads the
weights of an older step (`Trainer(load_best_model_at_end=True)`) leaves the rows of the last one beside them.
"""

import warnings
from typing import Any


def tables_stand_still(optimizer: str) -> None:
    """Warn that a training loop does not move the tables. optimizer: how the one that does is made."""
    warnings.warn(
        f"this loop trains a memory whose tables stay as they are: they are no parameters. {optimizer} moves them; "
        "if they are to stay, memory.frozen=True says so",
        stacklevel=3,
    )


def weights_came(learner: Any) -> None:
    """Weights have been loaded. Warn where the tables beside them have learned since, and nobody brings them back."""
    if learner is not None and learner.has_stepped and not learner.follows_weights:
        warnings.warn(
            "weights were loaded beside tables that have learned since: load the optimiser's state as well, as a resume does; "
            "nengram.hf.BestTables() among a Trainer's callbacks does it after load_best_model_at_end",
            stacklevel=3,
        )
