"""Spaces of Gymnasium, in which every suite on the host describes its environments."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ppo_jax.envs import spaces
from ppo_jax.errors import ConfigError

# Where an action has no bounds, EnvPool reports `std::numeric_limits` of its C++ type: `max()`, and
# as the lower bound `min()`, which for floating-point types is the smallest positive number.
_UNBOUNDED, _SMALLEST = 1e30, 1e-30
_MOST_CHANNELS = 16  # four stacked frames of four channels


def action_space(space: Any) -> spaces.Leaf:
    """Converts a space of actions."""
    from gymnasium import spaces as theirs

    if isinstance(space, theirs.Discrete):
        return spaces.Discrete(int(space.n))
    if isinstance(space, theirs.MultiDiscrete) and space.nvec.ndim == 1:
        return spaces.MultiDiscrete(tuple(map(int, space.nvec)))
    if isinstance(space, theirs.MultiBinary) and len(space.shape) == 1:
        return spaces.MultiDiscrete((2,) * space.shape[0])
    if isinstance(space, theirs.Box) and np.issubdtype(space.dtype, np.floating):
        if not (np.abs([space.low, space.high]) < _UNBOUNDED).all():
            return spaces.Box(tuple(space.shape))
        low, high = (tuple(map(float, x.ravel())) for x in (space.low, space.high))
        return spaces.Box(tuple(space.shape), low=low, high=high)
    raise ConfigError(
        "actions must be integers or floating-point numbers, as a single array (Discrete, "
        f"MultiDiscrete, MultiBinary, Box); got {space}. Wrap the environment."
    )


def action_converter(space: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function that turns actions of a policy into those of a space of Gymnasium."""
    start = getattr(space, "start", 0)
    bounds = None
    if hasattr(space, "low"):
        is_limit = (space.low > 0) & (space.low < _SMALLEST)
        bounds = np.where(is_limit, -np.inf, space.low), space.high

    def convert(actions: np.ndarray) -> np.ndarray:
        if bounds is not None:
            actions = np.clip(actions, *bounds)
        return (actions + start).astype(space.dtype)

    return convert


def observation_space(space: Any) -> spaces.Space:
    """Converts a space of observations."""
    from gymnasium import spaces as theirs

    if isinstance(space, theirs.Dict):
        return spaces.Dict.of(
            {name: observation_space(entry) for name, entry in space.spaces.items()}
        )
    if isinstance(space, theirs.Tuple):
        return spaces.Tuple(tuple(map(observation_space, space.spaces)))
    if isinstance(space, theirs.Discrete) and space.start == 0:
        return spaces.Discrete(int(space.n))
    if isinstance(space, theirs.MultiDiscrete) and space.nvec.ndim == 1 and not space.start.any():
        return spaces.MultiDiscrete(tuple(map(int, space.nvec)))
    if isinstance(space, theirs.MultiBinary):
        return spaces.Box(tuple(space.shape), "bool")
    if isinstance(space, theirs.Box):
        is_floating = np.issubdtype(space.dtype, np.floating)
        return spaces.Box(tuple(space.shape), "float32" if is_floating else str(space.dtype))
    raise ConfigError(
        "observations must be of Box, Discrete, MultiDiscrete, MultiBinary, Dict and Tuple, with "
        f"integers from 0; got {space}. Wrap the environment."
    )


def cast(space: spaces.Space, obs: Any) -> Any:
    """Returns an observation, or a batch of them, as plain dicts, tuples and arrays."""
    if isinstance(space, spaces.Dict):
        return {name: cast(entry, obs[name]) for name, entry in space.spaces}
    if isinstance(space, spaces.Tuple):
        return tuple(map(cast, space.spaces, obs))
    return np.asarray(obs, spaces.dtype_of(space))


def _has_channels_first(leaf: spaces.Leaf) -> bool:
    """Returns whether the first axis of images is that of channels: shorter than the last one."""
    if not isinstance(leaf, spaces.Box) or len(leaf.shape) != 3 or leaf.dtype != "uint8":
        return False
    # Colours and stacked frames are few; Stable-Baselines3 has a similar rule.
    return leaf.shape[0] <= _MOST_CHANNELS and leaf.shape[0] < min(leaf.shape[1:])


def channels_last(space: spaces.Space) -> spaces.Space:
    """Returns the space of observations whose images have their channels last."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict.of({name: channels_last(entry) for name, entry in space.spaces})
    if isinstance(space, spaces.Tuple):
        return spaces.Tuple(tuple(map(channels_last, space.spaces)))
    if isinstance(space, spaces.Box) and _has_channels_first(space):
        return spaces.Box((*space.shape[1:], space.shape[0]), space.dtype)
    return space


def to_observations(space: spaces.Space, obs: Any) -> Any:
    """Converts observations `[N, ...]` of a space to its dtypes, and images to channels last."""

    def convert(leaf: spaces.Leaf, x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.moveaxis(x, 1, 3)) if _has_channels_first(leaf) else x

    leaves, structure = jax.tree.flatten(cast(space, obs))
    return jax.tree.unflatten(structure, map(convert, spaces.leaves(space), leaves))
