"""Which update rule for the tables? Three rules x two table rates, the demo's Engram arm, judged on dev.

    python experiments/2026-11-22-update-rules/run.py [runs/update-rules]

Resumable: finished runs are not done again. Writes results.json beside this file; `make docs` copies its table into the decision note.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from nengram.config import load_config
from nengram.files import write_atomic
from nengram.store import ResidentStore, coalesce, make_rule
from nengram.study.arm import prepare_for
from nengram.study.compare import arm_config, arm_job
from nengram.study.processes import run_jobs
from nengram.study.tune import TUNING_SEED
from nengram.train import environment

RULES = ("sparse_adam", "rowwise_adagrad", "rowwise_rmsprop")
MULTIPLIERS = (5.0, 10.0)
ROWS, LOOKUPS = 295_066, 16_384  # the demo's table and batch


def main(out: Path, overrides: list[str]) -> None:
    """Train the six arms, time the three rules, write results.json."""
    config = load_config("demo", overrides)
    data, console = prepare_for(config), Console(width=120)
    jobs = {}
    for rule in RULES:
        for multiplier in MULTIPLIERS:
            arm = arm_config(config, "engram", TUNING_SEED).replace(
                train__table_rule=rule, train__table_lr_multiplier=multiplier, train__eval_tokens=0
            )
            jobs[rule, multiplier] = arm_job(arm, data, out / f"{rule}-x{multiplier}", test=False)
    run_jobs(list(jobs.values()), console)
    times = {rule: update_ms(rule, config.memory.row_width or 4) for rule in RULES}
    runs = [
        {
            "rule": rule,
            "multiplier": multiplier,
            "dev_nats": json.loads(job.done.read_text())["dev_nats"],
            "step_ms": times[rule]["ms"],
            "state_bytes_per_row": times[rule]["state_bytes_per_row"],
        }
        for (rule, multiplier), job in jobs.items()
    ]
    results = {
        "what": "dev loss of the demo's Engram arm by table update rule and rate; CPU ms of one coalesce + update",
        "command": "python experiments/2026-11-22-update-rules/run.py",
        "environment": environment(),
        "lr": config.compare.lr.get("engram", config.train.lr),
        "tokens": config.train.tokens,
        "seed": TUNING_SEED,
        "runs": runs,
    }
    write_atomic(Path(__file__).parent / "results.json", json.dumps(results, indent=1) + "\n")
    for run in runs:
        console.print(run)


def update_ms(name: str, row_width: int, repeats: int = 40) -> dict[str, float]:
    """Median CPU milliseconds of coalescing and applying one batch's gradients, and bytes of optimiser state a row."""
    torch.set_num_threads(1)
    rule, generator = make_rule(name), torch.Generator().manual_seed(0)
    store = ResidentStore(ROWS, row_width)
    spent = []
    for _ in range(repeats):
        rows = torch.randint(0, ROWS, (LOOKUPS,), generator=generator)
        grads = torch.randn(LOOKUPS, row_width, generator=generator)
        began = time.process_time()
        store.update(*coalesce(rows, grads), rule, 1e-3)
        spent.append(1e3 * (time.process_time() - began))
    state = sum(t.numel() * t.element_size() for key, t in store.tensors().items() if key.startswith("state."))
    return {"ms": float(np.median(spent[5:])), "state_bytes_per_row": state / ROWS}


if __name__ == "__main__":
    paths = [argument for argument in sys.argv[1:] if "=" not in argument]
    main(Path(paths[0] if paths else "runs/update-rules"), [argument for argument in sys.argv[1:] if "=" in argument])
