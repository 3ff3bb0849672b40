"""What is trained beside a frozen model, with the controls that a graft needs to mean anything.

A memory grafted onto a pretrained model nearly always lowers the loss on text like its training text. So does any other module
of that size, and so may the graft's own path with nothing to look up. Every arm adds to the hidden state before the same block,
or to the linear modules from there on, and starts as the model it is put on, bit for bit:

    none           nothing
    graft          an Engram and its table (zeros at the start)
    one_row        the same, every address of a slot sent to one row: the path without the lookup
    misaligned     the same, each sequence reading its neighbour's rows: a lookup that means nothing
    mlp            a plain MLP of as many parameters
    lora_total     LoRA of as many parameters as the graft has
    lora_touched   LoRA of as many as the graft's training text touches: most of a table may never be read
    graft_lora     a graft of half the rows, and LoRA for the rest

The update before the block is exactly a graft's: h + engram(vectors, h), before the block and everything in it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nengram.address import Addresser, AddressSpec, misaligned, one_row
from nengram.errors import ConfigError, nearest
from nengram.hf.grafting import graft
from nengram.hf.hooks import Graft
from nengram.hf.lora import Lora, linears_of, ranks_for
from nengram.hf.suffix import Suffix
from nengram.memory import Engram, MemoryStep
from nengram.store import ResidentStore, make_rule
from nengram.train import RowOptimizer

ARMS = ("none", "lora_total", "lora_touched", "mlp", "one_row", "misaligned", "graft", "graft_lora")
MEMORY_CONTROLS = {
    "graft": None,
    "one_row": one_row,
    "misaligned": lambda rows, *_: misaligned(rows),
}
TABLE_LR = 100.0  # times the rate of the rest


@dataclass(frozen=True)
class Sizes:
    """Of the graft: nominal rows of each head, heads of each order, numbers in a row, highest n-gram order."""

    rows_per_head: int = 20_000
    heads: int = 4
    row_width: int = 16
    max_order: int = 3


class Memory(nn.Module):
    """One memory layer with its table, before the first block of a suffix; `as_graft` makes it a part of the model itself.

    pad_id: the token id that stands before a text.
    """

    def __init__(
        self, suffix: Suffix, cids_V: np.ndarray, sizes: Sizes, control: Callable | None = None, pad_id: int = 0
    ) -> None:
        super().__init__()
        self.sizes, self.layer_id, self.control, self.pad_id = sizes, suffix.block, control, pad_id
        self.cids_V = torch.from_numpy(np.array(cids_V))
        spec = AddressSpec.engram(
            compressed_vocab_size=int(cids_V.max()) + 1,
            rows_per_head=[sizes.rows_per_head] * (sizes.max_order - 1),
            heads=sizes.heads,
            layer_ids=[suffix.block],
            block_indices=[suffix.block],
            pad_cid=int(cids_V[pad_id]),
        )
        self.addresser = Addresser(spec)
        self.store = ResidentStore(spec.num_rows(suffix.block), sizes.row_width, init_std=0.0)
        self.engram = Engram(spec.slots * sizes.row_width, suffix.width, dilation=sizes.max_order)

    def begin(self, ids_BT: Tensor) -> MemoryStep:
        """The rows of a batch, controls applied. Raises: AddressError from `misaligned` for a single sequence."""
        return MemoryStep.begin(self.cids_V[ids_BT], self.addresser, {self.layer_id: self.store}, control=self.control)

    def forward(self, hidden_BTD: Tensor, step: MemoryStep) -> Tensor:
        vecs_BTSE = step.vectors(self.layer_id).to(hidden_BTD.device)
        return hidden_BTD + self.engram(vecs_BTSE, hidden_BTD.unsqueeze(2)).squeeze(2)

    @property
    def table_parameters(self) -> int:
        """Numbers in the table."""
        return self.store.num_rows * self.store.row_width

    @torch.no_grad()
    def as_graft(self, model: nn.Module, tokenizer: Any, name: str = "default") -> Graft:
        """Graft a copy onto the model, which then computes what suffix and memory did, saves it as an adapter, and generates.

        The suffix shares the model's blocks, and with them the graft's hooks: it is not to be used any more.
        Raises: ConfigError as `graft` does, or for a model or tokenizer that address other rows.
        """
        owner = graft(
            model,
            tokenizer,
            name=name,
            blocks=(self.layer_id,),
            rows_per_head=(self.sizes.rows_per_head,) * (self.sizes.max_order - 1),
            heads=self.sizes.heads,
            row_width=self.sizes.row_width,
            pad_id=self.pad_id,
        )
        adapter = owner.adapter(name)
        if adapter.spec != self.addresser.spec or not torch.equal(adapter.lookback.cids_V.cpu(), self.cids_V):
            owner.discard(name)
            raise ConfigError("this memory was trained with another tokenizer's ids: give the model's own")
        adapter.stores[self.layer_id].load_tensors({"weight": self.store.weight})
        owner.layer(self.layer_id, name).load_state_dict(self.engram.state_dict())
        return owner

    def touched(self, ids_NT: np.ndarray) -> int:
        """Numbers of the table that a training text reads, controls applied."""
        with self.begin(torch.from_numpy(ids_NT)) as step:
            return len(step.rows[self.layer_id].unique()) * self.store.row_width


class Mlp(nn.Module):
    """h + W2 silu(W1 rms(h)), W2 zero at the start."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return hidden_BTD + self.down(F.silu(self.up(self.norm(hidden_BTD))))


