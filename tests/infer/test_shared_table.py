"""Two memory blocks on one table: trained, saved, resumed, read from every tier and generated from like any other run."""

import pytest
import torch

from nengram.config import TABLE_TIERS, load_config
from nengram.infer import generate, load_run
from nengram.infer.hot import count_rows, hot_sets
from nengram.model.folder import read_tensors
from nengram.train import train

SIZES = ("budget.scale=2", "model.context=32", "train.batch=4", "train.tokens=1536", "train.eval_tokens=200")


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """One run, whole, and killed at step 7 and resumed from its checkpoint at 5."""
    config = load_config("demo", (*SIZES, "train.checkpoint_every=5"))
    config = config.replace(memory__blocks=[0, 1], memory__shared_table=True)
    folder = tmp_path_factory.mktemp("shared")
    list(train(config, data, folder / "whole"))
    for record in train(config, data, folder / "cut"):
        if record.step == 7:
            break
    list(train(config, data, folder / "cut", resume=True))
    return folder


def test_one_table_is_kept_and_a_resumed_run_is_the_run(runs):
    assert [path.name for path in (runs / "whole" / "final").glob("table-*")] == ["table-0.safetensors"]
    for name in ("model.safetensors", "table-0.safetensors"):
        mine, theirs = (read_tensors(runs / run / "final" / name) for run in ("cut", "whole"))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_every_tier_writes_the_same_tokens(runs, data):
    resident = load_run(runs / "whole")
    counts = count_rows(resident.model.spec, resident.compression.cids_V, data.splits["train"])
    hot, ids = hot_sets(resident.model.spec, counts, 0.1), data.splits["test"].ids_N[:9].tolist()
    assert list(hot) == [0]
    written = [
        list(
            generate(
                load_run(runs / "whole", tier=tier, hot=hot if tier == "tiered" else None).model, ids, max_tokens=9
            )
        )
        for tier in TABLE_TIERS
    ]
    assert all(tokens == written[0] for tokens in written) and len(written[0]) == 9
