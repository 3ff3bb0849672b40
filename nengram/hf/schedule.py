"""What of a grafted model learns, and when: the memory alone, the memory first, or everything.

A memory learns fastest while the model around it stands still, and a frozen model forgets nothing. Tables go with the memory's
parameters, which say whether they learn. Each function sets `requires_grad` and nothing else; call one after PEFT has put LoRA on, for
PEFT freezes whatever it did not make, the memory included. Under DDP choose before wrapping: DDP looks once.
"""

from torch import nn
from transformers import TrainerCallback

from nengram.errors import ConfigError, nearest
from nengram.hf.grafting import grafted
from nengram.hf.hooks import Graft


def train_memory(model: nn.Module) -> None:
    """The active memory learns and nothing else; what else did is remembered for `train_jointly`. Raises ConfigError."""
    owner = grafted(model)
    memory = _memory(owner)
    held = [p for p in model.parameters() if p.requires_grad and id(p) not in memory]
    owner.held = held or owner.held
    for parameter in held:
        parameter.requires_grad_(False)
    _free(memory)


def train_jointly(model: nn.Module) -> None:
    """The active memory learns, and again whatever learned before `train_memory`: LoRA's parameters, or the whole model's."""
    owner = grafted(model)
    for parameter in owner.held:
        parameter.requires_grad_(True)
    owner.held = []
    _free(_memory(owner))


def train_all(model: nn.Module) -> None:
    """Every parameter of the model and of the active memory learns; those of other memories do not."""
    owner = grafted(model)
    others = {
        id(parameter)
        for name in owner.adapters
        if name != owner.active
        for module in owner.layers(name).values()
        for parameter in module.parameters()
    }
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) not in others and parameter.is_floating_point())
    owner.held = []


SCHEDULES = {"memory": train_memory, "joint": train_jointly, "full": train_all}


def schedule(model: nn.Module, name: str) -> None:
    """`train_memory`, `train_jointly` or `train_all` by name: "memory", "joint", "full". Raises ConfigError (nearest named)."""
    if name not in SCHEDULES:
        raise ConfigError(f'unknown schedule "{name}"{nearest(name, SCHEDULES)}; there are {", ".join(SCHEDULES)}')
    SCHEDULES[name](model)


class MemoryFirst(TrainerCallback):
    """For `Trainer`: the memory alone for the first `steps` optimiser steps, then jointly. Make the optimiser after this object."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model, self.steps = model, steps
        train_memory(model)

    def on_step_begin(self, args, state, control, **others) -> None:
        """Let the rest go once its time has come, in a resumed run too."""
        if state.global_step >= self.steps:
            train_jointly(self.model)


def _memory(owner: Graft) -> dict[int, nn.Parameter]:
    """The parameters of the active memory, with LoRA's on it and in the copies that `modules_to_save` reads instead."""
    found = {}
    for module in owner.layers().values():
        copies = getattr(module, "modules_to_save", None)
        found |= {id(p): p for p in (module if copies is None else copies).parameters()}
    return found


def _free(memory: dict[int, nn.Parameter]) -> None:
    for parameter in memory.values():
        parameter.requires_grad_(True)
