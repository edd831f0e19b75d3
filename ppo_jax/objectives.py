"""Objectives and losses, per sample, on plain arrays. Means are taken where they are composed."""

import chex
import jax
import jax.numpy as jnp

Scalar = float | jax.Array


def clipped_surrogate(ratio: jax.Array, advantages: jax.Array, *, clip_eps: Scalar) -> jax.Array:
    """PPO's objective, to be maximised: min(r Â, clip(r, 1 − ε, 1 + ε) Â).

    Schulman et al. 2017 (arXiv:1707.06347), equation 7.

    Args:
      ratio: r = π_θ(a|s) / π_θold(a|s), `[B]`.
      advantages: Â, `[B]`.
      clip_eps: ε.

    Returns:
      `[B]`.

    >>> clipped_surrogate(jnp.array([1.5, 1.5]), jnp.array([1.0, -1.0]), clip_eps=0.25).tolist()
    [1.25, -1.5]
    """
    chex.assert_equal_shape([ratio, advantages])
    clipped_ratio = jnp.clip(ratio, 1.0 - clip_eps, 1.0 + clip_eps)
    return jnp.minimum(ratio * advantages, clipped_ratio * advantages)


def value_loss(value: jax.Array, targets: jax.Array) -> jax.Array:
    """Half the squared error, ½ (V(s) − target)², `[B]`."""
    chex.assert_equal_shape([value, targets])
    return 0.5 * jnp.square(value - targets)


def clipped_value_loss(
    value: jax.Array, old_value: jax.Array, targets: jax.Array, *, value_clip_eps: Scalar
) -> jax.Array:
    """The larger of the losses of V and of V clipped to within ε_v of the old value, `[B]`.

    From OpenAI Baselines' ppo2, not from the paper; Engstrom et al. 2020 (arXiv:2005.12729),
    section 3. ε_v has the units of the value, so it is a parameter of its own.
    """
    chex.assert_equal_shape([value, old_value, targets])
    clipped = old_value + jnp.clip(value - old_value, -value_clip_eps, value_clip_eps)
    return jnp.maximum(value_loss(value, targets), value_loss(clipped, targets))


def approx_kl(log_ratio: jax.Array) -> jax.Array:
    """KL(π_old ‖ π) estimated per sample of π_old: (r − 1) − log r, `[B]`.

    Unbiased, never negative, and of low variance: the estimator k3 of Schulman's note
    "Approximating KL divergence" (2020).
    """
    return jnp.expm1(log_ratio) - log_ratio


def standardize(x: jax.Array) -> jax.Array:
    """`x` shifted and scaled to mean 0 and standard deviation 1 over all its elements."""
    return (x - jnp.mean(x)) / (jnp.std(x) + 1e-8)


def explained_variance(prediction: jax.Array, targets: jax.Array) -> jax.Array:
    """1 − Var(targets − prediction) / Var(targets): 1 is perfect, 0 no better than a constant.

    NaN where the targets do not vary.
    """
    chex.assert_equal_shape([prediction, targets])
    variance = jnp.var(targets)
    residual = jnp.var(targets - prediction)
    return jnp.where(variance > 0, 1.0 - residual / jnp.where(variance > 0, variance, 1.0), jnp.nan)
