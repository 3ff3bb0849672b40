"""A table's size says whose it is: row counts are sums of primes that a dialect hands out in one order.

A spec that was edited by hand, rounded by some JSON writer, or attached to another model's table is still well-formed.
But the primes of every family here are found again from nothing more than the first of each order, so a spec can be
held against its own dialect: all moduli must be the next primes that no earlier slot took, and a table may exceed their
sum only by what its family pads.
"""

from functools import reduce
from math import gcd

from nengram.address.dialects import ascending_primes
from nengram.address.primes import is_prime
from nengram.address.spec import AddressSpec
from nengram.errors import AddressError

PADDED = ("qwen_ple",)


def self_test(spec: AddressSpec) -> None:
    """Raise AddressError, naming layer and numbers, unless moduli and row counts are what the dialect derives.

    Specs with moduli of somebody's own choosing are allowed to exist; this is where they are told apart.
    """
    _check_moduli(spec)
    _check_padding(spec)


def _check_moduli(spec: AddressSpec) -> None:
    nominal = [heads[0] for heads in spec.layers[0].moduli]
    derived = ascending_primes(len(spec.layers), rows_per_head=nominal, heads=spec.heads)
    for layer, moduli in zip(spec.layers, derived, strict=True):
        for order, (found, made) in enumerate(zip(layer.moduli, moduli, strict=True), start=2):
            if found == made:
                continue
            head = next(place for place in range(spec.heads) if found[place] != made[place])
            why = "" if is_prime(found[head]) else ", and it is not even prime"
            raise AddressError(
                f"layer {layer.layer_id}, order {order}, head {head} has {found[head]:,} rows, dialect {spec.dialect} "
                f"makes it {made[head]:,}{why}: these addresses are not that dialect's"
            )


def _check_padding(spec: AddressSpec) -> None:
    """Rows beyond the sum of moduli: none, or fewer than the number that all row counts are multiples of."""
    multiple = reduce(gcd, (layer.num_rows for layer in spec.layers))
    for layer in spec.layers:
        total = sum(map(sum, layer.moduli))
        padding = layer.num_rows - total
        if padding and (spec.dialect not in PADDED or padding >= multiple):
            raise AddressError(
                f"layer {layer.layer_id} has {layer.num_rows:,} rows, its moduli sum to {total:,}: "
                f"dialect {spec.dialect} would not pad by {padding:,}"
            )
