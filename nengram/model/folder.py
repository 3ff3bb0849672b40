"""A model on disk: a sealed folder of tensors and tables, whole or not there.

    final/
    ├── manifest.json           SHA-256 of every other file, the seals of the tables, and the facts a reader must agree with
    ├── model.safetensors       backbone and memory projections (`model.*`); in a checkpoint the optimiser's state too
    ├── table-<layer>.safetensors   one per memory layer, with its AddressSpec
    └── ...                     what the writer adds: tokenizer.json, compression.safetensors

A folder is filled beside its place, synced, and renamed into it, so no reader ever sees half of one. The manifest is what makes it
sealed: a flipped byte is refused by file name instead of being trained on or read aloud. A table that is read where it lies (tiers
"mapped" and "tiered") may be larger than memory and is not read whole to be checked: its own seal, over the checksums of its chunks,
must be the one in the manifest, and `nengram table verify` reads the rest. Training and inference both read these folders and neither
imports the other, hence this file's room.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nengram.errors import CheckpointError
from nengram.files import sha256_file, sync_file, sync_folder, word_code, write_atomic
from nengram.memory import open_store, save_table
from nengram.memory.table import address_of
from nengram.model.transformer import Transformer
from nengram.store import CheckedStore, HotSet, TableFile, open_table

MANIFEST = "manifest.json"
MODEL = "model."  # prefix of the model's own tensors in model.safetensors


def save_model(
    folder: Path,
    model: Transformer,
    facts: dict,
    *,
    optimizer: dict[str, Tensor] | None = None,
    add: Callable[[Path], None] = lambda beside: None,
) -> None:
    """Replace `folder` by one that holds the model, its tables, what `add` writes, and `facts` (JSON) in the manifest.

    Args:
        optimizer: further named tensors (none may begin with "model."); given, the tables' update state is saved as well.
        add: called with the unfinished folder; whatever it writes there is sealed with the rest.
    Raises: OSError, CheckpointError; the old folder is then as it was.
    """
    tensors = {f"{MODEL}{name}": tensor for name, tensor in model.state_dict().items()} | (optimizer or {})
    with sealed(folder, facts) as beside:
        write_tensors(tensors, beside / "model.safetensors")
        for layer_id, store in model.stores.items():
            save_table(table_path(beside, layer_id), store, model.spec, layer_id, optimizer=optimizer is not None)
        add(beside)


def load_model(
    model: Transformer,
    folder: Path,
    *,
    tier: str = "resident",
    hot: Mapping[int, HotSet] | None = None,
    checked_share: float = 0.0,
) -> dict[str, Tensor]:
    """Fill `model` and its stores from a sealed folder; returns the tensors that are not the model's (optimiser state).

    Args:
        tier: where the tables are read from, one of `nengram.config.TABLE_TIERS`; the vectors are the same.
        hot: tier "tiered": the rows of each memory layer that are kept in memory.
        checked_share: recompute this share of every request's rows by plain reads, and refuse the first that differs.
    Raises: CheckpointError when a tensor is missing or of another shape, or a table was addressed otherwise; StoreError.
    """
    path = folder / "model.safetensors"
    tensors = read_tensors(path)
    if model.spec:
        _check_dialect(folder, model.spec.dialect)
    own = {name.removeprefix(MODEL): tensor for name, tensor in tensors.items() if name.startswith(MODEL)}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in own.items()}
    if wanted != found:
        name = min(name for name, _ in wanted.items() ^ found.items())
        raise CheckpointError(
            f"{path}: {name} is {found.get(name, 'missing')}, the config asks for {wanted.get(name, 'none')}"
        )
    model.load_state_dict(own)
    device = model.embed.weight.device
    for layer_id in model.spec.layer_ids if model.spec else ():
        path = table_path(folder, layer_id)
        place = {"spec": model.spec, "layer_id": layer_id, "row_width": model.memory_config.row_width, "device": device}
        store = open_store(path, tier, hot=hot[layer_id] if tier == "tiered" else None, **place)
        model.stores[layer_id] = CheckedStore(store, open_table(path), sample=checked_share) if checked_share else store
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(MODEL)}


def table_path(folder: Path, layer_id: int) -> Path:
    """Where a sealed folder keeps the table of one memory layer."""
    return folder / f"table-{layer_id}.safetensors"


def is_saved(folder: Path) -> bool:
    """Whether `open_folder` would find something, be it what a crash between two renames left behind."""
    return folder.exists() or _old(folder).exists()


def open_folder(folder: Path, *, tier: str = "resident") -> dict:
    """The manifest of a sealed folder, after every file was checked against it. Raises CheckpointError by file name.

    tier: where the tables will be read from; "mapped" and "tiered" check a table by its seal, the others by all its bytes.
    """
    if not folder.exists() and _old(folder).exists():
        os.rename(_old(folder), folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        digests, seals = dict(manifest["files"]), dict(manifest.get("tables", {}))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no checkpoint here ({MANIFEST} is missing)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: damaged ({error}); delete the folder and train again") from None
    for name, digest in digests.items():
        path = folder / Path(name).name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing from the checkpoint")
        if tier in ("mapped", "tiered") and name in seals:
            if _seal(path) != seals[name]:
                raise CheckpointError(f"{path}: is another table (its seal is not the one in {MANIFEST})")
        elif sha256_file(path) != digest:
            raise CheckpointError(f"{path}: damaged (its SHA-256 is not the one in {MANIFEST})")
    return manifest


def check_identity(facts: dict, identity: dict[str, str], folder: Path) -> None:
    """Raises CheckpointError naming the first part of `identity` in which a folder's facts differ, both digests shown."""
    for part, mine in identity.items():
        theirs = str(facts.get(part, ""))
        if theirs != mine:
            raise CheckpointError(
                f"{folder}: trained with another {part} ({_short(theirs)}, now {_short(mine)}); "
                f"use the {part} it was trained with, or another run folder"
            )


