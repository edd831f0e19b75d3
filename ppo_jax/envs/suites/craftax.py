"""Adapter for the open worlds of Craftax. The only module that imports craftax."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.envs.environment import Environment, Renderer, Step
from ppo_jax.envs.spaces import Box, Discrete

_NO_LIMIT = 2**31 - 1


def make(task: str, **kwargs: Any) -> Environment:
    """Builds a task; `kwargs` replace fields of its static parameters, such as `map_size`.

    Craftax does not distinguish its time limit from other ends; here the limit is a truncation.
    """
    from craftax.craftax_env import make_craftax_env_from_name

    is_classic = "Classic" in task
    metrics = _achievements(is_classic)
    inner = make_craftax_env_from_name(task, auto_reset=False)
    if kwargs:
        inner = type(inner)(inner.default_static_params().replace(**kwargs))
    params = inner.default_params
    space = inner.observation_space(params)

    # The methods that end in `_env` are not compiled by themselves, and do not reset.
    def reset(key: jax.Array, params: Any) -> tuple[Any, Any]:
        return inner.reset_env(key, params)

    def step(key: jax.Array, state: Any, action: jax.Array, params: Any) -> Step:
        # Achievements stay in the state, and are reported in the step that reaches them.
        before = state.achievements
        obs, state, reward, _, _ = inner.step_env(key, state, action, params)
        # `is_terminal` is also true at the time limit, so it is called with an unreachable limit.
        return Step(
            obs=obs,
            state=state,
            reward=jnp.asarray(reward, jnp.float32),
            terminated=inner.is_terminal(state, params.replace(max_timesteps=_NO_LIMIT)),
            truncated=state.timestep >= params.max_timesteps,
            metrics=dict(zip(metrics, state.achievements & ~before, strict=True)),
        )

    return Environment(
        name=task,
        reset=reset,
        step=step,
        params=params,
        observation_space=Box(tuple(map(int, space.shape))),
        action_space=Discrete(int(inner.action_space(params).n)),
        longest_episode=lambda params: params.max_timesteps,
        renderer=_renderer(is_classic),
        metrics=metrics,
    )


def _achievements(is_classic: bool) -> tuple[str, ...]:
    """Returns the names of the achievements, each of which an episode reaches once or never."""
    if is_classic:
        from craftax.craftax_classic.constants import Achievement
    else:
        from craftax.craftax.constants import Achievement
    return tuple(f"achievement/{x.name.lower()}" for x in Achievement)


def _renderer(is_classic: bool) -> Renderer:
    if is_classic:
        from craftax.craftax_classic import renderer
        from craftax.craftax_classic.envs.craftax_state import EnvState
    else:
        from craftax.craftax import renderer
        from craftax.craftax.craftax_state import EnvState

    def frames(states: Sequence[Any], params: Any) -> Iterator[np.ndarray]:
        del params
        draw = jax.jit(renderer.make_craftax_pixel_renderer(16))
        for state in states:
            yield np.asarray(draw(state)).astype(np.uint8)

    return Renderer(EnvState, frames, frames_per_second=10)
