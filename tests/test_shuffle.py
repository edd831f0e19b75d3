import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ppo_jax.ops.shuffle import shuffled, swap_or_not


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 100, 513, 4096])
def test_every_index_comes_once(size):
    order = shuffled(jax.random.key(size), jnp.arange(size), size=size)
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


def test_a_slice_of_the_order_can_be_computed_alone():
    key = jax.random.key(0)
    whole = shuffled(key, jnp.arange(100), size=100)
    part = shuffled(key, jnp.arange(40, 60), size=100)
    np.testing.assert_array_equal(part, whole[40:60])


def test_places_and_pairs_are_as_frequent_as_in_random_permutations():
    size, draws = 48, 40_000
    keys = jax.random.split(jax.random.key(1), draws)
    orders = np.asarray(
        jax.jit(jax.vmap(lambda key: shuffled(key, jnp.arange(size), size=size)))(keys)
    )
    for place in (0, 17, size - 1):
        counts = np.bincount(orders[:, place], minlength=size)
        assert scipy.stats.chisquare(counts).pvalue > 1e-4
    pairs = np.bincount(orders[:, 3] * size + orders[:, 4], minlength=size * size)
    different = ~np.eye(size, dtype=bool).ravel()
    assert pairs[~different].sum() == 0
    assert scipy.stats.chisquare(pairs[different]).pvalue > 1e-4
    cycles = np.array([np.sum(order == np.arange(size)) for order in orders])
    assert cycles.mean() == pytest.approx(1.0, abs=0.03)  # fixed points of a permutation: one
    assert cycles.var() == pytest.approx(1.0, abs=0.05)


def test_rounds_in_larger_steps_give_the_same_order():
    x = jnp.arange(100, dtype=jnp.uint32)
    keys = jax.random.bits(jax.random.key(0), (4, 2), jnp.uint32)
    one, two = (swap_or_not(x, keys, size=100, unroll=unroll) for unroll in (1, 2))
    np.testing.assert_array_equal(one, two)
