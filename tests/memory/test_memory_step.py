"""One object per forward: the right rows in the right order, one gradient per row, nothing left lent."""

import pytest
import torch
import torch.utils.checkpoint

from nengram.address import Addresser, AddressSpec, misaligned, one_row
from nengram.errors import AddressError, StoreError
from nengram.memory import Engram, MemoryStep
from nengram.store import ResidentStore, RowwiseAdagrad, SparseAdam

SPEC = AddressSpec.engram(
    compressed_vocab_size=50,
    rows_per_head=[11, 13],
    heads=2,
    layer_ids=[5, 2],
    pad_cid=0,
    block_indices=[3, 1],
)
ADDRESSER = Addresser(SPEC)
ROW_WIDTH = 3


def make_stores(**options) -> dict[int, ResidentStore]:
    return {id_: ResidentStore(SPEC.num_rows(id_), ROW_WIDTH, seed=id_, **options) for id_ in SPEC.layer_ids}


def some_ids(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(0))


def test_vectors_are_the_rows_of_the_ids_and_blocks_come_in_order():
    stores = make_stores()
    with MemoryStep.begin(some_ids(), ADDRESSER, stores) as step:
        assert list(step.rows) == [2, 5], "layer 2 sits in the lower block"
        for layer_id, rows_BTS in ADDRESSER(some_ids()).items():
            assert torch.equal(step.rows[layer_id], rows_BTS)
            assert torch.equal(step.vectors(layer_id), stores[layer_id].weight[rows_BTS])


def test_vectors_are_one_leaf_that_follows_grad_mode():
    stores = make_stores()
    with MemoryStep.begin(some_ids(), ADDRESSER, stores) as step:
        assert step.vectors(2) is step.vectors(2)
        assert step.vectors(2).is_leaf
        assert step.vectors(2).requires_grad
    with torch.no_grad():
        step = MemoryStep.begin(some_ids(), ADDRESSER, stores)
    assert not step.vectors(2).requires_grad, "made without gradients, read later"
    step.release()


def test_gradients_are_those_of_an_embedding():
    stores, ids = make_stores(), some_ids()
    layers = {layer_id: Engram(SPEC.slots * ROW_WIDTH, 8) for layer_id in SPEC.layer_ids}

    def loss_of(vectors) -> torch.Tensor:
        h = torch.ones(*ids.shape, 1, 8)
        for layer_id, layer in layers.items():
            h = h + layer(vectors(layer_id), h)
        return h.square().sum()

    tables = {layer_id: store.weight.clone().requires_grad_() for layer_id, store in stores.items()}
    rows = ADDRESSER(ids)
    loss_of(lambda layer_id: tables[layer_id][rows[layer_id]]).backward()
    with MemoryStep.begin(ids, ADDRESSER, stores) as step:
        loss_of(step.vectors).backward()
        grads = step.grads()
    assert set(grads) == {2, 5}
    for layer_id, (rows_U, grads_UE) in grads.items():
        dense = torch.zeros_like(tables[layer_id]).index_copy(0, rows_U, grads_UE)
        torch.testing.assert_close(dense, tables[layer_id].grad)
        assert rows_U.tolist() == sorted(set(rows[layer_id].flatten().tolist()))


def test_recomputation_sees_the_same_vectors_and_gradients():
    stores, ids = make_stores(), some_ids()
    layer = Engram(SPEC.slots * ROW_WIDTH, 8)
    h = torch.ones(*ids.shape, 1, 8, requires_grad=True)
    results = []
    checkpoint = torch.utils.checkpoint.checkpoint
    ways = (
        lambda block, h: block(h),
        lambda block, h: checkpoint(block, h, use_reentrant=False),
        lambda block, h: checkpoint(block, h, use_reentrant=True),
    )
    for run in ways:
        with MemoryStep.begin(ids, ADDRESSER, stores) as step:
            run(lambda h, step=step: h + layer(step.vectors(2), h), h).square().sum().backward()
            results.append(step.grads()[2])
    for rows_U, grads_UE in results[1:]:
        assert torch.equal(rows_U, results[0][0])
        assert torch.equal(grads_UE, results[0][1])


