"""docs/state.json: in which situations a memory may be cut, copied, padded and packed, tried in every dialect.

A situation is a function of one small memory (addresses and a layer in float64) that yields pairs: what was found in the
situation, and what the whole sequence, a sequence alone, or the slow twins give. Rows must be the same integers; outputs may
differ by 1e-12. `python scripts/state.py` writes the file, a test compares it with what it finds, and docs/state.md shows it.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nengram.address import Addresser, AddressSpec, StreamState, reference
from nengram.files import write_atomic
from nengram.memory import ConvState, Engram
from nengram.memory.reference import engram_reference

PLACE = Path(__file__).parents[1] / "docs" / "state.json"
TOLERANCE = 1e-12
VOCAB, PAD, BRANCHES, WIDTH, ROW_WIDTH = 40, 7, 2, 6, 3
BATCH, LENGTH = 3, 26


@dataclass
class State:
    """All that a memory layer remembers of a batch: the last ids, and the convolution's inputs."""

    addresses: StreamState
    conv: ConvState

    def snapshot(self) -> tuple:
        return self.addresses.snapshot(), self.conv.snapshot()

    def restore(self, snapshot: tuple) -> None:
        self.addresses.restore(snapshot[0])
        self.conv.restore(snapshot[1])

    def reorder(self, index_B: Tensor) -> None:
        self.addresses.reorder(index_B)
        self.conv.reorder(index_B)


class Memory:
    """One memory layer of a dialect with weights at no special value, its addresses, and a table."""

    def __init__(self, spec: AddressSpec, family: str, **options):
        self.addresser, self.spec, self.layer_id = Addresser(spec), spec, spec.layer_ids[0]
        generator = torch.Generator().manual_seed(0)
        make = {"generator": generator, "dtype": torch.float64}
        options = {"branches": BRANCHES, "dilation": spec.max_order} | options
        self.layer = Engram.family(family, spec.slots * ROW_WIDTH, WIDTH, **options).double()
        for parameter in self.layer.parameters():
            parameter.data = torch.randn(parameter.shape, **make) * 0.7
        self.table = torch.randn(spec.num_rows(self.layer_id), ROW_WIDTH, **make)

    @torch.no_grad()
    def __call__(
        self, given: "Given", *, start_BT=None, blocked_BT=None, reset: bool = True, state: State | None = None
    ) -> "Found":
        """Rows and outputs. `reset`: the convolution, too, is told of starts."""
        addresses, conv = (state.addresses, state.conv) if state else (None, None)
        rows = self.addresser(given.ids_BT, start_BT=start_BT, blocked_BT=blocked_BT, state=addresses)
        vecs_BTSE, heard_BT = self.table[rows[self.layer_id]], start_BT if reset else None
        delta_BTGD = self.layer(vecs_BTSE, given.hidden_BTGD, blocked_BT=blocked_BT, start_BT=heard_BT, state=conv)
        return Found(rows[self.layer_id], delta_BTGD)

    def by_loops(self, given: "Given", blocked_BT: Tensor | None = None) -> "Found":
        """The same from `nengram.address.reference` and `nengram.memory.reference`."""
        layer = self.spec.layer(self.layer_id)
        numbers = {"multipliers": layer.multipliers, "moduli": layer.moduli, "pad_cid": self.spec.pad_cid}
        rows_BTS = torch.tensor(
            [
                reference.table_rows(
                    ids_T.tolist(),
                    **numbers,
                    blocked=None if blocked_BT is None else blocked_BT[b].tolist(),
                    end_cid=self.spec.end_cid,
                )
                for b, ids_T in enumerate(given.ids_BT)
            ]
        )
        vecs_BTM = self.table[rows_BTS].flatten(2)
        return Found(rows_BTS, engram_reference(self.layer, vecs_BTM, given.hidden_BTGD, blocked_BT)[0].detach())

    def new_state(self, batch: int = BATCH) -> State:
        """Before the first token."""
        return State(self.addresser.new_state(batch), self.layer.new_state(batch))


@dataclass
class Given:
    """Token ids and hidden states of a batch; indexed as tensors are."""

    ids_BT: Tensor
    hidden_BTGD: Tensor

    def __getitem__(self, where) -> "Given":
        return Given(self.ids_BT[where], self.hidden_BTGD[where])


