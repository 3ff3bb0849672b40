"""What `nengram table ...` does: tables on disk, described, checked, written again, cut, converted and compared.

The work is in `nengram.memory`, the words are in `table_report.py`; here the two meet, with tokenizers for whoever
wants compressed ids or n-grams spelled.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from tokenizers import Tokenizer

from nengram.address import AddressSpec
from nengram.errors import CheckpointError, ConfigError, DataError
from nengram.memory.checkpoint_files import Checkpoint
from nengram.memory.layouts import LAYOUTS, Written, export_tables, import_checkpoint, tables_in
from nengram.memory.packing import codec_named, create, pack, slice_table
from nengram.memory.stat import TableStat, stat, verify
from nengram.memory.table import address_of, open_rows
from nengram.memory.table_diff import NOTHING as BEFORE
from nengram.memory.table_diff import TableDiff, diff_tables
from nengram.study.arm import corpus_place
from nengram.study.table_report import Report, described, print_diff, print_line, size, streaming, what_was_checked
from nengram.study.tokens import starts_of
from nengram.study.trace import NOTHING, visible
from nengram.text import CompressionMap, doc_id, load_tokenizer, read_corpus
from nengram.text.compress import token_keys
from nengram.text.pack import Packed
from nengram.text.pack import pack as pack_text


def run_stat(paths: Sequence[Path], *, as_json: bool, console: Console) -> list[TableStat]:
    """Describe tables; a folder stands for the tables in it. Raises CheckpointError."""
    found = [stat(path) for path in _tables(paths)]
    if as_json:
        print(json.dumps([one.to_dict() for one in found], indent=1))
        return found
    for one in found:
        for line in described(one):
            print_line(console, line)
    return found


def run_verify(paths: Sequence[Path], *, as_json: bool, console: Console) -> list[TableStat]:
    """Check tables wholly; the first that is damaged ends it. Raises CheckpointError."""
    found = []
    for path in _tables(paths):
        began = time.monotonic()
        with streaming(console, f"verify {path}") as report:
            found.append(verify(path, progress=report))
        if not as_json:
            print_line(console, f"{found[-1].path}: {what_was_checked(found[-1])}; {_took(began)}")
    if as_json:
        print(json.dumps([one.to_dict() | {"verified": True} for one in found], indent=1))
    return found


def run_pack(source: Path, into: Path, *, codec: str, shards: int, scale: float | None, console: Console) -> TableStat:
    """Write a table in another codec, or in shards. Raises CheckpointError, StoreError."""
    before, began = stat(source), time.monotonic()
    with streaming(console, f"pack {source}") as report:
        pack(source, into, codec=codec, shards=shards, scale=scale, progress=report)
    after = stat(into)
    left = f"; {', '.join(before.extras)} stayed behind" if before.extras else ""
    sizes = (
        f"{size(before.table_bytes)} of {before.codec['name']} -> {size(after.table_bytes)} of {after.codec['name']}"
    )
    print_line(console, f"{into}: {sizes} in {after.files} file{'s' * (after.files > 1)}{left}; {_took(began)}")
    return after


def run_slice(source: Path, into: Path, *, rows: str, order: int | None, console: Console) -> TableStat:
    """Cut rows FIRST:END, or one n-gram order, out of a table. Raises CheckpointError, StoreError, ConfigError."""
    with streaming(console, f"slice {source}") as report:
        slice_table(source, into, rows=_span(rows) if rows else None, order=order, progress=report)
    found = stat(into)
    end = found.first_row + found.num_rows
    print_line(console, f"{into}: rows {found.first_row:,} to {end:,} (not included) of {found.table_rows:,}")
    return found


def run_create(
    into: Path,
    target: str,
    overrides: Sequence[str],
    *,
    layer: int | None,
    codec: str,
    scale: float | None,
    console: Console,
) -> TableStat:
    """A table of zeros for a preset, TOML file, run folder or table. Raises ConfigError, CheckpointError, StoreError."""
    spec, layer_ids, row_width, own_codec = _addresses_of(target, overrides)
    if layer is None and len(layer_ids) > 1:
        raise ConfigError(f"{target} has memory layers {', '.join(map(str, layer_ids))}: choose one with --layer")
    create(into, spec, layer_ids[0] if layer is None else layer, codec_named(codec or own_codec, row_width, scale))
    found = stat(into)
    on_disk = into.stat().st_blocks * 512
    print_line(
        console, f"{into}: {found.num_rows:,} rows, {size(found.table_bytes)} of zeros in {size(on_disk)} of disk"
    )
    return found


def run_convert(
    source: Path,
    into: Path,
    *,
    to: str,
    layers: Sequence[int],
    shards: int,
    scale: float | None,
    config: Path | None,
    tokenizer: str,
    console: Console,
) -> list[Written]:
    """A released checkpoint into tables, or tables into such a checkpoint. What `source` is, is found out.

    Raises: CheckpointError, DataError, ConfigError.
    """
    if not source.exists():
        raise CheckpointError(f"{source}: no such file or folder")
    ours, began = _our_tables(source), time.monotonic()
    with streaming(console, f"convert {source}") as report:
        if to != "nengram":
            written = _export(source, into, ours, to, layers, report)
        elif ours:
            raise ConfigError(
                f"{source}: is a table already; `nengram table pack` writes it in another codec or format"
            )
        else:
            pad_cid = _pad_cid(source, config, tokenizer, console)
            written = import_checkpoint(
                source,
                into,
                layer_ids=layers or None,
                shards=shards,
                scale=scale,
                pad_cid=pad_cid,
                config=config,
                progress=report,
            )
    for one in written:
        described = f"memory layer {one.layer_id}, {one.rows:,} rows of {one.row_bytes} bytes ({one.codec})"
        print_line(console, f"{one.path}: {described}, {size(one.rows * one.row_bytes)}, addresses {one.addresses}")
    print_line(console, _took(began))
    return written


def run_diff(
    one: Path,
    other: Path,
    *,
    corpus: str,
    tokenizer: str,
    doc_token: str,
    tolerance: float,
    most: int,
    as_json: bool,
    console: Console,
) -> TableDiff:
    """What changed between two tables, in n-grams of a corpus. Raises CheckpointError, DataError, StoreError."""
    if most < 1:
        raise ConfigError(f"--most is a number of n-grams from 1 up, got {most}")
    cids_T = start_T = None
    text_of: Callable[[tuple[int, ...]], str] = str
    if corpus:
        with open_rows(one) as table:
            spec, _ = address_of(table)
        words = load_tokenizer(_tokenizer_path(one, other, tokenizer))
        compression = compression_for(words, spec)
        with Console(stderr=True).status(f"reading {corpus}", spinner="line"):
            packed = read_whole(corpus, words, doc_token)
        cids_T, start_T = compression(packed.ids_N.astype(np.int64)), starts_of(packed)
        text_of = speller(words, compression)
    with streaming(console, f"diff {one}") as report:
        found = diff_tables(
            one, other, cids_T, start_T, text_of=text_of, tolerance=tolerance, most=most, progress=report
        )
    if as_json:
        print(json.dumps(found.to_dict(), indent=1, ensure_ascii=False))
    else:
        print_diff(found, console)
    return found


def compression_for(tokenizer: Tokenizer, spec: AddressSpec) -> CompressionMap:
    """The map from a tokenizer's ids to those that a spec hashes: compressed, or raw. Raises DataError when neither fits."""
    raw = tokenizer.get_vocab_size(with_added_tokens=True)
    compression = CompressionMap.build(tokenizer)
    if spec.dialect != "qwen_ple" and compression.compressed_vocab_size == spec.compressed_vocab_size:
        return compression
    if spec.dialect == "qwen_ple" and raw <= spec.compressed_vocab_size:  # models pad their vocabulary
        return CompressionMap.identity(raw, compression.tokenizer_digest)
    if raw == spec.compressed_vocab_size:
        return CompressionMap.identity(raw, compression.tokenizer_digest)
    raise DataError(
        f"addresses {spec.word_code} are for {spec.compressed_vocab_size:,} ids, this tokenizer has {raw:,}, "
        f"compressed {compression.compressed_vocab_size:,}: it is not the table's"
    )


