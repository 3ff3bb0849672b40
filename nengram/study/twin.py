"""Twenty seconds that show what memory is for: private facts that a table holds and a model of the same size has no time to learn.

Two twins, pure MoE and Engram, have equal parameters and equal FLOPs and read the same text of random facts, each a pair of keys and
its value (`nengram.study.twin_task`). Where the pair is an n-gram, Engram learns the facts and MoE does not. In the permuted form, the
same tokens with the pair parted, Engram does not either: what remembers is the lookup, not the parameters. A third arm, `one_row`, has
Engram's path and nothing to look up.

Judged is the token after a fact's pair, among words that it was never shown with: how often it is right, and its loss. The rule
reads the accuracy of an arm minus that of pure MoE, paired over at least three seeds:

    learns the facts        the whole 95 % interval lies above 0.5
    learns nothing more     the whole interval lies within 0.05 of zero

The task separates when Engram learns the facts where the pair is an n-gram, and no arm learns anything more elsewhere.
"""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from nengram.errors import ConfigError
from nengram.files import write_atomic
from nengram.study.processes import cores, python_job, run_jobs
from nengram.study.twin_arm import Size
from nengram.study.twin_figure import draw_twin
from nengram.study.twin_report import markdown_of, print_twin, rates_table
from nengram.study.twin_task import FORMS, VALUES
from nengram.study.verdict import SEEDS_NEEDED, paired
from nengram.train import environment

ARMS = ("moe", "engram", "one_row")
LEARNS, NOTHING = 0.5, 0.05
TUNING_SEED = 1000
GRID = tuple(round(0.01 * 2 ** (k / 2), 5) for k in range(-4, 4))
RATES = {  # `nengram twin --tune` found them: the lowest loss on the values of shown facts, GRID tried for every arm
    "facts": {"moe": 0.01414, "engram": 0.01, "one_row": 0.02828},
    "permuted": {"moe": 0.01414, "engram": 0.02828, "one_row": 0.02828},
}
FIGURES = ("shown_accuracy", "unshown_accuracy", "shown_nats", "unshown_nats", "cpu_seconds", "curve")
COMMITTED = Path(__file__).parents[2] / "docs" / "twin.json"


def run_twin(
    *,
    seeds: Sequence[int] = (0,),
    out: Path | None = None,
    as_json: bool = False,
    tune: bool = False,
    console: Console,
    size: Size | None = None,
) -> dict:
    """Train all arms on both forms, and print the table and what follows from it; for the command line.

    out: folder for twin.json and twin.png; with `tune`, for twin.tune.json. as_json: print that JSON, progress going to stderr.
    tune: search each arm's learning rate instead, on a seed that is never reported.
    Raises: ConfigError for seeds that are not given, repeated or negative; NengramError when a process fails.
    """
    size = size or Size()
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError(f"twin: give seeds of 0 or more, each once; got {list(seeds)}")
    told = Console(stderr=True) if as_json else console
    began, cpu_before = time.monotonic(), _children_cpu_seconds()
    found = tune_twin(size, told) if tune else twin(seeds, size, told)
    found |= {
        "command": "nengram " + " ".join(sys.argv[1:]),
        "wall_seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(_children_cpu_seconds() - cpu_before, 1),
    }
    if as_json:
        print(json.dumps(found, indent=1))
    elif tune:
        console.print(rates_table(found))
    else:
        print_twin(found, console)
    if out is not None:
        files = [out / ("twin.tune.json" if tune else "twin.json")]
        write_atomic(files[0], json.dumps(found, indent=1) + "\n")
        if not tune and (picture := draw_twin(found, out / "twin.png")):
            files.append(picture)
        told.print(", ".join(map(str, files)), highlight=False, markup=False)
    return found


def twin(seeds: Sequence[int], size: Size, console: Console) -> dict:
    """Every arm on both forms with every seed, and what can be read off: docs/twin.json is one such dict."""
    jobs = {(form, seed): (form, seed, RATES[form]) for seed in seeds for form in FORMS}
    results = run_forms(jobs, size, console)
    forms = {form: over_seeds([results[form, seed] for seed in seeds]) for form in FORMS}
    task = size.task(FORMS[0], seeds[0])
    return {
        "what": "accuracy and loss on the value of private facts, at equal total parameters and forward FLOPs",
        "environment": environment() | {"threads": "1 per process", "processes_at_once": str(cores())},
        "seeds": list(seeds),
        "size": vars(size),
        "task": {
            "facts": task.facts,
            "never_shown": len(task.test_LW) - task.facts,
            "vocab_size": task.vocab_size,
            "chance": 1 / VALUES,
            "tokens": int(task.train_LW.size),
        },
        "rates": RATES,
        "costs": {arm: size.split(task, arm).cost.to_dict() for arm in ARMS},
        "forms": forms,
        "separates": separates(forms),
    }


