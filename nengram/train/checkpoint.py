"""A run on disk, and what of the optimiser has to be in it for a resumed run to be the same run.

    runs/demo/engram-s0/
    ├── config.toml            resolved: every size written out
    ├── env.json               hardware, versions, date
    ├── metrics.jsonl          one record a line
    ├── checkpoint/            while training: weights, optimiser and table states, place in the data
    └── final/                 when done: model.safetensors, table-<layer>.safetensors, tokenizer.json, compression.safetensors

The two folders are sealed and never half-written (`nengram.model.folder`). Resume is exact, bit for bit on the CPU: the state holds
all that the next step reads. Nothing is pickled, so a torch optimiser's state becomes named tensors here.
"""

import tomllib
from pathlib import Path

import tomli_w
import torch
from torch import Tensor

from nengram.config import Config, as_dict
from nengram.files import sha256_bytes
from nengram.text import Prepared

OF_NO_CONSEQUENCE = {
    "name": "",
    "train__checkpoint_every": 0,
    "train__log_every": 0,
    "train__table_tier": "",
    "data__cache": "",
}


def identity_of(config: Config, data: Prepared, folder: Path) -> dict[str, str]:
    """Digests of what must be equal for the run begun in `folder` to be continued or used.

    A key that the run's config.toml is too old to hold counts as its default, as in the rows of a sweep (decision 0020): runs
    outlive the addition of an option.
    """
    tree = as_dict(config.replace(**OF_NO_CONSEQUENCE))
    return {
        "config": sha256_bytes(tomli_w.dumps(_as_written(tree, folder / "config.toml")).encode()),
        "tokenizer": data.compression.tokenizer_digest,
        "compression": data.compression.digest,
        "corpus": data.digest,
    }


def _as_written(tree: dict, path: Path) -> dict:
    """`tree` without the keys that the file does not hold and that have their default; all of it when there is no such file."""
    try:
        known = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return tree
    defaults, kept = as_dict(Config()), {}
    for section, values in tree.items():
        if isinstance(values, dict):
            held, usual = known.get(section, {}), defaults[section]
            values = {key: value for key, value in values.items() if key in held or value != usual.get(key)}
            if not values and section not in known:
                continue
        kept[section] = values
    return kept


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of a torch optimiser as named tensors (no pickle)."""
    return {
        f"optimizer.{index}.{key}": value
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`; learning rates are the schedule's business."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        _, index, key = name.split(".", 2)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
