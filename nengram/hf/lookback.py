"""Where a memory's past lives while transformers generates: in transformers' own cache, as one more layer of it.

Rows depend on the last N-1 ids and a convolution on its last few inputs. A server, a beam search or a drafting model moves
sequences about, and whatever does not move with the cache is silently wrong: the text goes on, with another sequence's n-grams, and
the first few tokens even agree. So the past is a layer appended to `cache.layers`. Reordering, repeating, selecting, cropping,
resetting and copying a cache then carry it along, as they carry keys and values.

What may be looked back upon is what the attention mask shows, never what equals a pad id: a left pad is no text. Rows that hold several
texts without saying where each begins (packed training rows, continuous batching) cannot be served by any cache, and are refused.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

from nengram.address import Addresser
from nengram.errors import AddressError, ConfigError
from nengram.memory import MemoryStep
from nengram.store import Store

try:
    from transformers.cache_utils import DummyLayer
except ImportError:  # 5.19, which vLLM pins, has none; a layer without keys was one of linear attention
    from transformers.cache_utils import LinearAttentionLayer as DummyLayer

NOTHING = -1  # in place of an id that must not be seen: before the beginning, or padding
FLAT = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "block_table")  # what callers pass beside rows of several texts


class MemoryStates(DummyLayer):
    """A cache layer without keys: the past of every memory layer, `[B, past, ...]` under a name each.

    Only what the next forward needs is kept, unless the past is recorded: then everything since the last `crop`, which can
    take it back (assisted decoding records, verifies, and crops).

    code: word-code of the address spec that the past belongs to. seen: how many positions went by.
    """

    def __init__(self, code: str) -> None:
        super().__init__()
        self.code, self.seen, self.record_past = code, 0, False
        self.pasts: dict[str, int] = {}
        self.states: dict[str, Tensor] = {}

    def extend(self, name: str, new_BT: Tensor, past: int, before: float = 0) -> Tensor:
        """The last `past` positions under `name` and the new ones, `[B, past + T, ...]`, which are then remembered.

        before: what stands in for positions before the first.
        """
        if name not in self.states:
            beginning = (len(new_BT), past, *new_BT.shape[2:])
            self.pasts[name], self.states[name] = past, new_BT.new_full(beginning, before)
        whole = torch.cat((self.states[name].to(new_BT.dtype), new_BT.detach()), 1)
        self.states[name] = whole if self.record_past else _last(whole, past)
        if not new_BT.requires_grad:
            return _last(whole, past + new_BT.shape[1])
        return torch.cat((_last(whole[:, : whole.shape[1] - new_BT.shape[1]], past), new_BT), 1)

    def activate_past_recording(self) -> None:
        """Keep everything from here on, until the next `crop`."""
        self.record_past = True

    def forget_beyond(self, slack: int) -> None:
        """Keep `slack` recorded positions or up to twice as many, of which a `crop` may take `slack` back."""
        for name, state in self.states.items():
            past = self.pasts[name]
            if state.shape[1] > past + 2 * slack:
                self.states[name] = _last(state, past + slack)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last |tokens_to_remove| positions. Raises ConfigError when they were not recorded."""
        removed = abs(int(tokens_to_remove))
        for name, state in self.states.items():
            if state.shape[1] < self.pasts[name] + removed:
                raise ConfigError(
                    f"{removed} tokens cannot be taken back: cache.activate_past_recording() before the forward that adds them"
                )
            self.states[name] = _last(state[:, : state.shape[1] - removed], self.pasts[name])
        self.seen -= removed

    def reset(self) -> None:
        """As before the first token."""
        self.seen = 0
        self.pasts.clear()
        self.states.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence b goes on as sequence `beam_idx[b]`."""
        self._all(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        self._all(lambda state: state[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times, side by side."""
        self._all(lambda state: state.repeat_interleave(repeats, dim=0))

    def _all(self, change: Callable[[Tensor], Tensor]) -> None:
        self.states = {name: change(state) for name, state in self.states.items()}


