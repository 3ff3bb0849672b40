"""An address spec is saved as numbers, because the address of an n-gram is a file format.

A trained table means something only under the exact multipliers and moduli it was trained with. A seed
would make them depend on a random generator, a prime search and a dialect's code for ever; so they are
derived once, written out, and never derived again. The digest covers every number, and its word code lets
two people compare specs by eye.

Two limits make 64-bit arithmetic equal to Python's: a product of id and multiplier stays below 2**63 (so
the mix is never negative and `%` means the same everywhere), and a table stays below 2**48 rows. They are
checked whenever a spec is built, from whatever source.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from nengram.address import spec_json
from nengram.address.bounds import bounded, distinct, entries, integer, integers, shown
from nengram.address.dialects import BOUNDARIES, DIALECTS, Dialect, QwenPle
from nengram.errors import AddressError, nearest
from nengram.files import sha256_bytes, word_code

VERSION = 1
MAX_IDS = 2**31
MAX_ROWS = 2**48
MAX_HEADS = 2**12


@dataclass(frozen=True)
class LayerSpec:
    """One memory layer's numbers. `layer_id` seeded its hash; `block_index`: zero-based place, if known."""

    layer_id: int
    block_index: int | None
    multipliers: tuple[int, ...]
    moduli: tuple[tuple[int, ...], ...]
    num_rows: int


