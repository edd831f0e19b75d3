"""Sizes of pieces: the updates between two returns from the device to Python."""

_SECONDS = 1.0


def next_size(size: int, seconds: float) -> int:
    """Returns the number of updates that take about a second, if `size` of them took `seconds`.

    It is at most double, so that a single fast piece does not mislead.

    >>> next_size(4, 0.8), next_size(4, 0.01), next_size(4, 100.0)
    (5, 8, 1)
    """
    return max(1, min(2 * size, int(size * _SECONDS / seconds)))
