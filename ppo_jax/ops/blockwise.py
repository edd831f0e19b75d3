"""Computations over the steps of a rollout that take the memory of a few steps at a time."""

from collections.abc import Callable
from typing import Any

import jax

from ppo_jax.ops.blocks import largest_divisor


def map_blockwise(function: Callable[[Any], Any], tree: Any, *, num_samples: int) -> Any:
    """Applies a function to blocks of time steps, one block after another.

    Args:
      function: maps a tree of arrays `[t, N, ...]` to another one, for any number t of steps. Its
        results for a step do not depend on the other steps.
      tree: arrays `[T, N, ...]`.
      num_samples: maximum of t · N, unless a single step has more. Blocks have equal sizes.

    Returns:
      The results for all steps, arrays `[T, N, ...]`.

    >>> x = jax.numpy.arange(6.0).reshape(6, 1)
    >>> map_blockwise(lambda x: 2 * x, x, num_samples=3).ravel().tolist()
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    num_steps, num_envs = jax.tree.leaves(tree)[0].shape[:2]
    size = largest_divisor(num_steps, at_most=max(1, num_samples // num_envs))
    # A single block is a loop as well, which XLA removes.
    blocks = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), tree)
    results = jax.lax.map(function, blocks)
    return jax.tree.map(lambda x: x.reshape(num_steps, *x.shape[2:]), results)
