"""What turns an actor's outputs into actions. The only module that imports distrax.

A `Head` splits sampling in two: noise is drawn in bulk, outside the rollout's loop, and
`sample` is a deterministic function of parameters and noise inside it.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

with warnings.catch_warnings():
    # TensorFlow Probability, which distrax needs, reads deprecated names of JAX when imported.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    import distrax

from ppo_jax.envs.spaces import Box, Discrete, Space


class GaussianParams(NamedTuple):
    """Parameters of a diagonal Gaussian."""

    mean: jax.Array  # [..., *shape]
    log_std: jax.Array  # [..., *shape]


class Head(NamedTuple):
    """A family of action distributions. `params` is the pytree that `parametrize` makes."""

    num_outputs: int
    """Width of the actor's last layer."""
    log_std_shape: tuple[int, ...] | None
    """Shape of a learned, state-independent log standard deviation; None where there is none."""
    parametrize: Callable[[jax.Array, jax.Array | None], Any]
    """`(outputs [..., num_outputs], log_std) -> params`."""
    noise: Callable[[jax.Array, tuple[int, ...]], jax.Array]
    """`(key, batch_shape) -> noise`, of which `sample` needs one entry per action."""
    sample: Callable[[Any, jax.Array], jax.Array]
    """`(params, noise) -> action`."""
    mode: Callable[[Any], jax.Array]
    """`params -> action`, the most likely one."""
    distribution: Callable[[Any], distrax.Distribution]
    """`params -> distribution`, with `log_prob`, `entropy` and `kl_divergence`."""


def make_head(space: Space) -> Head:
    """The head for an action space: categorical for Discrete, diagonal Gaussian for Box."""
    return _categorical(space) if isinstance(space, Discrete) else _gaussian(space)


def _categorical(space: Discrete) -> Head:
    return Head(
        num_outputs=space.num_values,
        log_std_shape=None,
        parametrize=lambda outputs, log_std: outputs,
        noise=lambda key, shape: jax.random.gumbel(key, (*shape, space.num_values)),
        # Gumbel-max: argmax(logits + Gumbel noise) is a sample of softmax(logits).
        sample=lambda logits, noise: jnp.argmax(logits + noise, axis=-1).astype(jnp.int32),
        mode=lambda logits: jnp.argmax(logits, axis=-1).astype(jnp.int32),
        distribution=lambda logits: distrax.Categorical(logits=logits),
    )


def _gaussian(space: Box) -> Head:
    def parametrize(outputs: jax.Array, log_std: jax.Array | None) -> GaussianParams:
        mean = outputs.reshape(*outputs.shape[:-1], *space.shape)
        assert log_std is not None, "a head with log_std_shape is given one"
        return GaussianParams(mean, jnp.broadcast_to(log_std, mean.shape))

    return Head(
        num_outputs=int(np.prod(space.shape)),
        log_std_shape=space.shape,
        parametrize=parametrize,
        noise=lambda key, shape: jax.random.normal(key, (*shape, *space.shape)),
        sample=lambda params, noise: params.mean + jnp.exp(params.log_std) * noise,
        mode=lambda params: params.mean,
        distribution=lambda params: distrax.Independent(
            distrax.Normal(params.mean, jnp.exp(params.log_std)),
            reinterpreted_batch_ndims=len(space.shape),
        ),
    )
