"""A table on disk: its vectors beside the addresses that give them meaning.

Row 4711 is only "Alexander the Great" under the multipliers and moduli it was trained with, so the
AddressSpec travels in the file, as numbers, and a file whose spec differs from the model's is refused. The
format is plain safetensors, which any tool opens: `weight` `[rows, E]`, optionally `step` and
`state.<rule>.<name>`, and in the metadata `format`, `address_spec` (JSON), `layer_id` and `sha256` (of all
tensor bytes, names in alphabetical order). Nothing is ever unpickled.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nengram.address import AddressSpec
from nengram.errors import AddressError, CheckpointError, StoreError
from nengram.files import atomic_path
from nengram.store import ResidentStore, Store

FORMAT = "nengram-table-1"


class Table(NamedTuple):
    """What a table file holds: the vectors, the addresses, and the memory layer they belong to."""

    store: ResidentStore
    spec: AddressSpec
    layer_id: int


def save_table(
    path: str | os.PathLike, store: Store, spec: AddressSpec, layer_id: int, *, optimizer: bool = False
) -> None:
    """Write the table of one memory layer, whole or not at all.

    optimizer: also the update rule's state and step counter, so that training can go on exactly.
    Raises: CheckpointError when the store is not the size the spec asks for, or the file cannot be written.
    """
    _check_size(path, store.num_rows, spec, layer_id)
    tensors = {
        name: tensor.detach().to("cpu").contiguous()
        for name, tensor in store.tensors().items()
        if optimizer or name == "weight"
    }
    metadata = {
        "format": FORMAT,
        "address_spec": spec.to_json(),
        "layer_id": str(layer_id),
        "sha256": _digest(tensors),
    }
    try:
        with atomic_path(path) as beside:
            save_file(tensors, beside, metadata)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write table {path}: {_one_line(error)}") from error


def load_table(
    path: str | os.PathLike, expect_spec: AddressSpec | None = None, *, device: str | torch.device = "cpu"
) -> Table:
    """Read a table file into a resident store of the file's dtype, with optimiser state where it has some.

    expect_spec: the model's spec; a table of any other is refused and both word codes are shown.
    Raises: CheckpointError, naming the file, when it is missing, damaged, cut short, or of another spec.
    """
    path = Path(path)
    tensors, metadata = _read(path)
    spec, layer_id = _address(path, metadata)
    if expect_spec is not None and spec.digest != expect_spec.digest:
        raise CheckpointError(
            f"{path} holds a table for addresses {spec.word_code}, this model's are {expect_spec.word_code}: "
            "its rows would be read under other n-grams"
        )
    if "weight" not in tensors or tensors["weight"].dim() != 2:
        raise CheckpointError(f"{path} holds no table: a two-dimensional tensor named weight is needed")
    if _digest(tensors) != metadata.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its bytes do not match its sha256")
    weight = tensors["weight"]
    _check_size(path, len(weight), spec, layer_id)
    try:
        store = ResidentStore(len(weight), weight.shape[1], device=device, dtype=weight.dtype, init_std=0.0)
        store.load_tensors(tensors)
    except StoreError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Table(store, spec, layer_id)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if not path.is_file():
        raise CheckpointError(f"no table file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or not a table file: {_one_line(error)}") from error


def _address(path: Path, metadata: dict[str, str]) -> tuple[AddressSpec, int]:
    if metadata.get("format") != FORMAT:
        found = metadata.get("format", "none")
        raise CheckpointError(f"{path} is not a table file of this version: format {found!r}, not {FORMAT!r}")
    try:
        return AddressSpec.from_json(metadata["address_spec"]), int(metadata["layer_id"])
    except (KeyError, ValueError, AddressError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} has no readable address spec: {_one_line(error)}") from error


def _check_size(path: str | os.PathLike, num_rows: int, spec: AddressSpec, layer_id: int) -> None:
    if layer_id not in spec.layer_ids:
        raise CheckpointError(f"{path}: the address spec has no memory layer {layer_id}, only {list(spec.layer_ids)}")
    if num_rows != spec.num_rows(layer_id):
        needed = spec.num_rows(layer_id)
        raise CheckpointError(f"{path}: memory layer {layer_id} addresses {needed:,} rows, the table has {num_rows:,}")


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
