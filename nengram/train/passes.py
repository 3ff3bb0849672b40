"""What protects the tables when text is read more than once.

A row belongs to few n-grams, so after one pass it knows what followed them in this very text. On the second pass it tells the answer
before the model has thought, the gates learn to trust it, and held-out text, where rows are not so wise, pays. `train.second_pass`:

    keep          nothing is done
    fresh_tables  every further pass begins with tables drawn anew (same distribution, another seed) and no optimiser state: what was
                  learned by heart is gone as under another hash, and no address changes
    mask_rare     in every further pass n-grams that one pass holds fewer than `train.rare_below` times are not read: their vectors
                  are zero, nothing flows back, no row moves. Where the model is judged, all rows are read

An n-gram's count is that of the least read of its rows, over the heads of its order in all layers: never too low, and too high only
where every one of those rows is shared (a count-min sketch, Cormode and Muthukrishnan 2005). Counts are of the run's own first pass,
windows, order and row control included, and are taken again when a run is resumed: nothing more has to be saved.
"""

import torch
from torch import Tensor

from nengram.address import AddressSpec
from nengram.config import Config, TrainConfig
from nengram.errors import ConfigError, nearest
from nengram.model import Transformer
from nengram.text import Batches, Packed
from nengram.train.evaluate import tensors_of

SECOND_PASS = ("keep", "fresh_tables", "mask_rare")
SEEDS_APART = 1_000_000  # between the tables of two passes: no run has the seed of another's further pass


class RareNgrams:
    """Says of looked-up slots whether their n-gram was met often enough.

    counts: `{layer_id: int64 [rows]}`, how often each row was read in one pass. below: the least count that is often enough.
    """

    def __init__(self, spec: AddressSpec, counts: dict[int, Tensor], below: int):
        self.orders, self.heads = spec.max_order - 1, spec.heads
        self.counts, self.below = counts, below

    def keep(self, rows: dict[int, Tensor]) -> Tensor:
        """Bool [B, T, S], true where the slot's n-gram is not rare; `rows` as a memory step has them, `{layer_id: rows_BTS}`."""
        counts_BTS = torch.stack([self.counts[layer_id][rows_BTS] for layer_id, rows_BTS in rows.items()]).amin(0)
        counts_BTO = counts_BTS.unflatten(2, (self.orders, self.heads)).amin(3)
        return (counts_BTO >= self.below).repeat_interleave(self.heads, dim=2)


class FurtherPasses:
    """Does before each step what `train.second_pass` says; nothing in the first pass, and nothing for a model without tables.

    tier: where fresh tables live, as in `Transformer.create_tables`. Raises: ConfigError for an unknown way (nearest named).
    """

    def __init__(self, model: Transformer, config: Config, packed: Packed, *, tier: str):
        check_second_pass(config.train)
        self.model, self.config, self.packed, self.tier = model, config, packed, tier
        self._rare: RareNgrams | None = None

    def before(self, pass_index: int, *, begins: bool) -> RareNgrams | None:
        """To be called before the step of a batch. begins: it is the first of its pass. Returns what must not be read, if anything."""
        way = self.config.train.second_pass if pass_index and self.model.spec else "keep"
        if way == "fresh_tables" and begins:
            self.model.create_tables(self.config.train.seed + pass_index * SEEDS_APART, tier=self.tier)
        if way != "mask_rare":
            return None
        if self._rare is None:
            self._rare = RareNgrams(self.model.spec, self._counts(), self.config.train.rare_below)
        return self._rare

    @torch.no_grad()
    def _counts(self) -> dict[int, Tensor]:
        """How often the first pass reads each row of each layer."""
        spec, device, train = self.model.spec, self.model.embed.weight.device, self.config.train
        counts = {id_: torch.zeros(spec.num_rows(id_), dtype=torch.int64, device=device) for id_ in spec.layer_ids}
        sizes = {"batch": train.batch, "context": self.config.model.context}
        for batch, _ in Batches(self.packed, **sizes, seed=train.seed):
            ids_BT, _, start_BT = tensors_of(batch, device)
            with self.model.begin(ids_BT, start_BT=start_BT) as step:
                for layer_id, rows_BTS in step.rows.items():
                    rows_N = rows_BTS.flatten()
                    counts[layer_id].index_add_(0, rows_N, torch.ones_like(rows_N))
        return counts


def check_second_pass(train: TrainConfig) -> None:
    """Raises: ConfigError for an unknown `train.second_pass` (nearest named), or a `train.rare_below` below 1."""
    if train.second_pass not in SECOND_PASS:
        raise ConfigError(
            f'train.second_pass "{train.second_pass}" is unknown{nearest(train.second_pass, SECOND_PASS)}; '
            f"there are {', '.join(SECOND_PASS)}"
        )
    if train.rare_below < 1:
        raise ConfigError(f"train.rare_below must be at least 1, got {train.rare_below}")
