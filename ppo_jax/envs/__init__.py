"""Environments by name: `make`, `make_env`, `register`, `names`."""

import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ppo_jax.envs.suites import GYMNAX_NAMES, HOST_SUITES, SUITES
from ppo_jax.errors import ConfigError, require_known, require_new_name, unknown_name
from ppo_jax.lazy import submodules_of

if TYPE_CHECKING:
    from ppo_jax.config import Config
    from ppo_jax.envs.environment import Environment

__getattr__ = submodules_of(__name__)

VARIANTS = {"CartPole-v1-positions": ("CartPole-v1", (("observe_only", "0,2"),))}
"""Variants of gymnax's environments that need a memory: `(environment, wrappers)` by name."""

WRAPPER_NAMES = (
    "time_limit",
    "sticky_actions",
    "action_repeat",
    "frame_stack",
    "observe_only",
    "scale_reward",
    "flatten_observation",
    "previous_action_reward",
)
"""Names of the functions in `wrappers.WRAPPERS`, a module that imports JAX."""

_registered: dict[str, Callable[..., Any]] = {}


def names() -> tuple[str, ...]:
    """Returns all names that `make` takes, except those of suites on the host.

    >>> "CartPole-v1" in names()
    True
    """
    of_suites = [f"{name}:{task}" for name, suite in SUITES.items() for task in suite.tasks]
    return (*GYMNAX_NAMES, *VARIANTS, *of_suites, *_registered)


def is_name(name: str) -> bool:
    """Returns whether `make` takes a name; for host suites only the prefix is checked.

    >>> is_name("CartPole-v1"), is_name("gymnasium:Hopper-v5"), is_name("Cartpole")
    (True, True, False)
    """
    suite, colon, _ = name.partition(":")
    return name in names() or (bool(colon) and suite in HOST_SUITES)


def is_ours(name: str) -> bool:
    """Returns whether a name is that of a compiled environment which no user registered."""
    return name in names() and name not in _registered


def check_name(name: str) -> None:
    """Raises a `ConfigError` that lists the nearest names if there is no such environment."""
    if not is_name(name):
        error = unknown_name("environment", name, names(), listed_by="ppo-jax envs")
        if re.search(r"-v\d+$", name):  # as Gymnasium versions its names
            error = ConfigError(f"{error} One of Gymnasium is gymnasium:{name}.")
        raise error


def imported_by(name: str) -> str | None:
    """Returns the module that making an environment would import to register it; None for none.

    >>> imported_by("gymnasium:my_robots:Arm-v0"), imported_by("gymnasium:Hopper-v5")
    ('my_robots', None)
    """
    suite, _, task = name.partition(":")
    module, colon, _ = task.partition(":")
    return module if colon and suite == "gymnasium" else None


def register(name: str, factory: Callable[..., Any], *, overwrite: bool = False) -> None:
    """Makes `factory(**env_kwargs)` available under `name`.

    Args:
      name: a name that is not taken.
      factory: returns an `Environment`, or any object with the interface of gymnax 1.x or brax.
      overwrite: replace a factory that was registered under this name.

    Raises:
      ConfigError: the name is taken, or the factory cannot be called.
    """
    ours = set(names()) - set(_registered)
    require_new_name("environment", name, names(), ours=ours, overwrite=overwrite)
    if not callable(factory):
        raise ConfigError(
            f"a factory must be a function that returns an environment; got "
            f"{type(factory).__name__}. Write lambda: env."
        )
    _registered[name] = factory


def make(name: str, **kwargs: Any) -> "Environment":
    """Builds the environment of that name.

    Raises:
      ConfigError: unknown name, arguments that it does not take, or spaces that no policy can
        handle.
    """
    check_name(name)
    try:
        return _build(name, kwargs)
    except ConfigError:
        raise
    # MNISTBandit of gymnax fetches its images; errors of urllib are OSErrors.
    except OSError as error:
        raise ConfigError(
            f"an environment must find the files that it needs; {name} reads or downloads some "
            f"when it is made, and that failed: {error}. Connect to the internet, or see where its "
            "suite looks for them."
        ) from error
    # Without arguments the fault is not the user's, and must not be disguised.
    except (TypeError, ValueError) as error:
        if not kwargs:
            raise
        raise ConfigError(
            f"env_kwargs must be what the constructor of {name} takes; got {kwargs}: "
            f"{str(error).rstrip('.')}. Change or leave out env_kwargs."
        ) from error


def make_env(config: "Config") -> "Environment":
    """Builds the environment of a config: with its parameters, in its wrappers.

    Evaluating, rendering and exporting a policy need no more than this.

    Raises:
      ConfigError: as `make`; or unknown parameters or wrappers.

    >>> from ppo_jax import Config
    >>> env = make_env(Config(env="CartPole-v1", wrappers={"time_limit": 10}))
    >>> env.longest_episode(env.params)
    10
    """
    from ppo_jax.envs import wrappers

    env = make(config.env, **dict(config.env_kwargs))
    params = override_params(env.name, env.params, dict(config.env_params))
    return wrappers.apply(env._replace(params=params), config.wrappers)


def _build(name: str, kwargs: dict[str, Any]) -> "Environment":
    from ppo_jax.envs import suites, wrappers
    from ppo_jax.envs.suites import gymnax

    if name in _registered:
        return adapted(name, _registered[name](**kwargs))
    if name in VARIANTS:
        base, inside = VARIANTS[name]
        return wrappers.apply(gymnax.make(base, **kwargs), inside)._replace(name=name)
    return gymnax.make(name, **kwargs) if name in GYMNAX_NAMES else suites.make(name, **kwargs)


def adapted(name: str, env: Any) -> "Environment":
    """Converts an object with the interface of gymnax or brax to an `Environment`.

    Raises:
      ConfigError: it is neither, or it does not return what it describes.
    """
    from ppo_jax.envs.checks import check_env
    from ppo_jax.envs.environment import Environment
    from ppo_jax.envs.suites import brax, gymnax

    if isinstance(env, Environment):
        check_env(env)
        return env
    # Recognised by its attributes instead of its type, so that neither suite has to be imported.
    if hasattr(env, "default_params"):
        converted = gymnax.adapt(name, env)
        check_env(converted)
        return converted
    if hasattr(env, "action_size"):
        return brax.adapt(name, env)
    raise ConfigError(
        f"{name}'s factory must return an Environment, or an object with gymnax's interface "
        f"(default_params, ...) or brax's (action_size, ...); got {type(env).__name__}. "
        "Wrap it in one."
    )


def override_params(name: str, params: Any, changes: dict[str, Any]) -> Any:
    """Returns a dataclass with some fields changed; an unknown field is a `ConfigError`."""
    if not changes:
        return params
    if not dataclasses.is_dataclass(params) or isinstance(params, type):
        raise ConfigError(
            f"env_params need parameters that are a dataclass; those of {name} are "
            f"{type(params).__name__}. Make them a flax.struct.PyTreeNode, or leave env_params out."
        )
    known = [f.name for f in dataclasses.fields(params)]
    for field, value in changes.items():
        require_known(f"parameter of {name}", field, known)
        default = getattr(params, field)
        if _is_number(default) and not _is_number(value):
            raise ConfigError(
                f"a parameter of {name} must be a number if its default is one; got "
                f"{field}={value!r} and {default}."
            )
    return dataclasses.replace(params, **changes)


def _is_number(value: Any) -> bool:
    """Returns whether a value is a number or an array of numbers, bools included."""
    dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    return getattr(dtype, "kind", None) in ("b", "i", "u", "f")  # that of random keys has none
