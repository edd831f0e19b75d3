"""A random order of 0 … size − 1 without a sort: a keyed bijection on indices.

`jax.random.permutation` sorts random keys, several times, and costs as much as two minibatch
gradients. A learner only needs every sample once per epoch, in an order it cannot predict.
"""

import jax
import jax.numpy as jnp

_ROUNDS = 24


def shuffled(key: jax.Array, positions: jax.Array, *, size: int) -> jax.Array:
    """The images of `positions` under a random bijection of {0, …, size − 1} drawn by `key`.

    The swap-or-not shuffle of Hoang, Morris & Rogaway 2012 (arXiv:1208.1176), section 3: each
    round pairs x with k − x (mod size) and swaps the pair or not by one bit of a keyed hash of
    the larger. Each round is an involution, so any size gives a bijection, and any slice of
    the order can be computed by itself. 24 rounds leave frequencies and pairs
    indistinguishable from a permutation's (see the tests); this is no cryptography.

    Args:
      key: random key.
      positions: integers in [0, size), any shape.
      size: how many indices there are; at most 2**31.

    Returns:
      int32 array of `positions`' shape.

    >>> order = shuffled(jax.random.key(0), jnp.arange(10), size=10)
    >>> sorted(order.tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    def one_round(x: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        pivot, salt = key
        pivot %= jnp.uint32(size)
        partner = jnp.where(x <= pivot, pivot - x, pivot + jnp.uint32(size) - x)
        return jnp.where(_bit(jnp.maximum(x, partner), salt), partner, x), None

    # A loop: fused in a row, rounds compute each other anew and compile for seconds, or hours.
    keys = jax.random.bits(key, (_ROUNDS, 2), jnp.uint32)
    x, _ = jax.lax.scan(one_round, positions.astype(jnp.uint32), keys)
    return x.astype(jnp.int32)


def _bit(x: jax.Array, salt: jax.Array) -> jax.Array:
    """One well-mixed bit of each `x`: multiply and fold, after the finaliser of MurmurHash3."""
    x = (x ^ salt) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return (x >> 31).astype(bool)
