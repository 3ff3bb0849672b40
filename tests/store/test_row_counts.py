"""Row counts equal a plain counter, survive a file, and refuse what is not theirs."""

from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import save_file

from nengram.errors import CheckpointError, StoreError
from nengram.store import row_counts
from nengram.store.row_counts import RowCounts


@pytest.mark.parametrize("merge_at", [1, 7, 10**9])
def test_counts_equal_a_plain_counter(monkeypatch, merge_at):
    monkeypatch.setattr(row_counts, "MERGE_AT", merge_at)
    rng = np.random.default_rng(0)
    counts, plain = RowCounts(50), Counter()
    for shape in ((3, 4), (0,), (5,), (2, 2, 2)):
        rows = rng.integers(0, 50, shape)
        counts.add(rows)
        plain.update(rows.reshape(-1).tolist())
    rows_U, counts_U = counts.arrays()
    assert dict(zip(rows_U.tolist(), counts_U.tolist(), strict=True)) == plain
    assert (np.diff(rows_U) > 0).all()


def test_caller_may_reuse_its_array():
    counts, rows = RowCounts(9), np.array([1, 2])
    counts.add(rows)
    rows[:] = 8
    assert counts.arrays()[0].tolist() == [1, 2]


def test_file_gives_back_what_was_saved(tmp_path):
    counts = RowCounts(9, addresses="ab12", layer_id=3)
    counts.add(np.array([4, 4, 1]))
    counts.save(tmp_path / "c.safetensors")
    again = RowCounts.load(tmp_path / "c.safetensors")
    assert (again.num_rows, again.addresses, again.layer_id) == (9, "ab12", 3)
    assert [array.tolist() for array in again.arrays()] == [[1, 4], [1, 2]]


@pytest.mark.parametrize("rows", [np.array([-1]), np.array([9]), np.array([1.0])])
def test_rows_outside_the_table_are_refused(rows):
    with pytest.raises(StoreError):
        RowCounts(9).add(rows)


def test_other_files_are_refused_by_name(tmp_path):
    path = tmp_path / "other.safetensors"
    with pytest.raises(CheckpointError, match="no such file"):
        RowCounts.load(path)
    save_file({"rows_U": np.array([1])}, path)
    with pytest.raises(CheckpointError, match="other.safetensors: holds no row counts"):
        RowCounts.load(path)
    path.write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError, match="other.safetensors"):
        RowCounts.load(path)


@pytest.mark.parametrize("rows", [[2, 1], [1, 1], [1, 9], [-1, 1]])
def test_rows_that_do_not_ascend_in_the_table_are_damage(tmp_path, rows):
    path = tmp_path / "c.safetensors"
    counts = RowCounts(9)
    counts._rows_U, counts._counts_U = np.array(rows), np.array([1, 1])
    counts.save(path)
    with pytest.raises(CheckpointError, match="damaged"):
        RowCounts.load(path)
