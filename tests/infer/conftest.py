"""A finished run, small enough to train while a test waits."""

import pytest

from nengram.config import load_config
from nengram.infer import load_run
from nengram.train import train


@pytest.fixture(scope="session")
def run_folder(data, tmp_path_factory):
    """40 steps of an Engram model with two blocks on the small corpus."""
    config = load_config(
        "demo",
        (
            "budget.scale=2",
            "model.context=32",
            "train.batch=4",
            "train.tokens=5120",
            "train.warmup_steps=3",
            "train.eval_tokens=200",
        ),
    )
    folder = tmp_path_factory.mktemp("runs") / "engram"
    for _ in train(config, data, folder):
        pass
    return folder


@pytest.fixture(scope="session")
def run(run_folder):
    return load_run(run_folder)