class CachedConv:
    """The convolution state of one memory layer inside a cache; what `Engram.forward(state=...)` takes."""

    def __init__(self, states: MemoryStates, name: str, past: int) -> None:
        self.states, self.name, self.past = states, name, past

    def extend(self, inputs_BTGD: Tensor, start_BT: Tensor | None = None) -> Tensor:
        """The remembered inputs followed by new ones, `[B, P + T, G, D]`. Raises ConfigError for starts inside the rows."""
        if start_BT is not None:
            raise ConfigError("a convolution that stops at a text's beginning is not offered beside a cache")
        return self.states.extend(self.name, inputs_BTGD, self.past)


class Lookback:
    """The integers of a forward pass inside transformers: ids, mask and cache in, a `MemoryStep` out.

    addresser: of the memory layers. cids_V: compressed id of every token id, int64 [V]. blocks: how many layers the model's own cache
    has, after which the memory's is put (a cache may be made before it has any).
    """

    def __init__(self, addresser: Addresser, cids_V: Tensor, blocks: int) -> None:
        self.addresser, self.cids_V, self.blocks = addresser, cids_V, blocks
        self.past = addresser.spec.max_order - 1
        self._code = addresser.spec.word_code

    def begin(
        self,
        stores: Mapping[int, Store],
        ids_BT: Tensor | None,
        *,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        start_BT: Tensor | None = None,
        lookback_ids: Tensor | None = None,
        control: Callable | None = None,
        frozen: bool = False,
        **others: Any,
    ) -> MemoryStep:
        """Rows of every memory layer for this chunk, asked for; the cache has then seen the chunk.

        ids_BT: int64 [B, T]. attention_mask: as transformers passes it on: [B, past + T] of 0 and 1, or [B, 1, T, keys] boolean or
            additive, or a dict of those by kind of layer. start_BT: true where a text begins inside a row: packed rows.
        lookback_ids: the last N-1 ids before every token, most recent first, [B, T, N-1], -1 for none: rows without any order.
            Each token is then a sequence of its own: vectors are [B T, 1, S, E], and no cache is read.
        control, frozen: as `MemoryStep.begin`. others: further arguments of the model, looked at for signs of packed rows.
        Raises: AddressError without ids; ConfigError for packed rows that say nothing of their texts, an unknown or paged cache,
            and a cache whose tokens this memory has not seen.
        """
        if ids_BT is None:
            raise AddressError(
                "memory needs token ids: embeddings (inputs_embeds) have no addresses; pass input_ids, alone or as well"
            )
        how = {"control": control, "frozen": frozen}
        if lookback_ids is not None:
            before_NP = self._cids(lookback_ids.flatten(0, 1).flip(1), lookback_ids.flatten(0, 1).flip(1) == NOTHING)
            whole = torch.cat((before_NP, self.cids_V[ids_BT.reshape(-1, 1)]), 1)
            return self._behind(whole, stores, None, **how)
        states = None if cache is None else self.states_of(cache)
        blocked_BT = blocked_by(attention_mask, ids_BT.shape[1], 0 if states is None else states.seen)
        if start_BT is None:
            _refuse_packed(position_ids, blocked_BT, others)
        elif states is not None:
            raise ConfigError("packed rows (start_BT) and a cache exclude each other: use_cache=False")
        cids_BT = self._cids(ids_BT, blocked_BT)
        if states is None:
            cids_BT = cids_BT if blocked_BT is None else cids_BT.clamp_min(0)
            places = {"start_BT": start_BT, "blocked_BT": blocked_BT}
            return MemoryStep.begin(cids_BT, self.addresser, stores, **places, **how)
        whole = states.extend("ids", cids_BT, self.past, NOTHING)
        states.seen += ids_BT.shape[1]
        return self._behind(whole, stores, blocked_BT, **how)

    def states_of(self, cache: Any) -> MemoryStates:
        """The memory's layer of a cache, put there before its first token. Raises ConfigError as `begin`."""
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        check_cache(cache)
        code, filled = self._code, _length(cache)
        states = next((layer for layer in cache.layers if isinstance(layer, MemoryStates)), None)
        if states is None:
            while len(cache.layers) < self.blocks and cache.layer_class_to_replicate is not None:
                cache.layers.append(cache.layer_class_to_replicate())
            states = MemoryStates(code)
            cache.layers.append(states)
        if states.code != code:
            raise ConfigError(f"the cache belongs to a memory addressed by {states.code}, this one is {code}")
        if filled is not None and filled != states.seen:
            raise ConfigError(
                f"the cache holds {filled} tokens, of which this memory has seen {states.seen}: begin with an empty cache"
            )
        return states

    def conv_state(self, cache: Any, layer_id: int, memory: Any) -> CachedConv | None:
        """What `memory`, the layer with this id, remembers of its convolution; None without cache or convolution."""
        if cache is None or not getattr(memory, "conv", False):
            return None
        return CachedConv(self.states_of_begun(cache), f"conv.{layer_id}", (memory.kernel - 1) * memory.dilation)

    @staticmethod
    def states_of_begun(cache: Any) -> MemoryStates:
        """The memory's layer of a cache that `begin` was given. Raises ConfigError if it was not."""
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        for layer in getattr(cache, "layers", ()):
            if isinstance(layer, MemoryStates):
                return layer
        raise ConfigError("this cache has no memory states: begin the step with it first")

    def _cids(self, ids_BT: Tensor, blocked_BT: Tensor | None) -> Tensor:
        """Compressed ids, `NOTHING` where there is no text, whatever id stands there."""
        if blocked_BT is None:
            return self.cids_V[ids_BT]
        return self.cids_V[ids_BT.masked_fill(blocked_BT, 0)].masked_fill(blocked_BT, NOTHING)

    def _behind(self, whole: Tensor, stores: Mapping[int, Store], blocked_BT: Tensor | None, **how: Any) -> MemoryStep:
        """The step of `whole` but its first `past` positions, compressed ids that are only looked back on."""
        nothing = whole == NOTHING
        step = MemoryStep.begin(
            whole.clamp_min(0), self.addresser, stores, blocked_BT=nothing, context=self.past, **how
        )
        step.blocked_BT = blocked_BT
        return step


