"""Wherever a table lives and however its rows are coded, the same stored bytes give the same vectors, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nengram.errors import StoreError
from nengram.store import (
    CODECS,
    CheckedStore,
    Counters,
    HostStore,
    HotSet,
    MappedStore,
    ResidentStore,
    TieredStore,
    make_codec,
    open_table,
    page_reader,
    tiered,
    write_table,
)
from nengram.store.codecs_reference import decode_reference

ROWS, WIDTH = 700, 37
PARAMETERS = {"fp8_tensor": {"scale": 1e-3}}
EVERY_THIRD, FEW = np.arange(0, ROWS, 3), np.array([0, 1, 63, 64, 65, 128, ROWS - 1])

TIERS = {
    "resident": lambda path, bytes_RB, codec, **kept: ResidentStore.from_bytes(bytes_RB, codec, **kept),
    "host": lambda path, bytes_RB, codec, **kept: HostStore.from_bytes(bytes_RB, codec, **kept),
    "mapped": lambda path, bytes_RB, codec, **kept: MappedStore(path, **kept),
    "mapped, through a mapping": lambda path, bytes_RB, codec, **kept: MappedStore(path, reads="mapping", **kept),
    "tiered above mapped": lambda path, bytes_RB, codec, **kept: TieredStore(
        MappedStore(path, **kept), EVERY_THIRD, **kept
    ),
    "tiered above host": lambda path, bytes_RB, codec, **kept: TieredStore(
        HostStore.from_bytes(bytes_RB, codec, **kept), HotSet(FEW), **kept
    ),
    "tiered above tiered": lambda path, bytes_RB, codec, **kept: TieredStore(
        TieredStore(MappedStore(path, **kept), EVERY_THIRD, **kept), FEW, **kept
    ),
    "checked above tiered": lambda path, bytes_RB, codec, **kept: CheckedStore(
        TieredStore(MappedStore(path, **kept), EVERY_THIRD, **kept), open_table(path), sample=0.1
    ),
}
POISONED = {"poison_released": True}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """`{codec: (path, bytes_RB, codec, expected_RE)}`, every table in three shards; expected by the codecs' slow twin."""
    folder, made = tmp_path_factory.mktemp("tables"), {}
    vectors_RE = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    vectors_RE[5] = 0
    for name in CODECS:
        codec = make_codec(name, WIDTH, **PARAMETERS.get(name, {}))
        bytes_RB = codec.encode(vectors_RE).clone()
        write_table(folder / name, codec, ROWS, {}, blocks=[bytes_RB.numpy()], shards=3)
        expected_RE = torch.from_numpy(decode_reference(codec, bytes_RB.numpy())).to(codec.vector_dtype)
        made[name] = folder / name, bytes_RB, codec, expected_RE
    return made


@pytest.fixture(params=CODECS)
def table(request, tables):
    return tables[request.param]


@st.composite
def requests(draw):
    """Rows of any shape: empty ones, repeats, a whole table's worth."""
    shape = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple) | st.sampled_from([(0,), (900,)]))
    near = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.randint(0, 8 if near else ROWS, shape, generator=generator)


@pytest.mark.parametrize("tier", TIERS)
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(several=st.lists(requests(), min_size=1, max_size=4), late=st.booleans())
def test_every_tier_gives_the_stored_vectors(tier, table, several, late):
    """Several tickets are open at once, waited for in another order than asked, released in a third."""
    path, bytes_RB, codec, expected_RE = table
    with TIERS[tier](path, bytes_RB, codec, **POISONED) as store, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiered, "FEW_ROWS", 0 if late else 1024)
        patch.setattr(page_reader, "INLINE_ROWS", 3 if late else 512)
        patch.setattr(page_reader, "ROWS_PER_THREAD", 8)
        tickets = [store.prefetch(rows) for rows in several]
        for rows, ticket in reversed(list(zip(several, tickets, strict=True))):
            found = ticket.vectors()
            assert found.shape == (*rows.shape, WIDTH) and found.dtype == store.dtype
            assert same_bits(found, expected_RE[rows])
        for place, (rows, ticket) in enumerate(zip(several, tickets, strict=True)):
            assert same_bits(ticket.vectors(), expected_RE[rows])  # whatever became of the tickets before it
            ticket.release()
            store.prefetch(several[place - 1]).release()
        assert store.codec == codec and (store.num_rows, store.row_width) == (ROWS, WIDTH)


