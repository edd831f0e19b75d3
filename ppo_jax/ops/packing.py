"""Trees of arrays packed into few arrays, for loops that store them."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Carry = TypeVar("Carry")

_SMALL = 4  # up to this many elements a row, types of 1 or 2 bytes are widened to 4 bytes
_WARP = 32  # threads of a GPU that run together; arrays with fewer rows are not transposed
_NARROW = 8  # up to this many elements a row, the rows become the last axis
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class _Place(NamedTuple):
    """Place of a leaf in the packed arrays."""

    name: str
    """Name of the array that holds the leaf."""
    elements: slice | None
    """Elements of the array's rows that are the leaf's; None for a leaf that is stored as it is."""
    rows_last: bool
    """The rows are the last axis of the array, and their elements the one before."""
    shape: tuple[int, ...]
    dtype: Any


class Packing:
    """Packs trees of one structure, whose leaves are scalars or have a first axis of environments.

    An accelerator launches a kernel for every array that a loop stores in a step. Leaves with the
    same number of rows N and the same element size are concatenated to one array of unsigned
    integers, which holds their bits; F is the number of elements of all these leaves in one row.
    Leaves with at most 8 elements a row become `[F, N]` if N is at least 32; other leaves, such as
    images, become `[N, F]`. Random keys and complex numbers are stored unpacked.

    Args:
      packs_wide: pack leaves with more than 8 elements a row as well; False stores them unpacked. A
        TPU tiles the last two axes of an array, so that packing would move such leaves several
        times.

    >>> packing = Packing()
    >>> tree = {"obs": jnp.ones((3, 2)), "done": jnp.array([True, False, False])}
    >>> packed = packing.pack(tree)
    >>> [x.shape for x in packed.values()]
    [(3, 3)]
    >>> packing.unpack(packed)["done"].tolist()
    [True, False, False]
    """

    def __init__(self, *, packs_wide: bool = True) -> None:
        self._packs_wide = packs_wide
        self._structure: Any = None
        self._places: list[_Place] = []

    def pack(self, tree: Any) -> dict[str, jax.Array]:
        """Returns the packed arrays by group; scalars count as one row."""
        leaves, self._structure = jax.tree.flatten(tree)
        self._places = []
        groups: dict[str, list[jax.Array]] = {}
        packed: dict[str, jax.Array] = {}
        for leaf in leaves:
            num_rows = leaf.shape[0] if leaf.ndim else 1
            is_wide = leaf.size > _NARROW * num_rows
            if not _is_packable(leaf.dtype) or (is_wide and not self._packs_wide):
                name = f"leaf {len(packed)}"
                packed[name] = leaf
                self._places.append(_Place(name, None, False, leaf.shape, leaf.dtype))
                continue
            rows = _unsigned(leaf).reshape(num_rows, leaf.size // num_rows)
            width = leaf.dtype.itemsize
            if width < 4 and rows.shape[1] <= _SMALL:
                width, rows = 4, rows.astype(np.uint32)
            # Threads that run together compute neighbours of the last axis. If these are different
            # leaves, the threads compute all leaves one after the other: CartPole's rollout took
            # 11 % longer on an H100 (8 steps in an iteration: 6 %).
            rows_last = not is_wide and num_rows >= _WARP
            name = f"{num_rows} x {width} bytes" + (", narrow" if rows_last else "")
            axis = 0 if rows_last else 1  # of the elements
            start = sum(part.shape[axis] for part in groups.get(name, []))
            elements = slice(start, start + rows.shape[1])
            self._places.append(_Place(name, elements, rows_last, leaf.shape, leaf.dtype))
            groups.setdefault(name, []).append(rows.T if rows_last else rows)
        for place in self._places:
            if place.name in groups:
                axis = 0 if place.rows_last else 1
                packed[place.name] = jnp.concatenate(groups.pop(place.name), axis=axis)
        return packed

    def unpack(self, packed: dict[str, jax.Array]) -> Any:
        """Returns the tree that `pack` packed last; arrays may have axes before those packed."""
        leaves = []
        for name, elements, rows_last, shape, dtype in self._places:
            x = packed[name]
            if elements is not None:
                rows = x[..., elements, :].mT if rows_last else x[..., elements]
                bits = rows.astype(_UNSIGNED[dtype.itemsize])
                x = _from_unsigned(bits, dtype).reshape(*x.shape[:-2], *shape)
            leaves.append(x)
        return jax.tree.unflatten(self._structure, leaves)


class NoPacking:
    """Stands in for `Packing` where a loop carries or stores trees as they are."""

    def pack(self, tree: Any) -> Any:
        """Returns the tree."""
        return tree

    def unpack(self, packed: Any) -> Any:
        """Returns the tree."""
        return packed


def _is_packable(dtype: Any) -> bool:
    return any(jnp.issubdtype(dtype, kind) for kind in (bool, jnp.integer, jnp.floating))


def _unsigned(x: jax.Array) -> jax.Array:
    """Returns the bits of an array as unsigned integers."""
    if x.dtype == bool:
        return x.astype(np.uint8)
    return jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize])


def _from_unsigned(bits: jax.Array, dtype: Any) -> jax.Array:
    if np.issubdtype(dtype, np.bool_):
        return bits.astype(bool)
    return jax.lax.bitcast_convert_type(bits, dtype)


def scan(
    step: Callable[[Carry, Any, Any], tuple[Carry, Any]],
    carry: Carry,
    inputs: Any,
    *,
    derive: Callable[[Carry], Any] = lambda carry: None,
) -> tuple[Carry, Any]:
    """Scans `step` over inputs, with `jax.lax.scan` on a CPU and `packed_scan` on accelerators.

    Args:
      step: `(carry, derive(carry), input) -> (carry, outputs)`.
      carry: the initial carry.
      inputs: tree of arrays with a leading axis.
      derive: computes values from a carry, such as biases from a vector of parameters. On
        accelerators the loop carries them, because XLA fuses an argument of a loop into kernels
        into which it does not fuse an array that the loop computes.

    Returns:
      The carry after the last step, and the outputs with a leading axis.
    """
    step = jax.jit(step)  # traced once for both

    def plain_scan(carry: Carry, inputs: Any) -> tuple[Carry, Any]:
        return jax.lax.scan(lambda carry, x: step(carry, derive(carry), x), carry, inputs)

    def deriving_scan(carry: Carry, inputs: Any) -> tuple[Carry, Any]:
        def step_and_derive(both: tuple[Carry, Any], x: Any) -> tuple[tuple[Carry, Any], Any]:
            carry, outputs = step(*both, x)
            return (carry, derive(carry)), outputs

        (end, _), outputs = packed_scan(step_and_derive, (carry, derive(carry)), inputs)
        return end, outputs

    return jax.lax.platform_dependent(carry, inputs, cpu=plain_scan, default=deriving_scan)


def packed_scan(
    step: Callable[[Carry, Any], tuple[Carry, Any]],
    carry: Carry,
    inputs: Any,
    *,
    unroll: int = 1,
    make_packing: Callable[[], Packing | NoPacking] = Packing,
) -> tuple[Carry, Any]:
    """Computes `jax.lax.scan(step, carry, inputs, unroll=unroll)`, and stores its outputs packed.

    Args:
      step: `(carry, input) -> (carry, outputs)`; the outputs are as `Packing` takes them.
      carry: the initial carry.
      inputs: tree of arrays with a leading axis.
      unroll: steps in one iteration of the loop.
      make_packing: returns a new packing, for the outputs.

    Returns:
      The carry after the last step, and the outputs with a leading axis.
    """
    packing = make_packing()

    def packed_step(carry: Carry, inputs: Any) -> tuple[Carry, Any]:
        carry, output = step(carry, inputs)
        return carry, packing.pack(output)

    end, stored = jax.lax.scan(packed_step, carry, inputs, unroll=unroll)
    return end, packing.unpack(stored)