def check_cache(cache: Any) -> None:
    """Raises ConfigError for what is not transformers' own cache of sequences."""
    if not isinstance(cache, Cache):
        raise ConfigError(
            f"a {type(cache).__name__} keeps no order of tokens that a memory could look back on (paged caches, "
            "continuous batching): serve in plain mode, or pass lookback_ids"
        )


def blocked_by(attention_mask: Any, length: int, seen: int) -> Tensor | None:
    """True where the last `length` positions are no text, [B, T]; None where all are. `seen` positions lie before them."""
    if isinstance(attention_mask, Mapping):
        masks = [mask for mask in attention_mask.values() if isinstance(mask, Tensor)]
        attention_mask = attention_mask.get("full_attention", masks[0] if masks else None)
    if not isinstance(attention_mask, Tensor):
        return None
    if attention_mask.dim() == 2:
        blocked_BT = attention_mask[:, -length:] == 0
    elif attention_mask.dim() == 4:
        keys = attention_mask.shape[3]
        first = seen if seen + length <= keys else keys - length  # a window that slid on holds the last keys
        itself_BT = attention_mask[:, 0].diagonal(first, 1, 2)[:, :length]
        blocked_BT = ~itself_BT if itself_BT.dtype == torch.bool else itself_BT < 0
    else:
        raise ConfigError(f"an attention mask is [B, past + T] or [B, 1, T, keys], got {list(attention_mask.shape)}")
    return blocked_BT if bool(blocked_BT.any()) else None


def _refuse_packed(position_ids: Tensor | None, blocked_BT: Tensor | None, others: Mapping[str, Any]) -> None:
    """Raises ConfigError where one row holds several texts: positions that do not count on, or lengths given beside them."""
    flat = [name for name in FLAT if others.get(name) is not None]
    if position_ids is not None and not flat:
        positions_BT = position_ids if position_ids.dim() == 2 else position_ids[0]
        jumps_BT = positions_BT.diff(dim=1) != 1
        if blocked_BT is not None:
            jumps_BT = jumps_BT & ~blocked_BT[:, 1:] & ~blocked_BT[:, :-1]
        flat = ["position_ids that begin anew"] if bool(jumps_BT.any()) else []
    if flat:
        raise ConfigError(
            f"rows that hold several texts ({flat[0]}) do not say which ids a memory may look back on: one text a row, "
            "or pass start_BT (where each begins) or lookback_ids"
        )


def _length(cache: Cache) -> int | None:
    """How many tokens a cache holds; None where no layer counts them."""
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return None


def _last(whole: Tensor, length: int) -> Tensor:
    return whole[:, whole.shape[1] - length :]
