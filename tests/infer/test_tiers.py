"""Where a table lives changes no token and no loss; what is asked for is asked for early, once, and counted."""

import shutil

import numpy as np
import pytest
import torch

from nengram.config import TABLE_TIERS
from nengram.errors import CheckpointError, ConfigError, StoreError
from nengram.infer import generate, load_run
from nengram.infer.hot import RowRecorder, count_rows, counts_name, hot_sets, load_counts, new_counts
from nengram.infer.stats import to_dict, watch
from nengram.model.folder import table_path
from nengram.store import Store
from nengram.train import token_nats


def opened(run_folder, data, tier, **options):
    """The run on a tier; a tiered one keeps a tenth of each table's rows."""
    resident = load_run(run_folder)
    counts = count_rows(resident.model.spec, resident.compression.cids_V, data.splits["train"])
    hot = hot_sets(resident.model.spec, counts, 0.1) if tier == "tiered" else None
    return load_run(run_folder, tier=tier, hot=hot, **options)


@pytest.mark.parametrize("tier", TABLE_TIERS)
def test_every_tier_writes_the_same_tokens_and_has_the_same_losses(run, run_folder, data, tier):
    other = opened(run_folder, data, tier, checked_share=0.2)
    ids = data.splits["test"].ids_N[:9].tolist()
    arguments = {"max_tokens": 40, "temperature": 1.0, "seed": 3, "doc_id": data.doc_id}
    with pytest.warns(UserWarning, match="goes on from the last"):
        expected, found = list(generate(run.model, ids, **arguments)), list(generate(other.model, ids, **arguments))
    assert found == expected
    sizes = {"batch": 4, "context": 32, "tokens": 600}
    losses = [token_nats(one.model, data.splits["dev"], **sizes) for one in (run, other)]
    assert np.array_equal(*losses, equal_nan=True)
    assert all(store.checked_rows > 50 for store in other.model.stores.values())


@pytest.mark.parametrize("tier", TABLE_TIERS)
def test_counters_name_orders_and_add_up(run_folder, data, tier):
    loaded = opened(run_folder, data, tier)
    counters = watch(loaded.model)
    with torch.no_grad():
        loaded.model(torch.from_numpy(data.splits["test"].ids_N[:24].astype(np.int64))[None])
    stats = to_dict(counters, 24)
    layers = stats["layers"]
    assert stats["tokens"] == 24 and list(layers) == [str(layer) for layer in loaded.model.spec.layer_ids]
    for layer in layers.values():
        assert list(layer["labels"]) == ["2-gram", "3-gram"]
        assert layer["total"]["rows"] == 24 * loaded.model.spec.slots
        for counts in (layer["total"], *layer["labels"].values()):
            assert sum(tier["hits"] for tier in counts["tiers"].values()) == counts["distinct"] <= counts["rows"]
    assert ("hot" in layers["1"]["total"]["tiers"]) == (tier == "tiered")


class Slow(Store):
    """Notes the order of asking and waiting."""

    def __init__(self, below: Store, events: list, name: str) -> None:
        self.below, self.events, self.name = below, events, name
        self.num_rows = below.num_rows

    def prefetch(self, rows):
        self.events.append(("asked", self.name))
        ticket = self.below.prefetch(rows)
        vectors = ticket.vectors
        ticket.vectors = lambda: (self.events.append(("waited", self.name)), vectors())[1]
        return ticket

    def update(self, rows_U, grads_UE, rule, lr): ...

    def tensors(self): ...

    def load_tensors(self, tensors): ...

    def read_coded(self, rows_U): ...


def test_rows_are_asked_for_before_the_caller_gets_the_token(run_folder, data):
    loaded, events = load_run(run_folder), []
    loaded.model.stores = {layer: Slow(store, events, layer) for layer, store in loaded.model.stores.items()}
    tokens = generate(loaded.model, [1, 2, 3], max_tokens=3)
    next(tokens)
    assert events == [("asked", 1), ("waited", 1), ("asked", 1)]
    tokens.close()
    next_events = len(events)
    list(generate(loaded.model, [1, 2, 3], max_tokens=3))
    assert [kind for kind, _ in events[next_events:]] == ["asked", "waited"] * 3


