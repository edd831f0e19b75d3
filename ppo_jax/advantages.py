"""Advantage estimators on plain arrays, time-major `[T, N]`.

`terminated` stops bootstrapping; `truncated` does not: a time limit is not a death.
"""

import chex
import jax
import jax.numpy as jnp

Scalar = float | jax.Array


def td_error(
    reward: jax.Array,
    value: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    *,
    gamma: Scalar,
) -> jax.Array:
    """δ_t = r_t + γ (1 − terminated_t) V(s'_t) − V(s_t).

    Args:
      reward: r_t, `[T, N]`.
      value: V(s_t), `[T, N]`.
      next_value: V(s'_t) of the true successor (before any reset), `[T, N]`.
      terminated: bool, the successor is terminal, `[T, N]`.
      gamma: discount γ.

    Returns:
      δ, `[T, N]`.
    """
    chex.assert_equal_shape([reward, value, next_value, terminated])
    return reward + gamma * jnp.where(terminated, 0.0, next_value) - value


def gae(
    reward: jax.Array,
    value: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    *,
    gamma: Scalar,
    gae_lambda: Scalar,
) -> jax.Array:
    """Generalised advantage estimation, Â_t = Σ_k (γλ)^k δ_{t+k} within one episode.

    Schulman et al. 2016 (arXiv:1506.02438), equation 16, as the recursion
    Â_t = δ_t + γλ (1 − done_t) Â_{t+1} with done = terminated | truncated. δ bootstraps from
    the value of the true successor wherever the episode was not *terminated*, also where a
    time limit or the rollout's end cut it.

    Args:
      reward: r_t, `[T, N]`.
      value: V(s_t), `[T, N]`.
      next_value: V(s'_t) of the true successor (before any reset), `[T, N]`.
      terminated: bool, the successor is terminal, `[T, N]`.
      truncated: bool, a time limit cut the episode here, `[T, N]`.
      gamma: discount γ.
      gae_lambda: λ; 0 gives the TD error, 1 the discounted return minus the value.

    Returns:
      Advantages, `[T, N]`.

    >>> one = jnp.ones((2, 1))
    >>> no = jnp.zeros((2, 1), bool)
    >>> gae(one, 0 * one, 0 * one, no, no, gamma=0.5, gae_lambda=1.0)[:, 0].tolist()
    [1.5, 1.0]
    """
    chex.assert_rank(reward, 2)
    chex.assert_equal_shape([reward, value, next_value, terminated, truncated])
    delta = td_error(reward, value, next_value, terminated, gamma=gamma)
    decay = gamma * gae_lambda * (1.0 - jnp.logical_or(terminated, truncated))

    def backward(advantage: jax.Array, inputs: tuple) -> tuple[jax.Array, jax.Array]:
        delta_t, decay_t = inputs
        advantage = delta_t + decay_t * advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(
        backward, jnp.zeros_like(delta[0]), (delta, decay), reverse=True, unroll=16
    )
    return advantages
