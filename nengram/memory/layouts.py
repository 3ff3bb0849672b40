"""Released tables into table files and back, by byte range: nothing is decoded, so nothing can be lost.

A layout says how one family's checkpoints name and cut a table, and how their config spells the addresses. Both
directions copy bytes: a NaN, a scale of 2^-127, a row of zeros come back as they were, and an exported tensor is byte
for byte the imported one. The row counts are a self-test that costs nothing: they are sums of primes, made here from
the config alone, and a checkpoint whose tensors have other counts is refused with both numbers.

| layout | tensors of a table | codec |
|---|---|---|
| deepseek_v41 | `layers.N.engram.embed.weight` F8_E4M3 `[rows, E]`, `.scale` F8_E8M0 `[rows, E/32]` | fp8 |
| qwen_ple | `layers.I.ple.ple_embedding.ngram_embedding.weight` `[rows, E]`, whole or in pieces | fp8_tensor, bf16, ... |

What a table file keeps of its origin (tensor names, pieces, config fields) is in its metadata as `origin`. A table that
was never in a checkpoint is exported under the released names.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nengram.address import AddressSpec
from nengram.errors import AddressError, CheckpointError, nearest
from nengram.memory.checkpoint_files import (
    CONFIG,
    INDEX,
    Checkpoint,
    Piece,
    Plane,
    TensorPlan,
    read_rows,
    safetensors_header,
    shown,
    write_at,
    write_rows,
)
from nengram.memory.layout import Layout, Matrix, Origin, Tensors
from nengram.memory.layout_deepseek import DeepseekV41
from nengram.memory.layout_qwen import QwenPle
from nengram.memory.packing import checked_blocks
from nengram.memory.table import AT_ONCE, AnyTable, address_of, check_addresses, open_rows, table_metadata
from nengram.store.table_file import write_table
from nengram.store.table_place import Claim, refusals

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (DeepseekV41(), QwenPle())}
ORIGIN = "origin"  # in a table file's metadata
SUFFIX = ".safetensors"

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class Written(NamedTuple):
    """A table or checkpoint file that a conversion wrote."""

    layer_id: int
    path: Path
    rows: int
    row_bytes: int
    codec: str
    addresses: str  # word code


def detect(checkpoint: Checkpoint) -> Layout:
    """The layout of a checkpoint. Raises: CheckpointError when it holds no table of any."""
    for layout in LAYOUTS.values():
        if layout.is_in(checkpoint):
            return layout
    raise CheckpointError(f"{checkpoint.path}: has no tensor of a table that is known here ({', '.join(LAYOUTS)})")


def import_checkpoint(
    path: str | os.PathLike,
    into: str | os.PathLike,
    *,
    layer_ids: Sequence[int] | None = None,
    shards: int = 1,
    scale: float | None = None,
    pad_cid: int | None = None,
    config: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> list[Written]:
    """Tables of a released checkpoint as table files, one per memory layer.

    path: a folder with config.json, index and shards, or one safetensors file with config.json beside it, or `config`.
    into: a folder; its files are `table-<layer>.safetensors`, with `shards` above 1 folders `table-<layer>`. A name that
        ends in .safetensors is the file itself, for a single layer.
    layer_ids: which layers (ids of the hash); all of the config if not given.
    scale: of an FP8 table whose checkpoint holds none. pad_cid: compressed id of the pad token, where a tokenizer told.
    Memory does not grow with the table. Raises: CheckpointError, AddressError, naming file, field or tensor.
    """
    checkpoint = Checkpoint(path, config)
    layout = detect(checkpoint)
    try:
        spec = layout.spec_of(checkpoint.config, pad_cid)
    except (AddressError, CheckpointError) as error:
        raise CheckpointError(f"{config or checkpoint.folder / CONFIG}: {error}") from None
    chosen = _chosen(spec, layer_ids)
    found = {layer_id: layout.find(checkpoint, spec, layer_id, scale) for layer_id in chosen}
    for layer_id, table in found.items():
        if table is None:
            raise CheckpointError(
                f"{path}: has no tensor of memory layer {layer_id}, which its config lists; choose with --layers"
            )
    places = _places(Path(into), chosen, shards)
    sizes = {layer_id: table.planes[0].num_rows * table.codec.row_bytes for layer_id, table in found.items()}
    written, done = [], 0
    for layer_id, table in found.items():
        rows, codec = table.planes[0].num_rows, table.codec
        metadata = table_metadata(spec, layer_id) | {ORIGIN: json.dumps(table.origin, separators=(",", ":"))}
        blocks = read_rows(table.planes, max(1, AT_ONCE // codec.row_bytes))
        report = _shifted(progress, done, sum(sizes.values()))
        write_table(places[layer_id], codec, rows, metadata, blocks, shards=shards, progress=report)
        written.append(Written(layer_id, places[layer_id], rows, codec.row_bytes, codec.name, spec.word_code))
        done += sizes[layer_id]
    return written


def export_tables(
    paths: Sequence[str | os.PathLike], into: str | os.PathLike, layout_name: str, *, progress: Progress | None = None
) -> list[Written]:
    """Table files as a checkpoint of a released layout: config, index, and one safetensors file per table.

    paths: tables of one spec, one per memory layer (not necessarily all). into: a folder, which appears whole or not at
    all.
    Raises: CheckpointError when the addresses cannot be said in this layout's config, or the codec has no place in it.
    """
    layout = layout_named(layout_name)
    tables = [open_rows(path) for path in paths]
    try:
        specs = [address_of(table) for table in tables]
        for table, (spec, layer_id) in zip(tables, specs, strict=True):
            check_addresses(table, spec, layer_id, None)
        spec = _same_spec(tables, specs)
        origins = [_origin_of(table, layout) for table in tables]
        config = _config(layout, spec, tables, origins)
        cuts = [
            layout.tensors(table.codec, spec, layer_id, origin)
            for table, (_, layer_id), origin in zip(tables, specs, origins, strict=True)
        ]
        written = _write_checkpoint(Path(into), config, tables, cuts, progress)
    finally:
        for table in tables:
            table.close()
    return [
        Written(layer_id, path, table.num_rows, table.codec.row_bytes, table.codec.name, spec.word_code)
        for path, table, (_, layer_id) in zip(written, tables, specs, strict=True)
    ]


def layout_named(name: str) -> Layout:
    """Raises: CheckpointError for an unknown layout; the nearest is named."""
    if name not in LAYOUTS:
        raise CheckpointError(f'unknown layout "{name}"{nearest(str(name), LAYOUTS)}; there are {", ".join(LAYOUTS)}')
    return LAYOUTS[name]


def tables_in(path: str | os.PathLike) -> list[Path]:
    """The tables at `path`: itself, or all `table-*` of a folder. None when there is no table."""
    path = Path(path)
    if path.is_file() or (path / "index.json").is_file():
        return [path]
    if not path.is_dir():
        return []
    return sorted(entry for entry in path.glob("table-*") if entry.suffix == SUFFIX or (entry / "index.json").is_file())


def _chosen(spec: AddressSpec, layer_ids: Sequence[int] | None) -> list[int]:
    for layer_id in layer_ids or ():
        if layer_id not in spec.layer_ids:
            raise CheckpointError(
                f"there is no memory layer {layer_id} in this checkpoint, only {list(spec.layer_ids)}"
            )
    return list(dict.fromkeys(layer_ids)) if layer_ids else list(spec.layer_ids)


def _places(into: Path, layer_ids: Sequence[int], shards: int) -> dict[int, Path]:
    if into.suffix == SUFFIX:
        if len(layer_ids) > 1:
            raise CheckpointError(f"{into}: one file cannot hold {len(layer_ids)} tables; name a folder, or one layer")
        return {layer_ids[0]: into}
    return {layer_id: into / (f"table-{layer_id}" + (SUFFIX if shards == 1 else "")) for layer_id in layer_ids}


def _same_spec(tables: list[AnyTable], specs: list[tuple[AddressSpec, int]]) -> AddressSpec:
    spec = specs[0][0]
    for table, (other, _) in zip(tables, specs, strict=True):
        if other.digest != spec.digest:
            raise CheckpointError(
                f"{table.path}: its addresses are {other.word_code}, those of {tables[0].path} {spec.word_code}; "
                "one checkpoint has one config"
            )
        if other is not spec and table.codec.row_width != tables[0].codec.row_width:
            raise CheckpointError(f"{table.path}: its rows are not as wide as those of {tables[0].path}")
    layer_ids = [layer_id for _, layer_id in specs]
    if len(set(layer_ids)) < len(layer_ids):
        raise CheckpointError(f"two of these tables are of one memory layer: {layer_ids}")
    return spec


def _origin_of(table: AnyTable, layout: Layout) -> Origin:
    """What the import noted, if it was from this layout; a note that is not usable counts as none."""
    try:
        origin = json.loads(table.metadata.get(ORIGIN, "{}"))
    except (ValueError, RecursionError):
        return {}
    return origin if isinstance(origin, dict) and origin.get("layout") == layout.name else {}


def _config(layout: Layout, spec: AddressSpec, tables: list[AnyTable], origins: list[Origin]) -> dict[str, Any]:
    """The config as it was imported, or one made from the numbers; either must give the same addresses again."""
    for config in (origins[0].get("config"), layout.config_of(spec, tables[0].codec.row_width)):
        if isinstance(config, dict) and _says(layout, config, spec):
            return config
    raise CheckpointError(
        f"{tables[0].path}: the config of layout {layout.name} cannot say these addresses ({spec.dialect}, "
        f"{spec.word_code}): other primes, seeds or boundaries than that family's"
    )


def _says(layout: Layout, config: dict[str, Any], spec: AddressSpec) -> bool:
    try:
        said = layout.spec_of(config, spec.pad_cid)
    except (AddressError, CheckpointError):
        return False
    names = ("compressed_vocab_size", "max_order", "heads", "pad_cid", "boundary")
    numbers = [(layer.layer_id, layer.multipliers, layer.moduli, layer.num_rows) for layer in said.layers]
    wanted = [(layer.layer_id, layer.multipliers, layer.moduli, layer.num_rows) for layer in spec.layers]
    return numbers == wanted and all(getattr(said, name) == getattr(spec, name) for name in names)


def _write_checkpoint(
    into: Path, config: dict[str, Any], tables: list[AnyTable], cuts: list[Tensors], progress: Progress | None
) -> list[Path]:
    _require_distinct(into, cuts)
    claim = Claim(into, folder=True)
    try:
        with refusals(into):
            names = [f"model-{place:05d}-of-{len(tables):05d}{SUFFIX}" for place in range(1, len(tables) + 1)]
            total, done, weight_map = sum(table.num_rows * table.codec.row_bytes for table in tables), 0, {}
            for name, table, cut in zip(names, tables, cuts, strict=True):
                held = _write_file(claim.part / name, table, cut, _shifted(progress, done, total))
                weight_map |= dict.fromkeys(held, name)
                done += table.num_rows * table.codec.row_bytes
            _write_json(claim.part / CONFIG, {"text_config": config})
            _write_json(claim.part / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
            claim.publish()
    except BaseException:
        claim.discard()
        raise
    return [into / name for name in names]


def _require_distinct(into: Path, cuts: list[Tensors]) -> None:
    """Tensor names come from the tables' own notes: two tables may claim one."""
    seen: set[str] = set()
    for cut in cuts:
        names = [plan.name for plan, _ in cut.small] + [name for matrix in cut.matrices for name, _ in matrix.parts]
        for name in names:
            if name in seen:
                raise CheckpointError(f"{into}: tensor {shown(name)} would be written twice; a table's origin is wrong")
            seen.add(name)


