"""Objectives and losses per sample, on plain arrays. `stages.losses` composes and averages them."""

from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp

from ppo_jax.ops.collective import mean_over

Scalar = float | jax.Array


def policy_gradient(log_prob: jax.Array, advantages: jax.Array) -> jax.Array:
    """Computes log π_θ(a|s) Ψ, whose gradient is that of the policy gradient theorem, `[B]`.

    Schulman et al. 2016 (arXiv:1506.02438), equation 1; Ψ is a return or an advantage.
    """
    chex.assert_equal_shape([log_prob, advantages])
    return log_prob * advantages


def surrogate(ratio: jax.Array, advantages: jax.Array) -> jax.Array:
    """Computes the surrogate r Â with r = π_θ(a|s) / π_θold(a|s), `[B]`.

    Its gradient is the importance-sampled one, E_{θold}[r Â ∇log π_θ]; Schulman et al. 2015
    (arXiv:1502.05477), equation 14.
    """
    chex.assert_equal_shape([ratio, advantages])
    return ratio * advantages


def kl_penalized(
    ratio: jax.Array, advantages: jax.Array, kl: jax.Array, *, kl_coef: Scalar
) -> jax.Array:
    """Computes the penalised surrogate r Â − β KL(π_θold ‖ π_θ).

    Schulman et al. 2017 (arXiv:1707.06347), equation 8.

    Args:
      ratio: r = π_θ(a|s) / π_θold(a|s), `[B]`.
      advantages: Â, `[B]`.
      kl: KL(π_θold ‖ π_θ) of the distributions, `[B]`.
      kl_coef: β.

    Returns:
      `[B]`.
    """
    chex.assert_equal_shape([ratio, advantages, kl])
    return ratio * advantages - kl_coef * kl


def adapt_kl_coef(kl_coef: jax.Array, kl: jax.Array, *, d_targ: Scalar) -> jax.Array:
    """Returns β after an update that moved the policy by `kl`.

    Schulman et al. 2017 (arXiv:1707.06347), section 4: β is halved below d_targ / 1.5 and doubled
    above 1.5 d_targ. It is kept in [1e-6, 1e6], so that it can return after many changes in one
    direction; the paper sets no bounds.
    """
    factor = jnp.where(kl < d_targ / 1.5, 0.5, jnp.where(kl > 1.5 * d_targ, 2.0, 1.0))
    return jnp.clip(kl_coef * factor, 1e-6, 1e6)


def clipped_surrogate(
    ratio: jax.Array,
    advantages: jax.Array,
    *,
    clip_eps: Scalar,
    dual_clip: Scalar | None = None,
) -> jax.Array:
    """Computes PPO's objective min(r Â, clip(r, 1 − ε, 1 + ε) Â), to be maximised.

    Schulman et al. 2017 (arXiv:1707.06347), equation 7. With `dual_clip` c > 1 it is at least c Â
    where Â < 0; Ye et al. 2020 (arXiv:1912.09729), equation 5.

    Args:
      ratio: r = π_θ(a|s) / π_θold(a|s), `[B]`.
      advantages: Â, `[B]`.
      clip_eps: ε.
      dual_clip: c, or None for no second clip.

    Returns:
      `[B]`.

    >>> clipped_surrogate(jnp.array([1.5, 1.5]), jnp.array([1.0, -1.0]), clip_eps=0.25).tolist()
    [1.25, -1.5]
    """
    chex.assert_equal_shape([ratio, advantages])
    # Equal to min and clip: the ratio is replaced only where it exceeds the bound on the side to
    # which the advantage pushes it. Two selections take half as many kernels as min and clip, whose
    # gradients are divided between equal arguments.
    gains = advantages >= 0
    bound = jnp.where(gains, 1.0 + clip_eps, 1.0 - clip_eps)
    is_beyond = jnp.where(gains, ratio > bound, ratio < bound)
    objective = jnp.where(is_beyond, bound, ratio) * advantages
    if dual_clip is None:
        return objective
    return jnp.where(advantages < 0, jnp.maximum(objective, dual_clip * advantages), objective)


def simple_policy(ratio: jax.Array, advantages: jax.Array, *, clip_eps: Scalar) -> jax.Array:
    """Computes r Â − |Â| (r − 1)² / (2 ε), a parabola in r with its maximum at 1 ± ε, `[B]`.

    Simple Policy Optimization, Xie et al. 2025 (arXiv:2401.16025). An ε below 10⁻⁶ counts as 10⁻⁶.
    """
    chex.assert_equal_shape([ratio, advantages])
    width = 2.0 * jnp.maximum(clip_eps, 1e-6)
    return ratio * advantages - jnp.abs(advantages) * jnp.square(ratio - 1.0) / width


