"""Will it fit, where, and how fast: everything `nengram plan` says, as one value.

    sizes        arithmetic on the address spec                    plan_sizes.py
    placements   the same against two budgets of memory            here
    hits         a corpus's n-grams against a hot set              plan_hits.py
    rates        amounts per token against ceilings                plan_rates.py, measure.py
    training     rows that a budget of tokens can teach            plan_rows.py

Nothing here reads a file or prints; `Plan.to_dict()` is all that a report shows. docs/plan.md explains each number.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from nengram.errors import ConfigError
from nengram.infer.plan_hits import HOT_SHARES, ChunkReads, HotHits, PlanText, ReadTrace, trace_reads
from nengram.infer.plan_rates import Ceiling, ChunkRates, rates_of
from nengram.infer.plan_rows import RowsFor, Spectrum, largest_rows, recommend_rows, rows_for
from nengram.infer.plan_sizes import GIB, CodecSize, PlannedTables, Sizes, sizes_of

INDEX_BITS_PER_ROW = 1.5  # of every row of the table, hot or not: `nengram.store.HotSet`
SIZES_SHOWN = (0.5, 1, 2)  # of the recommended rows


@dataclass(frozen=True)
class Placement:
    """Where the tables go under one codec. tier: "resident", "host", "tiered" (hot set in RAM over disk) or "mapped" (disk).

    hot_share: of the rows, in RAM. host_bytes holds the hot set and its index. hit_rate: predicted, of row reads; None where all
    rows are in memory. exhausted: as `HotHits`.
    """

    codec: str
    tier: str
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    hot_rows: int
    hot_share: float
    hit_rate: float | None
    exhausted: bool = False


@dataclass(frozen=True)
class Training:
    """Rows that `tokens` tokens can teach. per_order: the table at half, once and double the recommendation, and as in the config."""

    tokens: int
    beyond_corpus: float
    recommended: tuple[int, ...]
    parameters: int
    per_order: dict[str, tuple[RowsFor, ...]]


@dataclass(frozen=True)
class Plan:
    """All answers for one set of tables. addresses: the word code of their spec."""

    name: str
    codec: str
    dialect: str
    addresses: str
    device_gib: float
    host_gib: float
    host_source: str
    text: str
    proxy: bool
    method: str
    sizes: Sizes
    placements: tuple[Placement, ...]
    hits: tuple[HotHits, ...]
    chunks: tuple[ChunkReads, ...]
    ceilings: dict[str, Ceiling]
    rates: tuple[ChunkRates, ...]
    training: Training | None

    @property
    def placement(self) -> Placement:
        """The placement under the codec that is planned for."""
        return next(one for one in self.placements if one.codec == self.codec)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Budget:
    """GiB for tables on the device and in host RAM. Raises: ConfigError for a negative or infinite size."""

    device_gib: float
    host_gib: float
    host_source: str = "given"

    def __post_init__(self) -> None:
        for option, value in (("--device-gib", self.device_gib), ("--host-gib", self.host_gib)):
            if not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"{option} must be a number of GiB from 0 up, got {value}")


def make_plan(
    tables: PlannedTables,
    text: PlanText,
    budget: Budget,
    ceilings: dict[str, Ceiling],
    *,
    tokens: int = 0,
) -> Plan:
    """The whole plan. tokens: a training budget to recommend rows for; 0: none.

    Raises: ConfigError for a ceiling or budget that is no positive number; DataError for text that is too short.
    """
    check_ceilings(ceilings)
    sizes, trace = sizes_of(tables), trace_reads(tables, text)
    placements = tuple(placement_of(name, size, sizes, budget, trace) for name, size in sizes.codecs.items())
    mine = next(one for one in placements if one.codec == tables.codec)
    shares = sorted({*HOT_SHARES, *([mine.hot_share] if mine.tier == "tiered" else [])})
    chunks = trace.chunks(mine.hot_share)
    size = sizes.codecs[tables.codec]
    rates = (
        rates_of(size, rows_per_token=sizes.rows_per_token, chunk=chunk, tier=mine.tier, ceilings=ceilings)
        for chunk in chunks
    )
    return Plan(
        name=tables.name,
        codec=tables.codec,
        dialect=tables.spec.dialect,
        addresses=tables.spec.word_code,
        device_gib=budget.device_gib,
        host_gib=budget.host_gib,
        host_source=budget.host_source,
        text=text.about,
        proxy=text.proxy,
        method=trace.method,
        sizes=sizes,
        placements=placements,
        hits=tuple(trace.hits(share) for share in shares),
        chunks=chunks,
        ceilings=ceilings,
        rates=tuple(rates),
        training=_training(tables, text, tokens) if tokens else None,
    )


def check_ceilings(ceilings: dict[str, Ceiling]) -> None:
    """Raises: ConfigError for a ceiling that is no positive number, by the name of its option."""
    for name, ceiling in ceilings.items():
        if not (ceiling.value > 0 and math.isfinite(ceiling.value)):
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, got {ceiling.value}")


def placement_of(codec: str, size: CodecSize, sizes: Sizes, budget: Budget, trace: ReadTrace) -> Placement:
    """Where the tables go under one codec: the fastest tier with room for all; else the disk, with what hot rows RAM can hold."""
    table_bytes, host_room = size.table_bytes, int(budget.host_gib * GIB)
    if table_bytes <= budget.device_gib * GIB:
        return Placement(codec, "resident", table_bytes, 0, 0, 0, 0.0, None)
    if table_bytes <= host_room:
        return Placement(codec, "host", 0, table_bytes, 0, 0, 0.0, None)
    index_bytes = math.ceil(sizes.rows * INDEX_BITS_PER_ROW / 8)
    hot_rows = (host_room - index_bytes) // size.row_bytes
    if hot_rows < 1:
        return Placement(codec, "mapped", 0, 0, table_bytes, 0, 0.0, 0.0)
    share = hot_rows / sizes.rows
    host_bytes = hot_rows * size.row_bytes + index_bytes
    hits = trace.hits(share)
    return Placement(codec, "tiered", 0, host_bytes, table_bytes, hot_rows, share, hits.all, hits.exhausted)


def _training(tables: PlannedTables, text: PlanText, tokens: int) -> Training:
    spec = tables.spec
    spectra = recommend_rows(text.train_T, text.train_start_T, tokens=tokens, max_order=spec.max_order)
    recommended = tuple(_rounded(largest_rows(spectrum)) for spectrum in spectra)
    configured = [min(heads) for heads in spec.layer(tables.layer_ids[0]).moduli]
    sizes = {f"x{times:g}": [max(1, int(times * rows)) for rows in recommended] for times in SIZES_SHOWN}
    return Training(
        tokens=tokens,
        beyond_corpus=max(spectrum.beyond for spectrum in spectra),
        recommended=recommended,
        parameters=sum(recommended) * spec.heads * len(tables.layer_ids) * tables.row_width,
        per_order={name: _rows_for(spectra, rows) for name, rows in (sizes | {"config": configured}).items()},
    )


def _rows_for(spectra: tuple[Spectrum, ...], rows: list[int]) -> tuple[RowsFor, ...]:
    return tuple(rows_for(spectrum, number) for spectrum, number in zip(spectra, rows, strict=True))


def _rounded(rows: int) -> int:
    """Down to two digits: the estimate is no finer."""
    unit = 10 ** max(0, len(str(rows)) - 2)
    return rows // unit * unit