def test_update_moves_the_read_rows_of_every_layer_and_releases():
    stores = make_stores(poison_released=True)
    before = {layer_id: store.weight.clone() for layer_id, store in stores.items()}
    step = MemoryStep.begin(some_ids(), ADDRESSER, stores)
    sum(step.vectors(layer_id).sum() for layer_id in SPEC.layer_ids).backward()
    step.update(RowwiseAdagrad(), 0.1)
    for layer_id, store in stores.items():
        moved = set((store.weight != before[layer_id]).any(1).nonzero().flatten().tolist())
        assert moved == set(step.rows[layer_id].flatten().tolist())
    with pytest.raises(StoreError, match="released"):
        step.vectors(2)


def test_scaled_gradients_are_what_the_store_gets():
    plain, halved = make_stores(init_std=0.0), make_stores(init_std=0.0)

    class Descent:
        name = "descent"

        def state_shapes(self, num_rows, row_width):
            return {}

        def apply(self, weight_UE, grads_UE, state, *, lr, step):
            return weight_UE - lr * grads_UE, {}

    for stores, scale in ((plain, 1.0), (halved, 0.5)):
        with MemoryStep.begin(some_ids(), ADDRESSER, stores) as step:
            sum(step.vectors(layer_id).sum() for layer_id in SPEC.layer_ids).backward()
            grads = step.grads()
            for _, grads_UE in grads.values():
                grads_UE.mul_(scale)
            step.update(Descent(), 0.1, grads=grads)
    assert plain[2].weight.any()
    for layer_id in SPEC.layer_ids:
        torch.testing.assert_close(halved[layer_id].weight, 0.5 * plain[layer_id].weight)


def test_blocked_lookups_move_nothing():
    stores = make_stores()
    blocked_BT = torch.zeros(2, 9, dtype=torch.bool)
    blocked_BT[0, 4] = blocked_BT[1, :] = True
    with MemoryStep.begin(some_ids(), ADDRESSER, stores, blocked_BT=blocked_BT) as step:
        layer = Engram(SPEC.slots * ROW_WIDTH, 8)
        layer(step.vectors(2), torch.ones(2, 9, 1, 8), blocked_BT=step.blocked_BT).sum().backward()
        rows_U, _ = step.grads()[2]
        assert set(rows_U.tolist()) == set(step.rows[2][~blocked_BT].flatten().tolist())


def test_a_layer_without_part_in_the_loss_is_absent():
    stores = make_stores()
    with MemoryStep.begin(some_ids(), ADDRESSER, stores) as step:
        with pytest.raises(StoreError, match="no gradient has reached a table"):
            step.grads()
        step.vectors(5)
        step.vectors(2).sum().backward()
        step.update(SparseAdam(), 0.1)
    assert (stores[2].step, stores[5].step) == (1, 0)


def test_chunks_with_a_state_read_the_rows_of_the_whole():
    stores, ids = make_stores(), some_ids()
    with MemoryStep.begin(ids, ADDRESSER, stores) as step:
        whole = {layer_id: rows.clone() for layer_id, rows in step.rows.items()}
    state = ADDRESSER.new_state(2)
    pieces = []
    for chunk in ids.split([1, 5, 3], dim=1):
        with MemoryStep.begin(chunk, ADDRESSER, stores, state=state) as step:
            pieces.append(step.rows)
    for layer_id, rows_BTS in whole.items():
        assert torch.equal(torch.cat([piece[layer_id] for piece in pieces], 1), rows_BTS)


def test_controls_replace_rows_before_they_are_read():
    stores = make_stores()
    with MemoryStep.begin(some_ids(), ADDRESSER, stores, control=one_row) as step:
        assert (step.rows[2] == torch.as_tensor(SPEC.offsets(2))).all()
        assert torch.equal(step.vectors(2), stores[2].weight[step.rows[2]])
    with MemoryStep.begin(some_ids(), ADDRESSER, stores, control=lambda rows, *_: misaligned(rows)) as step:
        assert torch.equal(step.rows[5], ADDRESSER(some_ids())[5].roll(1, 0))


def test_numpy_ids_are_welcome():
    stores = make_stores()
    with MemoryStep.begin(some_ids().numpy(), ADDRESSER, stores) as step:
        assert torch.equal(step.rows[2], ADDRESSER(some_ids())[2])


