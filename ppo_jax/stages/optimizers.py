"""Optimisers by name, with a traced learning rate, and the schedules that anneal it."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from ppo_jax.config import Config
from ppo_jax.defaults import OPTIMIZERS
from ppo_jax.errors import ConfigError, require_known
from ppo_jax.hparams import HParams
from ppo_jax.policy.networks import merge_params, split_params

Scalar = float | jax.Array


class Schedule(NamedTuple):
    """A rule for the factor of every learning rate."""

    factor: Callable[[jax.Array], jax.Array]
    """`progress -> factor`; the progress of a training is in [0, 1]."""
    adapt: Callable[[jax.Array, jax.Array, HParams], jax.Array] | None = None
    """`(second factor, KL of the update, hparams) -> second factor` of a schedule that adapts to
    how far an update moved the policy; the factor starts from 1. None: it does not adapt."""


def adapt_lr_factor(factor: jax.Array, kl: jax.Array, *, desired_kl: Scalar) -> jax.Array:
    """Returns the factor of the learning rate after an update that moved the policy by `kl`.

    The factor is divided by 1.5 above twice the desired KL and multiplied by 1.5 below half of it,
    as in the public code of Rudin et al. 2022 (arXiv:2109.11978), which adapts after each
    minibatch. It is kept in [0.01, 100].
    """
    change = jnp.where(kl > 2.0 * desired_kl, 1 / 1.5, jnp.where(kl < desired_kl / 2.0, 1.5, 1.0))
    return jnp.clip(factor * change, 0.01, 100.0)


SCHEDULES: dict[str, Schedule] = {
    "constant": Schedule(jnp.ones_like),
    "linear": Schedule(lambda progress: 1.0 - progress),
    "cosine": Schedule(lambda progress: 0.5 * (1.0 + jnp.cos(jnp.pi * progress))),
    "kl_adaptive": Schedule(
        jnp.ones_like,
        adapt=lambda factor, kl, hparams: adapt_lr_factor(
            factor, kl, desired_kl=hparams.desired_kl
        ),
    ),
}
"""Schedules by name; the keys are the choices of `Config.lr_schedule`."""

Optimizer = Callable[[Any, HParams], optax.GradientTransformation]
"""`(learning_rate, hparams) -> transformation`; both arguments may be traced."""


def make_optimizer(config: Config) -> Optimizer:
    """Returns the optimiser that `config` names, behind clips of the gradient's norm and entries.

    With `separate_grad_norms` the update clips the norms itself, by `clip_actor_and_critic`.

    Raises:
      ConfigError: unknown optimiser, or an argument that it does not take.
    """
    require_known("optimizer", config.optimizer, OPTIMIZERS)
    # The signature of the optax function is the list of arguments; ours would go out of date.
    factory = getattr(optax, config.optimizer)
    parameters = dict(inspect.signature(factory).parameters)
    del parameters["learning_rate"]
    for name, value in config.optimizer_kwargs:
        require_known(f"argument of optax.{config.optimizer}", name, parameters)
        # optax itself would fail while it is traced.
        default = parameters[name].default
        if isinstance(default, (int, float)) and not isinstance(value, (int, float)):
            raise ConfigError(
                f"an argument of optax.{config.optimizer} must be a number if its default is one; "
                f"got {name}={value!r} and {default}."
            )
    kwargs = {**OPTIMIZERS[config.optimizer], **dict(config.optimizer_kwargs)}

    def optimizer(learning_rate: Any, hparams: HParams) -> optax.GradientTransformation:
        # The state of a clip is as empty as that of the identity, so that the state's structure
        # does not depend on which values are set.
        clip_norm = clip_entries = optax.identity()
        if hparams.max_grad_norm is not None and not config.separate_grad_norms:
            clip_norm = optax.clip_by_global_norm(hparams.max_grad_norm)
        if hparams.max_grad_value is not None:
            clip_entries = optax.clip(hparams.max_grad_value)
        # The norm first: clipped entries would have another norm.
        return optax.chain(clip_norm, clip_entries, factory(learning_rate, **kwargs))

    return optimizer


def clip_actor_and_critic(gradient: Any, max_norm: Scalar) -> Any:
    """Returns the gradient with the actor's and the critic's part clipped by separate norms."""
    clip = optax.clip_by_global_norm(max_norm)

    def clipped(part: Any) -> Any:
        flat, unravel = ravel_pytree(part)  # one kernel for the norm instead of one per leaf
        return unravel(clip.update(flat, clip.init(flat))[0])

    return merge_params(*map(clipped, split_params(gradient)))
