"""Adapter for the grid worlds of XLand-MiniGrid. The only module that imports xminigrid."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.envs.environment import Environment, Renderer, Step, one_hot_channels
from ppo_jax.envs.spaces import Box, Discrete
from ppo_jax.errors import ConfigError, require_known


class Params(flax.struct.PyTreeNode):
    """Traced parameters of a task."""

    max_steps_in_episode: int
    """Steps after which an episode is truncated. The reward for the goal falls with the share of
    them that was needed."""


def make(task: str, *, benchmark: str | None = None, **kwargs: Any) -> Environment:
    """Builds a task. The tile and the colour of each cell become one-hot channels.

    Args:
      task: name in xminigrid's registry.
      benchmark: set of rules and goals, one of which is drawn at each reset: a name such as
        "trivial-21k", which is downloaded, or the path of a file. XLand's tasks need one. It is a
        constant of every program, so that sets of a million rules take hundreds of megabytes.
      **kwargs: go to the environment's parameters, such as `view_size`.
    """
    import xminigrid
    from xminigrid.benchmarks import load_benchmark_from_path
    from xminigrid.core.constants import NUM_COLORS, NUM_TILES

    inner, static = xminigrid.make(task, **kwargs)
    # A task of XLand has no goal without rules, so that no episode of it ends by one.
    if task.startswith("XLand") != (benchmark is not None):
        raise ConfigError(
            f"tasks of XLand, and no others, need a benchmark; got {task} and {benchmark}. Set "
            'env_kwargs={"benchmark": "trivial-21k"}, or leave it out.'
        )
    rules = None
    if benchmark is not None:
        is_file = os.path.exists(benchmark)
        if not is_file:
            require_known("benchmark", benchmark, xminigrid.registered_benchmarks())
        rules = (load_benchmark_from_path if is_file else xminigrid.load_benchmark)(benchmark)
    sizes = (NUM_TILES, NUM_COLORS)
    height, width, _ = inner.observation_shape(static)

    def with_limit(params: Params) -> Any:
        # `max_steps` is a static field, and may be traced: a step only compares and divides by it.
        return static.replace(max_steps=params.max_steps_in_episode)

    def reset(key: jax.Array, params: Params) -> tuple[Any, Any]:
        rules_key, key = jax.random.split(key)
        own = with_limit(params)
        # A new task for each episode: Nikulin et al. 2024 (arXiv:2312.12044).
        if rules is not None:
            own = own.replace(ruleset=rules.sample_ruleset(rules_key))
        timestep = inner.reset(own, key)
        return one_hot_channels(timestep.observation, sizes), timestep

    def step(key: jax.Array, state: Any, action: jax.Array, params: Params) -> Step:
        del key  # transitions are deterministic
        timestep = inner.step(with_limit(params), state, action)
        is_terminal = timestep.discount == 0
        return Step(
            obs=one_hot_channels(timestep.observation, sizes),
            state=timestep,
            reward=jnp.asarray(timestep.reward, jnp.float32),
            terminated=is_terminal,
            truncated=timestep.last() & ~is_terminal,
        )

    def frames(states: Sequence[Any], params: Params) -> Iterator[np.ndarray]:
        del params
        for timestep in states:
            yield np.asarray(inner.render(static, timestep))

    return Environment(
        name=task,
        reset=reset,
        step=step,
        params=Params(static.max_steps),
        observation_space=Box((height, width, sum(sizes)), "bool"),
        action_space=Discrete(inner.num_actions(static)),
        renderer=Renderer(xminigrid.types.TimeStep, frames, frames_per_second=5),
    )
