"""Nothing here may reach a network, and models whose memory decides what they say are built once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import pytest

from nengram.hf.auto import register
from tests.hf.strong import VARIANTS, Strong, build

register()


@pytest.fixture(scope="session")
def strong(tmp_path_factory) -> Strong:
    """The strong model as it comes: grouped-query attention, convolution, compressed ids."""
    return build(tmp_path_factory.mktemp("strong"))


@pytest.fixture(scope="session", params=VARIANTS)
def any_strong(request, tmp_path_factory) -> Strong:
    """Every variant of the strong model."""
    return build(tmp_path_factory.mktemp("strong"), request.param)


@pytest.fixture(scope="session")
def draft(tmp_path_factory) -> Strong:
    """Another model with the same tokenizer: what it drafts is mostly wrong, and has to be taken back."""
    return build(tmp_path_factory.mktemp("draft"), seed=1)
