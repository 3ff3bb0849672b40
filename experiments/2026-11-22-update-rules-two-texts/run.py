"""Which update rule for the tables, asked again: three rules x eight table rates x three seeds, on two texts, judged on dev.

    python experiments/2026-11-22-update-rules-two-texts/run.py [demo facts] [--seeds 1001] [--at-once N]

results.json beside this file is also the memory: what stands in it is not run again, one seed of everything comes before the next.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console

from nengram.config import load_config
from nengram.files import write_atomic
from nengram.study.arm import prepare_for
from nengram.study.compare import arm_config, arm_job
from nengram.study.processes import run_jobs
from nengram.train import environment

RULES = ("sparse_adam", "rowwise_adagrad", "rowwise_rmsprop")
MULTIPLIERS = (5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
SEEDS = (1001, 1002, 1003)  # of no comparison and no tuning run
DEV_TOKENS = 131_072
OUT, RESULTS = Path("runs/update-rules-two-texts"), Path(__file__).parent / "results.json"


def main() -> None:
    """Train what is missing, and write results.json after every seed of a text."""
    parser = argparse.ArgumentParser()
    parser.add_argument("texts", nargs="*", default=["demo", "facts"])
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--at-once", type=int, default=None)
    options = parser.parse_args()
    console = Console(width=120)
    for seed in options.seeds:
        for text in options.texts:
            known = {(run["text"], run["rule"], run["multiplier"]): run["dev_nats"] for run in load()["runs"]}
            jobs = {
                (rule, multiplier): job_of(text, seed, rule, multiplier)
                for rule in RULES
                for multiplier in MULTIPLIERS
                if str(seed) not in known.get((text, rule, multiplier), {})
            }
            run_jobs(list(jobs.values()), console, options.at_once)
            for (rule, multiplier), job in jobs.items():
                nats = json.loads(job.done.read_text())["dev_nats"]
                known.setdefault((text, rule, multiplier), {})[str(seed)] = nats
            write_atomic(RESULTS, json.dumps(results_of(known), indent=1) + "\n")


def load() -> dict:
    """results.json, or an empty one."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": []}


def job_of(text: str, seed: int, rule: str, multiplier: float):
    """One run of the text's Engram arm at its tuned rate."""
    config = load_config(text)
    arm = arm_config(config, "engram", seed).replace(
        train__table_rule=rule, train__table_lr_multiplier=multiplier, train__eval_tokens=DEV_TOKENS
    )
    return arm_job(arm, prepare_for(config), OUT / f"{text}-{rule}-x{multiplier:g}-s{seed}", test=False)


def results_of(known: dict[tuple[str, str, float], dict[str, float]]) -> dict:
    """Dev loss by text, rule and multiplier: every seed's, and the mean of those that are done."""
    return {
        "what": "dev loss of the Engram arm by text, table update rule and table rate (a multiple of the backbone's tuned rate)",
        "command": "python experiments/2026-11-22-update-rules-two-texts/run.py",
        "environment": environment(),
        "dev_tokens": DEV_TOKENS,
        "runs": [
            {
                "text": text,
                "rule": rule,
                "multiplier": times,
                "dev_nats": nats,
                "mean": float(np.mean(list(nats.values()))),
            }
            for (text, rule, times), nats in known.items()
        ],
    }


if __name__ == "__main__":
    main()
