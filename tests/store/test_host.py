"""A table in host memory trains and is saved exactly as a resident one."""

import pytest
import torch

from nengram.errors import StoreError
from nengram.store import RULES, HostStore, ResidentStore, coalesce, host_zeros, make_codec, make_rule
from nengram.store.host_memory import ADVICE, HUGE_PAGE_BYTES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def batch(step: int, store) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    rows_N = torch.randint(0, store.num_rows, (40,), generator=generator)
    return coalesce(rows_N, torch.randn(40, store.row_width, generator=generator))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_training_is_that_of_a_resident_table_bit_for_bit(name, dtype):
    stores = [kind(300, 8, dtype=dtype, seed=3) for kind in (HostStore, ResidentStore)]
    for step in range(6):
        for store in stores:
            store.update(*batch(step, store), make_rule(name), 0.01)
        assert same(stores[0].tensors(), stores[1].tensors())
    rows = torch.randint(0, 300, (4, 9))
    with stores[0].prefetch(rows) as host, stores[1].prefetch(rows) as resident:
        assert torch.equal(host.vectors(), resident.vectors())


def test_what_was_saved_goes_on_in_either(tmp_path):
    host, resident = HostStore(300, 8, seed=3), ResidentStore(300, 8, seed=4)
    for step in range(3):
        host.update(*batch(step, host), make_rule("sparse_adam"), 0.01)
    resident.load_tensors(host.tensors())
    again = HostStore(300, 8)
    again.load_tensors(resident.tensors())
    for step in range(3, 6):
        for store in (host, resident, again):
            store.update(*batch(step, store), make_rule("sparse_adam"), 0.01)
    assert same(host.tensors(), resident.tensors()) and same(again.tensors(), resident.tensors())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8])
@pytest.mark.parametrize("shape", [(3, 5), (1,), (HUGE_PAGE_BYTES // 4 + 7, 3)])
def test_host_memory_is_zeros_that_can_be_written(dtype, shape):
    memory = host_zeros(shape, dtype)
    assert memory.shape == shape and memory.dtype == dtype and memory.is_contiguous()
    assert not memory.any()
    memory.fill_(3)
    assert (memory == 3).all()
    if ADVICE is not None and memory.numel() * memory.itemsize >= HUGE_PAGE_BYTES:
        assert memory.data_ptr() % HUGE_PAGE_BYTES == 0


def test_rows_drawn_on_huge_pages_are_those_drawn_anywhere():
    large = HUGE_PAGE_BYTES // 64 + 100, 16
    assert torch.equal(HostStore(*large, seed=5).tensors()["weight"], ResidentStore(*large, seed=5).weight)


@pytest.mark.parametrize("kind", [HostStore, ResidentStore])
def test_coded_rows_are_read_and_never_trained(kind):
    codec = make_codec("int4", 6)
    bytes_RB = codec.encode(torch.randn(20, 6))
    store = kind.from_bytes(bytes_RB, codec)
    with store.prefetch(torch.tensor([3, 3, 19])) as ticket:
        assert torch.equal(ticket.vectors(), codec.decode(bytes_RB[[3, 3, 19]]))
    with pytest.raises(StoreError, match="coded as int4 are only read"):
        store.update(torch.tensor([1]), torch.ones(1, 6), make_rule("sparse_adam"), 0.1)
    assert torch.equal(store.tensors()["weight"], bytes_RB)


@pytest.mark.parametrize("kind", [HostStore, ResidentStore])
def test_rows_of_a_plain_codec_are_trained(kind):
    twin = ResidentStore(20, 6, seed=1)
    store = kind.from_bytes(make_codec("fp32", 6).encode(twin.weight.clone()), make_codec("fp32", 6))
    for table in (store, twin):
        table.update(*batch(0, table), make_rule("rowwise_adagrad"), 0.1)
    assert same(store.tensors(), twin.tensors())


@pytest.mark.parametrize("kind", [HostStore, ResidentStore])
@pytest.mark.parametrize(
    ("bytes_RB", "words"),
    [
        (torch.zeros(3, 8, dtype=torch.uint8), "rows of 5 bytes are needed"),
        (torch.zeros(3, 5), "uint8"),
        (torch.zeros(0, 5, dtype=torch.uint8), "uint8"),
    ],
)
def test_bytes_that_are_no_rows_are_refused(kind, bytes_RB, words):
    with pytest.raises(StoreError, match=words):
        kind.from_bytes(bytes_RB, make_codec("int4", 6))


def test_a_device_that_cannot_be_served_is_refused():
    with pytest.raises(StoreError, match="on cpu or cuda, not on meta"):
        HostStore(4, 2, device="meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the copy from page-locked memory")
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp8", "int4"])
def test_a_gpu_is_lent_the_same_bits(name):
    codec = make_codec(name, 64)
    bytes_RB = codec.encode(torch.randn(5000, 64) * 0.02)
    store = HostStore.from_bytes(bytes_RB, codec, device="cuda", poison_released=True)
    expected_RE = codec.decode(bytes_RB)
    several = [torch.randint(0, 5000, shape) for shape in ((3, 200), (0,), (7000,), (16,))]
    for _ in range(3):
        tickets = [store.prefetch(rows) for rows in several]
        for rows, ticket in zip(several, tickets, strict=True):
            assert ticket.vectors().device.type == "cuda"
            assert torch.equal(ticket.vectors().cpu(), expected_RE[rows])
            ticket.release()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: gradients come from there")
def test_a_table_beside_a_gpu_trains_as_one_beside_none():
    host, resident = HostStore(300, 8, device="cuda", seed=3), ResidentStore(300, 8, seed=3)
    for step in range(4):
        rows_U, grads_UE = batch(step, resident)
        resident.update(rows_U, grads_UE, make_rule("sparse_adam"), 0.01)
        host.update(rows_U.cuda(), grads_UE.cuda(), make_rule("sparse_adam"), 0.01)
    assert same(host.tensors(), resident.tensors())
