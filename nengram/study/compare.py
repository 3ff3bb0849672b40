"""The main job: does memory pay, at equal parameters and equal FLOPs, on this text?

Every arm sees the same tokens in the same order, starts from the same seed, has the total parameters and forward FLOPs of pure MoE
(`nengram.model.budget`), and runs at a learning rate found with the same number of tries (`tune`). Three differences are read off:

    engram  - moe        the claim: memory instead of some of the experts
    engram  - one_row    the lookup: the same arm with nothing to look up (every address of a slot sent to the slot's first row)
    one_row - no_table   the added path: projections, gate and convolution, against the same experts without them

Results land in one folder: results.json (all numbers, config, hardware, versions, date), curves.png, tokens.json.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console

from nengram.config import ARMS, Config, as_dict, shipped, to_toml
from nengram.errors import ConfigError, NengramError, nearest
from nengram.files import write_atomic
from nengram.model import resolve
from nengram.study.arm import FACTS, load_facts, load_nats, prepare_for
from nengram.study.processes import Job, cores, python_job, run_jobs
from nengram.study.verdict import paired
from nengram.text import Packed, Prepared
from nengram.train import environment, steps_of

READINGS = {
    "claim": ("engram", "moe"),
    "lookup": ("engram", "one_row"),
    "path": ("one_row", "no_table"),
    "gate": ("engram", "additive"),
    "additive": ("additive", "moe"),
    "alignment": ("engram", "misaligned"),
    "learning": ("engram", "frozen"),
    "dense": ("engram", "wide_shared"),
}


def compare(config: Config, out: Path, *, resume: bool, console: Console) -> dict:
    """Run every arm of `config.compare` with every seed, and gather the results (also written to `out/results.json`).

    Raises: ConfigError for arms, seeds or a budget that cannot be; DataError; NengramError when an arm fails.
    """
    config = check(config)
    data = prepare_for(config)
    _open_out(config, out, resume)
    jobs = arm_jobs(config, data, out)
    run_jobs(list(jobs.values()), console)
    results = gather(config, data, out)
    write_atomic(out / "results.json", json.dumps(results, indent=1))
    return results


def check(config: Config) -> Config:
    """The config of a comparison, or ConfigError: known arms, at least one seed, a budget."""
    for arm in config.compare.arms:
        if arm not in ARMS:
            raise ConfigError(f'compare.arms: "{arm}" is unknown{nearest(arm, ARMS)}; arms: {", ".join(ARMS)}')
    for arm in config.compare.lr:
        if arm not in ARMS:
            raise ConfigError(f'compare.lr: "{arm}" is no arm{nearest(arm, ARMS)}; arms: {", ".join(ARMS)}')
    if not config.compare.arms or not config.compare.seeds:
        raise ConfigError("compare: give at least one arm and one seed")
    if not config.budget.scale:
        raise ConfigError("compare: [budget] scale is not set; arms can only be made equal from a budget")
    return config


def arm_config(config: Config, arm: str, seed: int, lr: float | None = None) -> Config:
    """The config of one run of the comparison, at the arm's tuned learning rate unless `lr` is given."""
    return replace(
        config,
        name=f"{arm}-s{seed}",
        budget=replace(config.budget, arm=arm),
        train=replace(config.train, seed=seed, lr=lr or config.compare.lr.get(arm, config.train.lr)),
    )


def arm_job(config: Config, data: Prepared, folder: Path, *, test: bool = True) -> Job:
    """The process that trains one arm into `folder`. Raises ConfigError, DataError when it could not start."""
    steps = steps_of(resolve(config, data.tokenizer.get_vocab_size()), data)
    write_atomic(folder / "arm.toml", to_toml(config))
    arguments = [str(folder / "arm.toml"), str(folder), *([] if test else ["--no-test"])]
    return python_job(folder.name, "nengram.study.arm", arguments, folder, folder / FACTS, steps)


def arm_jobs(config: Config, data: Prepared, out: Path) -> dict[tuple[str, int], Job]:
    """A job per arm and seed, seed by seed, so that the first pair is complete early."""
    return {
        (arm, seed): arm_job(arm_config(config, arm, seed), data, out / f"{arm}-s{seed}")
        for seed in config.compare.seeds
        for arm in config.compare.arms
    }


