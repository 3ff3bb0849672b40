"""What arrives at a forward pass of transformers, looked at before anything is computed.

Two servers of today, continuous batching and generic backends, hand a model one flat row of many texts and their own cache. A model
without memory gets by on positions; one with memory would read the n-grams of its neighbours, without an error and with the first few
tokens right. So whatever does not say what came before a token is refused here, in one line that says what to pass.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nengram.errors import AddressError, ConfigError
from nengram.hf.lookback import blocked_by, check_cache
from nengram.model.attention import View

NO_POSITION = 2**62


def check_inputs(ids_BT: Tensor | None, inputs_embeds: Tensor | None, cache: Any, others: Mapping[str, Any]) -> None:
    """Raises AddressError without ids, ConfigError for what is not offered: embeddings, inner outputs, foreign caches."""
    if ids_BT is None:
        raise AddressError("memory needs token ids: embeddings (inputs_embeds) have no addresses; pass input_ids")
    if inputs_embeds is not None:
        raise ConfigError("inputs_embeds beside input_ids would not be read: pass input_ids alone")
    for name in ("output_attentions", "output_hidden_states"):
        if others.get(name):
            raise ConfigError(f"{name} is not offered by nengram models")
    if cache is not None:
        check_cache(cache)


def check_history(position_ids: Tensor | None, attention_mask: Any, length: int) -> None:
    """For a chunk of `length` that no cache precedes: raises ConfigError where its positions say that something came before."""
    if position_ids is None:
        return
    blocked_BT = blocked_by(attention_mask, length, 0)
    shown_BT = position_ids if blocked_BT is None else position_ids.masked_fill(blocked_BT, NO_POSITION)
    first_B = shown_BT.amin(1)
    begun_B = first_B[(first_B > 0) & (first_B < NO_POSITION)]
    if len(begun_B):
        raise ConfigError(
            f"position_ids begin at {int(begun_B[0])} and no cache holds what came before: the memory cannot look back; "
            "pass the cache, or lookback_ids"
        )


def view_of(ids_BT: Tensor, attention_mask: Any, position_ids: Tensor | None, seen: int) -> View:
    """Positions and padding of a chunk behind `seen` tokens.

    attention_mask: [B, seen + T] of 0 and 1, or [B, 1, T, keys] boolean or additive, or a dict of those by kind of layer.
    Raises: ConfigError for a mask of another length.
    """
    length = ids_BT.shape[1]
    mask = attention_mask["full_attention"] if isinstance(attention_mask, dict) else attention_mask
    if mask is not None and mask.dim() == 2 and mask.shape[1] != seen + length:
        raise ConfigError(
            f"the attention mask has {mask.shape[1]} columns for {seen} tokens in the cache and {length} new ones: "
            "give one for each"
        )
    if position_ids is None:
        position_ids = torch.arange(seen, seen + length, device=ids_BT.device)[None]
    return View(position_ids.to(ids_BT.device), seen, None if mask is None else _shown(mask, ids_BT.device))


def _shown(mask: Tensor, device: torch.device) -> Tensor | None:
    """What a mask shows, as `View` has it; None: everything."""
    if mask.dim() == 4:
        return (mask[:, 0] >= 0 if mask.is_floating_point() else mask[:, 0].bool()).to(device)
    return None if bool(mask.all()) else mask.bool().to(device)
