"""Orthogonal initialisation of all layers together, by matrix products alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.defaults import GAINS

_ITERATIONS = 40


def orthogonal_matrices(key: jax.Array, shapes: Sequence[tuple[int, int]]) -> list[jax.Array]:
    """Draws matrices with orthonormal rows or columns, from the uniform (Haar) distribution.

    JAX's initialiser takes the QR decomposition of a Gaussian matrix, which is slow on GPUs if
    batched. Here the polar factor of a Gaussian matrix, which has the same distribution, is found
    by the Newton-Schulz iteration X ← X (3 I − XᵀX) / 2. Each round multiplies a small singular
    value by about 1.5. After 40 rounds every singular value above float32's resolution is 1.

    Args:
      key: random key.
      shapes: rows and columns of each matrix.

    Returns:
      A matrix of each shape. Its columns are orthonormal if it is tall, and its rows if it is wide.
    """
    # Several batched QR decompositions under one `vmap` wait for each other forever on a CPU with
    # two threads (jaxlib 0.10.2).
    ends = np.cumsum([0, *map(np.prod, shapes)])
    # One draw and one loop for all matrices compile in a third of the time of one for each.
    entries = jax.random.normal(key, (ends[-1],))

    def start(i: int, shape: tuple[int, int]) -> jax.Array:
        rows, columns = max(shape), min(shape)
        x = entries[ends[i] : ends[i + 1]].reshape(rows, columns)
        # √rows + √columns bounds the largest singular value except in rare tails; the iteration
        # converges up to √3 times the bound.
        return x / (np.sqrt(rows) + np.sqrt(columns))

    def improve(_: int, matrices: list[jax.Array]) -> list[jax.Array]:
        return [1.5 * x - 0.5 * x @ (x.T @ x) for x in matrices]

    matrices = [start(i, shape) for i, shape in enumerate(shapes)]
    with jax.default_matmul_precision("highest"):
        matrices = jax.lax.fori_loop(0, _ITERATIONS, improve, matrices)
    return [x if x.shape == shape else x.T for x, shape in zip(matrices, shapes, strict=True)]


def orthogonal(gain: str | None = None) -> Callable[..., "_PendingMatrix"]:
    """Returns an initialiser of kernels `[inputs, outputs]` that `draw` completes.

    The kernel is the gain times an orthogonal matrix (Saxe et al. 2014, arXiv:1312.6120), times
    √(outputs / inputs) in a layer that widens. Without that factor, a layer from 4 inputs to 64
    units would output a quarter of the inputs' standard deviation (Yang et al. 2023,
    arXiv:2310.17813, condition 1).

    Args:
      gain: a key of `defaults.GAINS`; None is a gain of 1.
    """

    def initialize(
        _: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32
    ) -> _PendingMatrix:
        inputs, outputs = shape
        scale = np.sqrt(max(1.0, outputs / inputs))
        return _PendingMatrix(jnp.zeros(shape, dtype), scale, gain)

    return initialize


def draw(key: jax.Array, params: Any, gains: Mapping[str, Any] | None = None) -> Any:
    """Replaces the placeholders that `orthogonal` left in parameters by matrices.

    Args:
      key: random key.
      params: parameters as flax made them.
      gains: gains by name; names that are missing keep their default in `defaults.GAINS`.
    """
    gains = {**GAINS, **(gains or {})}
    leaves, treedef = jax.tree.flatten(params, is_leaf=_is_pending)
    pending = [leaf for leaf in leaves if _is_pending(leaf)]
    matrices = iter(orthogonal_matrices(key, [leaf.value.shape for leaf in pending]))

    def scaled(leaf: _PendingMatrix) -> jax.Array:
        scale = leaf.scale if leaf.gain is None else gains[leaf.gain] * leaf.scale
        return (scale * next(matrices)).astype(leaf.value.dtype)

    drawn = [scaled(leaf) if _is_pending(leaf) else leaf for leaf in leaves]
    return jax.tree.unflatten(treedef, drawn)


class _PendingMatrix(flax.struct.PyTreeNode, nn.meta.AxisMetadata[jax.Array]):
    """A placeholder for an orthogonal matrix; flax unboxes it where a layer uses its parameter."""

    value: jax.Array  # [inputs, outputs], zeros
    scale: float = flax.struct.field(pytree_node=False)
    gain: str | None = flax.struct.field(pytree_node=False)

    def unbox(self) -> jax.Array:
        return self.value

    def replace_boxed(self, val: Any) -> Any:
        return self.replace(value=val)

    # flax asks for these where layers are stacked by a lifted `vmap` or `scan`; none are.
    def add_axis(self, index: int, params: Any) -> "_PendingMatrix":
        raise NotImplementedError

    def remove_axis(self, index: int, params: Any) -> "_PendingMatrix":
        raise NotImplementedError


def _is_pending(leaf: Any) -> bool:
    return isinstance(leaf, _PendingMatrix)
