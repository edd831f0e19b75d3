"""brax's tasks under our protocol. The only module that imports brax."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from ppo_jax.config import ConfigError
from ppo_jax.envs.environment import Environment, Step, cast
from ppo_jax.envs.spaces import Box, Dict, Space

# Of 2,048 episodes each of ant, hopper, walker2d and the two pendulums (spring engine) under the
# largest actions the shortest had 5, 8, 31, 7 and 10 steps; humanoid falls 2 cm in 4. A reset of
# hopper takes a fifth of the time of a step.
_SHORTEST_EPISODE = 4


class Params(flax.struct.PyTreeNode):
    """What of an episode is traced."""

    max_steps_in_episode: int = 1000
    """Where it is truncated: brax's episode_length, which it leaves to its wrappers. Below 4 two
    episodes in a row may begin alike (`Environment.shortest_episode`)."""


class State(NamedTuple):
    """One environment."""

    inner: Any
    """The suite's own state."""
    time: jax.Array  # int32 [], steps since the reset


def make(name: str, **kwargs: Any) -> Environment:
    """The task after `brax:`; `kwargs` are its class's, `backend` among them.

    Raises:
      ConfigError: brax is not installed.
    """
    try:
        from brax import envs
    except ImportError as error:
        raise ConfigError(
            f"{name} needs brax, which is not installed: pip install 'ppo-jax[brax]'."
        ) from error
    env = adapt(name, envs.get_environment(name.removeprefix("brax:"), **kwargs))
    # Other arguments may bring an early death.
    return env._replace(shortest_episode=_SHORTEST_EPISODE if kwargs.keys() <= {"backend"} else 1)


def adapt(name: str, env: Any) -> Environment:
    """Any object with brax's interface, which MuJoCo Playground's have, too, as an `Environment`.

    That is `reset(key) -> state`, `step(state, action) -> state`, where a state has `obs`,
    `reward` and `done`, and `action_size`; actions are in [-1, 1]. Without brax's wrappers `done`
    is a death, never a time limit.
    """
    initial = jax.eval_shape(lambda: env.reset(jax.random.key(0)))
    space = _space(name, initial.obs)
    size = env.action_size

    def reset(key: jax.Array, params: Params) -> tuple[Any, State]:
        del params
        inner = env.reset(key)
        return cast(space, inner.obs), State(inner, jnp.zeros((), jnp.int32))

    def step(key: jax.Array, state: State, action: jax.Array, params: Params) -> Step:
        del key  # a state carries its own, if the task is random
        inner = env.step(state.inner, jnp.clip(action, -1.0, 1.0))
        time = state.time + 1
        return Step(
            obs=cast(space, inner.obs),
            state=State(inner, time),
            reward=jnp.asarray(inner.reward, jnp.float32),
            terminated=jnp.asarray(inner.done, bool),
            truncated=time >= params.max_steps_in_episode,
        )

    return Environment(
        name=name,
        reset=reset,
        step=step,
        params=Params(),
        observation_space=space,
        action_space=Box((size,), low=(-1.0,) * size, high=(1.0,) * size),
    )


def _space(name: str, shape: Any) -> Space:
    """Of observations of these shapes."""
    if isinstance(shape, Mapping):
        return Dict.of({key: _space(name, entry) for key, entry in shape.items()})
    if isinstance(shape, jax.ShapeDtypeStruct):
        return Box(tuple(shape.shape), shape.dtype.name)
    raise ConfigError(
        f"an observation must be an array, or a mapping of them; {name} has {shape}. "
        "Change what its states show."
    )
