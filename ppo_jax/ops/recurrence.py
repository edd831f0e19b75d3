"""Linear recurrences over sequences, in few passes over all steps."""

import jax
import jax.numpy as jnp

_BLOCK = 8  # steps that one kernel computes


@jax.custom_vjp
def linear_recurrence(decay: jax.Array, x: jax.Array, state: jax.Array) -> jax.Array:
    """Computes y_t = decay_t y_{t−1} + x_t, where y_{−1} is the state, in a few passes.

    Eight steps compose to one step of the same form, so a recurrence over blocks of eight steps
    gives the values at which the blocks start. It is computed in the same way, recursively.
    Blelloch 1990 (CMU-CS-90-190), section 1.4.

    Args:
      decay: `[T, ...]`.
      x: inputs, `[T, ...]`.
      state: `[...]`.

    Returns:
      y, `[T, ...]`.
    """
    if len(x) <= _BLOCK:
        return jnp.stack(_steps(decay, x, state))
    padding = [(0, -len(x) % _BLOCK)] + [(0, 0)] * (x.ndim - 1)
    # The leading axis is the step within a block; each entry is `[K, ...]` for K blocks.
    decays, inputs = (
        jnp.moveaxis(jnp.pad(leaf, padding).reshape(-1, _BLOCK, *leaf.shape[1:]), 1, 0)
        for leaf in (decay, x)
    )
    ends = linear_recurrence.fun(
        jnp.prod(decays, axis=0), _steps(decays, inputs, jnp.zeros_like(inputs[0]))[-1], state
    )
    before = jnp.concatenate([state[None], ends[:-1]])
    y = jnp.stack(_steps(decays, inputs, before), axis=1)
    return y.reshape(-1, *x.shape[1:])[: len(x)]


def _steps(decay: jax.Array, x: jax.Array, state: jax.Array) -> list[jax.Array]:
    """Returns the states after each of a few steps."""
    states = []
    for t in range(len(x)):
        state = decay[t] * state + x[t]
        states.append(state)
    return states


def _linear_forward(
    decay: jax.Array, x: jax.Array, state: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    y = linear_recurrence.fun(decay, x, state)
    return y, (decay, y, state)


def _linear_backward(saved: tuple[jax.Array, ...], d_y: jax.Array) -> tuple[jax.Array, ...]:
    decay, y, state = saved
    # The derivative with respect to x is the same recurrence from the last step to the first.
    later = jnp.concatenate([jnp.zeros_like(decay[:1]), decay[:0:-1]])
    # `fun` is the function without `custom_vjp`, so that this rule can be differentiated again.
    d_x = linear_recurrence.fun(later, d_y[::-1], jnp.zeros_like(state))[::-1]
    before = jnp.concatenate([state[None], y[:-1]])
    return d_x * before, d_x, d_x[0] * decay[0]


linear_recurrence.defvjp(_linear_forward, _linear_backward)
