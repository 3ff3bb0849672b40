"""What a model read of its tables: rows by n-gram order and tier, bytes, and the time that somebody waited.

The orders are this side's labels: a store only sees ranges of rows. One set of counters a memory layer, from `watch` to the moment it
is read; counting sorts every request, so a model that nobody watches pays nothing.
"""

from typing import Any

from nengram.memory import order_labels
from nengram.model import Transformer
from nengram.store import Counters


def watch(model: Transformer) -> dict[int, Counters]:
    """Count from now on what every memory layer reads; `{layer_id: Counters}`, empty for a model without memory."""
    counters = {}
    for layer_id, store in model.stores.items():
        counters[layer_id] = store.counters = Counters(order_labels(model.spec, layer_id))
    return counters


def to_dict(counters: dict[int, Counters], tokens: int) -> dict[str, Any]:
    """For JSON: `tokens` read, and of each memory layer what `Counters.to_dict` says."""
    return {"tokens": tokens, "layers": {str(layer_id): one.to_dict() for layer_id, one in counters.items()}}