def test_what_is_missing_is_named():
    stores = make_stores()
    with pytest.raises(AddressError, match="need token ids"):
        MemoryStep.begin(None, ADDRESSER, stores)
    with pytest.raises(StoreError, match="memory layer 2 has no store"):
        MemoryStep.begin(some_ids(), ADDRESSER, {5: stores[5]})
    with pytest.raises(StoreError, match="layer 2 addresses .* rows, its store has 7"):
        MemoryStep.begin(some_ids(), ADDRESSER, {**stores, 2: ResidentStore(7, ROW_WIDTH)})
    with (
        MemoryStep.begin(some_ids(), ADDRESSER, stores) as step,
        pytest.raises(AddressError, match="layer 3"),
    ):
        step.vectors(3)


def test_a_failed_begin_leaves_nothing_lent():
    class Failing(ResidentStore):
        def prefetch(self, rows):
            raise StoreError("the disk is gone")

    stores = make_stores()
    failing = {**stores, 5: Failing(SPEC.num_rows(5), ROW_WIDTH)}
    released = []
    original = type(stores[2].prefetch(torch.tensor([0]))).release
    ticket_type = type(stores[2].prefetch(torch.tensor([0])))
    try:
        ticket_type.release = lambda ticket: (released.append(ticket), original(ticket))
        with pytest.raises(StoreError, match="disk is gone"):
            MemoryStep.begin(some_ids(), ADDRESSER, failing)
    finally:
        ticket_type.release = original
    assert len(released) == 1


def test_a_masked_slot_gives_zeros_takes_no_gradient_and_its_row_stays():
    stores, ids = make_stores(), some_ids()
    keep_BTS = torch.rand(2, 9, SPEC.slots, generator=torch.Generator().manual_seed(1)) < 0.6
    before = {layer_id: store.weight.clone() for layer_id, store in stores.items()}
    blocked_BT = torch.zeros(2, 9, dtype=torch.bool)
    blocked_BT[0, 3] = True
    with MemoryStep.begin(ids, ADDRESSER, stores, blocked_BT=blocked_BT) as step:
        step.mask(keep_BTS)
        for layer_id, rows_BTS in step.rows.items():
            expected = before[layer_id][rows_BTS] * keep_BTS.unsqueeze(-1)
            assert torch.equal(step.vectors(layer_id), expected)
        (step.vectors(2).sum() + step.vectors(5).sum()).backward()
        used_BTS = keep_BTS & ~blocked_BT.unsqueeze(-1)
        for layer_id, (rows_U, grads_UE) in step.grads().items():
            read_U, times_U = step.rows[layer_id][used_BTS].unique(return_counts=True)
            assert torch.equal(rows_U, read_U)
            assert torch.equal(grads_UE, times_U.float().unsqueeze(-1).expand(-1, ROW_WIDTH))
        used = {layer_id: rows_BTS[used_BTS] for layer_id, rows_BTS in step.rows.items()}
        step.update(SparseAdam(), 0.1)
    for layer_id, store in stores.items():
        moved = (store.weight != before[layer_id]).any(1)
        assert torch.equal(moved.nonzero().flatten(), used[layer_id].unique())


def test_a_mask_of_nothing_updates_no_row():
    stores = make_stores()
    before = stores[2].weight.clone()
    with MemoryStep.begin(some_ids(), ADDRESSER, stores) as step:
        step.mask(torch.zeros(2, 9, SPEC.slots, dtype=torch.bool))
        step.vectors(2).sum().backward()
        step.update(SparseAdam(), 0.1)
    assert torch.equal(stores[2].weight, before)


def test_a_mask_comes_before_the_vectors_and_has_their_shape():
    with MemoryStep.begin(some_ids(), ADDRESSER, make_stores()) as step:
        with pytest.raises(StoreError, match=r"a mask of slots is bool \(2, 9, 4\), not torch.bool \(2, 9\)"):
            step.mask(torch.ones(2, 9, dtype=torch.bool))
        step.vectors(5)
        with pytest.raises(StoreError, match="these were read already"):
            step.mask(torch.ones(2, 9, SPEC.slots, dtype=torch.bool))


def test_a_frozen_step_has_vectors_and_no_gradient():
    stores = make_stores()
    with MemoryStep.begin(some_ids(), ADDRESSER, stores, frozen=True) as step:
        assert not step.vectors(2).requires_grad
        with pytest.raises(StoreError, match="no gradient has reached a table"):
            step.grads()
