"""Orthogonal initialisation out of matrix products alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

_ITERATIONS = 40


def orthogonal(gain: float) -> Callable[[jax.Array, tuple[int, ...]], jax.Array]:
    """`gain` times a matrix with orthonormal rows or columns, uniform over all of them.

    Saxe et al. 2014 (arXiv:1312.6120). JAX's own initialiser takes the QR decomposition of a
    Gaussian matrix. Several of these under one `vmap` wait for each other forever on a CPU with
    two threads (jaxlib 0.10.2), and batched QR is slow on GPUs. The polar factor of a
    Gaussian matrix has the same distribution, and Newton and Schulz's iteration
    X ← X (3 I − XᵀX) / 2 finds it by products alone: each round grows a small singular
    value by half, so 40 reach every one that float32 can tell from zero.
    """

    def initialize(
        key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32
    ) -> jax.Array:
        rows, columns = max(shape), min(shape)
        identity = jnp.eye(columns)
        # √rows + √columns bounds the largest singular value but for rare tails; √3 of slack.
        x = jax.random.normal(key, (rows, columns)) / (np.sqrt(rows) + np.sqrt(columns))

        def improve(_: int, x: jax.Array) -> jax.Array:
            gram = jnp.matmul(x.T, x, precision="highest")
            return jnp.matmul(x, 1.5 * identity - 0.5 * gram, precision="highest")

        x = jax.lax.fori_loop(0, _ITERATIONS, improve, x)
        return (gain * (x if shape == x.shape else x.T)).astype(dtype)

    return initialize
