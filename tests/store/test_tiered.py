"""Hot sets: the most frequent rows, exactly; what is not hot, and nothing else, goes below."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from nengram.errors import CheckpointError, StoreError
from nengram.store import RULES, HostStore, HotSet, ResidentStore, Store, TieredStore, coalesce, make_rule
from nengram.store.hot_set import RowIndex


class Recorded(Store):
    """A store that remembers what it was asked."""

    def __init__(self, below):
        self.below, self.asked = below, []
        self.num_rows, self.row_width, self.codec = below.num_rows, below.row_width, below.codec
        self.dtype, self.device = below.dtype, below.device

    def prefetch(self, rows):
        self.asked.append(rows.tolist())
        return self.below.prefetch(rows)

    def read_coded(self, rows_U):
        return self.below.read_coded(rows_U)

    def update(self, *given):
        self.below.update(*given)

    def tensors(self):
        return self.below.tensors()

    def load_tensors(self, tensors):
        self.below.load_tensors(tensors)


def test_the_store_below_sees_the_distinct_misses_alone():
    below = Recorded(ResidentStore(100, 4))
    store = TieredStore(below, np.array([3, 50, 99]))
    rows = torch.tensor([[50, 7, 3], [7, 99, 2]])
    with store.prefetch(rows) as ticket:
        assert torch.equal(ticket.vectors(), below.below.weight[rows])
    with store.prefetch(torch.tensor([3, 3, 99])) as ticket:
        assert torch.equal(ticket.vectors(), below.below.weight[[3, 3, 99]])
    assert below.asked == [[2, 7]]


def test_a_row_outside_the_table_reaches_nobody():
    below = Recorded(ResidentStore(100, 4))
    store = TieredStore(below, np.array([3]))
    with pytest.raises(StoreError, match="row 100"):
        store.prefetch(torch.tensor([3, 100, 2]))
    assert below.asked == []


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 300), st.integers(0, 6)), st.integers(0, 320))
def test_the_most_frequent_rows_are_hot_and_ties_go_to_the_lower(counts, budget):
    rows, times = np.array(list(counts), np.int64), np.array(list(counts.values()), np.int64)
    seen = sorted((row for row in counts if counts[row]), key=lambda row: (-counts[row], row))
    assert HotSet.from_counts(rows, times, budget).rows_H.tolist() == sorted(seen[:budget])


@settings(deadline=None)
@given(st.sets(st.integers(0, 400)), st.lists(st.integers(0, 400)))
def test_the_index_says_which_rows_are_hot_and_where(hot, rows):
    ordered = sorted(hot)
    ranks = RowIndex(np.array(ordered, np.int64), 401).ranks(np.array(rows, np.int64))
    assert ranks.tolist() == [ordered.index(row) if row in hot else -1 for row in rows]


def test_a_hot_set_comes_back_as_it_was_saved_and_belongs_to_one_table(tmp_path):
    saved = HotSet(np.array([9, 2, 2, 70]), belongs_to="lusab-babad")
    saved.save(tmp_path / "hot")
    found = HotSet.load(tmp_path / "hot", "lusab-babad")
    assert found.rows_H.tolist() == [2, 9, 70] and found.belongs_to == "lusab-babad"
    assert len(HotSet.load(tmp_path / "hot")) == 3
    with pytest.raises(CheckpointError, match='hot: is a hot set for "lusab-babad", this table\'s rows are "gutih"'):
        HotSet.load(tmp_path / "hot", "gutih")


@pytest.mark.parametrize(
    ("rows", "metadata", "words"),
    [
        (np.array([1, 2]), {"format": "other"}, "holds no hot set"),
        (np.array([2, 1]), {"format": "nengram-hot-set-1"}, "the rows of a hot set ascend"),
        (np.array([-2, 1]), {"format": "nengram-hot-set-1"}, "damaged"),
        (np.array([1.0]), {"format": "nengram-hot-set-1"}, "damaged"),
    ],
)
def test_a_file_that_is_no_hot_set_is_refused(rows, metadata, words, tmp_path):
    save_file({"rows": rows}, tmp_path / "hot", metadata)
    with pytest.raises(CheckpointError, match=words):
        HotSet.load(tmp_path / "hot")


def test_a_missing_or_broken_hot_set_is_one_line(tmp_path):
    (tmp_path / "hot").write_bytes(b"\x00" * 30)
    for name in ("hot", "none"):
        with pytest.raises(CheckpointError) as raised:
            HotSet.load(tmp_path / name)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: HotSet(np.array([1.5])), "int64"),
        (lambda: HotSet(np.array([-1])), "no row -1"),
        (lambda: HotSet.from_counts(np.array([1, 1]), np.array([2, 3]), 5), "counted twice"),
        (lambda: HotSet.from_counts(np.array([1, 2]), np.array([2]), 5), "one count for each row"),
        (lambda: HotSet.from_counts(np.array([1]), np.array([2]), -1), "not -1"),
        (lambda: TieredStore(ResidentStore(10, 2), np.array([3, 10])), "row 10, the table only 10"),
    ],
)
def test_what_cannot_be_hot_is_refused(make, words):
    with pytest.raises(StoreError, match=words):
        make()


@pytest.mark.parametrize("name", RULES)
def test_hot_rows_follow_what_the_store_below_learns(name):
    below, twin = HostStore(60, 5), ResidentStore(60, 5)
    store = TieredStore(below, np.arange(0, 60, 2))
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        given = coalesce(torch.randint(0, 60, (30,), generator=generator), torch.randn(30, 5, generator=generator))
        for table in (store, twin):
            table.update(*given, make_rule(name), 0.01)
        with store.prefetch(torch.arange(60)) as ticket:
            assert torch.equal(ticket.vectors(), twin.weight)
    store.load_tensors({"weight": torch.zeros(60, 5)})
    with store.prefetch(torch.arange(60)) as ticket:
        assert not ticket.vectors().any()


def test_hot_rows_are_read_in_pieces(monkeypatch):
    monkeypatch.setattr("nengram.store.tiered.PIECE_BYTES", 100)
    table = ResidentStore(200, 4)
    hot = np.arange(1, 200, 3)
    with TieredStore(table, hot) as store, store.prefetch(torch.arange(200)) as ticket:
        assert torch.equal(ticket.vectors(), table.weight)
