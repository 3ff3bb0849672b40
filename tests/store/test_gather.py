"""The compiled gather: the rows asked for, byte for byte; none outside the table; nothing of the wrong size."""

import mmap
import threading

import numpy as np
import pytest

from nengram.store.gather import AHEAD, gather_rows


def table_of(num_rows, row_bytes):
    return np.random.default_rng(row_bytes).integers(0, 256, (num_rows, row_bytes), dtype=np.uint8)


@pytest.mark.parametrize("row_bytes", [1, 7, 64, 65, 130, 256, 264, 5000])
@pytest.mark.parametrize("count", [0, 1, AHEAD - 1, AHEAD, AHEAD + 1, 500])
def test_rows_are_those_of_the_table(row_bytes, count):
    table_RB = table_of(97, row_bytes)
    rows_N = np.random.default_rng(count).integers(0, 97, count)
    out_NB = np.full((count, row_bytes), 0xAA, dtype=np.uint8)
    assert gather_rows(table_RB, rows_N, out_NB) == -1
    assert np.array_equal(out_NB, table_RB[rows_N])


def test_first_last_and_repeated_rows():
    table_RB = table_of(5, 8)
    rows_N = np.array([4, 0, 4, 4, 0, 2])
    out_NB = np.empty((6, 8), dtype=np.uint8)
    assert gather_rows(table_RB, rows_N, out_NB) == -1
    assert np.array_equal(out_NB, table_RB[rows_N])


@pytest.mark.parametrize("outside", [-1, 40, 2**40, 2**62, -(2**62), np.iinfo(np.int64).min, np.iinfo(np.int64).max])
@pytest.mark.parametrize("place", [0, 3, AHEAD + 4, 59])
def test_the_first_row_outside_is_named_and_nothing_is_read_for_it(outside, place):
    table_RB = table_of(40, 8)
    rows_N = np.arange(60) % 40
    rows_N[place:] = outside
    out_NB = np.full((60, 8), 0xAA, dtype=np.uint8)
    assert gather_rows(table_RB, rows_N, out_NB) == place
    assert np.array_equal(out_NB[:place], table_RB[rows_N[:place]])
    assert (out_NB[place:] == 0xAA).all()


def test_a_read_only_map_serves_as_a_table(tmp_path):
    path = tmp_path / "rows"
    table_RB = table_of(1000, 8)
    table_RB.tofile(path)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        mapped_RB = np.frombuffer(mapped, dtype=np.uint8).reshape(1000, 8)
        out_NB = np.empty((3, 8), dtype=np.uint8)
        rows_N = np.array([999, 0, 7])
        rows_N.flags.writeable = False
        assert gather_rows(mapped_RB, rows_N, out_NB) == -1
        assert np.array_equal(out_NB, table_RB[rows_N])
        del mapped_RB


def test_an_output_of_another_size_is_refused_before_a_byte_is_written():
    table_RB, rows_N = table_of(10, 8), np.arange(4)
    for shape in ((3, 8), (5, 8), (4, 7), (4, 9)):
        out_NB = np.full(shape, 0xAA, dtype=np.uint8)
        with pytest.raises(ValueError, match="one row of the table's bytes for each row"):
            gather_rows(table_RB, rows_N, out_NB)
        assert (out_NB == 0xAA).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda table, rows, out: (table[:, ::2], rows, out[:, ::2]),
        lambda table, rows, out: (table, rows[::2], out[::2].copy()),
        lambda table, rows, out: (table, rows, np.asfortranarray(out)),
        lambda table, rows, out: (table, rows.astype(np.float64), out),
        lambda table, rows, out: (table.view(np.uint64), rows, out),
        lambda table, rows, out: (table, rows, out.view(np.int8)),
        lambda table, rows, out: (table.ravel(), rows, out),
    ],
)
def test_other_layouts_and_dtypes_are_refused(change):
    given = change(table_of(10, 8), np.arange(4), np.zeros((4, 8), dtype=np.uint8))
    with pytest.raises(TypeError):
        gather_rows(*given)


def test_an_output_that_may_not_be_written_is_refused():
    out_NB = np.zeros((4, 8), dtype=np.uint8)
    out_NB.flags.writeable = False
    with pytest.raises(TypeError):
        gather_rows(table_of(10, 8), np.arange(4), out_NB)


def test_threads_gather_at_once():
    table_RB = table_of(1000, 264)
    wrong = []

    def work(seed):
        rng, out_NB = np.random.default_rng(seed), np.empty((300, 264), dtype=np.uint8)
        for _ in range(50):
            rows_N = rng.integers(0, 1000, 300)
            if gather_rows(table_RB, rows_N, out_NB) != -1 or not np.array_equal(out_NB, table_RB[rows_N]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
