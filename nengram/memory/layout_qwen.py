"""Qwen's per-layer embeddings (`qwen4_exp`) in a checkpoint: one matrix, whole or cut into hundreds of pieces.

Rows are FP8 under one scale for the whole table, or bf16, or float32. The name of the scale's tensor was never
published, so whatever stands beside the matrix, is called a scale and holds one number is taken; else the caller gives
it. Three buffers repeat multipliers, moduli and offsets; where they are present they must agree.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from nengram.address import AddressSpec
from nengram.errors import CheckpointError
from nengram.memory.checkpoint_files import Checkpoint, TensorPlan
from nengram.memory.layout import Found, Matrix, Origin, Tensors, integer_of, integers_of, section_of, text_of
from nengram.store.codecs import Codec, make_codec
from nengram.store.safetensors_header import DTYPE_BITS

NAME = re.compile(
    r"((?:.*\.)?layers\.(0|[1-9][0-9]{0,8})\.ple\.ple_embedding\.ngram_embedding)(?:\.shard_([0-9]{1,9}))?\.weight"
)
SCALE = r"(?:\.shard_[0-9]{1,9})?(?:\.weight)?[._](?:weight_)?scale(?:_inv)?"
CODECS_OF = {"F8_E4M3": "fp8_tensor", "BF16": "bf16", "F16": "fp16", "F32": "fp32"}
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
LAYERS = "ple_layer_ids"
FIELDS = {
    "ngram_size": ("max_order", 3),
    "heads_per_ngram": ("heads", 8),
    "ngram_vocab_size_base": ("rows_per_head", 20_000_000),
    "make_ngram_vocab_size_divisible_by": ("divisible_by", 128),
    "seed": ("seed", 1234),
}
KEPT = ("vocab_size", "eos_token_id", "ple_embed_dim", "hidden_size", "split_ngram_parts", LAYERS, *FIELDS)


class QwenPle:
    """The layout `qwen_ple`."""

    name = "qwen_ple"

    def is_in(self, checkpoint: Checkpoint) -> bool:
        return bool(checkpoint.matching(NAME))

    def spec_of(self, config: Mapping[str, Any], pad_cid: int | None = None) -> AddressSpec:
        inner = section_of(config, LAYERS)
        sizes = {ours: integer_of(inner, theirs, default) for theirs, (ours, default) in FIELDS.items()}
        return AddressSpec.qwen_ple(
            vocab_size=integer_of(inner, "vocab_size"),
            eos_id=_eos_id(inner if "eos_token_id" in inner else config),
            ple_layer_ids=sorted(set(integers_of(inner, LAYERS))),
            **sizes,
        )

    def find(self, checkpoint: Checkpoint, spec: AddressSpec, layer_id: int, scale: float | None) -> Found | None:
        block = spec.layer(layer_id).block_index
        found = {name: match for name, match in checkpoint.matching(NAME).items() if int(match[2]) == block}
        if not found:
            return None
        prefix = next(iter(found.values()))[1]
        names = _in_order(checkpoint, prefix, {name: match[3] for name, match in found.items()})
        config = section_of(checkpoint.config, LAYERS)
        width = _row_width(config, spec)
        plane = checkpoint.plane(names, list(CODECS_OF), width, spec.num_rows(layer_id))
        dtype = checkpoint.entry(names[0])[1].dtype
        small = _checked_buffers(checkpoint, prefix, spec, layer_id)
        if dtype == "F8_E4M3":
            scale, scales = _scale_of(checkpoint, prefix, scale)
            codec = make_codec("fp8_tensor", width, scale=scale)
            small = scales | small
        else:
            codec = make_codec(CODECS_OF[dtype], width)
        parts = [[name.removeprefix(prefix), piece.rows] for name, piece in zip(names, plane.pieces, strict=True)]
        fields = {name: config[name] for name in KEPT if name in config}
        fields.setdefault("eos_token_id", spec.pad_cid)
        return Found(
            codec,
            (plane,),
            {"layout": self.name, "prefix": prefix, "parts": parts, "small": small, "config": fields},
        )

    def config_of(self, spec: AddressSpec, row_width: int) -> dict[str, Any]:
        return {
            LAYERS: [_block(spec, layer_id) + 1 for layer_id in spec.layer_ids],
            "vocab_size": spec.compressed_vocab_size,
            "eos_token_id": spec.pad_cid,
            "ple_embed_dim": row_width * spec.slots,
            "ngram_size": spec.max_order,
            "heads_per_ngram": spec.heads,
            "ngram_vocab_size_base": spec.layers[0].moduli[0][0],
            "make_ngram_vocab_size_divisible_by": 128,
            "seed": 1234,
        }

    def tensors(self, codec: Codec, spec: AddressSpec, layer_id: int, origin: Origin) -> Tensors:
        dtypes = {name: dtype for dtype, name in CODECS_OF.items()}
        if codec.name not in dtypes:
            raise CheckpointError(
                f"{self.name} holds rows as {', '.join(dtypes)}, this table is {codec.name}: pack it with --codec"
            )
        rows = spec.num_rows(layer_id)
        prefix = text_of(origin, "prefix", f"model.layers.{_block(spec, layer_id)}.ple.ple_embedding.ngram_embedding")
        parts = tuple((f"{prefix}{name}", count) for name, count in _noted_parts(origin, rows))
        small = _noted_small(origin)
        scale = getattr(codec, "scale", None)
        if scale is not None and not any(_is_scale(plan, content, prefix, scale) for plan, content in small):
            small += ((TensorPlan(f"{prefix}.weight_scale", "F32", (1,)), np.float32(scale).tobytes()),)
        return Tensors((Matrix(parts, dtypes[codec.name], codec.row_width),), small)


def _block(spec: AddressSpec, layer_id: int) -> int:
    block = spec.layer(layer_id).block_index
    if block is None:
        raise CheckpointError(
            f"qwen_ple names tensors by block, and these addresses do not say which block layer {layer_id} is"
        )
    return block


def _eos_id(config: Mapping[str, Any]) -> int:
    """Of a list only the first ends texts."""
    value = config.get("eos_token_id")
    first = value[0] if isinstance(value, list) and value else value
    return integer_of({"eos_token_id": first}, "eos_token_id")


def _row_width(config: Mapping[str, Any], spec: AddressSpec) -> int:
    whole = integer_of(config, "ple_embed_dim" if config.get("ple_embed_dim") is not None else "hidden_size")
    width, left = divmod(whole, spec.slots)
    if left or width < 1:
        raise CheckpointError(f"config field ple_embed_dim is {whole}, which {spec.slots} heads cannot share")
    return width


def _in_order(checkpoint: Checkpoint, prefix: str, numbers: dict[str, str | None]) -> list[str]:
    """Tensor names in the order of their rows. Raises: CheckpointError for a gap, or whole and pieces together."""
    if len(numbers) == 1 and None in numbers.values():
        return list(numbers)
    if None in numbers.values():
        raise CheckpointError(f"{checkpoint.path}: has {prefix}.weight both whole and in pieces")
    ordered = sorted(numbers, key=lambda name: int(numbers[name]))
    first = int(numbers[ordered[0]])
    for place, name in enumerate(ordered, start=first):
        if int(numbers[name]) != place:
            raise CheckpointError(f"{checkpoint.path}: piece {place} of {prefix} is missing or there twice")
    if first > 1:
        raise CheckpointError(f"{checkpoint.path}: the pieces of {prefix} begin with {first}, earlier ones are missing")
    return ordered


def _scale_of(checkpoint: Checkpoint, prefix: str, given: float | None) -> tuple[float, dict[str, Any]]:
    """The one scale of a table, and the tensors that hold it, as they are noted in the origin."""
    noted, values = {}, {}
    for name in sorted(checkpoint.matching(re.compile(re.escape(prefix) + SCALE))):
        entry, content = checkpoint.small(name)
        if entry.dtype not in FLOATS or math.prod(entry.shape) != 1:
            raise CheckpointError(f"{checkpoint.path}: {name} is {entry.dtype} {list(entry.shape)}, not one scale")
        noted[name] = [entry.dtype, list(entry.shape), content.hex()]
        values[name] = float(torch.frombuffer(bytearray(content), dtype=FLOATS[entry.dtype]))
    if len(set(values.values())) > 1:
        raise CheckpointError(
            f"{checkpoint.path}: {', '.join(list(values)[:3])} differ; one scale for the table is needed"
        )
    if not values and given is None:
        raise CheckpointError(
            f"{checkpoint.path}: no tensor beside {prefix} holds the scale of its FP8 rows; give it with --scale"
        )
    found = next(iter(values.values()), given)
    if given is not None and float(np.float32(given)) != float(np.float32(found)):
        raise CheckpointError(f"{checkpoint.path}: {next(iter(values))} says scale {found:g}, --scale says {given:g}")
    return found, noted


def _checked_buffers(checkpoint: Checkpoint, prefix: str, spec: AddressSpec, layer_id: int) -> dict[str, Any]:
    """The buffers that repeat the addresses, as noted in the origin. Raises: CheckpointError where one disagrees."""
    expected = {
        "layer_multipliers": spec.multipliers(layer_id),
        "ngram_heads_vocab_sizes": spec.moduli(layer_id),
        "ngram_heads_offsets": spec.offsets(layer_id),
    }
    noted = {}
    for buffer, numbers in expected.items():
        name = prefix.removesuffix("ngram_embedding") + buffer
        if name not in checkpoint.tensors:
            continue
        entry, content = checkpoint.small(name)
        if entry.dtype != "I64" or math.prod(entry.shape) != len(numbers):
            raise CheckpointError(
                f"{checkpoint.path}: {name} is {entry.dtype} {list(entry.shape)}, not {len(numbers)} I64"
            )
        found = np.frombuffer(content, "<i8")
        if not np.array_equal(found, numbers):
            at = int(np.flatnonzero(found != numbers)[0])
            raise CheckpointError(
                f"{checkpoint.path}: {name} has {found[at]} at place {at}, its config makes {numbers[at]}: "
                "config and tables are of different models"
            )
        noted[name] = [entry.dtype, list(entry.shape), content.hex()]
    return noted


def _noted_parts(origin: Origin, rows: int) -> list[tuple[str, int]]:
    """The pieces of the imported table; one whole tensor when the note is not usable."""
    parts = origin.get("parts")
    try:
        noted = [(str(name), int(count)) for name, count in parts]
    except (TypeError, ValueError):
        return [(".weight", rows)]
    fits = noted and sum(count for _, count in noted) == rows and all(count > 0 for _, count in noted)
    return noted if fits and len({name for name, _ in noted}) == len(noted) else [(".weight", rows)]


def _noted_small(origin: Origin) -> tuple[tuple[TensorPlan, bytes], ...]:
    """The small tensors of the imported checkpoint; those whose note is not usable are left out."""
    small, kept = origin.get("small"), []
    for name, note in small.items() if isinstance(small, dict) else ():
        try:
            dtype, shape, content = note
            plan, content = TensorPlan(str(name), dtype, tuple(int(axis) for axis in shape)), bytes.fromhex(content)
        except (TypeError, ValueError):
            continue
        if dtype in DTYPE_BITS and plan.size == len(content):
            kept.append((plan, content))
    return tuple(kept)


def _is_scale(plan: TensorPlan, content: bytes, prefix: str, scale: float) -> bool:
    """Whether a small tensor holds the codec's scale already."""
    if plan.dtype not in FLOATS or not re.fullmatch(re.escape(prefix) + SCALE, plan.name):
        return False
    return float(torch.frombuffer(bytearray(content), dtype=FLOATS[plan.dtype]).float()) == scale
