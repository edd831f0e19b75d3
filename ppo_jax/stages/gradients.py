"""Gradients of losses, computed in the order and in the chunks that suit a platform."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.hparams import HParams
from ppo_jax.ops.blocks import largest_divisor
from ppo_jax.policy.networks import merge_params, split_params
from ppo_jax.policy.spec import images_in_cache
from ppo_jax.stages.losses import Losses
from ppo_jax.types import Batch, Scalars

LossFn = Callable[[Any, Batch, HParams], tuple[jax.Array, Scalars]]
"""`(params, batch, hparams) -> (loss, metrics)`, scalars."""
GradientFn = Callable[[Any, Batch, HParams], tuple[Any, Scalars]]
"""`(params, batch, hparams) -> (gradient, metrics)`."""


def gradient_of(losses: Losses, loss_fn: LossFn) -> GradientFn:
    """Returns a function that computes the gradient of a loss.

    On a CPU, convolutional networks process as many images at a time as the cache holds.
    """
    gradient = partial(_gradient, loss_fn, chunk_size=losses.shard.chunk_size)
    if (num_images := images_in_cache(losses.spec)) is None:
        return gradient
    in_chunks = partial(_gradient, loss_fn, chunk_size=num_images)
    return partial(jax.lax.platform_dependent, cpu=in_chunks, default=gradient)


def joint_gradient(losses: Losses) -> GradientFn:
    """Returns a function that computes the gradient of the joint loss.

    If the network is separable, a GPU computes the critic's part after the actor's, so that both
    use the same memory for activations: 1,024 seeds of CartPole take 194 instead of 261 MiB, for
    two or three more kernels a minibatch.
    """
    joint = gradient_of(losses, losses.joint if losses.network.has_critic else losses.policy)
    if not losses.network.is_separable:
        return joint

    def weighted_value(params: Any, batch: Batch, hparams: HParams) -> tuple[jax.Array, Scalars]:
        loss, metrics = losses.value(params, batch, hparams)
        return hparams.vf_coef * loss, metrics

    policy_gradient = gradient_of(losses, losses.policy)
    value_gradient = gradient_of(losses, weighted_value)

    def in_turn(params: Any, minibatch: Batch, hparams: HParams) -> tuple[Any, Scalars]:
        actor, critic = split_params(params)
        first = policy_gradient(actor, minibatch, hparams)
        # Without the barrier XLA computes both losses in one kernel, after all activations.
        minibatch, (actor_grads, metrics) = jax.lax.optimization_barrier((minibatch, first))
        critic_grads, value_metrics = value_gradient(critic, minibatch, hparams)
        return merge_params(actor_grads, critic_grads), metrics | value_metrics

    return partial(jax.lax.platform_dependent, cpu=joint, tpu=joint, default=in_turn)


def _gradient(
    loss_fn: LossFn, params: Any, minibatch: Batch, hparams: HParams, *, chunk_size: int | None
) -> tuple[Any, Scalars]:
    """Returns the gradient of the mean loss, and metrics, accumulated over chunks of samples.

    A masked minibatch is not split into chunks, because these would need weights: not all samples
    count. Sequences and whole rollouts `[T, N]` are not split either.

    Args:
      loss_fn: the loss.
      params: of the network.
      minibatch: samples.
      hparams: complete.
      chunk_size: maximum number of samples that are differentiated together; None for all. Chunks
        are equal. If they could only be smaller than half of this, the minibatch is not split.
    """
    gradient = jax.grad(loss_fn, has_aux=True)
    size = minibatch.log_prob.size
    is_whole = minibatch.mask is not None or minibatch.log_prob.ndim > 1
    if chunk_size is None or size <= chunk_size or is_whole:
        return gradient(params, minibatch, hparams)
    num_chunks = size // largest_divisor(size, at_most=chunk_size)
    if num_chunks > 2 * size // chunk_size:
        return gradient(params, minibatch, hparams)
    chunks = jax.tree.map(
        lambda x: x.reshape(num_chunks, size // num_chunks, *x.shape[1:]), minibatch
    )

    def accumulate(total: Any, chunk: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, chunk, hparams)), None

    # A scan needs the structure of its carry before the first chunk is computed.
    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], chunks), hparams)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(accumulate, zeros, chunks)
    # Chunks are of equal size, so the mean of their means is the mean.
    return jax.tree.map(lambda x: x / num_chunks, total)