@pytest.mark.parametrize("tier", TIERS)
def test_stored_bytes_can_be_had_for_a_tier_above(tier, table):
    path, bytes_RB, codec, _ = table
    with TIERS[tier](path, bytes_RB, codec, **POISONED) as store:
        rows_U = torch.tensor([0, 3, 4, 400, ROWS - 1])
        assert torch.equal(store.read_coded(rows_U), bytes_RB[rows_U])


@pytest.mark.parametrize("tier", TIERS)
def test_released_vectors_are_poisoned(tier, tables):
    path, bytes_RB, codec, _ = tables["fp32"]
    with TIERS[tier](path, bytes_RB, codec, **POISONED) as store:
        ticket = store.prefetch(torch.tensor([[9, 2], [9, 300]]))
        kept = ticket.vectors()
        assert not kept.isnan().any()
        ticket.release()
        assert kept.isnan().all()


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (torch.tensor([[3, 4], [ROWS, 5]]), rf"row {ROWS} at position \[1, 0\] is outside a table of {ROWS} rows"),
        (torch.tensor([5, 5, -1]), r"row -1 at position \[2\]"),
        (torch.tensor([2**62, 1]), "is outside"),
        (torch.tensor([1], dtype=torch.int32), "must be int64, not int32"),
    ],
)
def test_rows_outside_the_table_are_named_and_nothing_is_read(tier, rows, words, tables, monkeypatch):
    path, bytes_RB, codec, expected_RE = tables["int8"]
    with TIERS[tier](path, bytes_RB, codec, **POISONED) as store:
        with monkeypatch.context() as patch:
            patch.setattr(page_reader.PageReader, "begin", lambda *given: pytest.fail("a file was read"))
            for store.counters in (None, Counters()):
                with pytest.raises(StoreError, match=words):
                    store.prefetch(rows)
        assert store.counters.to_dict()["requests"] == 0
        with store.prefetch(torch.tensor([7])) as ticket:
            assert same_bits(ticket.vectors(), expected_RE[7:8])


@pytest.mark.parametrize("tier", TIERS)
def test_counts_add_up(tier, tables):
    """Rows and distinct rows are those of the request; every distinct row is one tier's hit, per label too."""
    path, bytes_RB, codec, _ = tables["fp8"]
    labels = [("low", 0, 100), ("high", 400, ROWS)]
    with TIERS[tier](path, bytes_RB, codec, **POISONED) as store:
        counters = store.counters = Counters(labels)
        rows_N = torch.randint(0, ROWS, (3, 200), generator=torch.Generator().manual_seed(1))
        for part in rows_N:
            with store.prefetch(part) as ticket:
                ticket.vectors()
        found = counters.to_dict()
        assert found["requests"] == 3
        assert found["total"]["rows"] == 600
        for name, first, end in [*labels, ("unlabelled", 100, 400)]:
            parts = [part[(part >= first) & (part < end)] for part in rows_N]
            counted = found["labels"][name]
            assert counted["rows"] == sum(len(part) for part in parts)
            assert counted["distinct"] == sum(len(part.unique()) for part in parts)
            assert sum(one["hits"] for one in counted["tiers"].values()) == counted["distinct"]


@pytest.mark.parametrize("tier", TIERS)
def test_a_late_backward_through_a_buffer_lent_again_is_refused(tier, tables):
    path, bytes_RB, codec, _ = tables["fp32"]
    with TIERS[tier](path, bytes_RB, codec) as store:
        ticket = store.prefetch(torch.tensor([1, 300]))
        leaf = ticket.vectors().detach().requires_grad_()
        loss = leaf.square().sum()
        ticket.release()
        with store.prefetch(torch.tensor([0, 3])) as other:
            other.vectors()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
