"""Compiled forms of `coalesce` and of the update rules, for float32 tables on the CPU; imported at first use.

In torch operations an update gathers vectors and state into fresh tensors, computes, and scatters back: five
to ten passes over memory that only one needs. Here each row is visited once, in ascending order, and changed
in place. The sort is a radix sort of positions, which is stable: gradients of one row are added in lookup
order, hence the same on every run. Serial by choice: on a busy machine a parallel loop this short waits for
its slowest thread. The torch forms are the slow, obvious twins, and the ones that run on other devices and
dtypes; tests hold the two together.

For 16,384 lookups on one core, coalescing included, the torch form took 39 ms and this one 4-7 ms under
sparse Adam at 1M rows x 64, and 14.5 against 2-3.5 ms under row-wise Adagrad. The sort is 0.1 ms of it.
"""

import numba
import numpy as np

from nengram.store.rules import RowwiseAdagrad, RowwiseRMSprop, Rule, SparseAdam

DIGIT_BITS = 11
compiled = numba.njit(cache=True, nogil=True, error_model="numpy")
# Only the mean of squares is summed in another order than written, so that it can use vector instructions.
compiled_reassociating = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})


@compiled
def ascending_order(rows_N, order_N, spare_N, key_bits):
    """Positions in ascending order of row, equal rows in their own order; returned in one of the buffers."""
    count = np.empty(1 << DIGIT_BITS, np.int64)
    mask = (1 << DIGIT_BITS) - 1
    for i in range(rows_N.size):
        order_N[i] = i
    for shift in range(0, key_bits, DIGIT_BITS):
        count[:] = 0
        for i in range(rows_N.size):
            count[(rows_N[i] >> shift) & mask] += 1
        place = 0
        for digit in range(count.size):
            place, count[digit] = place + count[digit], place
        for i in range(rows_N.size):
            position = order_N[i]
            digit = (rows_N[position] >> shift) & mask
            spare_N[count[digit]] = position
            count[digit] += 1
        order_N, spare_N = spare_N, order_N
    return order_N


@compiled
def count_distinct(rows_N, order_N):
    distinct = 1 if rows_N.size else 0
    for i in range(1, rows_N.size):
        distinct += rows_N[order_N[i]] != rows_N[order_N[i - 1]]
    return distinct


@compiled
def sum_equal_rows(rows_N, grads_NE, order_N, rows_U, grads_UE):
    u = -1
    for i in range(rows_N.size):
        position = order_N[i]
        row = rows_N[position]
        if u < 0 or rows_U[u] != row:
            u += 1
            rows_U[u] = row
            for e in range(grads_NE.shape[1]):
                grads_UE[u, e] = grads_NE[position, e]
        else:
            for e in range(grads_NE.shape[1]):
                grads_UE[u, e] += grads_NE[position, e]


def coalesce(rows_N: np.ndarray, grads_NE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`nengram.store.coalesce` for int64 rows, none negative, and float32 gradients."""
    key_bits = max(1, int(rows_N.max(initial=0)).bit_length())
    order_N = ascending_order(rows_N, np.empty_like(rows_N), np.empty_like(rows_N), key_bits)
    distinct = count_distinct(rows_N, order_N)
    rows_U, grads_UE = np.empty(distinct, np.int64), np.empty((distinct, grads_NE.shape[1]), np.float32)
    sum_equal_rows(rows_N, grads_NE, order_N, rows_U, grads_UE)
    return rows_U, grads_UE


@compiled
def adam_rows(weight, exp_avg, exp_avg_sq, rows_U, grads_UE, rest_1, rest_2, eps, step_size):
    for u in range(rows_U.size):
        row = rows_U[u]
        for e in range(grads_UE.shape[1]):
            grad = grads_UE[u, e]
            mean = exp_avg[row, e] + rest_1 * (grad - exp_avg[row, e])
            mean_sq = exp_avg_sq[row, e] + rest_2 * (grad * grad - exp_avg_sq[row, e])
            exp_avg[row, e] = mean
            exp_avg_sq[row, e] = mean_sq
            weight[row, e] -= step_size * mean / (np.sqrt(mean_sq) + eps)


@compiled_reassociating
def mean_square(grad_E):
    total = np.float32(0)
    for e in range(grad_E.size):
        total += grad_E[e] * grad_E[e]
    return total / np.float32(grad_E.size)


@compiled
def adagrad_rows(weight, sum_sq, rows_U, grads_UE, lr, eps):
    for u in range(rows_U.size):
        row = rows_U[u]
        sum_sq[row] += mean_square(grads_UE[u])
        scale = lr / (np.sqrt(sum_sq[row]) + eps)
        for e in range(grads_UE.shape[1]):
            weight[row, e] -= scale * grads_UE[u, e]


@compiled
def rmsprop_rows(weight, mean_sq, rows_U, grads_UE, lr, rest, eps):
    for u in range(rows_U.size):
        row = rows_U[u]
        now = mean_square(grads_UE[u])
        mean_sq[row] = now if mean_sq[row] == 0 else mean_sq[row] + rest * (now - mean_sq[row])
        scale = lr / (np.sqrt(mean_sq[row]) + eps)
        for e in range(grads_UE.shape[1]):
            weight[row, e] -= scale * grads_UE[u, e]


def update_in_place(
    weight: np.ndarray,
    state: dict[str, np.ndarray],
    rows_U: np.ndarray,
    grads_UE: np.ndarray,
    rule: Rule,
    *,
    lr: float,
    step: int,
) -> bool:
    """Apply `rule` to `rows_U` of a whole float32 table and its state.

    False, and nothing done, for a rule that has no compiled form.
    """
    number = np.float32
    match rule:
        case SparseAdam(betas=(beta_1, beta_2), eps=eps):
            moments = state["exp_avg"], state["exp_avg_sq"]
            rests = number(1 - beta_1), number(1 - beta_2)
            step_size = number(rule.step_size(lr, step))
            adam_rows(weight, *moments, rows_U, grads_UE, *rests, number(eps), step_size)
        case RowwiseAdagrad(eps=eps):
            adagrad_rows(weight, state["sum_sq"], rows_U, grads_UE, number(lr), number(eps))
        case RowwiseRMSprop(beta=beta, eps=eps):
            numbers = number(lr), number(1 - beta), number(eps)
            rmsprop_rows(weight, state["mean_sq"], rows_U, grads_UE, *numbers)
        case _:
            return False
    return True
