"""Static, hashable descriptions of observations and actions."""

from collections.abc import Mapping
from typing import Any, NamedTuple

ACTION_MASK = "action_mask"
"""Name of the entry of a dict observation that tells which actions are allowed. Networks do not see
it."""


class Discrete(NamedTuple):
    """The integers 0 … num_values − 1; an int32 scalar."""

    num_values: int


class MultiDiscrete(NamedTuple):
    """Several integers, the k-th of them below `num_values[k]`; int32 `[K]`."""

    num_values: tuple[int, ...]


class Box(NamedTuple):
    """Arrays of one shape and dtype, with bounds for actions."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    low: tuple[float, ...] | None = None
    """Minimum of each entry, flattened; None where it is not used."""
    high: tuple[float, ...] | None = None
    """Maximum of each entry, flattened; None where it is not used."""


class Dict(NamedTuple):
    """Named spaces; values are dicts."""

    spaces: "tuple[tuple[str, Space], ...]"
    """Sorted by name, as JAX sorts the keys of a dict."""

    @classmethod
    def of(cls, spaces: "Mapping[str, Space]") -> "Dict":
        """Returns the space of a mapping from names to spaces.

        >>> Dict.of({"goal": Discrete(3), "arm": Box((2,))}).names
        ('arm', 'goal')
        """
        return cls(tuple(sorted(spaces.items())))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the entries, sorted."""
        return tuple(name for name, _ in self.spaces)


class Tuple(NamedTuple):
    """Several spaces; values are tuples."""

    spaces: "tuple[Space, ...]"


Leaf = Discrete | MultiDiscrete | Box
Space = Leaf | Dict | Tuple


def leaves(space: Space) -> tuple[Leaf, ...]:
    """Returns the spaces of single arrays, in the order of `jax.tree.leaves` of a value."""
    if isinstance(space, Dict):
        return tuple(leaf for _, entry in space.spaces for leaf in leaves(entry))
    if isinstance(space, Tuple):
        return tuple(leaf for entry in space.spaces for leaf in leaves(entry))
    return (space,)


def shape_of(leaf: Leaf) -> tuple[int, ...]:
    """Returns the shape of a value, without batch axes."""
    if isinstance(leaf, Discrete):
        return ()
    return (len(leaf.num_values),) if isinstance(leaf, MultiDiscrete) else leaf.shape


def dtype_of(leaf: Leaf) -> str:
    """Returns the dtype of a value."""
    return leaf.dtype if isinstance(leaf, Box) else "int32"


def to_plain(space: Space) -> dict[str, Any]:
    """Returns the space in types of JSON."""
    kind = type(space).__name__
    if isinstance(space, Dict):
        return {"kind": kind, "spaces": [[name, to_plain(entry)] for name, entry in space.spaces]}
    if isinstance(space, Tuple):
        return {"kind": kind, "spaces": [to_plain(entry) for entry in space.spaces]}
    return {"kind": kind, **{name: _to_plain(value) for name, value in space._asdict().items()}}


def _to_plain(value: Any) -> Any:
    """Returns a field of a space with NumPy's numbers unwrapped, which JSON does not take."""
    if isinstance(value, tuple):
        return tuple(map(_to_plain, value))
    return value.item() if hasattr(value, "item") else value


def from_plain(plain: Mapping[str, Any]) -> Space:
    """Returns the space that `to_plain` converted.

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
