"""A grafted memory on disk: one sealed folder, which says what it belongs to.

    facts-memory/
    ├── manifest.json              SHA-256 of every other file, and the tables' seals
    ├── adapter.json               the base model's fingerprint, the sizes, the addresses as numbers
    ├── memory.safetensors         projections, gains and convolutions
    ├── table-<layer>.safetensors  one per memory layer, in the format of every other table: any tier, any of its verbs
    └── compression.safetensors    compressed id of every token id

A memory is trained against one model's hidden states and one tokenizer's ids, and on another it would load, run and be wrong. So the
base is checked by architecture and sizes, and both are named where they differ. LoRA that PEFT put on a memory's projections is
PEFT's to save; here it is left out, and `modules_to_save` copies are saved as the module that they stand for.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nengram.address import AddressSpec
from nengram.config import Config, MemoryConfig, as_dict
from nengram.errors import AddressError, CheckpointError, ConfigError, DataError
from nengram.files import write_atomic
from nengram.hf.blocks import Anatomy, anatomy, width_of
from nengram.hf.grafting import adapter_of, graft_of, grafted
from nengram.hf.hooks import Adapter, Graft
from nengram.memory import open_store, save_table
from nengram.model.folder import open_folder, read_tensors, sealed, table_path, write_tensors
from nengram.model.memories import layer_id_of
from nengram.text import CompressionMap

FORMAT = "nengram-adapter-1"


def save_adapter(
    model: nn.Module | Graft,
    folder: str | Path,
    name: str | None = None,
    *,
    optimizer: Mapping[str, Tensor] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write one memory of a grafted model, the active one if no `name` is given, whole or not at all.

    optimizer: tensors by name, to go on training from; the tables' update state is then saved as well. facts: JSON, for the manifest.
    Raises: ConfigError without a graft or adapter; StoreError for tables that are only read; CheckpointError, OSError.
    """
    owner = model if isinstance(model, Graft) else grafted(model)
    name = owner.active if name is None else name
    adapter = owner.adapter(name)
    with sealed(Path(folder), facts or {}) as beside:
        write_tensors(_plain_tensors(owner, name), beside / "memory.safetensors")
        if optimizer is not None:
            write_tensors(optimizer, beside / "optimizer.safetensors")
        for layer_id, store in adapter.stores.items():
            save_table(table_path(beside, layer_id), store, adapter.spec, layer_id, optimizer=optimizer is not None)
        adapter.compression.save(beside / "compression.safetensors")
        write_atomic(
            beside / "adapter.json", json.dumps(_about(owner.place, adapter), indent=1, ensure_ascii=False) + "\n"
        )


def load_adapter(
    model: nn.Module, folder: str | Path, *, name: str = "default", tier: str = "resident", blocks_at: str | None = None
) -> Graft:
    """Put a saved memory on a model of the same base and make it the active one; returns the model's graft.

    tier: where its tables are read from: "resident", "host", or "mapped" (the folder must then stay; such tables do not learn).
    blocks_at: as `graft`; the folder's own if not given.
    Raises: CheckpointError, naming the file, for a folder that is damaged, of another base, or of other addresses; StoreError for a
    tier that does not exist; ConfigError as `graft`.
    """
    folder = Path(folder)
    if tier == "tiered":
        raise ConfigError('tier "tiered" needs a hot set, which adapters have not: "mapped"')
    open_folder(folder, tier=tier)
    memory, spec, base, own_place = _read_about(folder / "adapter.json")
    place = anatomy(model, blocks_at or own_place)
    check_base(base, fingerprint(place), folder)
    compression = _compression(folder, spec, memory)
    tensors = read_tensors(folder / "memory.safetensors")
    stores = {}
    for layer_id in spec.layer_ids:
        block = next(block for block in memory.blocks if layer_id_of(memory, block) == layer_id)
        device = next(place.blocks[block].parameters()).device
        wanted = {"spec": spec, "layer_id": layer_id, "row_width": memory.row_width, "device": device}
        stores[layer_id] = open_store(table_path(folder, layer_id), tier, **wanted)
    owner = graft_of(place)
    owner.add(name, adapter_of(place, memory, compression, spec, stores))
    try:
        _fill(owner, name, tensors, folder / "memory.safetensors")
    except CheckpointError:
        owner.discard(name)
        raise
    return owner


