"""Checks of an environment against its description, by shapes alone: nothing is computed."""

import re
from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.envs.environment import Environment, Step
from ppo_jax.envs.spaces import Dict, Space, Tuple, dtype_of, shape_of
from ppo_jax.errors import ConfigError

_METRICS_OF_EPISODES = ("count", "finished", "length", "score")
"""Names that metrics of episodes and evaluations have already, besides those of the return."""


def is_metric_name(name: str) -> bool:
    """Returns whether an environment's metric can have this name.

    >>> is_metric_name("reward/upright"), is_metric_name("length"), is_metric_name("return_max")
    (True, False, False)
    """
    is_taken = name in _METRICS_OF_EPISODES or name.startswith("return")
    return not is_taken and re.fullmatch(r"[\w./-]+", name) is not None


def example(space: Space, batch_shape: tuple[int, ...]) -> Any:
    """Returns shapes and dtypes of a batch of values of a space."""
    if isinstance(space, Dict):
        return {name: example(entry, batch_shape) for name, entry in space.spaces}
    if isinstance(space, Tuple):
        return tuple(example(entry, batch_shape) for entry in space.spaces)
    return jax.ShapeDtypeStruct((*batch_shape, *shape_of(space)), dtype_of(space))


def check_env(env: Environment) -> None:
    """Raises a `ConfigError` if `reset` or `step` do not return what the environment describes."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    obs, state = _returned(env, "reset", 2, env.reset, key, env.params)
    _check_obs(env, "reset", obs)
    action = example(env.action_space, env.agent_axes)
    step = _traced(env, "step", env.step, key, state, action, env.params)
    if not isinstance(step, Step):
        raise ConfigError(
            f"step must return a Step(obs, state, reward, terminated, truncated); {env.name} "
            f"returns {type(step).__name__}. Import it from ppo_jax.envs.environment."
        )
    _check_obs(env, "step", step.obs)
    if _differ(step.state, state):
        raise ConfigError(
            f"step must return a state of the shapes and dtypes that reset returns; {env.name} "
            f"has {_described(step.state)} and {_described(state)}. Cast the fields that differ."
        )
    _check_metrics(env, step)
    values = {name: getattr(step, name) for name in ("reward", "terminated", "truncated")}
    for name, value in (*values.items(), *step.metrics.items()):
        shape = jnp.shape(value)
        needed = env.agent_axes if name == "reward" else ()
        if shape != needed:
            raise ConfigError(
                f"{name} must {'be a scalar' if needed == () else f'have the shape {needed}'}; "
                f"{env.name} has the shape {shape}. A step describes a "
                "single environment: jax.vmap adds the axis of environments."
            )


def _check_metrics(env: Environment, step: Step) -> None:
    """Checks the names of an environment's metrics."""
    if set(step.metrics) != set(env.metrics):
        raise ConfigError(
            f"a step must report the metrics that its environment names; {env.name} names "
            f"{sorted(env.metrics)} and reports {sorted(step.metrics)}. Set "
            "Environment(metrics=…), or Step(metrics=…)."
        )
    for name in env.metrics:
        if not is_metric_name(name):
            raise ConfigError(
                "a metric's name must have letters, digits and '_-./', and not be return… or one "
                f"of {', '.join(_METRICS_OF_EPISODES)}; got {name!r} of {env.name}. Rename it."
            )


def _returned(env: Environment, name: str, count: int, function: Any, *args: Any) -> Any:
    result = _traced(env, name, function, *args)
    if not isinstance(result, tuple) or len(result) != count:
        raise ConfigError(
            f"{name} must return (obs, state); {env.name} returns {type(result).__name__}."
        )
    return result


def _traced(env: Environment, name: str, function: Any, *args: Any) -> Any:
    """Returns the shapes of a function's results; raises a `ConfigError` if JAX cannot trace it."""
    try:
        return jax.eval_shape(function, *args)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise ConfigError(
            f"{name} must be a function that JAX can trace; that of {env.name} needs the value of "
            f"an array in Python: {str(error).splitlines()[0]} Use jnp.where or jax.lax.cond "
            "instead of if, and jax.numpy instead of NumPy."
        ) from error


def _check_obs(env: Environment, name: str, obs: Any) -> None:
    expected = example(env.observation_space, env.agent_axes)
    if _differ(obs, expected):
        raise ConfigError(
            f"observations must be as observation_space describes them; {name} of {env.name} "
            f"returns {_described(obs)}, and the space is {_described(expected)}. Change the "
            "space, or the observation."
        )


def _differ(x: Any, y: Any) -> bool:
    """Returns whether two trees differ in structure, shapes or dtypes."""
    # Nodes of trees are not compared: they may define == differently, as navix's do.
    described = [jax.tree.flatten(_described(tree)) for tree in (x, y)]
    return described[0] != described[1]


def _described(tree: Any) -> Any:
    """Returns a tree of shapes and dtypes as text that can be shown."""

    def describe(x: Any) -> str:
        return f"{jnp.result_type(x).name}{list(map(int, jnp.shape(x)))}"

    described = jax.tree.map(describe, tree)
    return described if jax.tree.leaves(described) else None
