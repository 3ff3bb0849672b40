"""An Engram layer of DeepSeek-V4.1, as it was released, ready to be called: table, addresses and weights from one folder.

The 188 GiB of tables stay where they are (`checkpoint_store.py`); of the rest of the checkpoint only this layer's three
matrices are read. Compressed ids come from the tokenizer, which this room does not know: `CompressionMap.build`, whose
count the config states.

    released = deepseek_layer(folder, 1, pad_cid=int(compression.cids_V[2]))
    delta_BTGD = released(compression.cids_V[ids_BT], hidden_BTGD)
"""

import os
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nengram.address import Addresser, AddressSpec, StreamState
from nengram.errors import CheckpointError
from nengram.memory.checkpoint_files import Checkpoint
from nengram.memory.checkpoint_store import open_released
from nengram.memory.engram import Engram
from nengram.memory.layer_layouts import DEEPSEEK_NAMES, DEEPSEEK_SCALE, from_deepseek_v41
from nengram.memory.layout import section_of
from nengram.memory.layout_deepseek import LAYERS, NAME
from nengram.memory.step import MemoryStep
from nengram.store import HotSet, Store

EPS = "rms_norm_eps"


@dataclass(frozen=True, eq=False)
class ReleasedLayer:
    """One memory layer: `layer` and `store` are ours to use, `spec` is that of all layers of the checkpoint."""

    layer: Engram
    store: Store
    spec: AddressSpec
    layer_id: int
    addresser: Addresser

    def __call__(
        self,
        cids_BT: Tensor,
        hidden_BTGD: Tensor,
        *,
        blocked_BT: Tensor | None = None,
        state: StreamState | None = None,
    ) -> Tensor:
        """The update `[B, T, G, D]` of every residual stream, to be added before the block; the table is frozen.

        cids_BT: compressed ids. blocked_BT: dead positions (image spans): they stop every n-gram, and their gate is 0.
        state: of `addresser.new_state`, for decoding in chunks. Raises: AddressError, StoreError, ConfigError.
        """
        rows = self.addresser(cids_BT, blocked_BT=blocked_BT, state=state)[self.layer_id]
        with MemoryStep({self.layer_id: rows}, {self.layer_id: self.store}, blocked_BT, frozen=True) as step:
            vecs_BTSE = step.vectors(self.layer_id).to(hidden_BTGD.device, copy=True)
        return self.layer(vecs_BTSE, hidden_BTGD, blocked_BT=blocked_BT)

    def close(self) -> None:
        """Give up the table's files."""
        self.store.close()


def deepseek_layer(
    folder: str | os.PathLike,
    layer_id: int,
    *,
    tier: str = "mapped",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    hot: HotSet | str | os.PathLike | None = None,
    pad_cid: int | None = None,
) -> ReleasedLayer:
    """A memory layer from a checkpoint with the released names and shapes, e.g. layer 1 or 14.

    tier, device, hot: where the table is, as `open_released`. dtype: of the layer's weights; the matrix, FP8 in blocks of
    32 x 32, becomes numbers of it. pad_cid: compressed id of the pad token, where a tokenizer told.
    Raises: CheckpointError, AddressError, naming file, field or tensor; StoreError.
    """
    checkpoint = Checkpoint(folder)
    prefix = _prefix(checkpoint, layer_id)
    names = [prefix + name for name in (*DEEPSEEK_NAMES, DEEPSEEK_SCALE)]
    state = from_deepseek_v41({name: _tensor(checkpoint, name) for name in names if name in checkpoint.tensors}, prefix)
    branches, width = state["query_gain"].shape
    memory_width = state["kv_proj.weight"].shape[1]
    eps = section_of(checkpoint.config, LAYERS).get(EPS, 1e-20)
    layer = Engram.family("deepseek_v41", memory_width, width, branches=branches, gate_eps=float(eps))
    layer.load_state_dict(state)
    store, spec, _ = open_released(folder, layer_id, tier, device=device, hot=hot, pad_cid=pad_cid)
    if spec.slots * store.row_width != memory_width:
        store.close()
        raise CheckpointError(
            f"{folder}: {prefix}engram.wkv.weight reads {memory_width} numbers, {spec.slots} rows of "
            f"{store.row_width} are {spec.slots * store.row_width}"
        )
    return ReleasedLayer(layer.to(device, dtype), store, spec, layer_id, Addresser(spec))


def _prefix(checkpoint: Checkpoint, layer_id: int) -> str:
    """What stands before `engram.` in the names of a layer's tensors."""
    for match in checkpoint.matching(NAME).values():
        if int(match[2]) == layer_id:
            return match[1].removesuffix("engram.embed")
    raise CheckpointError(f"{checkpoint.path}: has no tensor layers.{layer_id}.engram.embed.weight")


def _tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    path, _ = checkpoint.entry(name)
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {name} cannot be read: {error}") from None
