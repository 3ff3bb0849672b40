"""A run on disk. Nothing here is ever half-written: a folder is filled beside its place, synced, and renamed into it.

    runs/demo/engram-s0/
    ├── config.toml            resolved: every size written out
    ├── env.json               hardware, versions, date
    ├── metrics.jsonl          one record a line
    ├── checkpoint/            while training: weights, optimiser and table states, place in the data
    └── final/                 when done: model.safetensors, table-<layer>.safetensors, tokenizer.json, compression.safetensors

Every folder of tensors carries `manifest.json` with the SHA-256 of each file: a flipped byte is refused by name, not trained on.
Resume is exact, bit for bit on the CPU: the state holds all that the next step reads.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nengram.errors import CheckpointError
from nengram.files import sha256_file, sync_folder, write_atomic
from nengram.memory import load_table, save_table

MANIFEST = "manifest.json"


def save_folder(
    folder: Path,
    tensors: dict[str, Tensor],
    stores: dict,
    spec,
    facts: dict,
    *,
    with_optimizer: bool,
    add: Callable[[Path], None] = lambda beside: None,
) -> None:
    """Replace `folder` by one that holds `tensors`, every table, what `add` writes, and `facts` (JSON) in the manifest.

    Raises: OSError; the old folder is then as it was.
    """
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside / "model.safetensors")
    for layer_id, store in stores.items():
        save_table(beside / f"table-{layer_id}.safetensors", store, spec, layer_id, optimizer=with_optimizer)
    add(beside)
    seal_folder(beside, facts)
    swap_folder(beside, folder)


def seal_folder(folder: Path, facts: dict) -> None:
    """Sync every file of `folder` and write its manifest: digests and `facts`."""
    digests = {}
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        digests[path.name] = sha256_file(path)
    write_atomic(folder / MANIFEST, json.dumps({"files": digests, **facts}, indent=1))


def swap_folder(beside: Path, folder: Path) -> None:
    """Put `beside` in the place of `folder`. A crash between the two renames leaves the old one as `.<name>.old`, which is found."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(beside, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def open_folder(folder: Path) -> dict:
    """The manifest of a sealed folder, after every file's digest was checked. Raises CheckpointError by file name."""
    old = folder.with_name(f".{folder.name}.old")
    if not folder.exists() and old.exists():
        os.rename(old, folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        digests = dict(manifest["files"])
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no checkpoint here ({MANIFEST} is missing)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: damaged ({error}); delete the folder and train again") from None
    for name, digest in digests.items():
        path = folder / Path(name).name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing from the checkpoint")
        if sha256_file(path) != digest:
            raise CheckpointError(f"{path}: damaged (its SHA-256 is not the one in {MANIFEST})")
    return manifest


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises CheckpointError."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def load_model(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Fill `model` and its stores from a sealed folder; returns the tensors that are not the model's (optimiser state).

    Raises: CheckpointError when a tensor is missing or of another shape, or a table was addressed otherwise.
    """
    tensors = read_tensors(folder / "model.safetensors")
    own = {name[len("model.") :]: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in own.items()}
    if wanted != found:
        name = sorted(set(wanted.items()) ^ set(found.items()))[0][0]
        raise CheckpointError(
            f"{folder / 'model.safetensors'}: {name} is {found.get(name, 'missing')}, the config asks for {wanted.get(name, 'none')}"
        )
    model.load_state_dict(own)
    if model.spec:
        for layer_id in model.spec.layer_ids:
            model.stores[layer_id] = load_table(folder / f"table-{layer_id}.safetensors", model.spec).store
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("model.")}


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
