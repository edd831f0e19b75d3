"""What observations and actions look like: static, hashable descriptions."""

from collections.abc import Mapping
from typing import Any, NamedTuple

ACTION_MASK = "action_mask"
"""The entry of a dict observation that says which actions are allowed; no network sees it."""


class Discrete(NamedTuple):
    """The integers 0 … num_values − 1; an int32 scalar."""

    num_values: int


class MultiDiscrete(NamedTuple):
    """Several integers at once, the k-th of them below `num_values[k]`; int32 `[K]`."""

    num_values: tuple[int, ...]


class Box(NamedTuple):
    """Arrays of one shape and dtype, with bounds where something depends on them."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    low: tuple[float, ...] | None = None
    """Least value of each entry, flattened; None where it plays no part."""
    high: tuple[float, ...] | None = None
    """Greatest value of each entry, flattened."""


class Dict(NamedTuple):
    """Named spaces; values are dicts."""

    spaces: "tuple[tuple[str, Space], ...]"
    """Sorted by name, as JAX sorts the keys of a dict."""

    @classmethod
    def of(cls, spaces: "Mapping[str, Space]") -> "Dict":
        """From a mapping.

        >>> Dict.of({"goal": Discrete(3), "arm": Box((2,))}).names
        ('arm', 'goal')
        """
        return cls(tuple(sorted(spaces.items())))

    @property
    def names(self) -> tuple[str, ...]:
        """Of its entries."""
        return tuple(name for name, _ in self.spaces)


class Tuple(NamedTuple):
    """Spaces in a row; values are tuples."""

    spaces: "tuple[Space, ...]"


Leaf = Discrete | MultiDiscrete | Box
Space = Leaf | Dict | Tuple


def leaves(space: Space) -> tuple[Leaf, ...]:
    """The spaces of arrays in it, in the order of `jax.tree.leaves` of a value."""
    if isinstance(space, Dict):
        return tuple(leaf for _, entry in space.spaces for leaf in leaves(entry))
    if isinstance(space, Tuple):
        return tuple(leaf for entry in space.spaces for leaf in leaves(entry))
    return (space,)


def shape_of(leaf: Leaf) -> tuple[int, ...]:
    """The shape of a value, without batch axes."""
    if isinstance(leaf, Discrete):
        return ()
    return (len(leaf.num_values),) if isinstance(leaf, MultiDiscrete) else leaf.shape


def dtype_of(leaf: Leaf) -> str:
    """The dtype of a value."""
    return leaf.dtype if isinstance(leaf, Box) else "int32"


def to_plain(space: Space) -> dict[str, Any]:
    """The same in JSON's types."""
    kind = type(space).__name__
    if isinstance(space, Dict):
        return {"kind": kind, "spaces": [[name, to_plain(entry)] for name, entry in space.spaces]}
    if isinstance(space, Tuple):
        return {"kind": kind, "spaces": [to_plain(entry) for entry in space.spaces]}
    return {"kind": kind, **space._asdict()}


def from_plain(plain: Mapping[str, Any]) -> Space:
    """The inverse of `to_plain`.

    >>> space = Dict.of({"goal": Discrete(3), "arm": Box((2,), low=(0.0, 0.0))})
    >>> from_plain(to_plain(space)) == space
    True
    """
    fields = dict(plain)
    kind = fields.pop("kind")
    if kind == "Dict":
        return Dict(tuple((name, from_plain(entry)) for name, entry in fields["spaces"]))
    if kind == "Tuple":
        return Tuple(tuple(from_plain(entry) for entry in fields["spaces"]))
    leaf = {"Discrete": Discrete, "MultiDiscrete": MultiDiscrete, "Box": Box}[kind]
    return leaf(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
