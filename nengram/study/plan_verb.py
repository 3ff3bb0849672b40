"""`nengram plan`: from what a user names (a preset, a TOML file, a run folder, a table) to tables, text and ceilings for a plan.

Tables come with a tokenizer (a run's, a configured one, one trained on the corpus) or without: the presets of released models hold
sizes only. For those the corpus cut by our own BPE stands in, and everything that is printed says so.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from rich.console import Console

from nengram.address import text_starts
from nengram.config import Config, load_config
from nengram.errors import ConfigError, nearest
from nengram.infer.measure import free_ram, measure
from nengram.infer.plan import Budget, Plan, PlannedTables, PlanText, check_ceilings, make_plan
from nengram.infer.plan_rates import Ceiling, ceilings_of
from nengram.infer.plan_sizes import GIB, sizes_of
from nengram.memory.table import address_of, open_rows
from nengram.model import address_spec, resolve
from nengram.store.codecs import CODECS
from nengram.study.arm import corpus_place
from nengram.study.plan_report import print_plan
from nengram.text import CompressionMap, Packed, Prepared, prepare

TRAIN_AT_MOST, DEV_AT_MOST = 20_000_000, 2_000_000  # tokens that are counted; whole documents, evenly taken


@dataclasses.dataclass(frozen=True)
class Named:
    """What the user named, opened: the tables, the config that says which text, and whose tokens they hash.

    tables: None for a config whose sizes need the tokenizer first. tokenizer: path of the tables' own, or "".
    """

    name: str
    config: Config
    tables: PlannedTables | None
    tokenizer: str


def run_plan(
    target: str,
    overrides: tuple[str, ...],
    *,
    device_gib: float,
    host_gib: float | None,
    ceilings: dict[str, float | None],
    codec: str,
    corpus: str,
    tokens: int,
    measured: bool,
    disk_folder: Path | None,
    as_json: bool,
    console: Console,
) -> Plan:
    """Make the plan and print it.

    host_gib: None is what is free here now. ceilings: by the names of `plan_rates.ASSUMED`; None is not given.

    Raises: NengramError for a target, option or text that cannot be used.
    """
    budget = _budget(device_gib, host_gib)
    given = {name: Ceiling(value, "given") for name, value in ceilings.items() if value is not None}
    check_ceilings(given)
    if tokens < 0:
        raise ConfigError(f"--tokens must be a number of tokens from 1 up, got {tokens}")
    if disk_folder and not measured:
        raise ConfigError("--disk-folder is where --measure reads a scratch file: give both")
    if codec and codec not in CODECS:
        raise ConfigError(f'--codec "{codec}" is unknown{nearest(codec, CODECS)}; codecs: {", ".join(CODECS)}')
    named = open_target(target, overrides, corpus)
    with Console(stderr=True).status(f"reading {named.config.data.corpus}", spinner="line") as status:
        data = _prepared(named)
        tables = named.tables or _tables_of(named, data)
        if codec:
            tables = dataclasses.replace(tables, codec=codec)
        text = plan_text(named, tables, data)
        found: dict[str, Ceiling] = {}
        if measured:
            row_bytes = sizes_of(tables).codecs[tables.codec].row_bytes
            disk = ceilings.get("disk_iops") is None
            found = measure(row_bytes, disk_folder=disk_folder, disk=disk, progress=status.update)
        status.update("counting n-grams")
        plan = make_plan(tables, text, budget, ceilings_of(ceilings, found), tokens=tokens)
    if as_json:
        print(json.dumps(plan.to_dict(), indent=1))
    else:
        print_plan(plan.to_dict(), console)
    return plan


def open_target(target: str, overrides: tuple[str, ...] = (), corpus: str = "") -> Named:
    """A preset, TOML file, run folder, table file or folder of shards. Raises: ConfigError, CheckpointError, AddressError."""
    path = Path(target)
    corpus = (f"data.corpus={json.dumps(corpus)}",) if corpus else ()
    if path.suffix == ".safetensors" or (path / "index.json").is_file():
        return _open_table(path, load_config("demo", (*overrides, *corpus)))
    config = load_config(target, (*overrides, *corpus))
    own = path / "final" / "tokenizer.json"
    tokenizer = str(own) if own.is_file() else config.data.tokenizer
    named = Named(config.name, config, None, tokenizer)
    if config.budget.scale:
        return named
    if config.memory.kind == "none":
        raise ConfigError(f"{target}: this model has no memory layer (memory.kind is none), hence no table to plan for")
    memory, vocab_size = config.memory, config.model.vocab_size
    if len(memory.rows_per_head) != memory.max_order - 1:
        orders = f"one number for each order 2..{memory.max_order}"
        raise ConfigError(f"memory.rows_per_head needs {orders}, got {list(memory.rows_per_head)}")
    size = memory.compressed_vocab_size if memory.compress else vocab_size
    return dataclasses.replace(named, tables=_planned(config, size, memory.pad_id)) if size else named


def plan_text(named: Named, tables: PlannedTables, data: Prepared) -> PlanText:
    """The corpus as the tables' hash would see it: compressed ids (or raw ones) of train and dev, and where texts begin."""
    compression = _compression_of(tables, data)
    proxy = compression.compressed_vocab_size != tables.spec.compressed_vocab_size
    end_cid = -1 if proxy else tables.spec.end_cid
    train, dev = (data.splits[name] for name in ("train", "dev"))
    (train_T, train_start_T), (dev_T, dev_start_T) = (
        stream_of(split, compression, end_cid, most) for split, most in ((train, TRAIN_AT_MOST), (dev, DEV_AT_MOST))
    )
    part = f" (of {len(train):,})" if len(train_T) < len(train) else ""
    about = f"{named.config.data.corpus}: {len(train_T):,}{part} train and {len(dev_T):,} dev tokens"
    return PlanText(
        train_T, train_start_T, dev_T, dev_start_T, f"{about}, {compression.compressed_vocab_size:,} ids", proxy
    )


