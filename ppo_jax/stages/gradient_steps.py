"""Steps of an optimiser, and updates that are skipped because a gradient is not finite."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from ppo_jax.hparams import HParams
from ppo_jax.ops.collective import mean_over
from ppo_jax.policy.networks import with_biases
from ppo_jax.stages.gradients import GradientFn
from ppo_jax.stages.losses import Losses
from ppo_jax.stages.optimizers import Optimizer
from ppo_jax.types import Batch, Scalars

SKIPPED = "train/skipped_fraction"
"""Metric that is 1 if an update was skipped because a gradient was not finite, and 0 otherwise."""
CRITIC_SKIPPED = "train/critic_skipped_fraction"
"""The same for the update of a critic that is fitted separately."""


def initial_state(optimizer: Optimizer, learning_rate: Any, hparams: HParams, params: Any) -> Any:
    """Returns the initial state of an optimiser whose updates take one vector.

    Args:
      optimizer: makes the transformation of optax.
      learning_rate: learning rate before annealing.
      hparams: complete hyperparameters.
      params: a tree of layers.
    """
    flat, unravel = ravel_pytree(params)
    return optimizer(learning_rate, hparams, unravel).init(flat)


class FlatLearner(NamedTuple):
    """Parameters and the optimiser's state, as gradient steps change them."""

    params: jax.Array  # [P], all parameters concatenated
    opt_state: Any
    is_finite: jax.Array | bool = True  # [], all gradients so far were; a CPU leaves it True


def make_gradient_step(
    losses: Losses,
    gradient: GradientFn,
    tx: optax.GradientTransformation,
    unravel: Callable[[jax.Array], Any],
    hparams: HParams,
    *,
    clip: Callable[[Any], Any] | None = None,
) -> Callable[[FlatLearner, Any, Batch], tuple[FlatLearner, Scalars]]:
    """Returns a function that takes one step of the optimiser on a minibatch.

    Parameters stay one vector from step to step. The package's optimisers work elementwise except
    for norms, and the norm of a vector is one kernel, while that of a tree is one for each leaf.

    Unless `max_skipped_updates` is 0, the metric `SKIPPED` tells `guarded` whether the gradient is
    not finite. On accelerators, that step and all later ones leave the learner unchanged.

    Args:
      losses: the losses of the algorithm, which know the devices that share the minibatch.
      gradient: of the loss that is descended.
      tx: the optimiser.
      unravel: turns the vector of parameters into a tree.
      hparams: complete.
      clip: transforms a gradient as a tree, before the optimiser; None leaves it as it is.
    """

    def step(old: FlatLearner, biases: Any, minibatch: Batch) -> tuple[FlatLearner, Scalars]:
        params = with_biases(unravel(old.params), biases)
        grads, metrics = mean_over(gradient(params, minibatch, hparams), losses.shard.axis_name)
        # Averaging before clipping: the norm of a device's share is not that of the gradient.
        flat, _ = ravel_pytree(grads if clip is None else clip(grads))
        updates, opt_state = tx.update(flat, old.opt_state, old.params)
        new = FlatLearner(jnp.add(old.params, updates), opt_state, old.is_finite)
        if losses.config.max_skipped_updates:
            metrics[SKIPPED] = is_not_finite(flat)
            new = jax.lax.platform_dependent(
                metrics[SKIPPED],
                new,
                old,
                cpu=lambda is_not_finite, new, old: new,
                default=while_finite,
            )
        return new, metrics

    return step


def while_finite(is_not_finite: jax.Array, new: FlatLearner, old: FlatLearner) -> FlatLearner:
    """Returns `new`, or `old` from the first gradient on that is not finite."""
    is_finite = old.is_finite & (is_not_finite == 0.0)
    return select(is_finite, new, old)._replace(is_finite=is_finite)


def select(condition: jax.Array | bool, new: Any, old: Any) -> Any:
    """Returns `new` if a condition holds, and `old` otherwise: trees of one structure."""
    return jax.tree.map(partial(jnp.where, condition), new, old)


def is_not_finite(gradient: jax.Array) -> jax.Array:
    """Returns 1 if the squared norm of a gradient is NaN or infinite, else 0.

    The square may overflow where the gradient is finite, as it would in the state of Adam. A clip
    of the norm computes the same sum.
    """
    return 1.0 - jnp.isfinite(jnp.sum(jnp.square(gradient)))


def guarded(
    start: FlatLearner,
    end: FlatLearner,
    unravel: Callable[[jax.Array], Any],
    metrics: Scalars,
    applied: jax.Array | None = None,
) -> tuple[Any, Any, Scalars]:
    """Skips an update if the gradient of a step was not finite.

    The parameters return to those before the update. On a CPU the optimiser's state does as well:
    `while_finite` after every step would take 6 % of the time (16 seeds of CartPole under `vmap`;
    CartPole with a GRU). Accelerators use `while_finite`, so that the optimiser's state keeps the
    steps before the first such gradient. Restoring the state would need a copy, for Adam twice the
    memory of the parameters; the selection takes at most one kernel a minibatch.

    Args:
      start: the learner before the update.
      end: the learner after its last step.
      unravel: turns the vector of parameters into a tree.
      metrics: of every step, `[...]`.
      applied: bool `[...]`, the steps that count; None for all.

    Returns:
      Parameters, the optimiser's state, and means of the metrics over the steps that count.
    """
    means = jax.tree.map(lambda x: jnp.mean(x, where=applied), metrics)
    if SKIPPED not in metrics:
        return unravel(end.params), end.opt_state, means
    means[SKIPPED] = jnp.max(metrics[SKIPPED], where=applied, initial=0.0)

    def whole(is_finite: jax.Array, end: FlatLearner, start: FlatLearner) -> tuple[Any, Any]:
        kept = select(is_finite, end, start)
        return unravel(kept.params), kept.opt_state

    def params_only(is_finite: jax.Array, end: FlatLearner, start: FlatLearner) -> tuple[Any, Any]:
        # Trees instead of vectors: the tree of the parameters before the update exists already.
        params = select(is_finite, unravel(end.params), unravel(start.params))
        return params, end.opt_state

    params, opt_state = jax.lax.platform_dependent(
        means[SKIPPED] == 0.0, end, start, cpu=whole, default=params_only
    )
    return params, opt_state, means


def unless_skipped(metrics: Scalars, new: jax.Array, old: jax.Array) -> jax.Array:
    """Returns `new`, or `old` if the update was skipped."""
    return jnp.where(metrics[SKIPPED] == 1.0, old, new) if SKIPPED in metrics else new
