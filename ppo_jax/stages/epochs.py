"""Epochs over the samples of a rollout, in random minibatches."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from ppo_jax.config import Config
from ppo_jax.ops import packing
from ppo_jax.ops.shuffle import shuffled
from ppo_jax.stages.algorithm import UpdateInputs
from ppo_jax.stages.losses import Losses
from ppo_jax.types import Batch

Carry = TypeVar("Carry")


def run_epochs(
    gradient_step: Callable[[Carry, Any, Batch], tuple[Carry, Any]],
    carry: Carry,
    inputs: UpdateInputs,
    *,
    biases_of: Callable[[Carry], Any],
    config: Config,
    losses: Losses,
) -> tuple[Carry, Any]:
    """Passes each sample of a batch to `gradient_step` once an epoch, in random minibatches.

    With a memory environments are shuffled instead of samples, so that a minibatch holds whole
    sequences.

    Args:
      gradient_step: `(carry, biases_of(carry), minibatch) -> (carry, outputs)`.
      carry: the initial carry.
      inputs: have the batch of the rollout, `[T, N]`, and the random key of the orders.
      biases_of: returns the biases that accelerators carry from step to step. XLA for GPUs adds a
        bias in the kernel of a product only if it is an argument of the loop; as a part of the
        vector of parameters it takes a pass over all activations.
      config: complete; has the numbers of epochs and minibatches.
      losses: normalise the advantages of a minibatch.

    Returns:
      The carry after the last step, and outputs `[num_epochs, num_minibatches]`.
    """
    assert config.num_epochs is not None, "the config is complete"
    assert config.num_minibatches is not None, "the config is complete"
    num_minibatches, batch = config.num_minibatches, inputs.batch
    num_steps, num_envs = batch.log_prob.shape
    has_memory = batch.recurrent_state is not None
    # The first axis is shuffled: environments, or samples.
    if has_memory:
        count, batch = num_envs, _swap_time_and_envs(batch)
    else:
        count = num_steps * num_envs
        batch = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), batch)

    @jax.named_scope("minibatches")
    def minibatch(
        carry: Carry, biases: Any, inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[Carry, Any]:
        indices, advantages = inputs
        samples = jax.tree.map(lambda x: x[indices], batch)._replace(advantages=advantages)
        # Networks take sequences time-major.
        return gradient_step(carry, biases, _swap_time_and_envs(samples) if has_memory else samples)

    derive = jax.named_scope("minibatches")(biases_of)

    @jax.named_scope("shuffle")
    def epoch(carry: Carry, _: None, key: jax.Array) -> tuple[Carry, Any]:
        order = shuffled(key, jnp.arange(count), size=count)
        # Minibatches are consecutive parts of the order, so that each sample is in exactly one.
        order = order.reshape(num_minibatches, -1)
        # All minibatches are normalised together: devices exchange means once an epoch for it
        # instead of at every step.
        mask = None if batch.mask is None else batch.mask[order]
        advantages = jax.vmap(losses.normalize_advantages)(batch.advantages[order], mask)
        return packing.scan(minibatch, carry, (order, advantages), derive=derive)

    return packing.scan(epoch, carry, jax.random.split(inputs.key, config.num_epochs))


def _swap_time_and_envs(batch: Batch) -> Batch:
    """Turns `[T, N, ...]` into `[N, T, ...]` and back; the recurrent state has no time axis."""
    swapped = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), batch._replace(recurrent_state=None))
    return swapped._replace(recurrent_state=batch.recurrent_state)
