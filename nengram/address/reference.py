"""How a position of text becomes table rows, in plain Python integers. All fast paths are tested against it.

The Engram hash (arXiv 2601.07372, section 2.2, and its public demo) reads the last N compressed ids of a
position,

    window = [x_t, x_{t-1}, ..., x_{t-N+1}]        current id first; what cannot be seen reads as the pad id

multiplies each by its own odd number, XORs the products one by one, and after each XOR has the mix of one
n-gram order more:

    mix_n = x_t * m_0  ^  x_{t-1} * m_1  ^ ... ^  x_{t-n+1} * m_{n-1}                  n = 2..N

All heads of an order share that mix and differ only in their modulus, a prime: z = mix_n mod p. Each
(order, head) is a *slot* with its own p rows in the layer's table, laid one after another, so row = z +
(sum of the moduli before it). Python's integers cannot overflow; the fast paths use 64 bits, which is
enough because a spec keeps every product below 2**63.

Look-back has two kinds of barrier. A *start* is the first position of a document: it sees itself and
nothing before. A *blocked* position (an image token, say) breaks n-grams: its own window is all pad, and no
later window sees it or anything beyond it. In the Qwen dialect the id of the end-of-text token makes a start
of whatever comes after it.

Run me: `python -m nengram.address.reference` works one small example. Neither torch nor NumPy is needed.
"""

from collections.abc import Sequence


def windows(
    cids: Sequence[int],
    *,
    max_order: int,
    pad_cid: int,
    starts: Sequence[bool] | None = None,
    blocked: Sequence[bool] | None = None,
    end_cid: int = -1,
) -> list[list[int]]:
    """The ids each position of one sequence may see: T lists of `max_order` ids, the current one first.

    `starts[t]`: look-back begins anew at t. `blocked[t]`: t is a barrier and itself reads as pad (its id
    may be anything). `end_cid`: the id after which look-back begins anew, -1 for none.
    """
    starts = starts if starts is not None else [False] * len(cids)
    blocked = blocked if blocked is not None else [False] * len(cids)
    seen = []
    for t in range(len(cids)):
        window = []
        at = t
        while len(window) < max_order and at >= 0 and not blocked[at]:
            window.append(cids[at])
            if starts[at]:
                break
            at -= 1
            if at >= 0 and cids[at] == end_cid:
                break
        seen.append(window + [pad_cid] * (max_order - len(window)))
    return seen


def slot_ids(window: Sequence[int], multipliers: Sequence[int], moduli: Sequence[Sequence[int]]) -> list[int]:
    """The S = orders x heads table indices of one position, each within its own slot: order-major, then head.

    `moduli[0]` holds the heads of order 2, `moduli[1]` those of order 3, and so on.
    """
    mix = window[0] * multipliers[0]
    indices = []
    for lag, heads in enumerate(moduli, start=1):
        mix ^= window[lag] * multipliers[lag]
        indices += [mix % modulus for modulus in heads]
    return indices


def slot_offsets(moduli: Sequence[Sequence[int]]) -> list[int]:
    """The first row of each slot in the layer's table: the sum of all moduli before it."""
    offsets, total = [], 0
    for heads in moduli:
        for modulus in heads:
            offsets.append(total)
            total += modulus
    return offsets


def table_rows(
    cids: Sequence[int],
    *,
    multipliers: Sequence[int],
    moduli: Sequence[Sequence[int]],
    pad_cid: int,
    starts: Sequence[bool] | None = None,
    blocked: Sequence[bool] | None = None,
    end_cid: int = -1,
) -> list[list[int]]:
    """The rows of one sequence in one layer's table: T lists of S row numbers. Arguments as above."""
    offsets = slot_offsets(moduli)
    seen = windows(cids, max_order=len(multipliers), pad_cid=pad_cid, starts=starts, blocked=blocked, end_cid=end_cid)
    return [
        [first + index for first, index in zip(offsets, slot_ids(window, multipliers, moduli), strict=True)]
        for window in seen
    ]


def main() -> None:
    """Print one example: eight ids, a document start at 3, a blocked position at 5."""
    layer = {
        "multipliers": (7593627661414631, 479593001838623, 3563315849468963),
        "moduli": ((101, 103), (107, 109)),
        "pad_cid": 2,
    }
    cids = [16, 744, 230, 16, 744, -1, 744, 230]
    starts = [t == 3 for t in range(len(cids))]
    blocked = [t == 5 for t in range(len(cids))]
    print("spec    1,000 compressed ids, orders 2 and 3, 2 heads, one layer")
    for name, value in layer.items():
        print(f"        {name} {value}")
    print(f"        offsets {slot_offsets(layer['moduli'])}  (two slots of order 2, two of order 3)")
    print(f"ids     {cids}")
    print("\n  t     id  barrier  2-gram       3-gram            rows")
    seen = windows(cids, max_order=3, pad_cid=layer["pad_cid"], starts=starts, blocked=blocked)
    rows = table_rows(cids, **layer, starts=starts, blocked=blocked)
    for t, window in enumerate(seen):
        barrier = "blocked" if blocked[t] else "start" if starts[t] else ""
        bigram, trigram = (str(tuple(reversed(window[:order]))) for order in (2, 3))
        print(f"{t:>3}  {cids[t]:>5}  {barrier:<7}  {bigram:<11}  {trigram:<16}  {rows[t]}")
    print("\n1 and 4 end in the same 2-gram and share its rows; 0 and 3 begin with the same id and share all.")


if __name__ == "__main__":
    main()
