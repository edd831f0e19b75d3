"""Mean and variance of a stream, merged a batch at a time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.collective import sum_over

_EPS = 1e-8
_CLIP = 10.0


class RunningStats(NamedTuple):
    """Of everything seen so far, per entry of one sample."""

    num_samples: jax.Array  # []
    mean: jax.Array  # [*shape]
    var: jax.Array  # [*shape], the biased variance


def initial(shape: tuple[int, ...]) -> RunningStats:
    """Of nothing: `normalize` leaves x as it is.

    >>> normalize(initial(()), jnp.array(3.0)).item()
    3.0
    """
    return RunningStats(jnp.zeros(()), jnp.zeros(shape), jnp.ones(shape))


def update(stats: RunningStats, x: jax.Array, axis_name: str | None = None) -> RunningStats:
    """Merges a batch: Chan, Golub & LeVeque 1983, doi:10.1080/00031305.1983.10483115.

    Args:
      stats: so far.
      x: `[..., *shape]`; all leading axes are samples.
      axis_name: mesh axis of the devices that hold the rest of the batch; None for one.

    Returns:
      Statistics of the concatenated stream.

    >>> stats = update(initial(()), jnp.array([1.0, 3.0]))
    >>> stats = update(stats, jnp.array([5.0]))
    >>> round(stats.mean.item(), 4), round(stats.var.item(), 4)
    (3.0, 2.6667)
    """
    samples = tuple(range(x.ndim - stats.mean.ndim))
    x = x.astype(jnp.float32)
    local = jnp.asarray(x.size // stats.mean.size, jnp.float32)
    count = sum_over(local, axis_name)
    mean = sum_over(jnp.sum(x, samples), axis_name) / count
    squares = jnp.sum(jnp.square(x - jnp.expand_dims(mean, samples)), samples)
    var = sum_over(squares, axis_name) / count
    total = stats.num_samples + count
    weight = count / total
    delta = mean - stats.mean
    # Of nothing so far, the variance of 1 that stands there has weight 0.
    merged = (1.0 - weight) * stats.var + weight * var
    return RunningStats(
        num_samples=total,
        mean=stats.mean + delta * weight,
        var=merged + jnp.square(delta) * weight * (1.0 - weight),
    )


def normalize(stats: RunningStats, x: jax.Array) -> jax.Array:
    """(x − mean) / deviation, clipped to ±10; of the leading axes' shape."""
    axes = tuple(range(x.ndim - stats.mean.ndim))
    mean, var = (jnp.expand_dims(value, axes) for value in (stats.mean, stats.var))
    return jnp.clip((x - mean) * jax.lax.rsqrt(var + _EPS), -_CLIP, _CLIP)


def scale(stats: RunningStats, x: jax.Array) -> jax.Array:
    """Divides by the deviation, clipped to ±10: what is 0 stays 0."""
    return jnp.clip(x * jax.lax.rsqrt(stats.var + _EPS), -_CLIP, _CLIP)
