"""The protocol of environments inside ppo_jax, whatever suite they come from."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.envs.spaces import Dict, Leaf, Space, Tuple, dtype_of


class Step(NamedTuple):
    """The result of one step: the true successor, whether or not the episode ends there."""

    obs: Any
    state: Any
    reward: jax.Array
    """float32 scalar."""
    terminated: jax.Array
    """bool: the episode reached a terminal state, whose value is 0."""
    truncated: jax.Array
    """bool: a time limit cut the episode; the successor keeps its value."""


class Renderer(NamedTuple):
    """Pictures of an environment, drawn on the host."""

    state_type: type
    """Type of the environment's states, by which they are found inside the states of wrappers."""
    frames: Callable[[Sequence[Any], Any], Iterator[np.ndarray]] | None = None
    """`(states, params) -> frames`, a frame for each state: uint8 `[height, width, 3]`, all of one
    size. None if the environment can only be shown as a page."""
    page: Callable[[Sequence[Any]], str] | None = None
    """`states -> HTML`; None if there is no such page."""
    frames_per_second: float = 30.0
    """Steps of the environment in a second of the video."""


def max_steps_in_episode(params: Any) -> float | None:
    """Returns the parameter of that name, where gymnax and our adapters keep a time limit."""
    return getattr(params, "max_steps_in_episode", None)


class Environment(NamedTuple):
    """Pure functions of one environment, with its parameters and spaces; `jax.vmap` makes many.

    `reset(key, params) -> (obs, state)`; `step(key, state, action, params) -> Step`. A step does
    not reset; the rollout does. Observations have the dtypes of `observation_space`, and are plain
    dicts and tuples of arrays where it has several. Rewards are float32. Continuous actions may
    exceed the bounds of their space, so `step` must clip them, as the adapters of suites do.
    """

    name: str
    reset: Callable[[jax.Array, Any], tuple[Any, Any]]
    step: Callable[[jax.Array, Any, jax.Array, Any], Step]
    params: Any
    """Default parameters: a pytree of scalars, traced."""
    observation_space: Space
    action_space: Leaf
    shortest_episode: int = 1
    """The smallest number of steps that an episode can have, 1 or more. A rollout draws initial
    states at least once in this many steps. Set it where resets are expensive. If it is too large,
    two consecutive episodes may share an initial state."""
    longest_episode: Callable[[Any], float | None] = max_steps_in_episode
    """`params -> steps`: the largest number of steps that an episode can have; None if there is no
    bound."""
    renderer: Renderer | None = None
    """Draws states, for `ppo-jax render`; None if they cannot be drawn. Wrappers keep it."""


def cast(space: Space, obs: Any) -> Any:
    """Returns an observation as plain dicts, tuples and arrays of the dtypes of its space."""
    if isinstance(space, Dict):
        return {name: cast(entry, obs[name]) for name, entry in space.spaces}
    if isinstance(space, Tuple):
        return tuple(map(cast, space.spaces, obs))
    return jnp.asarray(obs, dtype_of(space))
