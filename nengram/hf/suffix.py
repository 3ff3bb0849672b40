"""Train in the middle of a frozen model without running its beginning twice.

What is added before block k of a frozen model changes nothing below k: the hidden states that arrive there are the same at every step
and in every arm of a comparison. `Suffix` computes them once (`before`) and goes on from them (`forward`): the blocks from k on, the
final norm and the head are the model's own modules, shared and not copied, so a LoRA put on one of them counts in both. Half of a
model is half of its forward pass and, since gradients end at k anyway, none of its backward pass.

`cached` keeps hidden states on disk, 4 x D bytes a token in float32 (2.3 kB at D = 576). In bfloat16 they would take half and would
no longer be the model's.
"""

import copy
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nengram.errors import ConfigError, DataError
from nengram.files import atomic_path, sha256_bytes
from nengram.hf.blocks import anatomy, width_of

PROBE = 8  # tokens


class Suffix(nn.Module):
    """Blocks `block`, `block` + 1, ... of a causal language model of transformers, its final norm and its head, all frozen.

    Raises: ConfigError when the blocks are not found, `block` is none of them, or the model does more between its embedding and its
        blocks than the blocks can be cut from (positions added to embeddings, blocks of several kinds): both parts together are
        compared with the whole model on a few tokens.
    """

    def __init__(self, model: nn.Module, block: int) -> None:
        super().__init__()
        found = anatomy(model)
        blocks = found.blocks
        if not 0 < block < len(blocks):
            raise ConfigError(
                f"block {block}: a model of {len(blocks)} blocks is cut before block 1 to {len(blocks) - 1}"
            )
        self.block, self.blocks = block, nn.ModuleList(blocks[block:])
        self.__dict__["whole"] = found.base  # not a part: its beginning is neither trained nor moved with this
        self.rest = _with(found.base, found.blocks_at.split("."), self.blocks)
        found.base.requires_grad_(False)
        self._probe()

    @property
    def width(self) -> int:
        """D of the hidden states."""
        return width_of(self.whole.config.get_text_config(decoder=True))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Logits `[B, T, V]` from the hidden states before the block."""
        return self.rest(inputs_embeds=hidden_BTD, use_cache=False).logits

    def normed(self, hidden_BTD: Tensor) -> Tensor:
        """What the head would read, `[B, T, D]`: for whoever wants logits at few positions."""
        return self.rest.base_model(inputs_embeds=hidden_BTD, use_cache=False).last_hidden_state

    @torch.no_grad()
    def before(self, ids_BT: Tensor) -> Tensor:
        """The hidden states before the block, `[B, T, D]`; the model runs no further."""
        found: list[Tensor] = []

        def stop(_, args: tuple, kwargs: dict) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _Reached

        hook = self.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.whole(input_ids=ids_BT, use_cache=False)
        except _Reached:
            pass
        finally:
            hook.remove()
        return found[0].detach()

    @torch.no_grad()
    def _probe(self) -> None:
        ids_BT = torch.arange(PROBE, device=self.whole.device).remainder(
            self.whole.get_input_embeddings().num_embeddings
        )
        ids_BT = ids_BT.unsqueeze(0)
        kinds = set(getattr(self.whole.config.get_text_config(), "layer_types", None) or ["same"])
        whole = self.whole(input_ids=ids_BT, use_cache=False).logits
        try:
            parts = self(self.before(ids_BT))
        except (TypeError, ValueError, RuntimeError):
            parts = torch.full_like(whole, torch.nan)
        if len(kinds) > 1 or not torch.allclose(parts, whole, rtol=1e-4, atol=1e-4):
            name = type(self.whole).__name__
            raise ConfigError(
                f"{name} cannot be cut before block {self.block}: its blocks alone do not go on as the whole does"
            )


class _Reached(Exception):
    """The block was reached."""


def _with(module: nn.Module, path: list[str], part: nn.Module) -> nn.Module:
    """The same module with another part at `path`: modules on the way are shallow copies, all others the same objects."""
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    clone._modules[path[0]] = part if len(path) == 1 else _with(module._modules[path[0]], path[1:], part)
    return clone


def cached(
    suffix: Suffix,
    ids_NT: np.ndarray,
    folder: str | os.PathLike,
    of: str,
    *,
    batch: int = 8,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> np.ndarray:
    """Hidden states before the block, float32 `[N, T, D]`, mapped from a file that is written at the first call.

    ids_NT: token ids; rows filled on the right, the fill is never heard by what lies before it. of: what names the model, such as the
    digest of its weights: the file is called by it, the block and the ids.
    Raises: DataError when the file is damaged or cannot be written.
    """
    ids_NT = np.ascontiguousarray(ids_NT, dtype=np.int64)
    name = sha256_bytes(f"{of} {suffix.block} {ids_NT.shape}".encode() + ids_NT.tobytes())[:24]
    path, shape = Path(folder) / f"hidden-{name}.npy", (*ids_NT.shape, suffix.width)
    try:
        if not path.exists():
            with atomic_path(path) as beside:
                _write(suffix, ids_NT, beside, shape, batch, progress)
        hidden_NTD = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}; remove it to compute it anew") from None
    if hidden_NTD.shape != shape or hidden_NTD.dtype != np.float32:
        raise DataError(f"{path}: damaged: {hidden_NTD.dtype} {hidden_NTD.shape}, not float32 {shape}; remove it")
    return hidden_NTD


def _write(suffix: Suffix, ids_NT: np.ndarray, path: Path, shape: tuple, batch: int, progress: Callable) -> None:
    hidden_NTD = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    for first in range(0, len(ids_NT), batch):
        ids_BT = torch.from_numpy(ids_NT[first : first + batch]).to(suffix.whole.device)
        hidden_NTD[first : first + batch] = suffix.before(ids_BT).float().cpu().numpy()
        progress(min(first + batch, len(ids_NT)), len(ids_NT))
    hidden_NTD.flush()
