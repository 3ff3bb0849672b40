"""A checked store lets right vectors through and stops at the first wrong bit, in memory or in the file."""

import pytest
import torch

from nengram.errors import StoreError
from nengram.store import CheckedStore, ResidentStore, SparseAdam, make_codec, open_table, write_table

ROWS, WIDTH = 500, 24


@pytest.fixture(params=["fp32", "fp8"])
def made(request, tmp_path):
    """(path, bytes_RB, codec)"""
    codec = make_codec(request.param, WIDTH)
    bytes_RB = codec.encode(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))).clone()
    write_table(tmp_path / "table", codec, ROWS, {}, blocks=[bytes_RB.numpy()], chunk_bytes=4096)
    return tmp_path / "table", bytes_RB, codec


def test_right_vectors_pass_and_are_counted(made):
    path, bytes_RB, codec = made
    with CheckedStore(ResidentStore.from_bytes(bytes_RB, codec), open_table(path), sample=0.1) as store:
        for shape, checked in (((5, 20), 10), ((3,), 11), ((0,), 11)):
            with store.prefetch(torch.randint(0, ROWS, shape)) as ticket:
                ticket.vectors()
            assert store.checked_rows == checked
        assert store.requests == 3


def test_one_wrong_bit_in_memory_stops_it(made):
    path, bytes_RB, codec = made
    wrong_RB = bytes_RB.clone()
    wrong_RB[77, 3] ^= 1
    with CheckedStore(ResidentStore.from_bytes(wrong_RB, codec), open_table(path), sample=1.0) as store:
        with store.prefetch(torch.tensor([76, 78])) as ticket:
            ticket.vectors()
        with store.prefetch(torch.tensor([76, 77])) as ticket:
            for _ in range(2):
                with pytest.raises(StoreError, match="row 77: 1 of 24 numbers are not those of .*table: ResidentStore"):
                    ticket.vectors()


def test_a_damaged_chunk_stops_it_even_where_both_read_the_same(made):
    path, bytes_RB, codec = made
    reader = open_table(path)
    with open(path, "r+b") as file:
        file.seek(reader.files[0].rows_offset + 77 * codec.row_bytes + 3)
        file.write(bytes([int(bytes_RB[77, 3]) ^ 1]))
    bytes_RB[77, 3] ^= 1
    store = CheckedStore(ResidentStore.from_bytes(bytes_RB, codec), reader, sample=1.0)
    with store, store.prefetch(torch.tensor([77])) as ticket, pytest.raises(StoreError, match="77 cannot be checked"):
        ticket.vectors()


def test_what_cannot_be_checked_is_refused(made):
    path, bytes_RB, codec = made
    reader = open_table(path)
    for below in (ResidentStore.from_bytes(bytes_RB[1:], codec), ResidentStore(ROWS, WIDTH, dtype=torch.float16)):
        with pytest.raises(StoreError, match="are not the same table"):
            CheckedStore(below, reader)
    below = ResidentStore.from_bytes(bytes_RB, codec)
    for sample in (0, 1.5):
        with pytest.raises(StoreError, match="share above 0"):
            CheckedStore(below, reader, sample=sample)
    with CheckedStore(below, reader) as store, pytest.raises(StoreError, match="cannot be trained"):
        store.update(torch.tensor([1]), torch.ones(1, WIDTH), SparseAdam(), 0.1)
