"""Means and sums over the devices that share a training."""

from typing import Any

import jax
from jax.flatten_util import ravel_pytree


def mean_over(tree: Any, axis_name: str | None) -> Any:
    """Returns the mean over the devices of a mesh axis, in one collective.

    For an axis name of None, a single device, the tree is returned unchanged.

    >>> x = jax.numpy.array([1.0, 3.0])
    >>> jax.vmap(lambda x: mean_over(x, "env"), axis_name="env")(x).tolist()
    [2.0, 2.0]
    """
    if axis_name is None:
        return tree
    flat, unravel = ravel_pytree(tree)
    return unravel(jax.lax.pmean(flat, axis_name))


def sum_over(x: jax.Array, axis_name: str | None) -> jax.Array:
    """Returns the sum over the devices of a mesh axis; for None `x` itself."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)
