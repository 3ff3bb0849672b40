"""Table sizes are primes, handed out so that no two slots of a model share one.

A shared modulus would make two slots of one order the same slot twice: heads differ by nothing else. Hence
one set of used primes for a whole model. Miller-Rabin with the first twelve primes as bases is a proof, not
a probability, below 3.1e23 (Sorenson and Webster, arXiv 1509.00864), far above any table.
"""

WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
PROVEN_BELOW = 318_665_857_834_031_151_167_461


def is_prime(n: int) -> bool:
    """Whether `n` is prime; exact for n < 3.1e23. Raises ValueError above."""
    if n >= PROVEN_BELOW:
        raise ValueError(f"primality of {n} is not decided by {len(WITNESSES)} bases")
    if n < 2:
        return False
    for prime in WITNESSES:
        if n % prime == 0:
            return n == prime
    twos = ((n - 1) & (1 - n)).bit_length() - 1
    odd = (n - 1) >> twos
    return not any(_proves_composite(base, n, odd, twos) for base in WITNESSES)


def take_primes(at_least: int, count: int, seen: set[int]) -> tuple[int, ...]:
    """The next `count` primes >= `at_least` that are not in `seen`, ascending; they are added to `seen`."""
    taken = []
    candidate = at_least
    while len(taken) < count:
        if candidate not in seen and is_prime(candidate):
            taken.append(candidate)
        candidate += 1
    seen.update(taken)
    return tuple(taken)


def _proves_composite(base: int, n: int, odd: int, twos: int) -> bool:
    power = pow(base, odd, n)
    if power in (1, n - 1):
        return False
    for _ in range(twos - 1):
        power = power * power % n
        if power == n - 1:
            return False
    return True