class Arm(nn.Module):
    """One arm on one suffix: its parts, which step they are at, and what moves them. Use as a context, which takes LoRA off again.

    Build with `make_arm`.
    """

    def __init__(
        self, name: str, memory: Memory | None = None, mlp: Mlp | None = None, lora: Lora | None = None
    ) -> None:
        super().__init__()
        self.name, self.memory, self.mlp, self.lora = name, memory, mlp, lora

    def begin(self, ids_BT: Tensor) -> MemoryStep | None:
        """The memory step of a batch, if there is a memory; release or apply it after the pass."""
        return None if self.memory is None else self.memory.begin(ids_BT)

    def forward(self, hidden_BTD: Tensor, step: MemoryStep | None) -> Tensor:
        """The hidden state that enters the block."""
        if self.mlp is not None:
            return self.mlp(hidden_BTD)
        return hidden_BTD if step is None else self.memory(hidden_BTD, step)

    def optimizers(self, lr: float, table_lr: float = 0.0) -> tuple[list[torch.optim.Optimizer], list[float]]:
        """AdamW for the parameters, row-wise Adagrad for a table (at `TABLE_LR` times `lr` if 0), and the rate of each."""
        found, rates = [], []
        if dense := list(self.parameters()):
            found.append(torch.optim.AdamW(dense, lr=lr, betas=(0.9, 0.95), weight_decay=0.0))
            rates.append(lr)
        if self.memory is not None:
            rates.append(table_lr or lr * TABLE_LR)
            found.append(RowOptimizer(make_rule("rowwise_adagrad"), rates[-1]))
        return found, rates

    def counts(self, ids_NT: np.ndarray) -> dict[str, int]:
        """Trainable numbers: `total`, and `touched` by a training text (all but the table's rows that it never reads)."""
        dense = sum(parameter.numel() for parameter in self.parameters())
        if self.memory is None:
            return {"total": dense, "touched": dense}
        return {"total": dense + self.memory.table_parameters, "touched": dense + self.memory.touched(ids_NT)}

    def __enter__(self) -> "Arm":
        return self

    def __exit__(self, *_: object) -> None:
        if self.lora is not None:
            self.lora.remove()


def make_arm(
    name: str,
    suffix: Suffix,
    cids_V: np.ndarray,
    ids_NT: np.ndarray,
    *,
    sizes: Sizes = Sizes(),
    seed: int = 0,
) -> Arm:
    """The arm called `name` on `suffix`, its parameters as many as the graft's (`lora_touched`: as its touched ones).

    cids_V: the compression map of the model's tokenizer. ids_NT: the training text. seed: of the initial weights.
    Raises: ConfigError for an unknown arm (nearest named), or a size too small to be matched.
    """
    if name not in ARMS:
        raise ConfigError(f'unknown arm "{name}"{nearest(name, ARMS)}; there are {", ".join(ARMS)}')
    device = next(suffix.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _built(name, suffix, cids_V, ids_NT, sizes, seed).to(device)


def _built(name: str, suffix: Suffix, cids_V: np.ndarray, ids_NT: np.ndarray, sizes: Sizes, seed: int) -> Arm:
    if name == "none":
        return Arm(name)

    def memory(sizes: Sizes, control: Callable | None = None) -> Memory:
        pad_id = suffix.whole.config.get_text_config(decoder=True).pad_token_id
        return Memory(suffix, cids_V, sizes, control, pad_id or 0)

    def lora(budget: int) -> Lora:
        linears = linears_of(suffix.blocks)
        return Lora(linears, ranks_for(linears, budget), seed=seed)

    if name in MEMORY_CONTROLS:
        return Arm(name, memory(sizes, MEMORY_CONTROLS[name]))
    counts = Arm("graft", memory(sizes)).counts(ids_NT)
    if name == "mlp":
        return Arm(name, mlp=Mlp(suffix.width, (counts["total"] - suffix.width) // (2 * suffix.width)))
    if name == "graft_lora":
        half = Arm(name, memory(Sizes(**vars(sizes) | {"rows_per_head": sizes.rows_per_head // 2})))
        half.lora = lora(counts["total"] - half.counts(ids_NT)["total"])
        return half
    return Arm(name, lora=lora(counts[name.removeprefix("lora_")]))
