"""Adapter for the grid worlds of navix. The only module that imports navix."""

from collections.abc import Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.envs import spaces
from ppo_jax.envs.environment import Environment, Renderer, Step, cast, one_hot_channels
from ppo_jax.envs.spaces import Box, Discrete
from ppo_jax.errors import require_known

# Values of the integers of a symbol: an object (`navix.entities.EntityIds`), a colour (`PALETTE`),
# and the state of a door or the player's direction.
_SYMBOLS = (11, 6, 4)


class Params(flax.struct.PyTreeNode):
    """Traced parameters of a task."""

    max_steps_in_episode: int = 100
    """Steps after which an episode is truncated."""


def make(task: str, *, observation: str = "symbolic", **kwargs: Any) -> Environment:
    """Builds a task.

    The three numbers of each cell in symbolic observations become one-hot channels.

    Args:
      task: name in navix's registry.
      observation: name of a function of `navix.observations`, such as "symbolic_first_person".
      **kwargs: go to the constructor, such as `max_steps`.
    """
    import navix

    kinds = ("categorical", "symbolic", "rgb")
    known = [name for name in vars(navix.observations) if name.startswith(kinds)]
    require_known("observation of navix", observation, known)
    inner = navix.make(task, observation_fn=getattr(navix.observations, observation), **kwargs)
    timestep = jax.eval_shape(inner.reset, jax.random.key(0))
    shape = timestep.observation
    is_symbolic = observation.startswith("symbolic")
    if is_symbolic:
        space: spaces.Space = Box((*map(int, shape.shape[:2]), sum(_SYMBOLS)), "bool")
    else:
        space = Box(tuple(map(int, shape.shape)), shape.dtype.name)

    def observed(obs: jax.Array) -> jax.Array:
        if is_symbolic:
            # A locked door has the state 254; no door has the last one, a direction.
            obs = one_hot_channels(jnp.minimum(obs, jnp.array(_SYMBOLS, obs.dtype) - 1), _SYMBOLS)
        return cast(space, obs)

    # Only pictures need the tiles, 12 KiB of a state.
    keeps_tiles = observation.startswith("rgb")

    def without_tiles(timestep: Any) -> Any:
        if keeps_tiles:
            return timestep
        return timestep.replace(state=timestep.state.replace(cache=None))

    def reset(key: jax.Array, params: Params) -> tuple[Any, Any]:
        del params
        timestep = inner.reset(key)
        return observed(timestep.observation), without_tiles(timestep)

    def step(key: jax.Array, state: Any, action: jax.Array, params: Params) -> Step:
        # The method with an underscore does not reset. Its random numbers come from the state.
        state = state.replace(state=state.state.replace(key=key))
        timestep = inner.replace(max_steps=params.max_steps_in_episode)._step(state, action)
        return Step(
            obs=observed(timestep.observation),
            state=without_tiles(timestep),
            reward=jnp.asarray(timestep.reward, jnp.float32),
            terminated=timestep.is_termination(),
            truncated=timestep.is_truncation(),
        )

    return Environment(
        name=task,
        reset=reset,
        step=step,
        params=Params(inner.max_steps),
        observation_space=space,
        action_space=Discrete(int(inner.action_space.n)),
        renderer=Renderer(navix.Timestep, _frames, frames_per_second=5),
    )


def _frames(states: Sequence[Any], params: Params) -> Iterator[np.ndarray]:
    """Draws states by navix's tiles."""
    del params
    from navix.observations import rgb
    from navix.rendering.cache import RenderingCache

    @jax.jit
    def draw(timestep: Any) -> jax.Array:
        state = timestep.state
        return rgb(state.replace(cache=RenderingCache.init(state.grid)))

    # Tiles have 8 pixels, too few to look at.
    for timestep in states:
        picture = np.asarray(draw(timestep))
        yield np.repeat(np.repeat(picture, 4, axis=0), 4, axis=1)
