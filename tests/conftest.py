"""One thread for every test, as the arms of a comparison have it, and a small corpus to train on."""

import json
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["NENGRAM_CHECK_SHAPES"] = "1"  # before nengram is imported: shapes at public borders are checked

import pytest
import torch

from nengram.cli import main
from nengram.config import Config, load_config
from nengram.text import Entry, Prepared, prepare
from nengram.train import loop

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


TINY = (  # the demo's config, shrunk for a run of a second
    "budget.scale=2",
    "model.context=32",
    "train.batch=4",
    "train.tokens=640",
    "train.warmup_steps=3",
    "train.eval_tokens=100",
)


@contextmanager
def recorded_batches() -> Iterator[list]:
    """Inside, every batch that the training loop is given is kept in the list."""
    seen, step = [], loop.train_step

    def keep(model, batch, *rest, **options):
        seen.append(batch)
        return step(model, batch, *rest, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "train_step", keep)
        yield seen


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
def corpus_file(tmp_path) -> Path:
    """The small corpus as a user's own file."""
    path = tmp_path / "facts.jsonl"
    lines = [{"key": e.key, "source": e.source, "text": e.text} for e in small_corpus()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def small(config, corpus_file, tmp_path) -> Config:
    """`config` on that file, without the demo's committed results."""
    return config.replace(
        data__corpus=str(corpus_file), data__vocab_size=400, data__cache=str(tmp_path / "cache"), compare__reference=""
    )


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
