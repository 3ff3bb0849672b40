"""DeepSeek-V4.1's tables in a checkpoint: values in one tensor, a scale for every 32 of them in another.

The addresses come from `text_config` of `config.json`, or from the flat config of the reference code, which has another
name for the pad. `engram_num_embeddings` holds row counts, which are checked against the primes.
"""

import re
from collections.abc import Mapping
from typing import Any

from nengram.address import AddressSpec
from nengram.errors import CheckpointError
from nengram.memory.checkpoint_files import Checkpoint
from nengram.memory.layout import Found, Matrix, Origin, Tensors, integer_of, integers_of, section_of, text_of
from nengram.store.codecs import Codec, make_codec

NAME = re.compile(r"((?:.*\.)?layers\.(0|[1-9][0-9]{0,8})\.engram\.embed)\.(weight|scale)")
FIELDS = {
    "engram_compressed_vocab_size": "compressed_vocab_size",
    "engram_vocab_size": "rows_per_head",
    "engram_max_ngram_size": "max_order",
    "engram_n_heads": "heads",
}
LAYERS, ROWS, WIDTH, SEED = "engram_layer_ids", "engram_num_embeddings", "engram_head_dim", "engram_seed"
PAD, PAD_OF_REFERENCE = "engram_pad_token_id", "engram_pad_id"
SAME_PAD = 2  # ids up to this are special tokens with keys of their own: compression leaves them where they are


class DeepseekV41:
    """The layout `deepseek_v41`."""

    name = "deepseek_v41"

    def is_in(self, checkpoint: Checkpoint) -> bool:
        return bool(checkpoint.matching(NAME))

    def spec_of(self, config: Mapping[str, Any], pad_cid: int | None = None) -> AddressSpec:
        config = section_of(config, LAYERS)
        sizes = {ours: integer_of(config, theirs) for theirs, ours in FIELDS.items()}
        layer_ids = integers_of(config, LAYERS)
        pad_cid = _raw_pad(config) if pad_cid is None else pad_cid
        seed = integer_of(config, SEED, default=0)
        spec = AddressSpec.deepseek_v41(layer_ids=layer_ids, pad_cid=pad_cid, seed=seed, **sizes)
        said, made = config.get(ROWS), [spec.num_rows(layer_id) for layer_id in layer_ids]
        if said is not None and integers_of(config, ROWS) != made:
            raise CheckpointError(f"config field {ROWS} is {said}, but the primes of this config sum to {made}")
        return spec

    def find(self, checkpoint: Checkpoint, spec: AddressSpec, layer_id: int, scale: float | None) -> Found | None:
        found = {match[3]: match for match in checkpoint.matching(NAME).values() if int(match[2]) == layer_id}
        if not found:
            return None
        prefix = next(iter(found.values()))[1]
        config = section_of(checkpoint.config, LAYERS)
        width, rows = integer_of(config, WIDTH), spec.num_rows(layer_id)
        codec = make_codec("fp8", width)
        planes = (
            checkpoint.plane([f"{prefix}.weight"], ["F8_E4M3"], width, rows),
            checkpoint.plane([f"{prefix}.scale"], ["F8_E8M0"], codec.row_bytes - width, rows),
        )
        fields = {name: value for name, value in config.items() if name.startswith("engram_")}
        return Found(codec, planes, {"layout": self.name, "prefix": prefix, "config": fields})

    def config_of(self, spec: AddressSpec, row_width: int) -> dict[str, Any]:
        return {
            LAYERS: list(spec.layer_ids),
            ROWS: [spec.num_rows(layer_id) for layer_id in spec.layer_ids],
            "engram_max_ngram_size": spec.max_order,
            "engram_vocab_size": spec.layers[0].moduli[0][0],
            "engram_n_heads": spec.heads,
            WIDTH: row_width,
            PAD: spec.pad_cid,
            "engram_compressed_vocab_size": spec.compressed_vocab_size,
        }

    def tensors(self, codec: Codec, spec: AddressSpec, layer_id: int, origin: Origin) -> Tensors:
        if codec.name != "fp8":
            raise CheckpointError(f"{self.name} holds fp8 rows, this table is {codec.name}: pack it with --codec fp8")
        rows = spec.num_rows(layer_id)
        prefix = text_of(origin, "prefix", f"layers.{layer_id}.engram.embed")
        values = Matrix(((f"{prefix}.weight", rows),), "F8_E4M3", codec.row_width)
        scales = Matrix(((f"{prefix}.scale", rows),), "F8_E8M0", codec.row_bytes - codec.row_width)
        return Tensors((values, scales))


def _raw_pad(config: Mapping[str, Any]) -> int:
    """The pad token's id, where that is its compressed id as well."""
    pad = integer_of(config, PAD if PAD in config else PAD_OF_REFERENCE)
    if pad > SAME_PAD:
        raise CheckpointError(f"the pad token is {pad}, whose compressed id the tokenizer decides: give --tokenizer")
    return pad