def speller(tokenizer: Tokenizer, compression: CompressionMap) -> Callable[[tuple[int, ...]], str]:
    """A function that spells n-grams of compressed ids with the keys under which tokens were merged."""
    keys = token_keys(tokenizer)
    first_C = np.unique(compression.cids_V, return_index=True)[1]
    return lambda cids: " ".join(NOTHING if cid == BEFORE else visible(keys[first_C[cid]]) for cid in cids)


def read_whole(corpus: str, tokenizer: Tokenizer, doc_token: str) -> Packed:
    """All documents of a corpus, tokenized, end to end. Raises DataError."""
    entries = list(read_corpus(corpus_place(corpus)))
    sources = tuple(sorted({entry.source for entry in entries}))
    return pack_text(entries, tokenizer, doc_id(tokenizer, doc_token or None), sources)


def _tables(paths: Sequence[Path]) -> list[Path]:
    """The tables that paths stand for. Raises: CheckpointError for one without a table, ConfigError for none."""
    tables: list[Path] = []
    if not paths:
        raise ConfigError("name a table: a file, a folder of shards, or a folder or run that holds tables")
    for path in paths:
        found = tables_in(path) or tables_in(path / "final")
        if not found:
            raise CheckpointError(f"{path}: no table here" if path.exists() else f"{path}: no such file or folder")
        tables += found
    return tables


