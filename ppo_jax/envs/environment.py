"""The protocol that every environment follows inside ppo_jax, whatever suite it comes from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.envs.spaces import Dict, Leaf, Space, Tuple, dtype_of


class Step(NamedTuple):
    """What one step returns: the true successor, whether or not the episode ends there."""

    obs: Any
    state: Any
    reward: jax.Array
    """float32 scalar."""
    terminated: jax.Array
    """bool: the episode reached a terminal state; what follows is worth nothing."""
    truncated: jax.Array
    """bool: a time limit cut the episode; what would have followed keeps its value."""


class Environment(NamedTuple):
    """An environment as pure functions of one environment (`vmap` makes many).

    `reset(key, params) -> (obs, state)`; `step(key, state, action, params) -> Step`. A step does
    not reset: the rollout does.
    Observations have the dtypes of `observation_space` (plain dicts and tuples of arrays where it
    has several), rewards are float32, and actions are clipped to the bounds of a box before they
    reach the suite's code.
    """

    name: str
    reset: Callable[[jax.Array, Any], tuple[Any, Any]]
    step: Callable[[jax.Array, Any, jax.Array, Any], Step]
    params: Any
    """Default parameters: a pytree of scalars, traced."""
    observation_space: Space
    action_space: Leaf
    shortest_episode: int = 1
    """Steps that an episode lasts at least, 1 or more. In so many steps an environment begins one
    new episode at most, so that a rollout draws one for each as rarely as this, or as the largest
    number below it that divides `num_steps`: worth saying where a reset is dear. Should an
    environment begin two, both begin alike."""


def cast(space: Space, obs: Any) -> Any:
    """An observation as plain dicts, tuples and arrays of the dtypes that its space says."""
    if isinstance(space, Dict):
        return {name: cast(entry, obs[name]) for name, entry in space.spaces}
    if isinstance(space, Tuple):
        return tuple(map(cast, space.spaces, obs))
    return jnp.asarray(obs, dtype_of(space))