def tune_twin(size: Size, console: Console) -> dict:
    """Loss on the values of shown facts for every form, arm and rate of GRID, at TUNING_SEED, and the best rates."""
    jobs = {(form, lr): (form, TUNING_SEED, dict.fromkeys(ARMS, lr)) for form in FORMS for lr in GRID}
    results = run_forms(jobs, size, console)
    losses = {
        form: {arm: {f"{lr:g}": results[form, lr][arm]["shown_nats"] for lr in GRID} for arm in ARMS} for form in FORMS
    }
    best = {form: {arm: float(min(of, key=of.get)) for arm, of in arms.items()} for form, arms in losses.items()}
    return {"environment": environment(), "seed": TUNING_SEED, "size": vars(size), "shown_nats": losses, "rates": best}


def run_forms(jobs: Mapping[tuple, tuple[str, int, dict[str, float]]], size: Size, console: Console) -> dict:
    """What every arm comes to, for each job of (form, seed, learning rate by arm): as many processes as there are cores.

    Raises: ConfigError for a size that cannot be; NengramError when a process fails.
    """
    with tempfile.TemporaryDirectory(prefix="nengram-twin-") as place:
        started = {}
        for key, (form, seed, rates) in jobs.items():
            folder = Path(place) / "-".join(map(str, key))
            steps = len(rates) * size.steps(size.task(form, seed))
            told = {"form": form, "seed": seed, "rates": rates, "size": vars(size)}
            write_atomic(folder / "job.json", json.dumps(told))
            done = folder / "done.json"
            started[key] = python_job(folder.name, "nengram.study.twin_arm", [str(folder)], folder, done, steps)
        run_jobs(list(started.values()), console)
        return {key: json.loads(job.done.read_text()) for key, job in started.items()}


def over_seeds(results: Sequence[Mapping[str, dict]]) -> dict:
    """One form: each arm's figures as lists over the seeds, and its paired differences to pure MoE."""
    arms = {
        arm: {name: [seed[arm][name] for seed in results] for name in FIGURES} | {"steps": results[0][arm]["steps"]}
        for arm in results[0]
    }
    readings = {arm: against(arms[arm], arms["moe"]) for arm in arms if arm != "moe"}
    return {"arms": arms, "readings": readings}


def against(arm: Mapping, baseline: Mapping) -> dict:
    """Paired differences of two arms' accuracy and loss on shown facts, and the words of the rule for the accuracy."""
    accuracy, nats = (
        paired(np.subtract(arm[f"shown_{what}"], baseline[f"shown_{what}"])).to_dict() for what in ("accuracy", "nats")
    )
    low, high = accuracy["low"], accuracy["high"]
    verdict = f"no verdict ({len(accuracy['differences'])} of {SEEDS_NEEDED} seeds)"
    if low is not None:
        nothing = low > -NOTHING and high < NOTHING
        verdict = "learns the facts" if low > LEARNS else "learns nothing more" if nothing else "in between"
    for one in (accuracy, nats):
        one["differences"] = list(one["differences"])
        del one["verdict"]  # the words of another rule
    return {"accuracy": accuracy, "nats": nats, "verdict": verdict}


def separates(forms: Mapping[str, dict]) -> bool | None:
    """Whether Engram learns the facts where they are n-grams, and nothing else learns anything; None with too few seeds."""
    verdicts = {(form, arm): of["verdict"] for form in forms for arm, of in forms[form]["readings"].items()}
    if any(verdict.startswith("no verdict") for verdict in verdicts.values()):
        return None
    can = verdicts.pop(("facts", "engram")) == "learns the facts"
    return can and set(verdicts.values()) == {"learns nothing more"}


def _children_cpu_seconds() -> float:
    """Of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def twin_table() -> str:
    """Markdown of the committed docs/twin.json, for the documents; a sentence where there is none."""
    if not COMMITTED.exists():
        return "*Not measured yet: `docs/twin.json` does not exist.*"
    return markdown_of(json.loads(COMMITTED.read_text(encoding="utf-8")))