def _our_tables(source: Path) -> list[Path]:
    """The tables at a place, unless it is a released checkpoint."""
    found = tables_in(source) or tables_in(source / "final")
    if found == [source] and source.is_file() and not _is_table(source):
        return []
    return found


def _is_table(path: Path) -> bool:
    from nengram.store.safetensors_header import read_header

    return read_header(path).metadata.get("format", "").startswith("nengram-table-")


def _export(
    source: Path, into: Path, tables: list[Path], to: str, layers: Sequence[int], report: Report
) -> list[Written]:
    if to not in LAYOUTS:
        raise ConfigError(f'--to "{to}" is unknown; there are nengram, {", ".join(LAYOUTS)}')
    if not tables:
        raise CheckpointError(f"{source}: holds no table of ours; a checkpoint becomes one with --to nengram")
    chosen = [path for path in tables if not layers or stat(path).layer_id in layers]
    if not chosen:
        raise CheckpointError(f"{source}: has no table of memory layer {', '.join(map(str, layers))}")
    return export_tables(chosen, into, to, progress=report)


def _pad_cid(source: Path, config: Path | None, tokenizer: str, console: Console) -> int | None:
    """The pad's compressed id, where a tokenizer is at hand that fits the checkpoint's config; else None."""
    checkpoint = Checkpoint(source, config)
    beside = checkpoint.folder / "tokenizer.json"
    inner = checkpoint.config.get("text_config")
    fields = inner if isinstance(inner, dict) else checkpoint.config
    wanted = fields.get("engram_compressed_vocab_size")
    if wanted is None or not (tokenizer or beside.is_file()):
        return None
    compression = CompressionMap.build(load_tokenizer(tokenizer or beside))
    if compression.compressed_vocab_size != wanted:
        raise DataError(
            f"{tokenizer or beside}: compresses to {compression.compressed_vocab_size:,} ids, the config says {wanted}: "
            "every address would be wrong; name the tokenizer of this model with --tokenizer"
        )
    pad = fields.get("engram_pad_token_id", fields.get("engram_pad_id"))
    if not isinstance(pad, int) or not 0 <= pad < len(compression.cids_V):
        return None
    print_line(console, f"{tokenizer or beside}: compresses to {wanted:,} ids, as the config says")
    return int(compression.cids_V[pad])


def _tokenizer_path(one: Path, other: Path, given: str) -> str:
    """The tokenizer named, or the one that lies beside a table. Raises DataError."""
    if given:
        return given
    for table in (one, other):
        for folder in (table.parent, table / "final", table):
            if (folder / "tokenizer.json").is_file():
                return str(folder / "tokenizer.json")
    raise DataError("a corpus needs the table's tokenizer, and none lies beside it: name one with --tokenizer")


def _addresses_of(target: str, overrides: Sequence[str]) -> tuple[AddressSpec, tuple[int, ...], int, str]:
    """Spec, layers, row width and codec of what a user names."""
    from nengram.model import address_spec, resolve
    from nengram.study.arm import prepare_for
    from nengram.study.plan_verb import open_target

    named = open_target(target, tuple(overrides))
    if named.tables is not None:
        tables = named.tables
        return tables.spec, tables.layer_ids, tables.row_width, tables.codec
    data = prepare_for(named.config)
    memory = resolve(named.config, data.vocab_size).memory
    if memory.kind == "none":
        raise ConfigError(f"{target}: this model has no memory layer, hence no table")
    compression = data.compression if memory.compress else CompressionMap.identity(data.vocab_size)
    spec = address_spec(memory, compression.compressed_vocab_size, int(compression.cids_V[memory.pad_id]))
    return spec, spec.layer_ids, memory.row_width, memory.codec


def _span(text: str) -> tuple[int, int]:
    """FIRST:END. Raises ConfigError."""
    first, colon, end = text.replace("_", "").replace(",", "").partition(":")
    if not (colon and first.isascii() and first.isdigit() and end.isascii() and end.isdigit()):
        raise ConfigError(f'--rows "{text}": write FIRST:END, e.g. 0:1000; END is not included')
    return int(first), int(end)


def _took(began: float) -> str:
    return f"{time.monotonic() - began:.1f} s"