@dataclass(frozen=True)
class AddressSpec:
    """All that decides which rows a sequence of compressed ids reads. Build with `engram`, `deepseek_v41`,
    `qwen_ple` or `from_json`.

    `layers` are in the order in which moduli were handed out. `num_rows` of a layer may exceed the sum of its
    moduli (padding rows). Raises AddressError, naming field and bound, if a number is out of its range.
    """

    version: int
    dialect: str
    compressed_vocab_size: int
    max_order: int
    heads: int
    pad_cid: int
    boundary: str
    layers: tuple[LayerSpec, ...]

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def engram(
        cls,
        *,
        compressed_vocab_size: int,
        rows_per_head: Sequence[int],
        heads: int,
        layer_ids: Sequence[int],
        pad_cid: int,
        seed: int = 0,
        block_indices: Sequence[int] | None = None,
    ) -> "AddressSpec":
        """The paper's addressing (arXiv 2601.07372 section 2.2; the public demo where the paper is silent).

        rows_per_head: nominal rows of one slot, one entry per order from 2 up.
        layer_ids: what seeds each layer's multipliers; their order decides the primes.
        block_indices: each layer's zero-based place in the stack, if known.

        Raises AddressError on an empty, duplicate or out-of-range argument.
        """
        vocab = integer("compressed_vocab_size", compressed_vocab_size, 1, MAX_IDS)
        return _derive(
            DIALECTS["engram"],
            vocab=vocab,
            rows_per_head=integers("rows_per_head", rows_per_head, 1, MAX_ROWS, "one per order, from 2 up"),
            heads=integer("heads", heads, 1, MAX_HEADS),
            layer_ids=integers("layer_ids", layer_ids, 0, MAX_IDS, "one id per memory layer"),
            pad_cid=integer("pad_cid", pad_cid, 0, vocab),
            seed=integer("seed", seed, 0, 2**63),
            block_indices=block_indices,
        )

    @classmethod
    def deepseek_v41(
        cls,
        *,
        compressed_vocab_size: int = 99_092,
        rows_per_head: int = 16_000_000,
        max_order: int = 4,
        heads: int = 8,
        layer_ids: Sequence[int] = (1, 14),
        pad_cid: int = 2,
        seed: int = 0,
    ) -> "AddressSpec":
        """The addressing of DeepSeek-V4.1-Flash; the defaults are the release's.

        It is the paper's with one nominal size for all orders, and layer ids that are zero-based block numbers.
        An image position is to be flagged as blocked. pad_cid: the COMPRESSED id of the pad token (2).

        Raises AddressError on an empty, duplicate or out-of-range argument.
        """
        vocab = integer("compressed_vocab_size", compressed_vocab_size, 1, MAX_IDS)
        orders = integer("max_order", max_order, 2, MAX_IDS) - 1
        blocks = integers("layer_ids", layer_ids, 0, MAX_IDS, "one id per memory layer")
        return _derive(
            DIALECTS["deepseek_v41"],
            vocab=vocab,
            rows_per_head=(integer("rows_per_head", rows_per_head, 1, MAX_ROWS),) * orders,
            heads=integer("heads", heads, 1, MAX_HEADS),
            layer_ids=blocks,
            pad_cid=integer("pad_cid", pad_cid, 0, vocab),
            seed=integer("seed", seed, 0, 2**63),
            block_indices=blocks,
        )

    @classmethod
    def qwen_ple(
        cls,
        *,
        vocab_size: int = 248_320,
        eos_id: int = 248_044,
        ple_layer_ids: Sequence[int],
        rows_per_head: int = 20_000_000,
        max_order: int = 3,
        heads: int = 8,
        divisible_by: int = 128,
        seed: int = 1234,
    ) -> "AddressSpec":
        """The addressing of Qwen's PLE (`qwen4_exp`); the defaults are Qwen3.8-Flash-Next's. Ids are raw token ids.

        eos_id: ends a text (a boundary) and stands before every start. ple_layer_ids: ONE-based block numbers,
        ascending; the spec's layer ids are 0, 1, ..., their places in this list.
        divisible_by: rows are padded to a multiple of this (`make_ngram_vocab_size_divisible_by`).

        Raises AddressError on an empty, duplicate, unsorted or out-of-range argument.
        """
        vocab = integer("vocab_size", vocab_size, 1, MAX_IDS)
        orders = integer("max_order", max_order, 2, MAX_IDS) - 1
        blocks = integers("ple_layer_ids", ple_layer_ids, 1, MAX_IDS, "one-based numbers of the blocks with memory")
        if list(blocks) != sorted(set(blocks)):
            raise AddressError(f"ple_layer_ids must be distinct and ascending, got {shown(list(blocks))}")
        return _derive(
            QwenPle(divisible_by=integer("divisible_by", divisible_by, 1, MAX_ROWS)),
            vocab=vocab,
            rows_per_head=(integer("rows_per_head", rows_per_head, 1, MAX_ROWS),) * orders,
            heads=integer("heads", heads, 1, MAX_HEADS),
            layer_ids=tuple(range(len(blocks))),
            pad_cid=integer("eos_id", eos_id, 0, vocab),
            seed=integer("seed", seed, 0, 2**63),
            block_indices=[block - 1 for block in blocks],
        )

    @classmethod
    def from_json(cls, text: str) -> "AddressSpec":
        """The spec that `to_json` wrote. Every key, type and bound of the text is checked: AddressError."""
        content = spec_json.parse(text, version=VERSION, spec_keys=_names(cls), layer_keys=_names(LayerSpec))
        return cls(**content | {"layers": tuple(LayerSpec(**layer) for layer in content["layers"])})

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, multipliers as decimal strings."""
        layers = [vars(layer) | {"multipliers": [str(m) for m in layer.multipliers]} for layer in self.layers]
        content = {name: getattr(self, name) for name in _names(AddressSpec)} | {"layers": layers}
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the canonical JSON."""
        return sha256_bytes(self.to_json().encode())

    @property
    def word_code(self) -> str:
        """The digest's first 48 bits as three pronounceable words, for logs."""
        return word_code(self.digest)

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """The id of every memory layer, in table order."""
        return tuple(layer.layer_id for layer in self.layers)

    @property
    def end_cid(self) -> int:
        """The id after which look-back begins anew, or -1: a rule of the boundary "eos", whose pad id it is."""
        return self.pad_cid if self.boundary == "eos" else -1

    @property
    def slots(self) -> int:
        """S: orders x heads, the same in every layer."""
        return (self.max_order - 1) * self.heads

    @property
    def slot_orders(self) -> np.ndarray:
        """int64 [S]: the n-gram order of each slot, 2, 2, ..., 3, 3, ..."""
        return np.repeat(np.arange(2, self.max_order + 1), self.heads)

    def num_rows(self, layer_id: int) -> int:
        """Rows of this layer's table."""
        return self.layer(layer_id).num_rows

    def multipliers(self, layer_id: int) -> np.ndarray:
        """int64 [max_order]; the first multiplies the current id."""
        return np.array(self.layer(layer_id).multipliers, dtype=np.int64)

    def moduli(self, layer_id: int) -> np.ndarray:
        """int64 [S]: rows of each slot."""
        return np.array(self.layer(layer_id).moduli, dtype=np.int64).reshape(self.slots)

    def offsets(self, layer_id: int) -> np.ndarray:
        """int64 [S]: the first row of each slot."""
        moduli_S = self.moduli(layer_id)
        return np.cumsum(moduli_S) - moduli_S

    def layer(self, layer_id: int) -> LayerSpec:
        """The numbers of one layer. Raises AddressError if there is no memory layer of that id."""
        for layer in self.layers:
            if layer.layer_id == layer_id:
                return layer
        raise AddressError(
            f"no memory layer has layer_id {layer_id}; this spec has {', '.join(map(str, self.layer_ids))}"
        )


