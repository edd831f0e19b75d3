"""Linear recurrences and their derivatives against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.ops.recurrence import linear_recurrence

N = 3


def sums_by_steps(decay, x, state):
    """Computes a linear recurrence from its definition."""
    sums = []
    for decay_t, x_t in zip(decay, x, strict=True):
        state = decay_t * state + x_t
        sums.append(state)
    return jnp.stack(sums)


# One block; several, the last of which is not full; and blocks of blocks.
@pytest.mark.parametrize("num_steps", [1, 5, 8, 19, 70])
def test_a_linear_recurrence_is_its_definition(num_steps):
    keys = jax.random.split(jax.random.key(num_steps), 4)
    decay = jax.random.uniform(keys[0], (num_steps, N), minval=-1.0)
    decay = jnp.where(decay > 0.6, 0.0, decay)
    x, weight = (jax.random.normal(key, (num_steps, N)) for key in keys[1:3])
    state = jax.random.normal(keys[3], (N,))
    every = (0, 1, 2)

    def results_of(function):
        def loss(*arguments):
            return jnp.sum(weight * jnp.square(function(*arguments)))

        arguments = decay, x, state
        return function(*arguments), jax.grad(loss, every)(*arguments)

    ours, plain = results_of(linear_recurrence), results_of(sums_by_steps)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, plain)


def test_derivatives_of_derivatives_are_those_of_the_definition():
    """TRPO multiplies by the Fisher matrix, the derivative of a gradient."""
    keys = jax.random.split(jax.random.key(0), 3)
    decay = jax.random.uniform(keys[0], (11, N))
    x, state = jax.random.normal(keys[1], (11, N)), jax.random.normal(keys[2], (N,))

    def product(function):
        def loss(decay):
            return jnp.sum(jnp.square(function(decay, x, state)))

        return jax.jvp(jax.grad(loss), (decay,), (jnp.ones_like(decay),))[1]

    ours, plain = product(linear_recurrence), product(sums_by_steps)
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-3)
