"""Views: what padding and odd positions make of attention, in both of its kinds, whole and behind a cache."""

import pytest
import torch

from nengram.config import ModelConfig
from nengram.model.attention import View
from nengram.model.init import Draws
from nengram.model.latent_attention import ATTENTIONS
from nengram.model.transformer import rope_of

SIZES = {"width": 32, "heads": 4, "kv_heads": 2, "head_width": 8, "rope_width": 4, "kv_rank": 12}
CHUNKS = [(0, 4), (4, 1), (5, 4)]
LENGTH, PADS = 9, 3


@pytest.fixture(params=ATTENTIONS)
def layer(request):
    config = ModelConfig(**SIZES, attention=request.param)
    layer = ATTENTIONS[request.param].of(config, rope_of(config))
    layer.init_weights(Draws(0), 1.0)
    return layer.requires_grad_(False)


def hidden(length: int = LENGTH) -> torch.Tensor:
    return torch.randn(2, length, 32, generator=torch.Generator().manual_seed(0))


def by_chunks(layer, hidden_BTD: torch.Tensor, chunks, view) -> torch.Tensor:
    cache = layer.new_cache(2, hidden_BTD.shape[1])
    return torch.cat([layer(hidden_BTD[:, at : at + n], cache, view(at, n)) for at, n in chunks], dim=1)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_a_view_of_everything_is_no_view(layer, length):
    hidden_BTD = hidden(length)
    whole = layer(hidden_BTD)
    assert torch.equal(layer(hidden_BTD, None, View(torch.arange(length)[None])), whole)
    shown = View(torch.arange(length)[None], 0, torch.ones(2, length, dtype=torch.bool))
    torch.testing.assert_close(layer(hidden_BTD, None, shown), whole)


@pytest.mark.parametrize("shows", [False, True])
def test_chunks_through_views_are_the_whole(layer, shows):
    def view(at: int, n: int) -> View:
        return View(torch.arange(at, at + n)[None], at, torch.ones(2, at + n, dtype=torch.bool) if shows else None)

    torch.testing.assert_close(by_chunks(layer, hidden(), CHUNKS, view), layer(hidden()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunks", [[(0, LENGTH + PADS)], [(0, 2), (2, 1), (3, 5), (8, 4)], [(0, 1), (1, 11)]])
def test_what_is_not_shown_changes_nothing(layer, chunks):
    """Left padding, cut inside it or behind it: the text sees itself alone, and no row is without a number."""
    padded_BTD = torch.cat((7 * torch.ones(2, PADS, 32), hidden()), dim=1)
    shown_BT = (torch.arange(LENGTH + PADS) >= PADS).expand(2, -1)

    def view(at: int, n: int) -> View:
        return View((torch.arange(at, at + n) - PADS).clamp(min=0)[None], at, shown_BT[:, : at + n])

    found = by_chunks(layer, padded_BTD, chunks, view)
    torch.testing.assert_close(found[:, PADS:], layer(hidden()), atol=1e-5, rtol=1e-5)
    assert found.isfinite().all()


def test_keys_beyond_what_is_filled_are_not_seen(layer):
    """A cache that hands out all of its places, filled or not, as a static one does."""
    kind = type(layer.new_cache(2, 1))

    class Static(kind):
        def append(self, *new):
            super().append(*new)
            places = [
                tensor
                for tensor in (getattr(self, name, None) for name in ("keys", "values", "both"))
                if tensor is not None
            ]
            return places[0] if len(places) == 1 else tuple(places)

    cache = layer.new_cache(2, 20)
    for tensor in vars(cache).values():
        if isinstance(tensor, torch.Tensor):
            tensor.fill_(5.0)
    cache.__class__ = Static
    parts = [layer(hidden()[:, at : at + n], cache, View(torch.arange(at, at + n)[None], at)) for at, n in CHUNKS]
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(hidden()), atol=1e-5, rtol=1e-5)


def test_a_query_may_be_shown_keys_of_its_own(layer):
    """[B, T, keys]: here every token sees itself and the one before it."""
    near = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().triu(-1).expand(2, -1, -1)
    found = layer(hidden(), None, View(torch.arange(LENGTH)[None], 0, near))
    pair = layer(hidden()[:, 4:6], None, View(torch.arange(4, 6)[None]))
    torch.testing.assert_close(found[:, 5], pair[:, 1], atol=1e-5, rtol=1e-5)