def _derive(
    dialect: Dialect,
    *,
    vocab: int,
    rows_per_head: tuple[int, ...],
    heads: int,
    layer_ids: tuple[int, ...],
    pad_cid: int,
    seed: int,
    block_indices: Sequence[int] | None,
) -> AddressSpec:
    distinct("layer_ids", layer_ids)
    blocks: Sequence[int | None] = [None] * len(layer_ids)
    if block_indices is not None:
        blocks = integers("block_indices", block_indices, 0, MAX_IDS, "one per entry of layer_ids")
    if len(blocks) != len(layer_ids):
        raise AddressError(
            f"block_indices has {len(blocks)} entries for {len(layer_ids)} layer_ids: give one per layer"
        )
    max_order = len(rows_per_head) + 1
    multipliers = dialect.multipliers(layer_ids, compressed_vocab_size=vocab, max_order=max_order, seed=seed)
    moduli = dialect.moduli(layer_ids, rows_per_head=rows_per_head, heads=heads)
    numbers = zip(layer_ids, blocks, multipliers, moduli, map(dialect.num_rows, moduli), strict=True)
    return AddressSpec(
        version=VERSION,
        dialect=dialect.name,
        compressed_vocab_size=vocab,
        max_order=max_order,
        heads=heads,
        pad_cid=pad_cid,
        boundary=dialect.boundary,
        layers=tuple(LayerSpec(*layer) for layer in numbers),
    )


def _check(spec: AddressSpec) -> None:
    spec_json.check_version(spec.version, VERSION)
    for field, known in (("dialect", tuple(DIALECTS)), ("boundary", BOUNDARIES)):
        name = getattr(spec, field)
        if name not in known:
            raise AddressError(f"unknown {field} {shown(name)}{nearest(str(name), known)}; known: {', '.join(known)}")
    bounded("compressed_vocab_size", spec.compressed_vocab_size, 1, MAX_IDS)
    bounded("max_order", spec.max_order, 2, MAX_IDS)
    bounded("heads", spec.heads, 1, MAX_HEADS)
    bounded("pad_cid", spec.pad_cid, 0, spec.compressed_vocab_size)
    if not isinstance(spec.layers, tuple) or not spec.layers:
        raise AddressError("layers is empty: an address spec needs at least one memory layer")
    for place, layer in enumerate(spec.layers):
        _check_layer(f"layers[{place}]", layer, spec)
    distinct("layer_id", spec.layer_ids)
    distinct("block_index", [layer.block_index for layer in spec.layers if layer.block_index is not None])


def _check_layer(where: str, layer: LayerSpec, spec: AddressSpec) -> None:
    bounded(f"{where}.layer_id", layer.layer_id, 0, MAX_IDS)
    if layer.block_index is not None:
        bounded(f"{where}.block_index", layer.block_index, 0, MAX_IDS)
    entries(f"{where}.multipliers", layer.multipliers, spec.max_order, "max_order")
    largest_cid = max(1, spec.compressed_vocab_size - 1)
    for lag, multiplier in enumerate(layer.multipliers):
        bounded(f"{where}.multipliers[{lag}]", multiplier, 1, (2**63 - 1) // largest_cid + 1)
    entries(f"{where}.moduli", layer.moduli, spec.max_order - 1, "max_order - 1")
    for place, heads in enumerate(layer.moduli):
        entries(f"{where}.moduli[{place}]", heads, spec.heads, "heads")
        for head, modulus in enumerate(heads):
            bounded(f"{where}.moduli[{place}][{head}]", modulus, 1, MAX_ROWS)
    bounded(f"{where}.num_rows", layer.num_rows, sum(map(sum, layer.moduli)), MAX_ROWS)


def _names(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]
