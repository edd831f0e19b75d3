"""Adapter for the CHIP-8 games of octax. The only module that imports octax."""

from collections.abc import Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.envs.environment import Environment, Renderer, Step
from ppo_jax.envs.spaces import Box, Discrete


class Params(flax.struct.PyTreeNode):
    """Traced parameters of a game."""

    max_steps_in_episode: int
    """Steps after which an episode is truncated, each of several frames."""


def make(task: str, **kwargs: Any) -> Environment:
    """Builds a game; `kwargs` go to its environment, such as `frame_skip`.

    Observations are the frames since the previous action as channels, bool `[64, 32, frames]`. All
    episodes of a game start from the same state; their random numbers differ.
    """
    from octax.env import OctaxEnvState
    from octax.environments import create_environment
    from octax.rendering import chip8_display_to_rgb, create_color_scheme

    inner, _ = create_environment(task, **kwargs)
    frames = jax.eval_shape(inner.reset, jax.random.key(0))[1]

    def observed(obs: jax.Array) -> jax.Array:
        return jnp.moveaxis(obs.astype(bool), 0, -1)

    def reset(key: jax.Array, params: Params) -> tuple[Any, Any]:
        del params
        state, obs, _ = inner.reset(key)
        return observed(obs), state

    # octax's own truncation is not used: its time limit is static, and this one is a parameter.
    def step(key: jax.Array, state: Any, action: jax.Array, params: Params) -> Step:
        # The game's instruction for random numbers reads this key.
        state, obs, reward, terminated, _, _ = inner.step(state.replace(rng=key), action)
        return Step(
            obs=observed(obs),
            state=state,
            reward=jnp.asarray(reward, jnp.float32),
            terminated=jnp.asarray(terminated, bool),
            truncated=state.time >= params.max_steps_in_episode,
        )

    colors = create_color_scheme(inner.color_scheme)

    def draw(states: Sequence[Any], params: Params) -> Iterator[np.ndarray]:
        del params
        for state in states:
            yield chip8_display_to_rgb(np.asarray(state.display), inner.render_scale, *colors)

    return Environment(
        name=task,
        reset=reset,
        step=step,
        params=Params(inner.max_num_steps_per_episodes),
        observation_space=Box((*frames.shape[1:], frames.shape[0]), "bool"),
        action_space=Discrete(int(inner.num_actions)),
        renderer=Renderer(OctaxEnvState, draw, frames_per_second=15),
    )
