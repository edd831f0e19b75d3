"""What observations and actions look like: static, hashable descriptions."""

from typing import NamedTuple


class Discrete(NamedTuple):
    """The integers 0 … num_values − 1; an int32 scalar."""

    num_values: int


class Box(NamedTuple):
    """Arrays of one shape and dtype. Bounds, where they matter, may depend on parameters
    and so are asked of the environment.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"


Space = Discrete | Box