def _budget(device_gib: float, host_gib: float | None) -> Budget:
    if host_gib is None:
        return Budget(device_gib, round(free_ram() / GIB, 1), "free here now")
    return Budget(device_gib, host_gib)


def _open_table(path: Path, config: Config) -> Named:
    with open_rows(path) as table:
        spec, layer_id = address_of(table)
        tables = PlannedTables(path.name, spec, (layer_id,), table.codec.row_width, table.codec.name)
    own = path.parent / "tokenizer.json"  # of the finished run whose table it is
    return Named(path.name, config, tables, str(own) if own.is_file() else config.data.tokenizer)


def _prepared(named: Named) -> Prepared:
    data = named.config.data
    return prepare(
        corpus_place(data.corpus),
        vocab_size=None if named.tokenizer else data.vocab_size,
        tokenizer_path=named.tokenizer or None,
        doc_token=data.doc_token or None,
        cache_folder=data.cache,
    )


def _tables_of(named: Named, data: Prepared) -> PlannedTables:
    """The tables of a config whose vocabulary is its tokenizer's."""
    memory = named.config.memory
    builds = dataclasses.replace(memory, dialect="engram", codec="fp32")  # a budget is split by building models
    config = resolve(dataclasses.replace(named.config, memory=builds), data.vocab_size)
    if config.memory.kind == "none":
        raise ConfigError(f"{named.name}: arm {config.budget.arm} has no table to plan for")
    sizes = dataclasses.replace(config.memory, dialect=memory.dialect, codec=memory.codec)
    compression = data.compression if config.memory.compress else CompressionMap.identity(data.vocab_size)
    if not 0 <= config.memory.pad_id < data.vocab_size:
        raise ConfigError(
            f"memory.pad_id {config.memory.pad_id} is no token id: the vocabulary is 0..{data.vocab_size - 1}"
        )
    pad_cid = int(compression.cids_V[config.memory.pad_id])
    return _planned(dataclasses.replace(config, memory=sizes), compression.compressed_vocab_size, pad_cid)


def _planned(config: Config, compressed_vocab_size: int, pad_cid: int) -> PlannedTables:
    spec = address_spec(config.memory, compressed_vocab_size, pad_cid)
    return PlannedTables(config.name, spec, spec.layer_ids, config.memory.row_width, config.memory.codec)


def _compression_of(tables: PlannedTables, data: Prepared) -> CompressionMap:
    """The map under which ids are hashed, known by its size; where neither fits, the ids are another tokenizer's."""
    maps = [data.compression, CompressionMap.identity(data.vocab_size)]
    wanted = tables.spec.compressed_vocab_size
    usual = maps[tables.spec.dialect == "qwen_ple"]
    return next((one for one in maps if one.compressed_vocab_size == wanted), usual)


def stream_of(split: Packed, compression: CompressionMap, end_cid: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and starts of a split, or of every k-th document of it where it is longer than `most`."""
    start_T = np.zeros(len(split), dtype=bool)
    start_T[split.doc_starts_D] = True
    if len(split) > most:
        kept_T = (np.cumsum(start_T) - 1) % -(-len(split) // most) == 0
        cids_T, start_T = compression(split.ids_N[kept_T].astype(np.int64)), start_T[kept_T]
    else:
        cids_T = compression(split.ids_N.astype(np.int64))
    return cids_T, text_starts(cids_T, start_T, end_cid)
