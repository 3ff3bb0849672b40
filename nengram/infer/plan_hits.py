"""How often a hot set answers, predicted from a corpus: the train split builds it, the dev split asks.

A hot set is static: the rows that the train split reads most, as many as there is room for. Two ways to know it:

- **rows**: every n-gram is hashed and the reads of each row are counted, collisions included. Exact for this corpus.
- **n-grams**: the heads of one order and all layers are asked by the same n-gram, so where a table is far larger than the corpus and
  few n-grams share a row, counting n-grams says the same at a fraction of the cost.

Both give every position of dev a key and that key's place in the ranking of the train split (`ranks_TK`), and the rest is comparing
places with the room there is. What a chunk asks twice it reads once: `chunks` counts distinct rows that are not hot.

A corpus cannot speak for a hot set that has room for more rows than it ever read (`exhausted`): its misses are then first meetings,
and more text, or a recording of real requests, would raise the rate.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from nengram.address import Addresser, AddressSpec, NgramCounts, count_of, ngram_counts, ngrams_of
from nengram.address.census import rows_of_ngrams
from nengram.errors import DataError
from nengram.infer.plan_sizes import PlannedTables

HOT_SHARES = (0.001, 0.01, 0.05, 0.1, 0.2)
ROWS_COUNTED = 2**26  # rows of one layer; beyond, n-grams are counted
CHUNKS = {"decode, batch 1": (1, 1), "decode, batch 8": (8, 1), "prefill 512": (1, 512), "prefill 4096": (1, 4096)}
DRAWS = {1: 1000, 512: 256, 4096: 64}  # at most so many, by length of the stretch
UNSEEN = np.iinfo(np.int64).max


@dataclass(frozen=True, eq=False)
class PlanText:
    """Compressed ids of the two splits and where look-back begins anew. `about`: one line on whose tokens these are.

    proxy: the ids are not those of the tables' own tokenizer, so frequencies stand in for frequencies.
    """

    train_T: np.ndarray
    train_start_T: np.ndarray
    dev_T: np.ndarray
    dev_start_T: np.ndarray
    about: str
    proxy: bool


@dataclass(frozen=True)
class HotHits:
    """Share of row reads that a hot set of `share` of the table answers; by order, and over all orders."""

    share: float
    rows: int
    by_order: dict[int, float]
    all: float
    exhausted: bool


@dataclass(frozen=True)
class ChunkReads:
    """A chunk of `tokens` tokens, `wanted` where dev is long enough. distinct_share: distinct rows per row asked.

    cold_rows_per_token: distinct rows outside the hot set, of all layers.
    """

    name: str
    tokens: int
    wanted: int
    distinct_share: float
    cold_rows_per_token: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class LayerReads:
    """What dev asks of one layer: keys int64 [T, K], the same for the same row, and each key's place in train's ranking.

    rows_per_key: rows that travel together under one key. layers: how many layers this one stands for.
    """

    keys_TK: np.ndarray
    ranks_TK: np.ndarray
    orders_K: np.ndarray
    rows_per_key: int
    layers: int
    num_rows: int
    known: int

    @property
    def weight(self) -> int:
        """Row reads that one key stands for."""
        return self.rows_per_key * self.layers

    def room(self, share: float) -> int:
        """Keys in a hot set of `share` of the rows."""
        return int(share * self.num_rows) // self.rows_per_key


@dataclass(frozen=True, eq=False)
class ReadTrace:
    """All reads of the dev split, ranked by the train split. `method`: "rows" or "n-grams"."""

    method: str
    tokens: int
    layers: tuple[LayerReads, ...]

    def hits(self, share: float) -> HotHits:
        """The hit rate of a hot set of `share` (0..1) of every layer's rows."""
        hot = [(layer.ranks_TK < layer.room(share), layer) for layer in self.layers]
        orders = sorted(set(self.layers[0].orders_K.tolist()))
        return HotHits(
            share=share,
            rows=sum(layer.room(share) * layer.weight for _, layer in hot),
            by_order={
                order: float(np.mean([hot_TK[:, layer.orders_K == order].mean() for hot_TK, layer in hot]))
                for order in orders
            },
            all=float(np.mean([hot_TK.mean() for hot_TK, _ in hot])),
            exhausted=any(layer.room(share) > layer.known for _, layer in hot),
        )

    def chunks(self, share: float) -> tuple[ChunkReads, ...]:
        """What chunks of each shape read beside a hot set of `share` of the rows, on average over draws from dev."""
        return tuple(self._chunk(name, *shape, share) for name, shape in CHUNKS.items())

    def _chunk(self, name: str, sequences: int, tokens: int, share: float) -> ChunkReads:
        if sequences == tokens == 1:  # slots of one token share no row
            cold = sum(layer.weight * (layer.ranks_TK >= layer.room(share)).sum() for layer in self.layers)
            return ChunkReads(name, 1, 1, 1.0, float(cold) / self.tokens)
        drawn = _draws(self.tokens, sequences, tokens)
        asked = distinct = cold = 0
        for layer in self.layers:
            weight, room = layer.weight, layer.room(share)
            for positions_T in drawn:
                keys, first = np.unique(layer.keys_TK[positions_T], return_index=True)
                asked += weight * len(positions_T) * layer.keys_TK.shape[1]
                distinct += weight * len(keys)
                cold += weight * int((layer.ranks_TK[positions_T].ravel()[first] >= room).sum())
        read = sum(len(positions_T) for positions_T in drawn)
        return ChunkReads(name, len(drawn[0]), sequences * tokens, distinct / asked, cold / read)


