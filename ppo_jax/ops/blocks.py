"""Sizes of equal blocks. Needs no JAX, so that a config can be checked without it."""


def largest_divisor(number: int, at_most: int) -> int:
    """Returns the largest divisor of `number` that is not larger than `at_most`.

    >>> largest_divisor(12, at_most=5)
    4
    """
    # Downwards from the smaller of both: a bound may be 2³¹ where the number is 128.
    return next(d for d in range(min(number, at_most), 0, -1) if number % d == 0)


def nearest_divisors(number: int, near: int) -> list[int]:
    """Returns the nearest divisors of `number` below and above `near`, without repetition.

    >>> nearest_divisors(12, near=5)
    [4, 6]
    """
    below = largest_divisor(number, at_most=near)
    above = next((d for d in range(near, number + 1) if number % d == 0), below)
    return sorted({below, above})