@contextmanager
def sealed(folder: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; on success it is sealed with `facts` and takes its place, on failure it is removed.

    Raises: OSError; `folder` is then as it was.
    """
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        seal_folder(beside, dict(facts))
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    swap_folder(beside, folder)


def seal_folder(folder: Path, facts: dict) -> None:
    """Sync every file of `folder` and write its manifest: digests, the tables' seals, and `facts`."""
    digests = {}
    seals = {path.name: _seal(path) for path in sorted(folder.glob("table-*.safetensors"))}
    for path in sorted(folder.iterdir()):
        sync_file(path)
        digests[path.name] = sha256_file(path)
    write_atomic(folder / MANIFEST, json.dumps({"files": digests, "tables": seals} | facts, indent=1))


def swap_folder(beside: Path, folder: Path) -> None:
    """Put `beside` in the place of `folder`. A crash between the two renames leaves the old one as `.<name>.old`, which is found."""
    old = _old(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(beside, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A new safetensors file. Raises CheckpointError or OSError when it cannot be written."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise unwritten(path, error) from None


def unwritten(path: Path, error: Exception) -> CheckpointError:
    """What to raise when a file of an unfinished folder cannot be written."""
    reason = " ".join(str(error).split())
    return CheckpointError(
        f"{path}: cannot be written: {reason}; nothing there was changed, make room and run it again"
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises CheckpointError."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def _check_dialect(folder: Path, dialect: str) -> None:
    """Before a tensor is missed: a dialect also decides the form of a layer, and how its table's file is called."""
    for path in sorted(folder.glob("table-*.safetensors")):
        with TableFile.open(path) as table:
            found, _ = address_of(table)
        if found.dialect != dialect:
            raise CheckpointError(f'{folder}: trained with dialect "{found.dialect}", this model has "{dialect}"')


def _seal(path: Path) -> str:
    with TableFile.open(path) as table:
        return table.seal


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _short(digest: str) -> str:
    return word_code(digest) if len(digest) == 64 else "none"
