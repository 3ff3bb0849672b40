"""What the finished rows say: every arm against the untouched model, the graft against its controls, as paired differences over seeds.

All measures are such that less is better: nats a token of held-out text, the share of questions answered wrongly, and the nats of the
right answers. The difference between facts that were shown and facts that never were is what was recalled; the rest is form.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nengram.errors import DataError
from nengram.files import atomic_path, write_atomic
from nengram.study.verdict import Paired, paired

LEARNT, FOREIGN = ("wordnet", "factbook", "foldoc"), ("enwiki", "stdlib")
ARMS = ("none", "lora_total", "lora_touched", "mlp", "one_row", "misaligned", "graft", "graft_lora")
READINGS = {
    "graft - none": ("graft", "none"),
    "lora_total - none": ("lora_total", "none"),
    "mlp - none": ("mlp", "none"),
    "graft - lora_total": ("graft", "lora_total"),
    "graft - lora_touched": ("graft", "lora_touched"),
    "graft - mlp": ("graft", "mlp"),
    "graft - one_row": ("graft", "one_row"),
    "graft - misaligned": ("graft", "misaligned"),
    "graft_lora - lora_total": ("graft_lora", "lora_total"),
    "graft_lora - graft": ("graft_lora", "graft"),
}

Row = dict
Measure = Callable[[Row], float]


def wrong(row: Row, group: str) -> float:
    """Share of a group's questions for which another answer was likelier."""
    return 1 - row["recall"][group]["chosen"]


def measures() -> dict[str, Measure]:
    """Every measure of a reported run by name."""
    found: dict[str, Measure] = {"learnt text": lambda row: float(np.mean([row["test"][name] for name in LEARNT]))}
    found |= {name: lambda row, name=name: row["test"][name] for name in (*LEARNT, *FOREIGN)}
    for form in ("shown", "near", "far"):
        found[f"known, {form}: wrong"] = lambda row, form=form: wrong(row, f"all/known/{form}")
        found[f"known, {form}: not exact"] = lambda row, form=form: 1 - row["recall"][f"all/known/{form}"]["exact"]
    for form in ("near", "far"):
        found[f"never, {form}: wrong"] = lambda row, form=form: wrong(row, f"all/never/{form}")
        found[f"known - never, {form}: wrong"] = lambda row, form=form: (
            wrong(row, f"all/known/{form}") - wrong(row, f"all/never/{form}")
        )
        found[f"known - never, {form}: nats"] = lambda row, form=form: (
            row["recall"][f"all/known/{form}"]["nats"] - row["recall"][f"all/never/{form}"]["nats"]
        )
    for relation in ("capital", "person"):
        found[f"known, near, {relation}: wrong"] = lambda row, key=f"{relation}/known/near": wrong(row, key)
    return found


def report(rows: list[Row], out: Path) -> dict:
    """Print the tables; write `out`/results.json and `out`/retrofit.png. Raises DataError when no arm has finished."""
    runs = latest_design([row for row in rows if row["kind"] == "run"])
    by_arm = {arm: {row["seed"]: row for row in runs if row["arm"] == arm} for arm in ARMS}
    by_arm = {arm: found for arm, found in by_arm.items() if found}
    table = {
        name: {arm: mean_of(found, measure) for arm, found in by_arm.items()} for name, measure in measures().items()
    }
    readings = {
        title: {name: found.__dict__ | {"verdict": found.verdict} for name, measure in measures().items()
                if (found := difference(by_arm, pair, measure)) is not None}
        for title, pair in READINGS.items()
    }  # fmt: skip
    results = {
        "what": "memory grafted onto SmolLM2-135M beside other uses of the same parameters; less is better everywhere",
        "command": "python experiments/2026-11-26-retrofit/run.py",
        "environments": environments(runs),
        "dates": sorted({row["environment"]["date"] for row in runs}),
        "design": runs[0]["design"],
        "tokens": max(row["tokens"] for row in runs),
        "arms": {
            arm: {
                "seeds": sorted(found),
                "lr": next(iter(found.values()))["lr"],
                "parameters": next(iter(found.values()))["parameters"],
                "seconds": round(float(np.mean([row["seconds"] for row in found.values()])), 1),
                "measures": {name: table[name][arm] for name in table},
            }
            for arm, found in by_arm.items()
        },
        "tuning": [
            {key: row[key] for key in ("arm", "lr", "dev_nats", "dev")}
            for row in rows
            if row["kind"] == "tune" and row["design"] == runs[0]["design"]
        ],
        "kept": {arm: kept(table["learnt text"], arm) for arm in ("one_row", "misaligned") if arm in by_arm},
        "readings": {title: found for title, found in readings.items() if found},
    }
    write_atomic(out / "results.json", json.dumps(results, indent=1) + "\n")
    print_tables(results)
    draw(results, out / "retrofit.png")
    return results


