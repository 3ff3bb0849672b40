"""The paired differences that the question asks for, from rows.jsonl into verdict.json: what a second pass is worth to each arm,
and what each safeguard changes."""

import json
from pathlib import Path

from nengram.files import write_atomic
from nengram.study import paired

HERE = Path(__file__).parent
ONE, TWO = 247_808, 495_616  # training tokens: the text once, and twice


def losses() -> dict[str, list[float]]:
    """Test nats by arm and passes, in the order of the seeds."""
    rows = [json.loads(line) for line in (HERE / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    found: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        passes = row["tokens"] // ONE
        how = row["point"].get("train.second_pass", "")
        found.setdefault(f"{row['arm']} {passes}{' ' + how if how else ''}", []).append(row["test_nats"])
    return found


def minus(left: list[float], right: list[float]) -> list[float]:
    return [a - b for a, b in zip(left, right, strict=True)]


def main() -> None:
    nats = losses()
    moe, engram = minus(nats["moe 2"], nats["moe 1"]), minus(nats["engram 2"], nats["engram 1"])
    asked = {
        "second pass, pure MoE": moe,
        "second pass, Engram": engram,
        "second pass, Engram less pure MoE (above zero: the lead shrinks)": minus(engram, moe),
        "lead after one pass": minus(nats["engram 1"], nats["moe 1"]),
        "lead after two": minus(nats["engram 2"], nats["moe 2"]),
        "tables drawn anew, against keep": minus(nats["engram 2 fresh_tables"], nats["engram 2"]),
        "rare n-grams not read, against keep": minus(nats["engram 2 mask_rare"], nats["engram 2"]),
    }
    verdict = {name: vars(paired(differences)) for name, differences in asked.items()}
    write_atomic(HERE / "verdict.json", json.dumps(verdict, indent=1) + "\n")
    for name, one in verdict.items():
        print(f"{one['mean']:+.4f} ({one['low']:+.4f} .. {one['high']:+.4f})  {name}")


if __name__ == "__main__":
    main()
