"""Adapter for the Atari games of jaxtari, by their objects. Only this module imports jaxtari."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.envs.environment import Environment, Renderer, Step
from ppo_jax.envs.spaces import Box, Discrete
from ppo_jax.errors import ConfigError


def make(task: str, **kwargs: Any) -> Environment:
    """Builds a game; `kwargs` go to `jaxtari.make`, such as `mode`, `difficulty` and `mods`.

    Observations are the attributes of all objects as one vector, scaled to [0, 1] by their bounds.
    A step is a single frame, and no time limit ends an episode: use the wrappers `action_repeat`,
    `sticky_actions` and `time_limit`.

    Raises:
      ConfigError: the pictures of the games, which jaxtari downloads once, are not there.
    """
    import jaxtari

    try:
        jaxtari.check_ownership()
    except RuntimeError as error:
        raise ConfigError(
            "jaxtari needs its pictures, which are not installed: install-sprites downloads them."
        ) from error
    try:
        inner = jaxtari.make(task, **kwargs)
    # It wraps the errors of a game's own module in this type.
    except ImportError as error:
        raise ConfigError(f"{task} of jaxtari cannot be built: {error}.") from error
    space = inner.observation_space()
    key = jax.eval_shape(lambda: jax.random.key(0))
    initial, state = jax.eval_shape(inner.reset, key)
    width = jax.eval_shape(lambda obs: _vector(space, obs), initial).shape

    def reset(key: jax.Array, params: tuple[()]) -> tuple[Any, Any]:
        del params
        obs, state = inner.reset(key)
        return _vector(space, obs), state

    def step(key: jax.Array, state: Any, action: jax.Array, params: tuple[()]) -> Step:
        del key, params  # random numbers come from the state
        obs, state, reward, done, _ = inner.step(state, action)
        return Step(
            obs=_vector(space, obs),
            state=state,
            reward=jnp.asarray(reward, jnp.float32),
            terminated=jnp.asarray(done, bool),
            truncated=jnp.array(False),
        )

    def frames(states: Sequence[Any], params: tuple[()]) -> Iterator[np.ndarray]:
        del params
        for state in states:
            yield np.asarray(inner.render(state), np.uint8)

    return Environment(
        name=task,
        reset=reset,
        step=step,
        params=(),
        observation_space=Box(width),
        action_space=Discrete(int(inner.action_space().n)),
        renderer=Renderer(type(state), frames, frames_per_second=60),
    )


def _vector(space: Any, obs: Any) -> jax.Array:
    """Returns all numbers of an observation as one vector, scaled by the bounds of its space."""
    if hasattr(space, "spaces"):
        parts = [_vector(entry, getattr(obs, name)) for name, entry in space.spaces.items()]
        return jnp.concatenate(parts)
    low, high = (
        np.broadcast_to(np.asarray(x, np.float32), obs.shape) for x in (space.low, space.high)
    )
    return jnp.ravel((jnp.asarray(obs, jnp.float32) - low) / np.maximum(1.0, high - low))
