"""Further passes over the text: each way does what it says, to nothing else, and a resumed run does it alike."""

import json
from collections import Counter

import pytest
import torch

from nengram.address import AddressSpec
from nengram.config import load_config
from nengram.errors import ConfigError
from nengram.model import resolve
from nengram.model.folder import read_tensors
from nengram.text import Batches, prepare
from nengram.train import build_model, train
from nengram.train.passes import SECOND_PASS, FurtherPasses, RareNgrams
from tests.conftest import small_corpus

pytestmark = pytest.mark.filterwarnings("ignore:all .* tokens of the split")


SIZES = {"batch": 8, "context": 32}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A fifth of the small corpus: a pass is 12 batches."""
    return prepare(small_corpus(60, seed=1), vocab_size=400, cache_folder=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def config():
    """A pass, and a third of another: 16 steps."""
    sizes = ("budget.scale=2", "model.context=32", "train.batch=8", f"train.tokens={16 * 256}")
    return load_config("demo", (*sizes, "train.eval_tokens=64", "train.checkpoint_every=100", "train.rare_below=3"))


@pytest.fixture(scope="module")
def whole(config, data, tmp_path_factory):
    """A run of each way, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    for way in SECOND_PASS:
        list(train(config.replace(train__second_pass=way), data, folder / way))
    return folder


def losses(folder) -> list[float]:
    return [json.loads(line)["loss_nats"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_until(config, data, folder, step: int) -> None:
    for record in train(config, data, folder):
        if record.step == step:
            return


@pytest.fixture
def fresh(config, data):
    """A model at its start, and what makes its further passes."""

    def make(**changes):
        changed = resolve(config.replace(**changes), data.tokenizer.get_vocab_size())
        model = build_model(changed, data)
        model.init_weights(changed.train.seed)
        return model, FurtherPasses(model, changed, data.splits["train"], tier="resident")

    return make


@pytest.mark.parametrize("checkpoint_every, killed_at", [(6, 13), (7, 15)], ids=["at its beginning", "inside it"])
@pytest.mark.parametrize("way", SECOND_PASS)
def test_a_run_resumed_in_the_second_pass_is_the_run(config, data, whole, tmp_path, way, checkpoint_every, killed_at):
    config = config.replace(train__second_pass=way, train__checkpoint_every=checkpoint_every)
    run_until(config, data, tmp_path, killed_at)
    list(train(config, data, tmp_path, resume=True))
    assert losses(tmp_path) == losses(whole / way) and len(losses(whole / way)) == 16
    mine, theirs = (read_tensors(folder / "final" / "table-1.safetensors") for folder in (tmp_path, whole / way))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_ways_part_where_the_second_pass_begins(whole):
    keep, *others = (losses(whole / way) for way in SECOND_PASS)
    for other in others:
        assert other[:12] == keep[:12] and other[12] != keep[12]


def test_fresh_tables_are_another_draw_without_a_past_and_only_as_a_pass_begins(fresh):
    model, passes = fresh(train__second_pass="fresh_tables")
    first = model.stores[1]
    for pass_index, begins in ((0, True), (1, False)):
        assert passes.before(pass_index, begins=begins) is None and model.stores[1] is first
    drawn = [first.tensors()["weight"].clone()]
    digest = model.spec.digest
    for pass_index in (1, 2):
        assert passes.before(pass_index, begins=True) is None
        assert model.stores[1].tensors().keys() == {"weight", "step"} and model.stores[1].step == 0
        drawn.append(model.stores[1].tensors()["weight"].clone())
    assert not any(torch.equal(a, b) for a, b in zip(drawn, drawn[1:], strict=False)) and model.spec.digest == digest
    assert all(weight.std().item() == pytest.approx(0.02, rel=0.02) for weight in drawn)


def ngrams_of_window(cids: list[int], starts: list[bool], order: int) -> list[tuple]:
    """At every position, the `order` ids that end there; nothing is seen beyond a start or the window's edge."""
    found = []
    for t in range(len(cids)):
        first = max([0, *(s for s in range(t + 1) if starts[s])])
        reach = [cids[s] if s >= first else None for s in range(t - order + 1, t + 1)]
        found.append(tuple(reach))
    return found


@pytest.mark.parametrize("below", [2, 9])
def test_what_is_masked_are_the_ngrams_that_one_pass_holds_too_rarely(config, data, fresh, below):
    model, passes = fresh(train__second_pass="mask_rare", train__rare_below=below)
    rare = passes.before(1, begins=False)
    assert rare is passes.before(2, begins=True), "counted once"
    packed = data.splits["train"]
    windows = [
        (data.compression.cids_V[ids].tolist(), starts.tolist())
        for batch, _ in Batches(packed, **SIZES, seed=0)
        for ids, starts in zip(batch.ids_BT, batch.start_BT, strict=True)
    ]
    counts = Counter(ngram for window in windows for order in (2, 3) for ngram in ngrams_of_window(*window, order))
    batch, _ = next(iter(Batches(packed, **SIZES, seed=0)))
    step = model.begin(torch.from_numpy(batch.ids_BT), start_BT=torch.from_numpy(batch.start_BT))
    keep_BTS = rare.keep(step.rows)
    masked = 0
    for window, keep_TS in zip(windows, keep_BTS, strict=False):
        for place, order in enumerate((2, 3)):
            slots = slice(place * model.spec.heads, (place + 1) * model.spec.heads)
            for ngram, keep_K in zip(ngrams_of_window(*window, order), keep_TS[:, slots].tolist(), strict=True):
                assert all(keep_K) == any(keep_K) == (counts[ngram] >= below), (ngram, counts[ngram])
                masked += not keep_K[0]
    assert 20 < masked < 400, "of 512, else nothing was tested"


@pytest.mark.parametrize("arm", ["moe", "one_row"])
def test_where_nothing_is_looked_up_nothing_is_rare(fresh, arm):
    model, passes = fresh(budget__arm=arm, train__second_pass="mask_rare")
    rare = passes.before(1, begins=True)
    if arm == "moe":
        assert rare is None
    else:
        assert rare.keep(model.begin(torch.arange(40).view(2, 20)).rows).all()


def test_an_unknown_way_is_refused_before_a_folder_is_begun(config, data, tmp_path):
    with pytest.raises(ConfigError, match=r'"mask_rar" is unknown \(did you mean "mask_rare"\?\); there are keep, '):
        next(train(config.replace(train__second_pass="mask_rar"), data, tmp_path / "run"))
    with pytest.raises(ConfigError, match="train.rare_below must be at least 1, got 0"):
        next(train(config.replace(train__rare_below=0), data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_ngrams_count_is_that_of_the_least_read_of_its_rows():
    spec = AddressSpec.engram(
        compressed_vocab_size=50, rows_per_head=[5, 5], heads=2, layer_ids=[1, 3], pad_cid=0, block_indices=[1, 3]
    )
    counts = {1: torch.arange(40), 3: torch.arange(40) * 2}
    rows = {1: torch.tensor([[[4, 30, 3, 3], [9, 9, 30, 30]]]), 3: torch.tensor([[[30, 30, 1, 30], [2, 9, 30, 30]]])}
    keep_BTS = RareNgrams(spec, counts, 4).keep(rows)
    assert keep_BTS.tolist() == [[[True, True, False, False], [True, True, True, True]]]
    assert not RareNgrams(spec, counts, 5).keep(rows)[0, :, :2].any()