def test_evaluation_asks_for_the_next_window_before_it_computes_this_one(run_folder, data):
    loaded, events = load_run(run_folder), []
    loaded.model.stores = {layer: Slow(store, events, layer) for layer, store in loaded.model.stores.items()}
    token_nats(loaded.model, data.splits["dev"], batch=2, context=16, tokens=60)
    kinds = [kind for kind, _ in events]
    assert kinds[:3] == ["asked", "asked", "waited"] and kinds[-2:] == ["waited", "waited"]
    assert kinds.count("asked") == kinds.count("waited") >= 2


def test_a_recording_makes_the_hot_set_that_its_requests_deserve(run_folder, data, tmp_path):
    loaded = load_run(run_folder)
    recorder = RowRecorder(loaded.model.spec)
    loaded.model.observer = recorder
    ids_BT = torch.from_numpy(data.splits["test"].ids_N[:64].astype(np.int64))[None]
    with torch.no_grad():
        loaded.model(ids_BT)
    recorder.save(tmp_path)
    counts = load_counts(tmp_path, loaded.model.spec)
    seen = len(counts[1].arrays()[0])
    share = (seen + 1) / loaded.model.spec.num_rows(1)
    again = load_run(run_folder, tier="tiered", hot=hot_sets(loaded.model.spec, counts, share))
    counters = watch(again.model)
    with torch.no_grad():
        again.model(ids_BT)
    total = to_dict(counters, 64)["layers"]["1"]["total"]
    assert total["tiers"]["hot"]["hits"] == total["distinct"] == seen


def test_counting_a_corpus_is_counting_what_the_model_reads(run, data):
    counts = count_rows(run.model.spec, run.compression.cids_V, data.splits["dev"])
    packed = data.splits["dev"]
    ids_BT = torch.from_numpy(packed.ids_N.astype(np.int64))[None]
    with torch.no_grad():
        step = run.model.begin(ids_BT, start_BT=ids_BT == data.doc_id)
    expected = np.unique(step.rows[1].numpy(), return_counts=True)
    step.release()
    assert all(np.array_equal(*pair) for pair in zip(counts[1].arrays(), expected, strict=True))


def test_counts_of_other_addresses_are_refused(run, tmp_path):
    for layer_id, counts in new_counts(run.model.spec).items():
        counts.addresses = "0" * 64
        counts.save(tmp_path / counts_name(layer_id))
    with pytest.raises(CheckpointError, match="rows of other addresses"):
        load_counts(tmp_path, run.model.spec)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_hot_share_is_a_share(run, share):
    with pytest.raises(ConfigError, match="hot share"):
        hot_sets(run.model.spec, new_counts(run.model.spec), share)


def test_a_table_read_where_it_lies_is_checked_by_its_seal_and_rows_when_asked(run_folder, data, tmp_path):
    copy = shutil.copytree(run_folder, tmp_path / "copy")
    path = table_path(copy / "final", 1)
    content = bytearray(path.read_bytes())
    content[5000] ^= 1  # in a row, which the seal does not cover by itself
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="table-1.safetensors: damaged"):
        load_run(copy)
    loaded = load_run(copy, tier="mapped", checked_share=1.0)
    with pytest.raises(StoreError, match="damaged"), torch.no_grad():
        loaded.model(torch.from_numpy(data.splits["train"].ids_N[:400].astype(np.int64))[None])


def test_another_table_in_its_place_is_refused_by_its_seal(run_folder, tmp_path):
    copy = shutil.copytree(run_folder, tmp_path / "copy")
    loaded = load_run(copy)
    from nengram.memory import save_table

    loaded.model.stores[1].weight[0] += 1
    save_table(table_path(copy / "final", 1), loaded.model.stores[1], loaded.model.spec, 1)
    with pytest.raises(CheckpointError, match="table-1.safetensors: is another table"):
        load_run(copy, tier="mapped")
