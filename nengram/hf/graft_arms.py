"""What `nengram graft` trains on a model: a memory, the same memory with nothing to look up, or LoRA of as many parameters.

A loss that falls proves little, for a memory layer also adds parameters and a path. So it has two rivals, each trained on the same
batches: `one_row` has the path and no lookup, `lora` the parameters and no memory. The loop (`graft_run`) knows an arm by what it
learns and how it is saved, no more.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from nengram.errors import DataError
from nengram.files import sha256_bytes
from nengram.hf.adapter import load_adapter, save_adapter
from nengram.hf.blocks import anatomy
from nengram.hf.grafting import graft
from nengram.hf.hooks import SITE
from nengram.hf.lora import Lora, linears_of, ranks_for
from nengram.hf.optim import optimizers
from nengram.hf.schedule import schedule
from nengram.model.folder import read_tensors, sealed, write_tensors
from nengram.text import Prepared
from nengram.train.checkpoint import load_optimizer, optimizer_tensors

OWN = "model."  # of the model's own weights among a checkpoint's tensors
OPTIMIZER, LORA = "optimizer.safetensors", "lora.safetensors"
FIRST_SHARE = 1 / 3  # of the steps, in schedule "first"


@dataclass(frozen=True)
class GraftPlan:
    """What decides a run.

    sizes: of `MemoryConfig`. steps: 0 is one pass over the text. lr, table_lr: of the memory; base_lr: of the model; lora_lr: of the
    rival. schedule: "memory", "first" or "full".
    """

    sizes: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 0
    batch: int = 4
    context: int = 128
    lr: float = 3e-3
    base_lr: float = 1e-4
    table_lr: float = 1.0
    lora_lr: float = 3e-3
    warmup_steps: int = 20
    clip: float = 1.0
    schedule: str = "memory"
    seed: int = 0
    checkpoint_every: int = 50

    def steps_of(self, data: Prepared) -> int:
        """Optimiser steps. Raises DataError when the text is smaller than a batch."""
        available, per_step = len(data.splits["train"]) - 1, self.batch * self.context
        if available < per_step:
            raise DataError(
                f"the train split has {available:,} tokens, one batch needs {per_step:,} (batch x context): more text, or smaller ones"
            )
        return self.steps or available // per_step

    def digest(self, **more: str) -> str:
        """Hex SHA-256 of all that decides the numbers."""
        decisive = vars(self) | {"sizes": dict(self.sizes), "checkpoint_every": None} | more
        return sha256_bytes(json.dumps(decisive, sort_keys=True, default=list).encode())


class Arm(Protocol):
    """What is put on a model and trained. control: its name in a run's identity."""

    model: nn.Module
    control: str

    def begin(self) -> torch.optim.Optimizer:
        """Put it on, fresh; what moves it."""
        ...

    def load(self, folder: Path) -> torch.optim.Optimizer:
        """Put it on as a folder of `save` has it, its optimiser with it."""
        ...

    def save(self, folder: Path, optimizer: torch.optim.Optimizer, facts: Mapping[str, Any], *, done: bool) -> None:
        """Write it as a sealed folder; done: nobody will train it further."""
        ...

    def learning(self, share: float) -> list[nn.Parameter]:
        """What learns once so much of the training is behind, tables apart."""
        ...


class MemoryArm:
    """A memory. control: what its rows are, "hashed" or "one_row"."""

    def __init__(self, model: nn.Module, tokenizer: Any, plan: GraftPlan, control: str = "hashed") -> None:
        self.model, self.tokenizer, self.plan, self.control = model, tokenizer, plan, control

    def begin(self) -> torch.optim.Optimizer:
        """Raises: ConfigError as `graft`."""
        graft(self.model, self.tokenizer, **self.plan.sizes, control=self.control, seed=self.plan.seed)
        return self._optimizer()

    def load(self, folder: Path) -> torch.optim.Optimizer:
        """Raises: CheckpointError as `load_adapter`."""
        load_adapter(self.model, folder)
        optimizer, path = self._optimizer(), folder / OPTIMIZER
        tensors = read_tensors(path) if path.exists() else {}
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if f"{OWN}{name}" in tensors:
                    parameter.copy_(tensors[f"{OWN}{name}"])
        if state := {name: tensor for name, tensor in tensors.items() if not name.startswith(OWN)}:
            load_optimizer(optimizer, state)  # as a whole: its groups are its parts'
        return optimizer

    def save(self, folder: Path, optimizer: torch.optim.Optimizer, facts: Mapping[str, Any], *, done: bool) -> None:
        """AdamW's state goes along, and the model's own weights if they learn; the tables' state lies with the tables."""
        alone = self.plan.schedule == "memory"
        own = {f"{OWN}{name}": p.detach() for name, p in self.model.named_parameters() if f"{SITE}." not in name}
        state = optimizer_tensors(optimizer.optimizers[0]) | ({} if alone else own)
        save_adapter(self.model, folder, optimizer=None if done and alone else state, facts=facts)

    def learning(self, share: float) -> list[nn.Parameter]:
        """In schedule "first" the model joins in after a third."""
        if self.plan.schedule == "first" and share >= FIRST_SHARE:
            schedule(self.model, "joint")
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _optimizer(self) -> torch.optim.Optimizer:
        schedule(self.model, "full" if self.plan.schedule == "full" else "memory")
        return optimizers(self.model, self.plan.lr, base_lr=self.plan.base_lr, table_lr=self.plan.table_lr)[0]


class LoraArm:
    """LoRA on every linear module of the model's blocks, of `budget` parameters or as many as their full ranks have."""

    control = "lora"

    def __init__(self, model: nn.Module, plan: GraftPlan, budget: int) -> None:
        self.model, self.plan, self.budget = model, plan, budget
        self.lora: Lora | None = None

    def begin(self) -> torch.optim.Optimizer:
        """Raises: ConfigError for a model without linear modules in its blocks (GPT-2's are of another class)."""
        self.model.requires_grad_(False)
        linears = linears_of(anatomy(self.model).blocks)
        self.lora = Lora(linears, ranks_for(linears, self.budget), seed=self.plan.seed)
        return torch.optim.AdamW(self.lora.parameters(), lr=self.plan.lora_lr, betas=(0.9, 0.95), weight_decay=0.0)

    def load(self, folder: Path) -> torch.optim.Optimizer:
        """Raises: CheckpointError."""
        optimizer = self.begin()
        self.lora.load_state_dict(read_tensors(folder / LORA))
        load_optimizer(optimizer, read_tensors(folder / OPTIMIZER))
        return optimizer

    def save(self, folder: Path, optimizer: torch.optim.Optimizer, facts: Mapping[str, Any], *, done: bool) -> None:
        """Raises: CheckpointError, OSError."""
        with sealed(folder, facts) as beside:
            write_tensors(self.lora.state_dict(), beside / LORA)
            write_tensors(optimizer_tensors(optimizer), beside / OPTIMIZER)

    def learning(self, share: float) -> list[nn.Parameter]:
        """The same from first to last."""
        return list(self.lora.parameters())
