"""What each part of the backbone is worth, and whether training was stable, into verdict.json.

    python experiments/2026-11-26-backbone/verdict.py [folder of the run folders, runs/arms if not given]

Differences are paired by seed, from rows.jsonl. Stability is read from the runs' own metrics, from step 100 on: the highest loss of a
batch against the first, and the widest ratio of gradient norms; what has no run folder here keeps what verdict.json said before.
"""

import json
import sys
from pathlib import Path

from nengram.files import write_atomic
from nengram.study import paired

HERE = Path(__file__).parent
SETTLED = 100  # steps
NAMES = {
    "train.optimizer=muon": "full",
    "model.streams=1": "one stream",
    "model.attention=gqa": "grouped-query attention",
    "train.optimizer=adamw": "AdamW",
    "model.attention=gqa model.streams=1 train.optimizer=adamw": "all three simpler",
}
ASKED = ("model.streams", "model.attention", "train.optimizer")


def name_of(row: dict) -> str:
    return NAMES[" ".join(f"{key}={row['point'][key]}" for key in sorted(ASKED) if key in row["point"])]


def stability(run: Path) -> dict[str, float]:
    """Of one run folder."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    late = [step for step in steps if step["step"] >= SETTLED]
    norms = [step["grad_norm"] for step in late]
    return {
        "first_nats": steps[0]["loss_nats"],
        "highest_nats": max(step["loss_nats"] for step in late),
        "norm_ratio": max(norms) / min(norms),
    }


def main() -> None:
    runs = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/arms")
    path = HERE / "verdict.json"
    before = json.loads(path.read_text(encoding="utf-8"))["stability"] if path.exists() else {}
    rows = [json.loads(line) for line in (HERE / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    nats: dict[str, dict[int, float]] = {}
    cpu: dict[str, list[float]] = {}
    stable: dict[str, dict] = {}
    for row in rows:
        name = name_of(row)
        nats.setdefault(name, {})[row["seed"]] = row["test_nats"]
        cpu.setdefault(name, []).append(row["cpu_seconds"])
        own, key = runs / Path(row["run"]).name, f"{name}, seed {row['seed']}"
        stable[key] = stability(own) if (own / "metrics.jsonl").exists() else before.get(key)
    differences = {}
    for name, by_seed in nats.items():
        seeds = sorted(set(by_seed) & set(nats["full"]))
        if name != "full" and len(seeds) > 1:
            differences[name] = vars(paired([by_seed[seed] - nats["full"][seed] for seed in seeds])) | {"seeds": seeds}
    verdict = {
        "test_nats": {name: sum(by_seed.values()) / len(by_seed) for name, by_seed in nats.items()},
        "against_full": differences,
        "cpu_seconds": {name: sum(values) / len(values) for name, values in cpu.items()},
        "stability": stable,
    }
    write_atomic(path, json.dumps(verdict, indent=1) + "\n")
    for name, mean in verdict["test_nats"].items():
        one = differences.get(name)
        against = "" if one is None else f"  {one['mean']:+.4f} ({one['low']} .. {one['high']})"
        print(f"{name:24} {mean:.4f} nats, {len(nats[name])} seeds, {verdict['cpu_seconds'][name]:.0f} CPU-s{against}")
    found = [one for one in stable.values() if one]
    if found:
        print(f"gradient norms from step {SETTLED}: within {max(one['norm_ratio'] for one in found):.1f} times")
        print(
            f"losses above the first: {sum(one['highest_nats'] > one['first_nats'] for one in found)} of {len(found)} runs"
        )


if __name__ == "__main__":
    main()