def trace_reads(tables: PlannedTables, text: PlanText) -> ReadTrace:
    """Rank what dev asks by what train asked, by rows or by n-grams, whichever tells the truth at least cost.

    Raises: DataError when a split is empty.
    """
    if not len(text.train_T) or not len(text.dev_T):
        raise DataError(f"{text.about}: a hit rate needs text in the train and the dev split")
    spec = tables.spec
    fits = max(int(text.train_T.max()), int(text.dev_T.max())) < spec.compressed_vocab_size
    largest = max(spec.num_rows(layer_id) for layer_id in tables.layer_ids)
    by_rows = fits and largest <= ROWS_COUNTED
    pad_cid = spec.pad_cid if by_rows else -1
    orders = [_Order.count(order, text, pad_cid) for order in range(2, spec.max_order + 1)]
    if by_rows:
        layers = _layers_by_rows(spec, tables.layer_ids, orders)
        return ReadTrace("rows", len(text.dev_T), tuple(layers))
    return ReadTrace("n-grams", len(text.dev_T), (_layer_by_ngrams(spec, tables.layer_ids, orders),))


@dataclass(frozen=True, eq=False)
class _Order:
    """The n-grams of one order: distinct ones of both splits, and which of dev's stands at each position."""

    train: NgramCounts
    dev: NgramCounts
    number_T: np.ndarray

    @classmethod
    def count(cls, order: int, text: PlanText, pad_cid: int) -> "_Order":
        train = ngram_counts(text.train_T, text.train_start_T, order, pad_cid=pad_cid)
        dev = ngram_counts(text.dev_T, text.dev_start_T, order, pad_cid=pad_cid)
        ngrams_TN = ngrams_of(text.dev_T, text.dev_start_T, order, pad_cid=pad_cid)
        return cls(train, dev, _number_of(dev, ngrams_TN))


def _number_of(counts: NgramCounts, ngrams_XN: np.ndarray) -> np.ndarray:
    """Where each n-gram stands in `counts`: int64 [X], -1 for one that was never counted."""
    return count_of(replace(counts, counts_U=np.arange(1, len(counts) + 1)), ngrams_XN) - 1


def _layer_by_ngrams(spec: AddressSpec, layer_ids: tuple[int, ...], orders: list[_Order]) -> LayerReads:
    ranks_U = _ranking(np.concatenate([order.train.counts_U for order in orders]))
    keys, ranks, first_key, first_rank = [], [], 0, 0
    for order in orders:
        place_U = _number_of(order.train, order.dev.ngrams_UN)
        rank_U = np.where(place_U >= 0, ranks_U[first_rank + place_U], UNSEEN)
        keys.append(first_key + order.number_T)
        ranks.append(rank_U[order.number_T])
        first_key, first_rank = first_key + len(order.dev), first_rank + len(order.train)
    return LayerReads(
        keys_TK=np.stack(keys, axis=1),
        ranks_TK=np.stack(ranks, axis=1),
        orders_K=np.array([order.train.order for order in orders]),
        rows_per_key=spec.heads,
        layers=len(layer_ids),
        num_rows=sum(spec.num_rows(layer_id) for layer_id in layer_ids) // len(layer_ids),
        known=len(ranks_U),
    )


def _layers_by_rows(spec: AddressSpec, layer_ids: tuple[int, ...], orders: list[_Order]) -> list[LayerReads]:
    address = Addresser(spec)
    rows_of = {layer_id: ([], [], []) for layer_id in layer_ids}
    for order in orders:
        in_order = spec.slot_orders == order.train.order
        train, dev = (rows_of_ngrams(address, counts, in_order) for counts in (order.train, order.dev))
        for layer_id, (rows, counts, asked) in rows_of.items():
            for rows_U in train[layer_id].T:
                rows_R, row_of_U = np.unique(rows_U, return_inverse=True)
                rows.append(rows_R)
                counts.append(np.bincount(row_of_U, weights=order.train.counts_U).astype(np.int64))
            asked.append(dev[layer_id][order.number_T])
    layers = []
    for layer_id, (rows, counts, asked) in rows_of.items():
        rows_R, ranks_R = np.concatenate(rows), _ranking(np.concatenate(counts))
        keys_TK = np.concatenate(asked, axis=1)
        place_TK = np.minimum(np.searchsorted(rows_R, keys_TK), len(rows_R) - 1)
        ranks_TK = np.where(rows_R[place_TK] == keys_TK, ranks_R[place_TK], UNSEEN)
        layers.append(LayerReads(keys_TK, ranks_TK, spec.slot_orders, 1, 1, spec.num_rows(layer_id), known=len(rows_R)))
    return layers


def _ranking(counts_U: np.ndarray) -> np.ndarray:
    """The place of each count when the largest comes first; of equal ones, the first."""
    ranks_U = np.empty(len(counts_U), np.int64)
    ranks_U[np.argsort(-counts_U, kind="stable")] = np.arange(len(counts_U))
    return ranks_U


def _draws(length: int, sequences: int, tokens: int) -> list[np.ndarray]:
    """Positions of chunks: stretches of `tokens` that do not overlap, or `sequences` single positions drawn at random."""
    if sequences > 1:
        rng = np.random.default_rng(0)
        return [rng.choice(length, size=min(sequences, length), replace=False) for _ in range(DRAWS[tokens])]
    most, tokens = DRAWS[tokens], min(tokens, length)
    whole = length // tokens
    chosen = np.unique(np.linspace(0, whole - 1, min(most, whole)).astype(np.int64))
    return [np.arange(place * tokens, (place + 1) * tokens) for place in chosen]
