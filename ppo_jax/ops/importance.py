"""Importance sampling: estimates of expectations under p from samples of q, and their errors.

E_p[f] = E_q[w f] with w = p / q; Owen 2013, "Monte Carlo theory, methods and examples", chapter 9.
The estimate is unbiased. Its variance is that of w f, which grows as p and q move apart; trust
regions and clipping limit this growth.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


class ImportanceEstimate(NamedTuple):
    """An estimate of E_p[f] from samples of q."""

    mean: jax.Array  # []
    standard_error: jax.Array  # []
    effective_sample_size: jax.Array  # [], in samples
    weight_variance: jax.Array  # []


def importance_sampling(
    log_p: jax.Array, log_q: jax.Array, values: jax.Array, *, self_normalized: bool = False
) -> ImportanceEstimate:
    """Estimates E_p[f] from samples x of q.

    Args:
      log_p: log p(x), `[B]`.
      log_q: log q(x), `[B]`.
      values: f(x), `[B]`.
      self_normalized: divide by the sum of the weights instead of by their number. The estimate is
        biased, but valid for an unnormalised p, and often has a smaller variance.

    Returns:
      An `ImportanceEstimate` of scalars.

    >>> same = jnp.zeros(4)
    >>> float(importance_sampling(same, same, jnp.array([1.0, 2.0, 3.0, 4.0])).mean)
    2.5
    """
    chex.assert_rank(values, 1)
    chex.assert_equal_shape([log_p, log_q, values])
    weights = jnp.exp(log_p - log_q)
    scale = jnp.mean(weights) if self_normalized else 1.0
    mean = jnp.mean(weights * values) / scale
    # The standard error of a ratio of means comes from the delta method.
    errors = weights * (values - mean) / scale if self_normalized else weights * values - mean
    return ImportanceEstimate(
        mean=mean,
        standard_error=jnp.sqrt(jnp.mean(jnp.square(errors)) / values.shape[0]),
        effective_sample_size=effective_sample_size(log_p - log_q),
        weight_variance=jnp.var(weights),
    )


def effective_sample_size(log_weights: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Computes Kish's effective sample size (Σ w)² / Σ w², from log w without overflow.

    Args:
      log_weights: log w, any shape.
      mask: weights that count, of the same shape; None for all.

    Returns:
      A scalar, in samples.

    >>> float(effective_sample_size(jnp.zeros(8)))
    8.0
    """
    if mask is not None:
        # A weight of exp(−∞) = 0 counts in neither sum.
        log_weights = jnp.where(mask, log_weights, -jnp.inf)
    logsumexp = jax.nn.logsumexp
    return jnp.exp(2.0 * logsumexp(log_weights) - logsumexp(2.0 * log_weights))


def trajectory_log_weights(log_ratio: jax.Array, done: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes the log-weights of trajectory pieces in a rollout, log w(τ) = Σ_t log r_t.

    Args:
      log_ratio: log π_θ(a|s) − log π_θold(a|s), `[T, N]`.
      done: bool, an episode ended here, `[T, N]`.

    Returns:
      `(log_weights, is_last)`, each `[T, N]`. A piece ends with an episode or with the rollout;
      `log_weights` at its last step is the sum over the piece.

    >>> log_weights, is_last = trajectory_log_weights(
    ...     jnp.array([[1.0], [2.0], [4.0]]), jnp.array([[False], [True], [False]])
    ... )
    >>> log_weights[is_last].tolist()
    [3.0, 4.0]
    """
    chex.assert_rank(log_ratio, 2)
    chex.assert_equal_shape([log_ratio, done])

    def forward(
        total: jax.Array, inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        log_ratio_t, done_t = inputs
        total = total + log_ratio_t
        return jnp.where(done_t, 0.0, total), total

    _, totals = jax.lax.scan(forward, jnp.zeros_like(log_ratio[0]), (log_ratio, done))
    # The rollout's end cuts the last piece of each environment.
    return totals, jnp.asarray(done).at[-1].set(True)
