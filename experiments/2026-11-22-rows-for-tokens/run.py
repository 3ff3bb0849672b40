"""How far does a plan for a training budget see? Predicted from part of a text, held against a census of all of it; losses by rows.

    python experiments/2026-11-22-rows-for-tokens/run.py              the predictions, a minute or two
    python experiments/2026-11-22-rows-for-tokens/run.py --train      the demo's Engram arm at five sizes of its table as well

Overrides (`train.tokens=2000`) follow. Resumable: finished runs are not done again. Writes results.json beside this file; `make docs`
copies its tables into the decision note.
"""

import json
import sys
from pathlib import Path

from rich.console import Console

from nengram.address import AddressSpec, take_census
from nengram.config import Config, load_config
from nengram.errors import DataError
from nengram.files import write_atomic
from nengram.infer.plan_rows import Growth, largest_rows, rows_for
from nengram.model import resolve
from nengram.study.arm import prepare_for
from nengram.study.compare import arm_config, arm_job
from nengram.study.plan_verb import stream_of
from nengram.study.processes import run_jobs
from nengram.study.tune import TUNING_SEED
from nengram.text import Prepared
from nengram.train import environment

HERE = Path(__file__).parent
PARTS = (1, 2, 4, 8, 16)  # the text is so many times what is known
PILOT_TOKENS, PILOT_ROWS = 409_600, (9_257, 18_517, 27_791, 46_309)  # rows a head that an early pilot tried
TIMES = (0.25, 0.5, 1, 2, 4)  # of the recommended rows
COMMAND = "python experiments/2026-11-22-rows-for-tokens/run.py"


def main(arguments: list[str]) -> None:
    """Predict, train if asked, write results.json."""
    console, overrides = Console(width=140), [argument for argument in arguments if "=" in argument]
    config, found = load_config("demo", overrides), []
    for preset in ("demo", "facts"):
        try:
            found += predictions(prepare_for(load_config(preset)), console)
        except DataError as error:
            console.print(f"left out: {error}")
    before = json.loads((HERE / "results.json").read_text()) if (HERE / "results.json").exists() else {}
    losses = before.get("losses", [])
    if "--train" in arguments:
        losses = losses_by_rows(config, console)
    results = {
        "what": "rows that tokens can teach: predicted from a part, counted on the whole; dev loss by rows a head",
        "command": COMMAND + " --train" * bool(losses),
        "environment": environment(),
        "predictions": found,
        "pilot": pilot(prepare_for(load_config("demo"))),
        "losses": losses,
    }
    write_atomic(HERE / "results.json", json.dumps(results, indent=1) + "\n")


def predictions(data: Prepared, console: Console) -> list[dict]:
    """The rows recommended for the whole train split, from each part of it, and what the hash really does to them."""
    found = []
    cids_T, start_T = stream_of(data.splits["train"], data.compression, -1, 10**9)
    for order in (2, 3):
        whole = Growth(cids_T, start_T, order)
        distinct = whole.spectrum(len(cids_T)).distinct
        for part in PARTS:
            known = len(cids_T) // part
            spectrum = Growth(whole.cids_T[:known], whole.start_T[:known], order).spectrum(len(cids_T))
            rows = largest_rows(spectrum)
            predicted, census = rows_for(spectrum, rows), census_of(data, whole, rows)
            found.append(
                {
                    "text": ", ".join(data.sources),
                    "tokens": len(cids_T),
                    "known": known,
                    "order": order,
                    "distinct_error": spectrum.distinct / distinct - 1,
                    "rows": rows,
                    "touched": [predicted.touched, census.occupied],
                    "taught": [predicted.taught, census.well_touched],
                }
            )
            console.print(found[-1])
    return found


def census_of(data: Prepared, growth: Growth, rows: int):
    """The census of one order, by the real hash."""
    spec = AddressSpec.engram(
        compressed_vocab_size=data.compression.compressed_vocab_size,
        rows_per_head=[rows] * (growth.order - 1),
        heads=2,
        layer_ids=[1],
        pad_cid=0,
    )
    return next(one for one in take_census(spec, [(growth.cids_T, growth.start_T)]).orders if one.order == growth.order)


def pilot(data: Prepared) -> list[dict]:
    """What rows of the pilot's sizes see of as many tokens as it had."""
    cids_T, start_T = stream_of(data.splits["train"], data.compression, -1, 10**9)
    spectra = [Growth(cids_T, start_T, order).spectrum(PILOT_TOKENS) for order in (2, 3)]
    return [rows_for(spectrum, rows).to_dict() for rows in PILOT_ROWS for spectrum in spectra]


def losses_by_rows(config: Config, console: Console) -> list[dict]:
    """Dev loss of the demo's Engram arm, all else equal, at `TIMES` the rows recommended for its tokens. Not of equal parameters."""
    data = prepare_for(config)
    cids_T, start_T = stream_of(data.splits["train"], data.compression, -1, 10**9)
    recommended = [largest_rows(Growth(cids_T, start_T, order).spectrum(config.train.tokens)) for order in (2, 3)]
    arm = resolve(arm_config(config, "engram", TUNING_SEED), data.vocab_size)
    jobs = {}
    for times in TIMES:
        rows = [int(times * number) for number in recommended]
        sized = arm.replace(memory__rows_per_head=rows, train__eval_tokens=0)
        jobs[times] = rows, arm_job(sized, data, Path("runs/rows-for-tokens") / f"x{times:g}", test=False)
    run_jobs([job for _, job in jobs.values()], console)
    return [
        {
            "times": times,
            "rows_per_head": rows,
            "tokens": config.train.tokens,
            "seed": TUNING_SEED,
            "dev_nats": json.loads(job.done.read_text())["dev_nats"],
        }
        for times, (rows, job) in jobs.items()
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
