"""How many tokens a second each tier could feed, and which one stops first: amounts per token against ceilings.

    device   bytes per token             against   device memory, random rows
    link     bytes per token             against   the bus between host and device (rows cross as they are stored)
    host     rows per token              against   rows a second that one gathering thread copies out of RAM
    disk     cold distinct rows x pages  against   random 4 KiB reads a second

Only what a placement uses can bind. These are ceilings of throughput, each tier working alone and kept busy; what one token waits is
another question. Without a measurement or an option the assumptions below are taken, and named as such wherever they are printed.
"""

from dataclasses import asdict, dataclass
from typing import Any

from nengram.infer.plan_hits import ChunkReads
from nengram.infer.plan_sizes import GIB, CodecSize

ASSUMED = {
    "device_gib_per_s": (400.0, "a quarter of 1.6 TiB/s: rows of a few hundred bytes read at random"),
    "link_gib_per_s": (25.0, "PCIe 4.0 x16 as copies reach it"),
    "host_rows_per_s": (5e6, "one thread, rows of a few hundred bytes, huge pages"),
    "disk_iops": (50_000.0, "an NVMe drive behind 16 reading threads"),
}
TIERS = {
    "resident": ("device",),
    "host": ("link", "host"),
    "tiered": ("link", "host", "disk"),
    "mapped": ("link", "host", "disk"),
}


@dataclass(frozen=True)
class Ceiling:
    """One limit and where it comes from: "given", "measured" or "assumed", with a word on it."""

    value: float
    source: str
    about: str = ""


@dataclass(frozen=True)
class ChunkRates:
    """Tokens a second at which each tier becomes the limit for one shape of chunk; None: it is never asked.

    binding: the lowest of those that the placement uses.
    """

    chunk: str
    tokens_per_s: dict[str, float | None]
    binding: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def ceilings_of(given: dict[str, float | None], measured: dict[str, Ceiling]) -> dict[str, Ceiling]:
    """Every ceiling: as given, else as measured, else as assumed."""
    found = {name: Ceiling(value, "assumed", about) for name, (value, about) in ASSUMED.items()}
    return found | measured | {name: Ceiling(value, "given") for name, value in given.items() if value is not None}


def rates_of(
    size: CodecSize, *, rows_per_token: int, chunk: ChunkReads, tier: str, ceilings: dict[str, Ceiling]
) -> ChunkRates:
    """The four limits for one codec and shape of chunk, under the placement `tier` (a key of TIERS)."""
    reads = chunk.cold_rows_per_token * size.pages_per_row
    bytes_per_s = {name: ceilings[f"{name}_gib_per_s"].value * GIB for name in ("device", "link")}
    limits = {name: rate / size.bytes_per_token for name, rate in bytes_per_s.items()}
    limits["host"] = ceilings["host_rows_per_s"].value / rows_per_token
    limits["disk"] = ceilings["disk_iops"].value / reads if reads else None
    used = {name: limits[name] for name in TIERS[tier]}
    binding = min(used, key=lambda name: float("inf") if used[name] is None else used[name])
    return ChunkRates(chunk.name, used, binding)
