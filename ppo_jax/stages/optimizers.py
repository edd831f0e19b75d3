"""Optimisers by name, with a traced learning rate, and the schedules that anneal it."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from ppo_jax.config import LR_SCHEDULES, Config
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
"""Schedules by name; `config.LR_SCHEDULES` has the same names."""


def register_lr_schedule(
    name: str, factor: Callable[[jax.Array], jax.Array], *, overwrite: bool = False
) -> None:
    """Makes a schedule of the learning rate available as `Config(lr_schedule=name)`.

    Args:
      name: a name that is not taken.
      factor: maps the progress of a training, a scalar in [0, 1], to the factor of every learning
        rate. It is traced.
      overwrite: replace a schedule that was registered under this name.

    Raises:
      ConfigError: the name is taken, the factor cannot be traced, or it is not a scalar.
    """

    def as_array(progress: jax.Array) -> jax.Array:
        return jnp.asarray(factor(progress), jnp.float32)

    rule = "a schedule must map the progress of a training, a scalar, to a scalar"
    try:
        # Only the shape is computed: modules may register schedules before a backend is started.
        found = jax.eval_shape(as_array, jax.ShapeDtypeStruct((), np.float32))
    # A user's function can fail in any way; the original error stays attached.
    except Exception as error:
        cause = str(error).partition("\n")[0]
        raise ConfigError(f"{rule}, by functions of JAX; {name} fails: {cause}") from error
    if found.shape:
        raise ConfigError(f"{rule}; {name} returns an array of shape {found.shape}.")
    LR_SCHEDULES.register(name, {}, overwrite=overwrite)
    SCHEDULES[name] = Schedule(as_array)


Optimizer = Callable[[Any, HParams, Callable[[jax.Array], Any]], optax.GradientTransformation]
"""`(learning_rate, hparams, unravel) -> transformation` of a vector of parameters. The first two
arguments may be traced. `unravel` turns the vector into a tree of layers."""

_REGISTERED: dict[str, Callable[..., optax.GradientTransformation]] = {}


def register_optimizer(
    name: str, make: Callable[..., optax.GradientTransformation], *, overwrite: bool = False
) -> None:
    """Makes an optimiser available as `Config(optimizer=name)`.

    Args:
      name: a name that is not taken.
      make: `(learning_rate, **kwargs) -> transformation` of optax. The learning rate is traced;
        `Config.optimizer_kwargs` has the other arguments. The transformation is given parameters
        and gradients as a tree of layers.
      overwrite: replace an optimiser that was registered under this name.

    Raises:
      ConfigError: the name is taken, or the function has no argument `learning_rate`.
    """
    if not callable(make) or "learning_rate" not in inspect.signature(make).parameters:
        raise ConfigError(
            f"an optimizer must be made by a function of learning_rate; got {make!r} for {name}. "
            "Write, for example, lambda learning_rate: optax.adam(learning_rate)."
        )
    OPTIMIZERS.register(name, {}, overwrite=overwrite)
    _REGISTERED[name] = make


def make_optimizer(config: Config) -> Optimizer:
    """Returns the optimiser that `config` names, after clipping of the gradient's norm and entries.

    With `separate_grad_norms` the update rule clips the norms instead, with
    `clip_actor_and_critic`.

    Raises:
      ConfigError: unknown optimiser, or an argument that it does not take.
    """
    require_known("optimizer", config.optimizer, OPTIMIZERS)
    registered = _REGISTERED.get(config.optimizer)
    factory = registered or getattr(optax, config.optimizer)
    title = config.optimizer if registered else f"optax.{config.optimizer}"
    # The signature of the function is the list of arguments; ours would go out of date.
    parameters = dict(inspect.signature(factory).parameters)
    del parameters["learning_rate"]
    takes_any = any(x.kind is inspect.Parameter.VAR_KEYWORD for x in parameters.values())
    for name, value in config.optimizer_kwargs:
        if takes_any and name not in parameters:
            continue
        require_known(f"argument of {title}", name, parameters)
        # optax itself would fail while it is traced.
        default = parameters[name].default
        if isinstance(default, (int, float)) and not isinstance(value, (int, float)):
            raise ConfigError(
                f"an argument of {title} must be a number if its default is one; "
                f"got {name}={value!r} and {default}."
            )
    kwargs = {**OPTIMIZERS[config.optimizer], **dict(config.optimizer_kwargs)}
    if registered:
        _check_optimizer(title, partial(registered, **kwargs))

    def optimizer(
        learning_rate: Any, hparams: HParams, unravel: Callable[[jax.Array], Any]
    ) -> optax.GradientTransformation:
        # The state of a clip is as empty as that of the identity, so that the state's structure
        # does not depend on which values are set.
        clip_norm = clip_entries = optax.identity()
        if hparams.max_grad_norm is not None and not config.separate_grad_norms:
            clip_norm = optax.clip_by_global_norm(hparams.max_grad_norm)
        if hparams.max_grad_value is not None:
            clip_entries = optax.clip(hparams.max_grad_value)
        # The norm first: clipped entries would have another norm.
        tx = factory(learning_rate=learning_rate, **kwargs)
        # The package's optimisers are elementwise, so that one vector takes one kernel. Registered
        # ones may treat matrices and biases differently.
        return optax.chain(clip_norm, clip_entries, _of_vectors(tx, unravel) if registered else tx)

    return optimizer


def _check_optimizer(name: str, make: Callable[..., Any]) -> None:
    """Raises a `ConfigError` unless a user's function makes a transformation that can be used."""
    rule = "an optimizer must be a function that returns a transformation of optax"

    def use(learning_rate: jax.Array, params: Any) -> Any:
        tx = make(learning_rate=learning_rate)
        if not isinstance(tx, optax.GradientTransformation):
            raise ConfigError(f"{rule}; {name} returns {type(tx).__name__}.")
        state = tx.init(params)
        tx.update(params, state, params)
        return state

    layer = {
        "kernel": jax.ShapeDtypeStruct((3, 2), np.float32),
        "bias": jax.ShapeDtypeStruct((2,), np.float32),
    }
    try:
        state = jax.eval_shape(use, jax.ShapeDtypeStruct((), np.float32), layer)
    except ConfigError:
        raise
    # A user's function can fail in any way; the original error stays attached.
    except Exception as error:
        cause = str(error).partition("\n")[0]
        raise ConfigError(
            f"{rule}, whose learning rate is traced; {name} fails: {cause}"
        ) from error
    # `optax.inject_hyperparams` would keep the learning rate of the first update.
    parts = jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "hyperparams"))
    if any(hasattr(x, "hyperparams") for x in parts):
        raise ConfigError(
            f"{rule} with the rate that it is given; {name} keeps a rate in its state. Leave "
            "inject_hyperparams out."
        )


def _of_vectors(
    tx: optax.GradientTransformation, unravel: Callable[[jax.Array], Any]
) -> optax.GradientTransformation:
    """Returns a transformation of trees as one of vectors; its state is that of the tree."""

    def update(
        updates: jax.Array, state: Any, params: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        tree = None if params is None else unravel(params)
        changes, state = tx.update(unravel(updates), state, tree)
        return ravel_pytree(changes)[0], state

    return optax.GradientTransformation(lambda params: tx.init(unravel(params)), update)


def clip_actor_and_critic(gradient: Any, max_norm: Scalar) -> Any:
    """Returns the gradient with the actor's and the critic's part clipped by separate norms."""
    clip = optax.clip_by_global_norm(max_norm)

    def clipped(part: Any) -> Any:
        flat, unravel = ravel_pytree(part)  # one kernel for the norm instead of one per leaf
        return unravel(clip.update(flat, clip.init(flat))[0])

    return merge_params(*map(clipped, split_params(gradient)))
