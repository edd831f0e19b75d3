"""Adapter for the environments of Jumanji. The only module that imports jumanji."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.envs.environment import Environment, Step, one_hot_channels
from ppo_jax.envs.spaces import ACTION_MASK, Box, Dict, Discrete, Leaf, MultiDiscrete, Space
from ppo_jax.errors import ConfigError

_MOST_CATEGORIES = 32  # integers with more values are numbers, such as the count of steps


def make(task: str, **kwargs: Any) -> Environment:
    """Builds an environment; `kwargs` go to its constructor, if they are plain values.

    Observations are nested dicts. Arrays of integers with at most 32 values are categories, and
    become one-hot channels; other integers with bounds are numbers, and are scaled to [0, 1]. An
    action of several integers whose mask is joint becomes one integer. Several agents are played by
    one policy for the sum of their rewards. An episode that ends with a discount of 0 is
    terminated, with another one truncated.
    """
    import jumanji

    # Sokoban downloads its levels here.
    inner = jumanji.make(task, **kwargs)
    observation = _dict(inner.observation_spec)
    if not isinstance(observation.space, Dict):
        raise ConfigError(f"an observation of Jumanji must be a record; that of {task} is not.")
    entries = dict(observation.space.spaces)
    mask = inner.observation_spec._specs.get(ACTION_MASK)
    actions = _actions(task, inner.action_spec, None if mask is None else mask.shape)
    if mask is not None:
        entries[ACTION_MASK] = Box((math.prod(mask.shape),), "bool")

    def observed(obs: Any) -> dict[str, Any]:
        result = observation.convert(obs)
        if mask is not None:
            result[ACTION_MASK] = obs.action_mask.reshape(-1)
        return result

    def reset(key: jax.Array, params: tuple[()]) -> tuple[Any, Any]:
        del params
        state, timestep = inner.reset(key)
        return observed(timestep.observation), state

    def step(key: jax.Array, state: Any, action: jax.Array, params: tuple[()]) -> Step:
        del key, params  # random numbers come from the state
        state, timestep = inner.step(state, actions.convert(action))
        is_terminal = jnp.all(timestep.discount == 0)
        return Step(
            obs=observed(timestep.observation),
            state=state,
            reward=jnp.sum(timestep.reward).astype(jnp.float32),
            terminated=timestep.last() & is_terminal,
            truncated=timestep.last() & ~is_terminal,
        )

    return Environment(
        name=task,
        reset=reset,
        step=step,
        params=(),
        observation_space=Dict.of(entries),
        action_space=actions.space,
        # Its time limits are terminations: observations have the step.
        longest_episode=lambda params: None,
    )


class _Converted(NamedTuple):
    """A space of ours, and the function that converts values."""

    space: Any
    convert: Callable[[Any], Any]


def _dict(spec: Any) -> _Converted:
    """Converts the description of an observation, and observations to ours."""
    if not hasattr(spec, "shape"):
        # No public attribute names the entries of a spec in jumanji 1.1.
        entries = {name: _dict(entry) for name, entry in spec._specs.items()}
        space: Space = Dict.of({name: entry.space for name, entry in entries.items()})
        return _Converted(
            space, lambda obs: {name: x.convert(getattr(obs, name)) for name, x in entries.items()}
        )
    shape, dtype = tuple(spec.shape), np.dtype(spec.dtype)
    if not np.issubdtype(dtype, np.integer):
        ours = "bool" if dtype.kind == "b" else "float32"
        return _Converted(Box(shape, ours), lambda x: jnp.asarray(x, ours))
    low, high = (np.asarray(getattr(spec, name, np.nan)) for name in ("minimum", "maximum"))
    # Such as the board of 2048, which has powers without a bound.
    if np.isnan(low).any() or np.isnan(high).any():
        return _Converted(Box(shape), lambda x: jnp.asarray(x, jnp.float32))
    first, last = int(low.min()), int(high.max())
    count = last - first + 1
    if shape and count <= _MOST_CATEGORIES:
        return _Converted(
            Box((*shape, count), "bool"), lambda x: one_hot_channels(x[..., None] - first, (count,))
        )
    scale = max(1, last - first)
    return _Converted(Box(shape), lambda x: (jnp.asarray(x, jnp.float32) - first) / scale)


def _actions(task: str, spec: Any, mask: tuple[int, ...] | None) -> _Converted:
    """Returns our space of actions, and what converts an action to Jumanji's."""
    dtype = np.dtype(spec.dtype)
    if np.issubdtype(dtype, np.floating):
        low, high = (
            tuple(np.broadcast_to(np.asarray(x, float), spec.shape).ravel().tolist())
            for x in (spec.minimum, spec.maximum)
        )
        space: Leaf = Box(tuple(spec.shape), low=low, high=high)
        return _Converted(space, lambda x: jnp.clip(x, spec.minimum, spec.maximum))
    if spec.shape == ():
        return _Converted(Discrete(int(spec.num_values)), lambda x: x)
    # MultiCVRP has bounds instead of numbers of values, and they are larger than its mask.
    sizes = getattr(spec, "num_values", None)
    if sizes is None:
        sizes = np.full(spec.shape, spec.maximum + 1 if mask is None else mask[-1])
    values = tuple(int(size) for size in np.ravel(sizes))
    if mask == values:

        def convert(x: jax.Array) -> jax.Array:
            return jnp.stack(jnp.unravel_index(x, values)).astype(dtype)

        return _Converted(Discrete(math.prod(values)), convert)
    if mask is not None and math.prod(mask) != sum(values):
        raise ConfigError(
            f"an action mask must be joint, or have a row for each integer of an action; {task} "
            f"has {mask} for {values}. Choose another task."
        )
    return _Converted(MultiDiscrete(values), lambda x: x.reshape(spec.shape).astype(dtype))
