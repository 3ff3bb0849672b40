"""One arm of a comparison, in a process of its own with one thread: train, judge every held-out token, leave the facts behind.

    python -m nengram.study.arm CONFIG.toml FOLDER

A process per arm makes CPU seconds and peak memory its own, keeps arms from sharing a thread pool (which changes results as well as
timings), and lets a crash or Ctrl-C cost one arm. Calling it again continues from the last checkpoint; a finished arm returns at once;
two processes that want the same arm do it once, the second waiting.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from nengram.config import Config, TableOptions, load_config
from nengram.errors import CheckpointError, DataError, NengramError
from nengram.files import held, write_atomic
from nengram.infer.hot import count_rows, hot_sets
from nengram.model import resolve
from nengram.model.folder import load_model, open_folder
from nengram.model.transformer import TRAINABLE
from nengram.study.processes import last_record, stop_on_terminate
from nengram.study.share import memory_share
from nengram.text import Prepared, prepare
from nengram.train import build_model, token_nats, train

HOT_SHARE = TableOptions().hot_share
FACTS, NATS = "arm.json", "test_nats.safetensors"


def prepare_for(config: Config) -> Prepared:
    """The corpus a config names, tokenized and split. Raises DataError, ConfigError."""
    given = config.data.tokenizer
    return prepare(
        corpus_place(config.data.corpus),
        vocab_size=None if given else config.data.vocab_size,
        tokenizer_path=given or None,
        doc_token=config.data.doc_token or None,
        cache_folder=config.data.cache,
    )


def corpus_place(name: str) -> str:
    """Where a corpus lies: a fetched mix by its name, else as given. Raises DataError for a mix that was not fetched."""
    if name != "facts" or Path(name).exists():
        return name
    if not Path("data/facts/manifest.json").is_file():
        raise DataError('corpus "facts" is not here yet: run nengram data fetch facts')
    return "data/facts"


def run_arm(config: Config, folder: Path, *, test: bool = True) -> dict:
    """Train (or continue) one arm and write `arm.json`; with `test`, also the loss of every test token.

    Returns the facts: rho reached, costs, dev loss, tokens, CPU seconds per token and the memory path's share, peak memory.
    Raises: NengramError of any kind; OSError.
    """
    if (folder / FACTS).exists():
        return load_facts(folder)
    data = prepare_for(config)
    for _ in train(config, data, folder, resume=(folder / "metrics.jsonl").exists()):
        pass
    record = last_record(folder)
    resolved = resolve(config, data.tokenizer.get_vocab_size())
    model = build_model(resolved, data)
    kept = open_folder(folder / "final")
    tier = resolved.train.table_tier
    hot = None
    if tier == "tiered" and model.spec:
        hot = hot_sets(model.spec, count_rows(model.spec, data.compression.cids_V, data.splits["train"]), HOT_SHARE)
    load_model(model, folder / "final", tier=tier, hot=hot)
    facts = {
        "arm": resolved.budget.arm,
        "rho": resolved.budget.rho,
        "lr": resolved.train.lr,
        "seed": resolved.train.seed,
        "tokens": record["tokens"],
        "dev_nats": record["dev_nats"],
        "cost": model.cost().to_dict(),
        "reachable_table": model.reachable_table_parameters(),
        "cpu_ms_per_token": 1e3 * record["cpu_seconds"] / record["tokens"],
        "peak_mib": kept["peak_mib"],
        "addresses": model.spec.word_code if model.spec else None,
    }
    if test:
        sizes = {
            "batch": resolved.train.batch,
            "context": resolved.model.context,
            "tokens": resolved.train.test_tokens,
        }
        nats_N = token_nats(model, data.splits["test"], **sizes)
        write_atomic(folder / NATS, save({"nats_N": nats_N}))
        facts["test_nats"] = float(np.nanmean(nats_N))
        if resolved.memory.kind == "engram" and resolved.memory.control == "hashed":
            permuted_N = token_nats(model, data.splits["test"], **sizes, control="permuted")
            facts["test_nats_permuted"] = float(np.nanmean(permuted_N))
    if tier not in TRAINABLE:
        load_model(model, folder / "final")
    facts["memory_share"] = memory_share(model, resolved, data) if model.spec else 0.0
    write_atomic(folder / FACTS, json.dumps(facts, indent=1))
    return facts


def load_facts(folder: Path) -> dict:
    """The facts of a finished arm. Raises CheckpointError for a damaged file."""
    try:
        return json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / FACTS}: damaged ({error}); delete it and run again") from None


def load_nats(folder: Path) -> np.ndarray:
    """Test loss of every token of a finished arm, float32 [N]. Raises CheckpointError for a damaged file."""
    try:
        return load_file(folder / NATS)["nats_N"]
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(
            f"{folder / NATS}: damaged ({error}); delete it and arm.json beside it, and run again"
        ) from None


def main() -> None:
    """The process that `nengram.study.compare` starts. Errors go to stderr as one line."""
    stop_on_terminate()
    torch.set_num_threads(1)
    try:
        with held(sys.argv[2]):
            run_arm(load_config(sys.argv[1]), Path(sys.argv[2]), test="--no-test" not in sys.argv)
    except NengramError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
