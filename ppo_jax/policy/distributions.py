"""What turns an actor's outputs into actions. The only module that imports distrax.

A `Head` splits sampling in two: noise is drawn in bulk, outside the rollout's loop, and
`sample` is a deterministic function of parameters and noise inside it.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

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


class Distribution(Protocol):
    """What a loss asks of a distribution; every result is `[...]`, one number per action."""

    def log_prob(self, action: jax.Array) -> jax.Array:
        """The exact log π(a)."""

    def entropy(self) -> jax.Array:
        """−E[log π(a)]."""

    def kl_divergence(self, other: Any) -> jax.Array:
        """KL(self ‖ other), exact; `other` is of the same family."""


class Categorical(NamedTuple):
    """A categorical distribution whose logits were normalised once.

    distrax normalises again for every question, and every normalisation has a gradient.
    """

    log_probs: jax.Array  # [..., A], normalised

    def log_prob(self, action: jax.Array) -> jax.Array:
        """Of the integer `action` `[...]`. A sum and no lookup, whose gradient is a scatter."""
        chosen = jax.nn.one_hot(action, self.log_probs.shape[-1], dtype=bool)
        return jnp.sum(jnp.where(chosen, self.log_probs, 0.0), axis=-1)

    def entropy(self) -> jax.Array:
        """−Σ p log p."""
        return -jnp.sum(jnp.exp(self.log_probs) * self.log_probs, axis=-1)

    def kl_divergence(self, other: "Categorical") -> jax.Array:
        """Σ p (log p − log q)."""
        return jnp.sum(jnp.exp(self.log_probs) * (self.log_probs - other.log_probs), axis=-1)


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
    distribution: Callable[[Any], Distribution]
    """`params -> distribution`."""


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
        distribution=lambda logits: Categorical(jax.nn.log_softmax(logits)),
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
