"""One thread for every test, as the arms of a comparison have it, and a small corpus to train on."""

import os
import random
import sys

os.environ["NENGRAM_CHECK_SHAPES"] = "1"  # before nengram is imported: shapes at public borders are checked

import pytest
import torch

from nengram.cli import main
from nengram.config import Config, load_config
from nengram.text import Entry, Prepared, prepare

torch.set_num_threads(1)


def small_corpus(entries: int = 300, seed: int = 0) -> list[Entry]:
    """Made-up facts with recurring names: enough structure for a loss to fall, small enough for a second of training."""
    rng = random.Random(seed)
    names = [
        f"{first} {last}" for first in ("Ada", "Alan", "Grace", "Kurt") for last in ("Hopper", "Turing", "Noether")
    ]
    places = ["Lake Geneva", "the Black Sea", "Mount Ararat", "the Milky Way"]
    made = []
    for number in range(entries):
        sentences = " ".join(
            f"{rng.choice(names)} went from {rng.choice(places)} to {rng.choice(places)} in {rng.randint(1800, 1999)}."
            for _ in range(rng.randint(2, 6))
        )
        made.append(Entry(f"entry {number}", "facts" if number % 3 else "notes", sentences))
    return made


def run_command(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `nengram ARGUMENTS` in this process."""
    monkeypatch.setattr(sys, "argv", ["nengram", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Prepared:
    """The small corpus, tokenized with 400 ids."""
    return prepare(small_corpus(), vocab_size=400, cache_folder=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def config() -> Config:
    """The demo's config, shrunk to two blocks of width 64 and 12 steps of 4 x 32 tokens."""
    return load_config(
        "demo",
        (
            "budget.scale=2",
            "model.context=32",
            "train.batch=4",
            "train.tokens=1536",
            "train.warmup_steps=3",
            "train.checkpoint_every=5",
            "train.eval_tokens=500",
        ),
    )
