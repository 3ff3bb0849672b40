"""The ratio of the two gains that the question asks for, in bits a byte, from rows.jsonl into verdict.json.

Seeds are not paired across vocabularies (another tokenizer, another order of windows): the interval of the ratio is Fieller's for two
independent means: the ratios r for which (gain of bytes) - r (gain of the BPE) is not told from nothing, t on the pooled degrees.
"""

import json
import math
from pathlib import Path

import numpy as np

from nengram.files import write_atomic
from nengram.study import paired
from nengram.study.verdict import t_quantile

HERE = Path(__file__).parent


def bits() -> dict[str, list[float]]:
    """Test bits a byte by vocabulary, arm and highest order, in the order of the seeds."""
    rows = [json.loads(line) for line in (HERE / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    found: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        order = row["point"].get("memory.max_order", 3)
        name = f"{row['point']['data.vocab_size']} {row['arm']}{'' if order == 3 else f' to order {order}'}"
        found.setdefault(name, []).append(row["bits_per_byte"])
    return found


def fieller(top: np.ndarray, bottom: np.ndarray) -> dict[str, float | None]:
    """mean(top) / mean(bottom) with a 95 % interval; None where it has no bound."""
    a, b = top.mean(), bottom.mean()
    va, vb = top.var(ddof=1) / len(top), bottom.var(ddof=1) / len(bottom)
    t = t_quantile(0.975, len(top) + len(bottom) - 2)
    lead, half_linear, last = b * b - t * t * vb, a * b, a * a - t * t * va
    inside = half_linear**2 - lead * last
    if lead <= 0 or inside < 0:
        return {"ratio": float(a / b), "low": None, "high": None}
    ends = sorted((half_linear + sign * math.sqrt(inside)) / lead for sign in (-1, 1))
    return {"ratio": float(a / b), "low": float(ends[0]), "high": float(ends[1])}


def main() -> None:
    of = {name: np.array(values) for name, values in bits().items()}
    gains = {
        "bytes": of["258 engram"] - of["258 moe"],
        "bytes, orders 2 to 5": of["258 engram to order 5"] - of["258 moe"],
        "BPE of 4,096": of["4096 engram"] - of["4096 moe"],
    }
    verdict = {
        "bits_per_byte": {name: float(values.mean()) for name, values in of.items()},
        "gain": {name: vars(paired(values)) for name, values in gains.items()},
        "ratio": {name: fieller(gains[name], gains["BPE of 4,096"]) for name in list(gains)[:2]},
    }
    write_atomic(HERE / "verdict.json", json.dumps(verdict, indent=1) + "\n")
    for name, one in verdict["gain"].items():
        print(f"{one['mean']:+.4f} bits a byte ({one['low']:+.4f} .. {one['high']:+.4f})  {name}")
    for name, one in verdict["ratio"].items():
        bounds = "no bound" if one["low"] is None else f"{one['low']:.2f} .. {one['high']:.2f}"
        print(f"{one['ratio']:.2f} times the BPE's ({bounds})  {name}")


if __name__ == "__main__":
    main()