def discovered_policy(
    log_ratio: jax.Array, advantages: jax.Array, *, alpha: Scalar, beta: Scalar
) -> jax.Array:
    """Computes the surrogate minus a drift, r Â − drift(r, Â).

    Discovered Policy Optimisation, Lu et al. 2022 (arXiv:2210.05639), section 5: with
    u = (r − 1) Â the drift is relu(u − α tanh(u / α)) where Â ≥ 0; with u = Â log r it is
    relu(u − β tanh(u / β)) where Â < 0.

    Args:
      log_ratio: log r, `[B]`.
      advantages: Â, `[B]`.
      alpha: α.
      beta: β.

    Returns:
      `[B]`.
    """
    chex.assert_equal_shape([log_ratio, advantages])
    ratio = jnp.exp(log_ratio)
    gain = (ratio - 1.0) * advantages
    loss = log_ratio * advantages
    drift = jnp.where(
        advantages >= 0,
        jax.nn.relu(gain - alpha * jnp.tanh(gain / alpha)),
        jax.nn.relu(loss - beta * jnp.tanh(loss / beta)),
    )
    return ratio * advantages - drift


def value_loss(value: jax.Array, targets: jax.Array) -> jax.Array:
    """Computes half the squared error, ½ (V(s) − target)², `[B]`."""
    chex.assert_equal_shape([value, targets])
    return 0.5 * jnp.square(value - targets)


def clipped_value_loss(
    value: jax.Array, old_value: jax.Array, targets: jax.Array, *, value_clip_eps: Scalar
) -> jax.Array:
    """Computes the larger of the losses of V and of V clipped to within ε_v of the old value.

    From OpenAI Baselines' ppo2, not from the paper; Engstrom et al. 2020 (arXiv:2005.12729),
    section 3. ε_v has the units of the value, so it is separate from the ε of the ratio.

    Args:
      value: V(s), `[B]`.
      old_value: V(s) before the update, `[B]`.
      targets: `[B]`.
      value_clip_eps: ε_v.

    Returns:
      `[B]`.
    """
    chex.assert_equal_shape([value, old_value, targets])
    change = value - old_value
    # As two selections, like the clipped surrogate above.
    is_beyond = jnp.abs(change) > value_clip_eps
    bound = old_value + jnp.sign(jax.lax.stop_gradient(change)) * value_clip_eps
    unclipped, clipped = value_loss(value, targets), value_loss(bound, targets)
    return jnp.where(is_beyond & (clipped > unclipped), clipped, unclipped)


def approx_kl(log_ratio: jax.Array) -> jax.Array:
    """Estimates KL(π_old ‖ π) per sample of π_old by (r − 1) − log r, `[B]`.

    Unbiased, never negative, and of low variance: the estimator k3 of Schulman's note
    "Approximating KL divergence" (2020).
    """
    return jnp.expm1(log_ratio) - log_ratio


def mean_share(x: jax.Array, mask: jax.Array | None, axis_name: str | None = None) -> jax.Array:
    """Computes a device's share of a mean; the mean of all shares is the mean over all elements.

    On one device, `axis_name=None`, the share is the mean. Losses are shares, so that a single
    collective can average the loss, its gradient and metrics.

    Args:
      x: any shape.
      mask: elements that count, or None for all; the mean over none is 0.
      axis_name: mesh axis of the devices that hold the other elements.
    """
    if mask is None:
        return jnp.mean(x)
    chex.assert_equal_shape([x, mask])
    # Devices may differ in how many elements count, so the shares are of the mean count.
    count = mean_over(jnp.sum(mask).astype(x.dtype), axis_name)
    return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.where(count > 0, count, 1.0)


def mean_shares(
    samples: Mapping[str, jax.Array], mask: jax.Array | None, axis_name: str | None = None
) -> dict[str, jax.Array]:
    """Computes `mean_share` of several arrays of the same shape, in one reduction."""
    # One reduction of a stack instead of one kernel for each metric.
    stacked = jnp.stack(list(samples.values()))
    shares = jax.vmap(lambda x: mean_share(x, mask, axis_name))(stacked)
    return dict(zip(samples, shares, strict=True))


def masked_mean(x: jax.Array, mask: jax.Array | None, axis_name: str | None = None) -> jax.Array:
    """Computes the mean over elements where `mask` is True, over all for None; 0 over none."""
    return mean_over(mean_share(x, mask, axis_name), axis_name)


def masked_variance(
    x: jax.Array, mask: jax.Array | None, axis_name: str | None = None
) -> jax.Array:
    """Computes the mean squared distance from the mean, over elements where `mask` is True."""
    centred = x - masked_mean(x, mask, axis_name)
    return masked_mean(jnp.square(centred), mask, axis_name)


def standardize(
    x: jax.Array, mask: jax.Array | None = None, axis_name: str | None = None
) -> jax.Array:
    """Shifts and scales `x` to mean 0 and standard deviation 1 over the elements of `mask`."""
    deviation = jnp.sqrt(masked_variance(x, mask, axis_name))
    return (x - masked_mean(x, mask, axis_name)) / (deviation + 1e-8)


def explained_variance(
    prediction: jax.Array,
    targets: jax.Array,
    mask: jax.Array | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Computes 1 − Var(targets − prediction) / Var(targets).

    1 is perfect, and 0 is no better than a constant. NaN where the targets do not vary.

    Args:
      prediction: any shape.
      targets: of the same shape.
      mask: elements that count, or None for all.
      axis_name: mesh axis of the devices that hold the other elements; None for one device.
    """
    chex.assert_equal_shape([prediction, targets])
    variance = masked_variance(targets, mask, axis_name)
    residual = masked_variance(targets - prediction, mask, axis_name)
    return jnp.where(variance > 0, 1.0 - residual / jnp.where(variance > 0, variance, 1.0), jnp.nan)