def gather(config: Config, data: Prepared, out: Path) -> dict:
    """Everything the finished arms in `out` say, as one JSON-able dict."""
    test = data.splits["test"]
    arms = {}
    for arm in config.compare.arms:
        runs = {seed: load_facts(out / f"{arm}-s{seed}") for seed in config.compare.seeds}
        by_source = {seed: nats_by_source(load_nats(out / f"{arm}-s{seed}"), test) for seed in config.compare.seeds}
        arms[arm] = summarise(runs, by_source, test)
    readings = {}
    for name, (memory, baseline) in READINGS.items():
        if memory in arms and baseline in arms:
            pairs = zip(arms[memory]["test_nats_by_seed"], arms[baseline]["test_nats_by_seed"], strict=True)
            readings[name] = {"arms": [memory, baseline], **paired([a - b for a, b in pairs]).to_dict()}
    return {
        "what": "paired comparison at equal total parameters and forward FLOPs; losses on the test split",
        "command": "nengram " + " ".join(sys.argv[1:]),
        "environment": environment() | {"threads": "1 per arm", "arms_at_once": str(cores())},
        "config": as_dict(config),
        "corpus": {
            "digest": data.digest,
            "vocab_size": data.tokenizer.get_vocab_size(),
            "compressed_vocab_size": data.compression.compressed_vocab_size,
            "tokens": {split: len(packed) for split, packed in data.splits.items()},
            "test_bytes": test.bytes_by_source,
        },
        "arms": arms,
        "readings": readings,
    }


def summarise(runs: dict[int, dict], by_source: dict[int, dict], test: Packed) -> dict:
    """One arm over its seeds: means, and the test loss of each seed."""
    first = next(iter(runs.values()))
    mean = {
        key: float(np.mean([facts[key] for facts in runs.values()]))
        for key in ("dev_nats", "test_nats", "cpu_ms_per_token", "memory_share", "peak_mib", "test_nats_permuted")
        if key in first
    }
    per_source = {
        source: {
            "nats": float(np.mean([seed[source]["nats"] for seed in by_source.values()])),
            "bits_per_byte": float(np.mean([seed[source]["bits_per_byte"] for seed in by_source.values()])),
        }
        for source in ("all", *test.sources)
        if source in next(iter(by_source.values()))
    }
    return {
        **{key: first[key] for key in ("rho", "lr", "tokens", "cost", "reachable_table", "addresses")},
        **mean,
        "test_nats_by_seed": [facts["test_nats"] for facts in runs.values()],
        "per_source": per_source,
    }


def nats_by_source(nats_N: np.ndarray, packed: Packed) -> dict[str, dict[str, float]]:
    """Mean loss in nats a token and in bits per byte of text, overall ("all") and for each source present.

    Where only a part of the tokens was judged, the bytes of that part are taken to be its share of the tokens.
    """
    real_N, could_N = np.isfinite(nats_N), np.arange(len(nats_N)) > 0  # nothing comes before the first token
    source_N = packed.source_of(np.arange(len(nats_N)))
    text_bytes = packed.bytes_by_source
    out = {}
    for name, mask_N, size in (
        ("all", np.ones_like(real_N), sum(text_bytes.values())),
        *((name, source_N == i, text_bytes[name]) for i, name in enumerate(packed.sources)),
    ):
        judged = int((real_N & mask_N).sum())
        if judged and size:
            total = float(nats_N[real_N & mask_N].sum(dtype=np.float64))
            size *= judged / int((could_N & mask_N).sum())
            out[name] = {"nats": total / judged, "bits_per_byte": total / np.log(2) / size}
    return out


def reference_of(config: Config) -> dict | None:
    """The committed results that a preset names, or None: no file, or a run of other text, sizes or training.

    A key that the file is too old to know counts as its default. Raises: NengramError when the file is damaged.
    """
    if not config.compare.reference:
        return None
    path = shipped("configs") / config.compare.reference
    try:
        results = json.loads(path.read_text())
        theirs = results["config"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError) as error:
        raise NengramError(f"{path}: damaged ({error})") from None
    mine, defaults = as_dict(config), as_dict(Config())
    where_it_lies = {"data": {"cache": ""}, "train": {"checkpoint_every": 0, "log_every": 0}}
    same = all(
        mine[part] | where_it_lies.get(part, {}) == defaults[part] | theirs[part] | where_it_lies.get(part, {})
        for part in ("data", "budget", "model", "memory", "train")
    )
    return results if same and mine["compare"]["lr"] == theirs["compare"]["lr"] else None


def _open_out(config: Config, out: Path, resume: bool) -> None:
    """Claim the results folder for this config, or refuse: another config's runs are never mixed in."""
    stamp = to_toml(replace(config, name=""))
    path = out / "compare.toml"
    if path.exists() and path.read_text() != stamp:
        raise ConfigError(f"{out}: holds a comparison with another config ({path}); choose another --out or delete it")
    if path.exists() and not resume:
        raise ConfigError(f"{out}: holds this comparison already; continue it with --resume, or choose another --out")
    write_atomic(path, stamp)