def latest_design(runs: list[Row]) -> list[Row]:
    """The runs of the design that the last row belongs to. Raises DataError."""
    if not runs:
        raise DataError("no run is finished yet")
    return [row for row in runs if row["design"] == runs[-1]["design"]]


def mean_of(found: dict[int, Row], measure: Measure) -> float:
    """Over the seeds."""
    return float(np.mean([measure(row) for row in found.values()]))


def kept(nats: dict[str, float], control: str) -> float | None:
    """What part of the graft's gain a control has, too."""
    if not {"none", "graft", control} <= set(nats):
        return None
    return (nats["none"] - nats[control]) / (nats["none"] - nats["graft"])


def difference(by_arm: dict, pair: tuple[str, str], measure: Measure) -> Paired | None:
    """Of one arm and another, over the seeds that both have; the untouched model is the same at every seed."""
    one, other = (by_arm.get(arm) for arm in pair)
    if not one or not other:
        return None
    if pair[1] == "none":
        other = dict.fromkeys(one, next(iter(other.values())))
    seeds = sorted(set(one) & set(other))
    return paired([measure(one[seed]) - measure(other[seed]) for seed in seeds]) if seeds else None


def environments(runs: list[Row]) -> list[dict]:
    """The different machines and versions that the runs had, dates apart."""
    found = []
    for row in runs:
        known = {key: value for key, value in row["environment"].items() if key != "date"}
        if known not in found:
            found.append(known)
    return found


def print_tables(results: dict) -> None:
    """Means by arm, then the paired differences with their intervals."""
    arms = results["arms"]
    print(f"{'':34}" + "".join(f"{arm:>14}" for arm in arms))
    for key in ("total", "touched"):
        print(f"{'parameters, ' + key:34}" + "".join(f"{facts['parameters'][key]:14,}" for facts in arms.values()))
    print(f"{'learning rate':34}" + "".join(f"{facts['lr']:14g}" for facts in arms.values()))
    for name in measures():
        print(f"{name:34}" + "".join(f"{facts['measures'][name]:14.3f}" for facts in arms.values()))
    for control, share in results["kept"].items():
        if share is not None:
            print(f"{control} keeps {share:.0%} of the graft's gain on learnt text")
    for title, found in results["readings"].items():
        print(f"\n{title}")
        for name, value in found.items():
            interval = "" if value["low"] is None else f"[{value['low']:+.3f}, {value['high']:+.3f}]"
            print(f"  {name:32}{value['mean']:+8.3f}  {interval:20} {value['verdict'].replace('memory', 'the first')}")


def draw(results: dict, path: Path) -> None:
    """Text learnt and forgotten, and facts recalled, by arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms = results["arms"]
    names = [arm for arm in arms if arm != "none"]
    places, slanted = np.arange(len(names)), {"rotation": 30, "ha": "right"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    bars = (
        ("learnt text", "text like the training text"),
        ("enwiki", "prose not trained on"),
        ("stdlib", "code not trained on"),
    )
    for shift, (name, label) in zip((-0.27, 0, 0.27), bars, strict=True):
        gain = (
            [arms[arm]["measures"][name] - arms["none"]["measures"][name] for arm in names] if "none" in arms else None
        )
        if gain:
            left.bar(places + shift, gain, 0.26, label=label)
    left.axhline(0, color="black", linewidth=0.8)
    left.set_ylim(top=0.75)
    left.set_ylabel("nats a token, less the untouched model's")
    left.set_xticks(places, names, **slanted)
    if "none" in arms:
        left.legend(loc="upper left", fontsize=9)
    every = list(arms)
    groups = (("known, near: wrong", "shown, another beginning"), ("known, far: wrong", "shown, a question"),
              ("never, near: wrong", "never shown, another beginning"))  # fmt: skip
    for shift, (name, label) in zip((-0.27, 0, 0.27), groups, strict=True):
        right.bar(np.arange(len(every)) + shift, [1 - arms[arm]["measures"][name] for arm in every], 0.26, label=label)
    right.axhline(0.25, color="black", linewidth=0.8, linestyle=":")
    right.set_ylabel("right answer likeliest of four")
    right.set_ylim(0, 1.3)
    right.set_yticks(np.arange(0, 1.01, 0.25))
    right.set_xticks(np.arange(len(every)), every, **slanted)
    right.legend(loc="upper left", fontsize=9)
    figure.suptitle(f"SmolLM2-135M, {results['tokens']:,} training tokens, equal parameters")
    with atomic_path(path) as beside:
        figure.savefig(beside, dpi=110, format="png")
    plt.close(figure)