def fingerprint(place: Anatomy) -> dict[str, Any]:
    """What an adapter's base is known by."""
    return {
        "architecture": type(place.base).__name__,
        "model_type": place.config.model_type,
        "hidden_size": width_of(place.config),
        "blocks": len(place.blocks),
        "vocab_size": place.config.vocab_size,
    }


def check_base(theirs: Mapping[str, Any], ours: Mapping[str, Any], folder: Path) -> None:
    """Raise CheckpointError, naming both, when an adapter was made for another base."""
    if dict(theirs) != dict(ours):
        raise CheckpointError(f"{folder}: this memory belongs to {_named(theirs)}; the model here is {_named(ours)}")


def _named(base: Mapping[str, Any]) -> str:
    sizes = f"width {base.get('hidden_size')}, {base.get('blocks')} blocks, {base.get('vocab_size')} ids"
    return f"{base.get('architecture')} ({sizes})"


def _about(place: Anatomy, adapter: Adapter) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "base": fingerprint(place),
        "blocks_at": place.blocks_at,
        "memory": as_dict(adapter.memory),
        "addresses": adapter.spec.word_code,
        "spec": json.loads(adapter.spec.to_json()),
        "compression": adapter.compression.digest,
    }


def _read_about(path: Path) -> tuple[MemoryConfig, AddressSpec, dict[str, Any], str]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']!r}, this version reads {FORMAT}")
        memory = Config().replace(memory=dict(about["memory"])).memory
        spec = AddressSpec.from_json(json.dumps(about["spec"]))
        return memory, spec, dict(about["base"]), str(about["blocks_at"])
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: no adapter here ({path.name} is missing)") from None
    except (OSError, ValueError, KeyError, TypeError, AddressError, ConfigError) as error:
        raise CheckpointError(f"{path}: is not an adapter's: {' '.join(str(error).split())}") from None


def _compression(folder: Path, spec: AddressSpec, memory: MemoryConfig) -> CompressionMap:
    path = folder / "compression.safetensors"
    try:
        compression = CompressionMap.load(path)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    wanted = {layer_id_of(memory, block) for block in memory.blocks}
    if compression.compressed_vocab_size != spec.compressed_vocab_size or wanted != set(spec.layer_ids):
        raise CheckpointError(
            f"{folder}: the addresses {spec.word_code} are of {spec.compressed_vocab_size:,} ids and layers {list(spec.layer_ids)}, "
            f"the adapter has {compression.compressed_vocab_size:,} and {sorted(wanted)}: a foreign spec"
        )
    return compression


def _plain_tensors(owner: Graft, name: str) -> dict[str, Tensor]:
    """Every memory layer's own tensors, `<block>.<tensor>`, whatever PEFT has wrapped them in."""
    found = {}
    for block, module in owner.layers(name).items():
        for key, tensor in plain_state(module).items():
            found[f"{block}.{key}"] = tensor.detach().contiguous()
    return found


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """A memory layer's state as if PEFT had not touched it: a `modules_to_save` copy is the layer, LoRA's factors are not of it."""
    copies = getattr(module, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        module = copies[module.active_adapters[0]]
    state = module.state_dict()
    return {key.replace(".base_layer.", "."): tensor for key, tensor in state.items() if ".lora_" not in key}


def _fill(owner: Graft, name: str, tensors: Mapping[str, Tensor], path: Path) -> None:
    for block, module in owner.layers(name).items():
        own = {key.removeprefix(f"{block}."): tensor for key, tensor in tensors.items() if key.startswith(f"{block}.")}
        wanted = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
        found = {key: tuple(tensor.shape) for key, tensor in own.items()}
        if wanted != found:
            key = min(key for key, _ in wanted.items() ^ found.items())
            raise CheckpointError(
                f"{path}: {key} of block {block} is {found.get(key, 'missing')}, the adapter's sizes ask for {wanted.get(key, 'none')}"
            )
        module.load_state_dict(own)
