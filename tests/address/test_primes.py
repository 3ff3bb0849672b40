"""Primality is exact, and primes are handed out once."""

import pytest

from nengram.address.primes import is_prime, take_primes

COMPOSITES = (
    561,  # Carmichael
    3_215_031_751,  # passes bases 2, 3, 5, 7
    3_825_123_056_546_413_051,  # passes the first nine bases
    (2**31 - 1) ** 2,
)


def test_small_primes_equal_a_sieve():
    sieve = [True] * 20_000
    sieve[:2] = [False, False]
    for n in range(2, 142):
        if sieve[n]:
            sieve[n * n :: n] = [False] * len(sieve[n * n :: n])
    assert [is_prime(n) for n in range(20_000)] == sieve


@pytest.mark.parametrize("n", COMPOSITES)
def test_strong_pseudoprimes_are_composite(n):
    assert not is_prime(n)


@pytest.mark.parametrize("n", [2**31 - 1, 2**61 - 1, 16_000_057])
def test_large_primes_are_prime(n):
    assert is_prime(n)


def test_numbers_beyond_the_proof_are_refused():
    with pytest.raises(ValueError, match="not decided"):
        is_prime(2**89 - 1)


def test_primes_are_taken_in_order_and_only_once():
    seen: set[int] = set()
    assert take_primes(97, 3, seen) == (97, 101, 103)
    assert take_primes(90, 3, seen) == (107, 109, 113)
    assert take_primes(1, 2, seen) == (2, 3)
    assert seen == {2, 3, 97, 101, 103, 107, 109, 113}
