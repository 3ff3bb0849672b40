"""A table read out of its file: faults become one line, no buffer is lent while somebody writes to it, files are watched."""

import gc
import os
import threading
import time
import warnings

import numpy as np
import pytest
import torch

from nengram.errors import CheckpointError, StoreError
from nengram.store import Counters, MappedStore, SparseAdam, create_zero_table, make_codec, page_reader, write_table
from nengram.store.page_reader import READS

ROWS, WIDTH = 6000, 64
CODEC = make_codec("fp32", WIDTH)


def vectors_of(seed: int) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


def write(path, seed=0, **options):
    write_table(path, CODEC, ROWS, {}, blocks=[CODEC.encode(vectors_of(seed)).numpy()], **options)
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "table")


@pytest.fixture(params=READS)
def store(request, path):
    with MappedStore(path, reads=request.param, poison_released=True) as store:
        yield store


@pytest.fixture
def pooled(monkeypatch):
    """Everything goes to the pool, in small pieces."""
    monkeypatch.setattr(page_reader, "INLINE_ROWS", 0)
    monkeypatch.setattr(page_reader, "ROWS_PER_THREAD", 4)


def read(store, rows):
    with store.prefetch(rows) as ticket:
        return ticket.vectors().clone()


def test_a_file_cut_short_is_refused_in_one_line(store, path):
    last = torch.tensor([ROWS - 1, 0])
    assert torch.equal(read(store, last), vectors_of(0)[last])
    os.truncate(path, 4096 + 100)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"table: was cut from [\d,]+ to 4,196 bytes while it was open") as raised:
            read(store, last)
        assert "\n" not in str(raised.value)


def test_a_file_cut_short_between_prefetch_and_vectors_is_refused(path, pooled):
    with MappedStore(path) as store:
        ticket = store.prefetch(torch.tensor([ROWS - 1]))
        os.truncate(path, 5000)
        with pytest.raises(StoreError, match="was cut"):
            ticket.vectors()
        ticket.release()


def test_a_file_changed_in_place_is_refused(store, path):
    read(store, torch.tensor([1]))
    time.sleep(0.02)  # a coarse clock may not tell two writes apart
    with open(path, "r+b") as file:
        file.seek(8192)
        file.write(b"other rows")
    with pytest.raises(StoreError, match="was changed while it was open: its rows may be of two tables; open it again"):
        read(store, torch.tensor([1]))


@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_a_file_that_another_took_the_place_of_is_still_the_table_that_was_opened(store, path, tmp_path, how):
    rows = torch.arange(0, ROWS, 7)
    if how == "replaced":
        os.replace(write(tmp_path / "other", seed=1), path)
    else:
        path.unlink()
    with pytest.warns(UserWarning, match="replaced or removed while it was open"):
        assert torch.equal(read(store, rows), vectors_of(0)[rows])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert torch.equal(read(store, rows), vectors_of(0)[rows])