@dataclass
class Found:
    """Rows and outputs; indexed as tensors are. No outputs: only rows are compared."""

    rows_BTS: Tensor
    delta_BTGD: Tensor | None = None

    def __getitem__(self, where) -> "Found":
        return Found(self.rows_BTS[where], None if self.delta_BTGD is None else self.delta_BTGD[where])


Pairs = Iterator[tuple[Found, Found]]


def batch_of(length: int = LENGTH, seed: int = 1) -> Given:
    """Random ids, rich in the pad id (which is Qwen's end of text), and hidden states."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(0, VOCAB, (BATCH, length), generator=generator)
    ids_BT[torch.rand(ids_BT.shape, generator=generator) < 0.1] = PAD
    return Given(ids_BT, torch.randn(BATCH, length, BRANCHES, WIDTH, generator=generator, dtype=torch.float64))


def joined(one: Given, other: Given) -> Given:
    """One text after another."""
    return Given(torch.cat([one.ids_BT, other.ids_BT], 1), torch.cat([one.hidden_BTGD, other.hidden_BTGD], 1))


def flags(*places: tuple[int, int], length: int = LENGTH) -> Tensor:
    """True at (sequence, position)."""
    flagged_BT = torch.zeros(BATCH, length, dtype=torch.bool)
    for b, t in places:
        flagged_BT[b, t] = True
    return flagged_BT


def in_chunks(
    memory: Memory, given: Given, cuts: list[int], expected: Found, state: State | None = None, **told
) -> Pairs:
    """Every chunk against its part of the whole; `told`: flags [B, T], cut alike."""
    state, first = state or memory.new_state(len(given.ids_BT)), 0
    for size in cuts:
        now = (slice(None), slice(first, first + size))
        flagged = {name: value if isinstance(value, bool) else value[now] for name, value in told.items()}
        yield memory(given[now], state=state, **flagged), expected[now]
        first += size


def whole(memory: Memory) -> Pairs:
    """The whole sequence at once, against loops over integers and numbers."""
    yield memory(batch_of()), memory.by_loops(batch_of())


def chunks(memory: Memory) -> Pairs:
    """Prefill in pieces of several sizes."""
    given = batch_of()
    for cuts in ([13, 13], [1, 2, 3, 20], [20, 5, 1], [25, 1]):
        yield from in_chunks(memory, given, cuts, memory(given))


def one_by_one(memory: Memory) -> Pairs:
    """Decoding: one token at a time."""
    given = batch_of()
    yield from in_chunks(memory, given, [1] * LENGTH, memory(given))


def rollback(memory: Memory) -> Pairs:
    """Speculative decoding: a draft is verified, and taken back to where it was accepted."""
    given, draft = batch_of(), batch_of(5, seed=9)
    expected = memory(given)
    for accepted in (0, 2, 5):
        state, at = memory.new_state(), 12
        memory(given[:, :at], state=state)
        before = state.snapshot()
        proposed = joined(given[:, at : at + accepted], draft[:, accepted:])
        yield memory(proposed, state=state)[:, :accepted], expected[:, at : at + accepted]
        state.restore(before)
        memory(given[:, at : at + accepted], state=state)
        yield from in_chunks(memory, given[:, at + accepted :], [1, 4, 5], expected[:, at + accepted :], state)


def beams(memory: Memory) -> Pairs:
    """Beam search: sequences are dropped, doubled and go on differently."""
    given, further = batch_of(), batch_of(8, seed=5)
    state, index_B = memory.new_state(), torch.tensor([2, 0, 0])
    memory(given, state=state)
    state.reorder(index_B)
    expected = memory(joined(given[index_B], further))[:, LENGTH:]
    yield from in_chunks(memory, further, [1, 1, 6], expected, state)


def left_padding(memory: Memory) -> Pairs:
    """A batch of unequal lengths, pads at the left and blocked, against each sequence alone; then decoding goes on."""
    given, further, lengths = batch_of(), batch_of(6, seed=3), (LENGTH, 11, 2)
    pads_BT = torch.stack([torch.arange(LENGTH) < LENGTH - length for length in lengths])
    alone = [
        memory(joined(given[b : b + 1, LENGTH - length :], further[b : b + 1])) for b, length in enumerate(lengths)
    ]
    state = memory.new_state()
    padded = memory(given, blocked_BT=pads_BT, state=state)
    after = [memory(further[:, t : t + 1], state=state) for t in range(6)]
    for b, length in enumerate(lengths):
        yield padded[b : b + 1, LENGTH - length :], alone[b][:, :length]
        for t, found in enumerate(after):
            yield found[b : b + 1], alone[b][:, length + t : length + t + 1]


def packed(memory: Memory, reset: bool = True) -> Pairs:
    """Documents side by side with starts, against each alone; whole and in chunks."""
    given, edges = batch_of(), (0, 4, 5, 16, LENGTH)
    start_BT = flags(*((b, t) for b in range(BATCH) for t in edges[1:-1]))
    alone = [memory(given[:, a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    expected = Found(torch.cat([one.rows_BTS for one in alone], 1), torch.cat([one.delta_BTGD for one in alone], 1))
    yield memory(given, start_BT=start_BT, reset=reset), expected
    for cuts in ([4, 12, 10], [7, 7, 12], [1] * LENGTH):
        yield from in_chunks(memory, given, cuts, expected, start_BT=start_BT, reset=reset)


def packed_as_published(memory: Memory) -> Pairs:
    """The same with the convolution not told of starts, as in every published code."""
    yield from packed(memory, reset=False)


def images(memory: Memory) -> Pairs:
    """Image spans, blocked: against loops, whole and in chunks; the rows of text after a span against that text alone."""
    given = batch_of()
    blocked_BT = flags(*((0, t) for t in range(6, 11)), (1, 0), (1, LENGTH - 1), *((2, t) for t in range(8)))
    expected = memory.by_loops(given, blocked_BT)
    yield memory(given, blocked_BT=blocked_BT), expected
    for cuts in ([8, 18], [3, 1, 22], [1] * LENGTH):
        yield from in_chunks(memory, given, cuts, expected, blocked_BT=blocked_BT)
    for b, end in ((0, 11), (2, 8)):
        yield Found(expected.rows_BTS[b : b + 1, end:]), Found(memory(given[b : b + 1, end:]).rows_BTS)


SITUATIONS: dict[str, Callable[[Memory], Pairs]] = {
    "whole sequence": whole,
    "prefill in chunks": chunks,
    "one token at a time": one_by_one,
    "draft and rollback": rollback,
    "beam reorder": beams,
    "left padding": left_padding,
    "image spans": images,
    "packed, the convolution told of starts": packed,
    "packed, the convolution not told": packed_as_published,
}

SIZES = {"compressed_vocab_size": VOCAB, "heads": 2, "layer_ids": [1], "pad_cid": PAD}
DIALECTS: dict[str, Callable[[], Memory]] = {
    "engram": lambda: Memory(AddressSpec.engram(rows_per_head=[53, 61], **SIZES), "engram"),
    "engram, the demo's biases": lambda: Memory(
        AddressSpec.engram(rows_per_head=[53, 61], **SIZES), "engram", bias=True
    ),
    "deepseek_v41": lambda: Memory(AddressSpec.deepseek_v41(rows_per_head=53, **SIZES), "deepseek_v41"),
    "qwen_ple": lambda: Memory(
        AddressSpec.qwen_ple(vocab_size=VOCAB, eos_id=PAD, ple_layer_ids=[2], rows_per_head=53, heads=2), "qwen_ple"
    ),
}


def cell(dialect: str, situation: str) -> dict:
    """What one situation gives in one dialect: positions compared, and whether rows and outputs were those expected."""
    positions, rows_differ, worst = 0, False, 0.0
    for found, expected in SITUATIONS[situation](DIALECTS[dialect]()):
        positions += found.rows_BTS[..., 0].numel()
        rows_differ |= not torch.equal(found.rows_BTS, expected.rows_BTS)
        if found.delta_BTGD is not None and found.delta_BTGD.numel():
            worst = max(worst, (found.delta_BTGD - expected.delta_BTGD).abs().max().item())
    return {
        "positions": positions,
        "rows": "differ" if rows_differ else "identical",
        "outputs": "equal" if worst <= TOLERANCE else "differ",
    }


def matrix() -> dict:
    """Every situation in every dialect."""
    cells = {situation: {dialect: cell(dialect, situation) for dialect in DIALECTS} for situation in SITUATIONS}
    return {"tolerance": TOLERANCE, "command": "python scripts/state.py", "cells": cells}


if __name__ == "__main__":
    write_atomic(PLACE, json.dumps(matrix(), indent=1) + "\n")