def _write_file(path: Path, table: AnyTable, cut: Tensors, progress: Progress | None) -> list[str]:
    """One table as a plain safetensors file; the names of its tensors. Raises OSError."""
    plans = sorted((plan for plan, _ in cut.small), key=lambda plan: plan.size % 8 != 0)  # aligned ones first
    plans += [plan for matrix in cut.matrices for plan in matrix.plans()]
    header, offsets = safetensors_header(plans)
    planes = [_plane_of(path, matrix, offsets) for matrix in cut.matrices]
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        os.truncate(descriptor, len(header) + sum(plan.size for plan in plans))
        write_at(descriptor, memoryview(header), 0)
        for plan, content in cut.small:
            write_at(descriptor, memoryview(content), offsets[plan.name])
        write_rows(planes, _counted(table, progress), {path: descriptor})
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return [plan.name for plan in plans]


def _plane_of(path: Path, matrix: Matrix, offsets: dict[str, int]) -> Plane:
    pieces = tuple(Piece(path, offsets[name], rows) for name, rows in matrix.parts)
    return Plane(TensorPlan("", matrix.dtype, (matrix.width,)).size, pieces)


def _counted(table: AnyTable, progress: Progress | None):
    done, total = 0, table.num_rows * table.codec.row_bytes
    for block_NB in checked_blocks(table):
        yield block_NB
        done += np.size(block_NB)
        if progress:
            progress(done, total)


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Progress of one table among several."""
    return progress and (lambda done, _: progress(before + done, total))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
