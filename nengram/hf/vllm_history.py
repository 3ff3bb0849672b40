"""What came before every token of a flat row: the past of a memory where an engine serves many requests out of one paged cache.

vLLM lays the tokens of all requests side by side, here a piece of a prompt, there one new token, and says of each where it stands. The
neighbour on the left may be another request's, so nothing may be looked up by going left. A position that lies before a token is
found in the first of three places that has it:

    in the row      it belongs to the same piece of the same request
    in the window   the ids just before the piece, as the runner knows them (vLLM's first runner: those of prompts; its second: all)
    in the slots    one value for every slot of the paged cache, written as its token goes by

A slot is as good as the cache's own keys: a block table pins positions to slots, requests with one beginning share its slots and had
the same values there, and the slot of a draft that was rejected is written anew. Keys that another instance computed are the
exception, as no token of theirs went by here; the window covers their ids and nothing covers a convolution.

Nothing here knows vLLM: `FlatRow` takes what any paged engine has.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from nengram.errors import ConfigError
from nengram.hf.lookback import NOTHING


class Before(NamedTuple):
    """Of the P positions before each of T tokens, nearest first, `[T, P]` each."""

    index: Tensor  # in the row, where it lies in the same piece
    outside: Tensor  # how far before its piece; 0 and less: in it
    slot: Tensor  # in the paged cache
    exists: Tensor  # false before the beginning of the text


@dataclass(frozen=True)
class FlatRow:
    """Where T tokens of R requests stand.

    positions_T: place of each in its text; a request's tokens follow each other. starts_R1: int [R + 1], where each request begins in
    the row, and the end; what lies behind it is padding. blocks_RK: int [R, K], the blocks of the paged cache that hold a request,
    `block_size` positions each. slots_T: the slot of every token, -1 for padding.
    Raises: ConfigError where lengths do not fit.
    """

    positions_T: Tensor
    starts_R1: Tensor
    blocks_RK: Tensor
    slots_T: Tensor
    block_size: int

    def __post_init__(self) -> None:
        if len(self.slots_T) != len(self.positions_T) or len(self.starts_R1) > len(self.blocks_RK) + 1:
            raise ConfigError(
                f"a flat row of {len(self.positions_T)} positions has {len(self.slots_T)} slots, "
                f"and block tables of {len(self.blocks_RK)} requests for {len(self.starts_R1) - 1}"
            )

    @cached_property
    def request_T(self) -> Tensor:
        """Which request each token belongs to; padding counts as the last one's."""
        index_T = torch.arange(len(self.positions_T), device=self.positions_T.device)
        ends_R = self.starts_R1[1:].to(index_T.dtype).contiguous()
        return torch.searchsorted(ends_R, index_T, right=True).clamp(max=len(ends_R) - 1)

    def before(self, count: int) -> Before:
        """Where the `count` positions before every token are to be found."""
        steps_P = torch.arange(1, count + 1, device=self.positions_T.device)
        index_TP = torch.arange(len(self.positions_T), device=steps_P.device)[:, None] - steps_P
        outside_TP = self.starts_R1.long()[self.request_T][:, None] - index_TP
        position_TP = self.positions_T.long()[:, None] - steps_P
        return Before(index_TP, outside_TP, self._slot(position_TP.clamp(min=0)), position_TP >= 0)

    def check(self) -> None:
        """Raise ConfigError unless block tables and slots tell the same of every token: else the past would be another's."""
        own_T = self._slot(self.positions_T.long()[:, None])[:, 0]
        if bool(((own_T != self.slots_T) & (self.slots_T >= 0)).any()):
            raise ConfigError(
                f"the paged cache does not lie in blocks of {self.block_size} as its block tables have it: "
                "no past can be looked up in it"
            )

    def _slot(self, position_TP: Tensor) -> Tensor:
        at_TP = (position_TP // self.block_size).clamp(max=self.blocks_RK.shape[1] - 1)
        return self.blocks_RK.long()[self.request_T[:, None], at_TP] * self.block_size + position_TP % self.block_size


def new_slots(number: int, *shape: int, like: Tensor, nothing: float = 0) -> Tensor:
    """A value `[*shape]` for each of `number` slots and a spare one at the end, which padding (slot -1) is written to."""
    return like.new_full((number + 1, *shape), nothing)


def history(
    ids_T: Tensor, row: FlatRow, count: int, *, slots_N: Tensor | None = None, window_RW: Tensor | None = None
) -> Tensor:
    """The last `count` ids before every token, int64 [T, count], most recent first, -1 where there is none.

    slots_N: int, of `new_slots(..., nothing=-1)`; this row's ids are written to it. window_RW: int [R or more, W], the ids before the
    first token of every request, most recent first, -1 where the runner does not know.
    Raises: ConfigError without both.
    """
    if slots_N is None and window_RW is None:
        raise ConfigError("flat rows need the runner's window or a slot cache: nothing else knows what came before")
    before = row.before(count)
    found_TP = _found(ids_T, row, before, slots_N, NOTHING).long()
    if window_RW is not None:
        column_TP = (before.outside - 1).clamp(0, window_RW.shape[1] - 1)
        known_TP = window_RW.long()[row.request_T[:, None], column_TP]
        inside_TP = (before.outside >= 1) & (before.outside <= window_RW.shape[1]) & (known_TP != NOTHING)
        found_TP = torch.where(inside_TP, known_TP, found_TP)
    return found_TP.masked_fill(~before.exists, NOTHING)


class PagedConv:
    """The past of one memory layer's convolution in slots; what `Engram.forward(state=...)` takes, each token a sequence of its own.

    slots_NGD: of `new_slots`. past: (kernel - 1) x dilation, how many inputs before its own a token hears.
    """

    def __init__(self, row: FlatRow, slots_NGD: Tensor, past: int) -> None:
        self.row, self.slots_NGD, self.past = row, slots_NGD, past

    def extend(self, inputs_BTGD: Tensor, start_BT: Tensor | None = None) -> Tensor:
        """Inputs [T, 1, G, D] behind those that each token hears, [T, past + 1, G, D]; they are then remembered.

        Raises: ConfigError for starts, which a flat row does not have.
        """
        if start_BT is not None:
            raise ConfigError("a convolution that stops at a text's beginning is not offered in flat rows")
        before = self.row.before(self.past)
        heard_TPGD = _found(inputs_BTGD[:, 0], self.row, before, self.slots_NGD, 0.0)
        return torch.cat((heard_TPGD.masked_fill(~before.exists[..., None, None], 0.0).flip(1), inputs_BTGD), 1)


def _found(values_T: Tensor, row: FlatRow, before: Before, slots_N: Tensor | None, nothing: float) -> Tensor:
    """Values of earlier positions from the row and from the slots, `[T, P, ...]`; this row's are written first."""
    own_TP = values_T[before.index.clamp(min=0)]
    if slots_N is None:
        kept_TP = torch.full_like(own_TP, nothing)
    else:
        slots_N[row.slots_T] = values_T.to(slots_N.dtype)
        kept_TP = slots_N[before.slot].to(own_TP.dtype)
    inside_TP = (before.outside <= 0).view(*before.outside.shape, *[1] * (own_TP.dim() - 2))
    return torch.where(inside_TP, own_TP, kept_TP)


def window_of(texts_QN: Tensor, request_R: Tensor, begun_Q: Tensor, count: int) -> Tensor:
    """The last `count` ids before each piece, int64 [R, count], most recent first, from the texts themselves.

    texts_QN: every request's ids from its first on. request_R: which of them stand in the row. begun_Q: how many ids of each were
    served before.
    """
    at_RP = begun_Q.long()[request_R][:, None] - torch.arange(1, count + 1, device=begun_Q.device)
    ids_RP = texts_QN[request_R[:, None], at_RP.clamp(min=0)].long()
    return ids_RP.masked_fill(at_RP < 0, NOTHING)
