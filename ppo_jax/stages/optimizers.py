"""Optimisers by name, with a traced learning rate, and the schedules that anneal it."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from ppo_jax.config import Config, HParams, unknown_name
from ppo_jax.policy.networks import merge_params, split_params

SCHEDULES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "constant": jnp.ones_like,
    "kl_adaptive": jnp.ones_like,  # a factor in the learner's state does it
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
}
"""Progress of the training in [0, 1) → factor of the learning rate."""

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adabelief": {},
    "adagrad": {},
    # Adam's eps of 1e-5, not optax's 1e-8, is PPO's since OpenAI Baselines: Huang et al. 2022,
    # "The 37 implementation details of PPO", detail 3.
    "adam": {"eps": 1e-5},
    "adamax": {},
    "adamw": {"eps": 1e-5},
    "lion": {},
    "nadam": {"eps": 1e-5},
    "radam": {"eps": 1e-5},
    "rmsprop": {"decay": 0.99, "eps": 1e-5},  # A2C's, from the same source
    "sgd": {},
}
"""Names of optax optimisers and the arguments with which we differ from optax's defaults."""


def adapt_lr_factor(factor: jax.Array, kl: jax.Array, *, desired_kl: Any) -> jax.Array:
    """The learning rate's factor after an update that moved the policy by `kl`.

    A third off above twice the desired KL, half as much again below half of it, as in the
    public code of Rudin et al. 2022 (arXiv:2109.11978), which adapts after each minibatch.
    Kept in [0.01, 100].
    """
    change = jnp.where(kl > 2.0 * desired_kl, 1 / 1.5, jnp.where(kl < desired_kl / 2.0, 1.5, 1.0))
    return jnp.clip(factor * change, 0.01, 100.0)


Optimizer = Callable[[Any, HParams], optax.GradientTransformation]
"""`(learning_rate, hparams) -> transformation`; all may be traced."""


def make_optimizer(config: Config) -> Optimizer:
    """The optimiser that `config` names, behind clips of the gradient's global norm and entries.

    With `separate_grad_norms` the norms are not its business: see `clip_actor_and_critic`.

    Raises:
      ConfigError: unknown optimiser, or an argument that it does not take.
    """
    if config.optimizer not in OPTIMIZERS:
        raise unknown_name("optimizer", config.optimizer, OPTIMIZERS)
    factory = getattr(optax, config.optimizer)
    known = [name for name in inspect.signature(factory).parameters if name != "learning_rate"]
    for name, _ in config.optimizer_kwargs:
        if name not in known:
            raise unknown_name(f"argument of optax.{config.optimizer}", name, known)
    kwargs = {**OPTIMIZERS[config.optimizer], **dict(config.optimizer_kwargs)}

    def optimizer(learning_rate: Any, hparams: HParams) -> optax.GradientTransformation:
        clip_norm = clip_entries = optax.identity()  # its state is theirs: an empty one
        if hparams.max_grad_norm is not None and not config.separate_grad_norms:
            clip_norm = optax.clip_by_global_norm(hparams.max_grad_norm)
        if hparams.max_grad_value is not None:
            clip_entries = optax.clip(hparams.max_grad_value)
        return optax.chain(clip_norm, clip_entries, factory(learning_rate, **kwargs))

    return optimizer


def clip_actor_and_critic(gradient: Any, max_norm: Any) -> Any:
    """Clips the gradient of each by a global norm of its own."""
    clip = optax.clip_by_global_norm(max_norm)

    def clipped(part: Any) -> Any:
        flat, unravel = ravel_pytree(part)  # one kernel for the norm, not one for each leaf
        return unravel(clip.update(flat, clip.init(flat))[0])

    return merge_params(*map(clipped, split_params(gradient)))
