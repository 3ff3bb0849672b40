"""One optimiser for a grafted model, to be handed to `Trainer`, TRL or a loop of one's own: parameters by AdamW, tables by their rows.

    Trainer(model, args, train_dataset=..., optimizers=nengram.hf.optimizers(model, lr=1e-3, steps=1000))

A table is no parameter. Between two optimiser steps there may be several forward passes (gradient accumulation), each with a
MemoryStep of its own, and with several processes each has seen other rows. So at a step the gradients of all pending passes are summed,
then those of all processes, and every process applies the same update to its own table: tables that were equal stay equal, bit for bit.
The sum over processes is a mean, as DDP's is of the parameters.

The state that is saved holds the tables and their update state too, so a `Trainer` that resumes goes on exactly.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from nengram.errors import ConfigError
from nengram.files import atomic_path
from nengram.hf.grafting import grafted
from nengram.hf.hooks import Graft
from nengram.memory.step import MemoryStep, RowGrads
from nengram.model.folder import read_tensors, write_tensors
from nengram.store import Rule, coalesce, make_rule
from nengram.train.optim import Together, kinds, lr_share


class TableOptimizer(torch.optim.Optimizer):
    """Updates the rows that the passes of a graft have read since the last step; its one group carries the rate.

    Its one parameter is a witness. Each backward pass that reaches a table leaves a gradient of 1 there, so whoever zeroes an
    optimiser's gradients, or unscales them, does to the witness what has to be done to the tables' gradients, and is heard.

    clip: limit of the gradient's norm of one table; 0: none. The tables are those of the adapter that is active now.
    follows_weights: whoever loads older weights will load this state, too (`BestTables`).
    """

    def __init__(self, graft: Graft, rule: Rule, lr: float, clip: float = 0.0) -> None:
        self.witness = nn.Parameter(torch.zeros(()))
        super().__init__([self.witness], {"lr": lr, "weight_decay": 0.0})
        self.rule, self.clip = rule, clip
        self.stores = graft.adapter().stores
        self.has_stepped = self.follows_weights = False
        self._passes: list[MemoryStep] = []
        graft.learn_by(self)

    def take(self, memory_step: MemoryStep) -> None:
        """A forward pass has begun."""
        self._passes.append(memory_step)

    def watch(self, vecs_BTSE: Tensor) -> None:
        """These vectors go into a block; their gradient will be asked for."""
        vecs_BTSE.register_hook(self._reached)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every table that was read, then the passes' tickets are released."""
        scale = 0.0 if self.witness.grad is None else float(self.witness.grad)
        sums = _summed([one.grads() for one in self._passes if one.has_grads()]) if scale else {}
        if _world() > 1:
            sums = {layer_id: _meaned(sums.get(layer_id), store) for layer_id, store in self.stores.items()}
        for layer_id, (rows_U, grads_UE) in sums.items():
            norm = scale * float(grads_UE.norm()) if self.clip else 0.0
            grads_UE = grads_UE * (scale * (self.clip / norm if norm > self.clip else 1.0))
            if len(rows_U):
                self.stores[layer_id].update(rows_U, grads_UE, self.rule, self.param_groups[0]["lr"])
        self._forget(self._passes)
        self.witness.grad = None
        self.has_stepped = True

    def _reached(self, _: Tensor) -> None:
        if self.witness.grad is None or not self.witness.grad:
            self._forget([one for one in self._passes if one.has_grads()])
            self.witness.grad = torch.ones_like(self.witness)

    def _forget(self, passes: list[MemoryStep]) -> None:
        self._passes = [one for one in self._passes if one not in passes]
        for one in passes:
            one.release()

    def state_dict(self) -> dict[str, Any]:
        """As torch's; after the first step the tables are in it. They are the live tensors: save them before the next step."""
        return super().state_dict() | ({"state": {0: self.tables()}} if self.has_stepped else {})

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`. Raises: StoreError for tables of another size or rule."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        if tables := state_dict["state"].get(0):
            self.load_tables(tables)

    def tables(self) -> dict[str, Tensor]:
        """Rows and update state by table and name: the live tensors."""
        found = {layer_id: store.tensors() for layer_id, store in self.stores.items()}
        return {f"table-{layer_id}.{key}": tensor for layer_id, own in found.items() for key, tensor in own.items()}

    def load_tables(self, tables: Mapping[str, Tensor]) -> None:
        """Inverse of `tables`. Raises: StoreError for tables of another size or rule."""
        for layer_id, store in self.stores.items():
            own = f"table-{layer_id}."
            store.load_tensors({key.removeprefix(own): value for key, value in tables.items() if key.startswith(own)})
        self.has_stepped = True


class BestTables(TrainerCallback):
    """For `Trainer(load_best_model_at_end=True)`, which brings back the weights of the best checkpoint alone: its tables, too.

    A checkpoint that is the best so far gets `tables.safetensors`: rows and update state (the optimiser's own file is a pickle).
    Raises: ConfigError at the start, where the optimiser moves no tables; CheckpointError at the end, for a missing or damaged file.
    """

    file = "tables.safetensors"

    def on_train_begin(self, args, state, control, optimizer=None, **others) -> None:
        """Say that the tables will follow the weights."""
        for one in self._tables(optimizer):
            one.follows_weights = args.load_best_model_at_end

    def on_save(self, args, state, control, optimizer=None, **others) -> None:
        """Keep the tables of a checkpoint that is the best so far."""
        if args.load_best_model_at_end and state.best_global_step == state.global_step and state.is_world_process_zero:
            tables = {
                f"{place}.{name}": tensor
                for place, one in enumerate(self._tables(optimizer))
                for name, tensor in one.tables().items()
            }
            with atomic_path(Path(state.best_model_checkpoint, self.file)) as path:
                write_tensors(tables, path)

    def on_train_end(self, args, state, control, optimizer=None, **others) -> None:
        """Bring back those of the best."""
        if not args.load_best_model_at_end or state.best_model_checkpoint is None:
            return
        tables = read_tensors(Path(state.best_model_checkpoint, self.file))
        for place, one in enumerate(self._tables(optimizer)):
            one.load_tables(
                {
                    name.removeprefix(f"{place}."): tensor
                    for name, tensor in tables.items()
                    if name.startswith(f"{place}.")
                }
            )

    def _tables(self, optimizer: Any) -> list[TableOptimizer]:
        inner = getattr(optimizer, "optimizer", optimizer)  # as accelerate has it
        found = [part for part in getattr(inner, "optimizers", [inner]) if isinstance(part, TableOptimizer)]
        if not found:
            raise ConfigError(
                "BestTables: this Trainer's optimiser moves no tables: give it optimizers=nengram.hf.optimizers(model)"
            )
        return found


def optimizers(
    model: nn.Module,
    lr: float = 3e-3,
    *,
    base_lr: float | None = None,
    table_lr: float = 1.0,
    rule: str | Rule = "rowwise_adagrad",
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    table_clip: float = 0.0,
    steps: int | None = None,
    warmup_steps: int = 0,
    final_share: float = 0.1,
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR | None]:
    """For `Trainer(optimizers=...)`: the optimiser of all that learns, or did before `train_memory`, and its schedule.

    lr: of the memory's parameters. base_lr: of all others (LoRA's, the model's own); a tenth of `lr` if not given.
    table_lr, rule: of the tables; see `nengram.store.RULES`.
    steps: length of a linear warm-up and a cosine down to `final_share`; without it there is no schedule, and `Trainer` makes its own.
    Tables that are only read (mapped, or coded) stay as they are. Raises: ConfigError without a graft, or when nothing learns.
    """
    owner = grafted(model)
    groups = param_groups(model, lr, base_lr=base_lr, weight_decay=weight_decay)
    if not groups and not owner.tables_learn():
        raise ConfigError(
            "nothing in this model learns: nengram.hf.train_memory(model) first, or train_jointly, or train_all"
        )
    parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=lr, betas=betas)] if groups else []
    if owner.adapter().learns:
        parts.append(
            TableOptimizer(owner, make_rule(rule) if isinstance(rule, str) else rule, table_lr, clip=table_clip)
        )
    whole = Together(*parts)
    if steps is None:
        return whole, None

    def share(step: int) -> float:
        return lr_share(min(step, steps - 1), steps, warmup_steps, final_share)

    return whole, torch.optim.lr_scheduler.LambdaLR(whole, share)


def param_groups(
    model: nn.Module, lr: float, *, base_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for any optimiser of torch: the memory's parameters at `lr`, all others that learn at `base_lr`; tables are no parameters.

    Only matrices decay. Parameters that `train_memory` holds back are in, for `train_jointly` may let them go. Raises: ConfigError.
    """
    owner = grafted(model)
    memory = {id(p) for module in owner.layers().values() for p in module.parameters()}
    later = {id(parameter) for parameter in owner.held}
    kind_of = kinds(model)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or id(parameter) in later:
            groups.setdefault((id(parameter) in memory, kind_of[name] != "vector"), []).append(parameter)
    base_lr = lr / 10 if base_lr is None else base_lr
    return [
        {"params": params, "lr": lr if own else base_lr, "weight_decay": weight_decay if decays else 0.0}
        for (own, decays), params in groups.items()
    ]


def _summed(passes: list[RowGrads]) -> RowGrads:
    """One gradient per row over several passes, by table."""
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for grads in passes:
        for layer_id, pair in grads.items():
            found.setdefault(layer_id, []).append(pair)
    return {
        layer_id: pairs[0] if len(pairs) == 1 else coalesce(*map(torch.cat, zip(*pairs, strict=True)))
        for layer_id, pairs in found.items()
    }


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _meaned(own: tuple[Tensor, Tensor] | None, store) -> tuple[Tensor, Tensor]:
    """The mean over processes of one table's gradients, a row that a process has not read being 0 there.

    Each process's rows are distinct and are added process after process, so that every process gets the same sum, on any device.
    """
    if own is None:
        own = (
            torch.empty(0, dtype=torch.int64, device=store.device),
            torch.empty(0, store.row_width, device=store.device),
        )
    rows_U, grads_UE = own
    count = torch.tensor([len(rows_U)], device=grads_UE.device)
    counts = [torch.zeros_like(count) for _ in range(_world())]
    dist.all_gather(counts, count)
    most = int(max(counts))
    padded_rows = rows_U.new_zeros(most).to(grads_UE.device)
    padded_grads = grads_UE.new_zeros(most, grads_UE.shape[1])
    padded_rows[: len(rows_U)], padded_grads[: len(rows_U)] = rows_U.to(grads_UE.device), grads_UE
    all_rows = [torch.zeros_like(padded_rows) for _ in counts]
    all_grads = [torch.zeros_like(padded_grads) for _ in counts]
    dist.all_gather(all_rows, padded_rows)
    dist.all_gather(all_grads, padded_grads)
    theirs = [(rows[: int(n)], grads[: int(n)]) for rows, grads, n in zip(all_rows, all_grads, counts, strict=True)]
    rows_W = torch.unique(torch.cat([rows for rows, _ in theirs]))
    sums_WE = grads_UE.new_zeros(len(rows_W), grads_UE.shape[1])
    for rows, grads in theirs:
        sums_WE.index_add_(0, torch.searchsorted(rows_W, rows), grads)
    return rows_W, sums_WE / _world()
