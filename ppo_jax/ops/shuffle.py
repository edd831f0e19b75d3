"""Random orders of 0 … size − 1 without a sort, by a keyed bijection of indices.

`jax.random.permutation` sorts random keys several times: 34 ms for 65,536 indices on a CPU, where
this module takes 1 ms. Training only needs every sample once per epoch, in an order that looks
random.
"""

from functools import partial

import jax
import jax.numpy as jnp

_ROUNDS = 24
_UNROLL = 8  # rounds in one kernel of an accelerator; all of them take 4 s more to compile


def shuffled(key: jax.Array, positions: jax.Array, *, size: int) -> jax.Array:
    """Returns the images of `positions` under a random bijection of {0, …, size − 1}.

    The swap-or-not shuffle of Hoang, Morris & Rogaway 2012 (arXiv:1208.1176), section 3. Each round
    pairs x with k − x (mod size); one bit of a keyed hash of the larger decides whether the two are
    swapped. A round is its own inverse, so the result is a bijection for any size. Positions are
    mapped independently, so that any slice of the order can be computed alone. After 24 rounds
    frequencies of positions and pairs are indistinguishable from those of uniform permutations (see
    the tests). The order is not cryptographically secure.

    Args:
      key: random key.
      positions: integers in [0, size), any shape.
      size: number of indices; at most 2**31.

    Returns:
      uint32 array of `positions`' shape. Indexing by it needs no check for negative indices.

    >>> order = shuffled(jax.random.key(0), jnp.arange(10), size=10)
    >>> sorted(order.tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    keys = jax.random.bits(key, (_ROUNDS, 2), jnp.uint32)
    # On a CPU, XLA fuses unrolled rounds into one kernel in which each round computes all earlier
    # ones again, and which takes seconds to hours to compile. Elsewhere each round is a launch.
    return jax.lax.platform_dependent(
        positions.astype(jnp.uint32),
        keys,
        cpu=partial(swap_or_not, size=size, unroll=1),
        default=partial(swap_or_not, size=size, unroll=_UNROLL),
    )


def swap_or_not(x: jax.Array, keys: jax.Array, *, size: int, unroll: int) -> jax.Array:
    """Applies the rounds of `shuffled`.

    Args:
      x: uint32 positions in [0, size), any shape.
      keys: uint32 pivot and salt of each round, `[rounds, 2]`.
      size: number of indices.
      unroll: rounds in one step of the loop.
    """

    def one_round(x: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        pivot, salt = key
        pivot %= jnp.uint32(size)
        # k − x modulo size, without negative numbers, which uint32 does not have.
        partner = jnp.where(x <= pivot, pivot - x, pivot + jnp.uint32(size) - x)
        return jnp.where(_bit(jnp.maximum(x, partner), salt), partner, x), None

    return jax.lax.scan(one_round, x, keys, unroll=unroll)[0]


def _bit(x: jax.Array, salt: jax.Array) -> jax.Array:
    """Returns one well-mixed bit of each `x`, as the finaliser of MurmurHash3 mixes them."""
    x = (x ^ salt) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return (x >> 31).astype(bool)
