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

import torch
from torch import Tensor


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