def test_a_shard_that_was_changed_is_noticed_where_it_is_touched(tmp_path):
    folder = write(tmp_path / "folder", shards=4)
    with MappedStore(folder) as store:
        shards = sorted(folder.glob("*.safetensors"))
        os.truncate(shards[2], 5000)
        assert torch.equal(read(store, torch.tensor([0, ROWS - 1])), vectors_of(0)[[0, ROWS - 1]])
        with pytest.raises(StoreError, match=f"{shards[2].name}: was cut"):
            read(store, torch.tensor([0, ROWS // 2 + 10]))


def test_what_fails_in_a_thread_is_one_line_in_vectors(path, pooled, monkeypatch):
    with MappedStore(path, poison_released=True) as store:
        monkeypatch.setattr(store._pages._reads, "finish", lambda rows_U, missed_M, out_UB: 2)
        ticket = store.prefetch(torch.tensor([70, 5, 900]))
        for _ in range(2):
            with pytest.raises(StoreError, match="row 900 of .*table could not be read"):
                ticket.vectors()
        ticket.release()
        monkeypatch.undo()
        assert torch.equal(read(store, torch.tensor([70, 5])), vectors_of(0)[[70, 5]])


@pytest.fixture
def slow(path, pooled, monkeypatch):
    """A store whose threads write only when `go` is set."""
    with MappedStore(path, threads=2, poison_released=True) as store:
        go, finish = threading.Event(), store._pages._reads.finish

        def late(*given):
            go.wait(10)
            return finish(*given)

        monkeypatch.setattr(store._pages._reads, "finish", late)
        monkeypatch.setattr(
            store._pages._reads, "begin", lambda rows_U, begin, end, stop, out, missed: _all(begin, end, missed)
        )
        yield store, go
        go.set()


def _all(begin, end, missed_U):
    """Every row is missing."""
    missed_U[begin:end] = np.arange(begin, end)
    return end, end - begin


def test_a_released_ticket_gives_its_buffer_back_only_when_nobody_writes(slow):
    store, go = slow
    ticket = store.prefetch(torch.tensor([4, 5, 6]))
    free = store._delivery._staging._free
    releasing = threading.Thread(target=ticket.release)
    releasing.start()
    releasing.join(0.05)
    assert releasing.is_alive() and not free
    go.set()
    releasing.join(10)
    assert not releasing.is_alive() and len(free) == 1
    assert free[0].buffer.isnan().all()  # written, then poisoned: in this order


def test_a_dropped_ticket_disturbs_nobody(slow):
    store, go = slow
    store.prefetch(torch.tensor([4, 5, 6]))
    gc.collect()
    ticket = store.prefetch(torch.tensor([1, 2, 3]))
    go.set()
    assert torch.equal(ticket.vectors(), vectors_of(0)[[1, 2, 3]])
    ticket.release()
    assert len(store._delivery._staging._free) == 1  # the other was never given back, hence is never lent again


def test_prefetch_does_not_wait_for_the_reads(slow):
    store, go = slow
    tickets = [store.prefetch(torch.tensor([first, first + 1])) for first in (0, 10, 20)]
    go.set()
    for first, ticket in zip((0, 10, 20), tickets, strict=True):
        assert torch.equal(ticket.vectors(), vectors_of(0)[[first, first + 1]])
        ticket.release()


def test_many_threads_may_ask(store):
    expected, wrong = vectors_of(0), []

    def ask(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(20):
            rows = torch.randint(0, ROWS, (40,), generator=generator)
            if not torch.equal(read(store, rows), expected[rows]):
                wrong.append(seed)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_ticket_that_outlives_its_store_reads_nothing(store):
    ticket = store.prefetch(torch.tensor([3, 9]))
    store.close()
    with pytest.raises(StoreError, match="was closed"):
        ticket.vectors()
    ticket.release()


def test_a_closed_store_says_so_and_leaves_no_thread(path, pooled):
    store = MappedStore(path)
    read(store, torch.tensor([3, 9]))
    assert any(thread.name.startswith("nengram-rows") for thread in threading.enumerate())
    store.close()
    store.close()
    assert not any(thread.name.startswith("nengram-rows") for thread in threading.enumerate())
    with pytest.raises(StoreError, match="was closed"):
        store.prefetch(torch.tensor([3]))


@pytest.mark.skipif(not getattr(os, "fork", None), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_makes_its_own_threads(path, pooled):
    with MappedStore(path) as store:
        read(store, torch.tensor([3, 9]))
        child = os.fork()
        if child == 0:
            same = torch.equal(read(store, torch.tensor([30, 90])), vectors_of(0)[[30, 90]])
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(read(store, torch.tensor([3, 9])), vectors_of(0)[[3, 9]])


def test_it_only_reads(path):
    with MappedStore(path) as store:
        for call in (
            store.tensors,
            lambda: store.load_tensors({}),
            lambda: store.update(torch.tensor([1]), torch.ones(1, WIDTH), SparseAdam(), 0.1),
        ):
            with pytest.raises(StoreError, match="a mapped table is only read"):
                call()


def test_what_is_no_table_is_refused_and_nothing_stays_open(tmp_path):
    (tmp_path / "table").write_bytes(b"no table")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with pytest.raises(CheckpointError):
        MappedStore(tmp_path / "table")
    with pytest.raises(StoreError, match="cached or mapping"):
        MappedStore(write(tmp_path / "good"), reads="telepathy")
    gc.collect()
    assert before == (len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0)


@pytest.mark.parametrize("reads", READS)
def test_rows_far_into_an_empty_table_are_zeros(tmp_path, reads):
    codec = make_codec("fp8", 256)
    create_zero_table(tmp_path / "table", codec, 50_000_000, {})  # 13 GB, none of it on the disk
    with MappedStore(tmp_path / "table", reads=reads) as store:
        assert not read(store, torch.tensor([49_999_999, 0, 33_333_333])).any()


@pytest.mark.skipif(page_reader.best_reads() != "cached", reason="this system does not tell what is in memory")
def test_counters_tell_the_page_cache_from_the_disk(path):
    with MappedStore(path) as store:
        file = store.reader.files[0]
        os.fsync(file.fd)
        os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        rows = torch.arange(16, 1600)  # 256 bytes each: 16 to a page
        counts = []
        for _ in range(2):
            store.counters = Counters()
            assert torch.equal(read(store, rows), vectors_of(0)[rows])
            counts.append(store.counters.to_dict()["total"]["tiers"])
        first, second = counts
        if first["disk"]["hits"] == 0:
            pytest.skip("this file system does not drop its cache")
        assert first["disk"]["reads"] <= 99 and first["disk"]["bytes"] == 4096 * first["disk"]["reads"]
        assert first["disk"]["hits"] + first["page cache"]["hits"] == len(rows)
        assert second["disk"] == {"hits": 0, "reads": 0, "bytes": 0}


@pytest.mark.skipif(
    page_reader.best_reads() != "cached", reason="only such reads tell a row in memory from one that is not"
)
def test_after_a_request_that_fetched_rows_the_pool_has_the_next_one(path):
    rows = torch.arange(20)
    with MappedStore(path) as store:
        pages = store._pages
        assert torch.equal(read(store, rows), vectors_of(0)[rows])
        assert not pages.is_cold and pages._pool is None  # just written, hence in the page cache
        os.posix_fadvise(store.reader.files[0].fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert torch.equal(read(store, rows), vectors_of(0)[rows])
        if not pages.is_cold:
            pytest.skip("this file system keeps a file's pages in memory")
        assert torch.equal(read(store, rows), vectors_of(0)[rows])
        assert pages._pool is not None and not pages.is_cold
