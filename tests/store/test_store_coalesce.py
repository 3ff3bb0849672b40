"""One gradient per distinct row: ascending, complete, and the same bits whichever form computes it."""

import pytest
import torch

from nengram.errors import StoreError
from nengram.store import coalesce
from nengram.store.coalesce import coalesce_torch


@pytest.mark.parametrize(
    ("count", "num_rows", "row_width"), [(0, 5, 3), (1, 1, 1), (500, 7, 4), (300, 2**12, 1), (400, 2**40, 3)]
)
def test_sums_are_those_of_a_loop(count, num_rows, row_width):
    generator = torch.Generator().manual_seed(count)
    rows_N = torch.randint(0, num_rows, (count,), generator=generator)
    grads_NE = torch.randn(count, row_width, generator=generator)
    sums: dict[int, torch.Tensor] = {}
    for row, grad_E in zip(rows_N.tolist(), grads_NE, strict=True):
        sums[row] = sums[row] + grad_E if row in sums else grad_E
    rows_U, grads_UE = coalesce(rows_N, grads_NE)
    assert rows_U.tolist() == sorted(sums)
    assert grads_UE.shape == (len(sums), row_width)
    for row, grad_E in zip(rows_U.tolist(), grads_UE, strict=True):
        assert torch.equal(grad_E, sums[row])  # the same order of addition, hence the same bits


def test_compiled_and_torch_forms_agree_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    rows_N = torch.randint(0, 5000, (20_000,), generator=generator)
    grads_NE = torch.randn(20_000, 4, generator=generator)
    for ours, plain in zip(coalesce(rows_N, grads_NE), coalesce_torch(rows_N, grads_NE), strict=True):
        assert torch.equal(ours, plain)


def test_rows_and_gradients_of_any_matching_shape():
    rows_BTS = torch.tensor([[[4, 1], [4, 4]]])
    grads_BTSE = torch.tensor([[[[1.0], [2.0]], [[4.0], [8.0]]]], dtype=torch.bfloat16)
    rows_U, grads_UE = coalesce(rows_BTS, grads_BTSE)
    assert rows_U.tolist() == [1, 4]
    assert grads_UE.tolist() == [[2.0], [13.0]]
    assert grads_UE.dtype == torch.float32


def test_half_precision_gradients_are_summed_in_float32():
    grads_NE = torch.ones(1000, 1, dtype=torch.bfloat16)  # bfloat16 cannot count past 256
    assert coalesce(torch.zeros(1000, dtype=torch.int64), grads_NE)[1].item() == 1000


def test_wrong_arguments_are_refused():
    with pytest.raises(StoreError, match=r"gradients \(3, 2\) do not belong to rows \(4,\)"):
        coalesce(torch.arange(4), torch.ones(3, 2))
    with pytest.raises(StoreError, match=r"row -1 at position \[1\]"):
        coalesce(torch.tensor([0, -1]), torch.ones(2, 2))
    with pytest.raises(StoreError, match="int64"):
        coalesce(torch.zeros(2), torch.ones(2, 2))
