"""Running mean and variance of a stream, to which batches are appended."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.ops.collective import sum_over

EPS = 1e-8
"""Added to a variance before its square root, by which values are divided."""
CLIP = 10.0
"""Bound on normalised values."""


class RunningStats(NamedTuple):
    """Mean and variance of all samples so far, per element of a sample."""

    num_samples: jax.Array  # []
    mean: jax.Array  # [*shape]
    var: jax.Array  # [*shape], the biased variance


def initial(shape: tuple[int, ...]) -> RunningStats:
    """Returns the statistics of an empty stream, by which `normalize` changes nothing.

    >>> normalize(initial(()), jnp.array(300.0)).item()
    300.0
    """
    return RunningStats(jnp.zeros(()), jnp.zeros(shape), jnp.ones(shape))


def merge(stats: RunningStats, x: jax.Array, axis_name: str | None = None) -> RunningStats:
    """Returns the statistics of the stream with a batch appended.

    A batch with a NaN or an infinity is left out as a whole: it would be in every mean after it. An
    element whose variance alone overflows keeps its statistics.

    Chan, Golub & LeVeque 1983, doi:10.1080/00031305.1983.10483115.

    Args:
      stats: of the stream before.
      x: `[..., *shape]`; all leading axes are samples.
      axis_name: mesh axis of the devices that hold the rest of the batch; None for one device.

    >>> stats = merge(initial(()), jnp.array([1.0, 3.0]))
    >>> stats = merge(stats, jnp.array([5.0]))
    >>> round(stats.mean.item(), 4), round(stats.var.item(), 4)
    (3.0, 2.6667)
    """
    samples = tuple(range(x.ndim - stats.mean.ndim))
    # Sums of half-precision numbers would lose the small differences that the variance needs.
    x = x.astype(jnp.float32)
    local_count = jnp.asarray(x.size // stats.mean.size, jnp.float32)
    count = sum_over(local_count, axis_name)
    mean = sum_over(jnp.sum(x, samples), axis_name) / count
    squares = jnp.sum(jnp.square(x - jnp.expand_dims(mean, samples)), samples)
    var = sum_over(squares, axis_name) / count
    total = stats.num_samples + count
    weight = count / total
    delta = mean - stats.mean
    # An empty stream has a variance of 1, which gets a weight of 0 here.
    merged = (1.0 - weight) * stats.var + weight * var
    appended = RunningStats(
        num_samples=total,
        mean=stats.mean + delta * weight,
        var=merged + jnp.square(delta) * weight * (1.0 - weight),
    )
    # A large entry of an observation, such as 1e20 for "nothing seen", must not leave all others
    # without normalisation.
    is_whole = jnp.all(jnp.isfinite(appended.mean))
    is_finite = is_whole & jnp.isfinite(appended.var)
    return RunningStats(
        num_samples=jnp.where(jnp.any(is_finite), appended.num_samples, stats.num_samples),
        mean=jnp.where(is_finite, appended.mean, stats.mean),
        var=jnp.where(is_finite, appended.var, stats.var),
    )


def normalize(stats: RunningStats, x: jax.Array) -> jax.Array:
    """Returns (x − mean) / standard deviation, clipped to ±10, for x `[..., *shape]`.

    Without samples x is returned as it is: its scale is not known, so that a clip would be
    arbitrary.
    """
    axes = tuple(range(x.ndim - stats.mean.ndim))
    mean, var = (jnp.expand_dims(value, axes) for value in (stats.mean, stats.var))
    normalized = jnp.clip((x - mean) * jax.lax.rsqrt(var + EPS), -CLIP, CLIP)
    return jnp.where(stats.num_samples > 0, normalized, x)


def scale(stats: RunningStats, x: jax.Array) -> jax.Array:
    """Returns x / standard deviation, clipped to ±10; unlike `normalize` it keeps 0 at 0."""
    return jnp.clip(x * jax.lax.rsqrt(stats.var + EPS), -CLIP, CLIP)
