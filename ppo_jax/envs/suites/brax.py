"""Adapter for tasks of brax. The only module that imports brax."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from ppo_jax.envs.checks import is_metric_name
from ppo_jax.envs.environment import Environment, Renderer, Step, cast
from ppo_jax.envs.spaces import Box, Dict, Space
from ppo_jax.errors import ConfigError

# The shortest of 2,048 episodes under the largest actions had 5 (ant), 8 (hopper) and 31 (walker2d)
# steps with the spring engine; humanoid falls by 2 cm in 4 steps. A reset of hopper takes a fifth
# of the time of a step, so drawing fewer of them pays. Pendulums may fall in 2 steps.
_SHORTEST_EPISODE = 4
_PENDULUMS = ("inverted_pendulum", "inverted_double_pendulum")


class Params(flax.struct.PyTreeNode):
    """Traced parameters of a task."""

    max_steps_in_episode: int = 1000
    """Steps after which an episode is truncated; brax calls this episode_length and leaves it to
    its wrappers. Below 4, two consecutive episodes may share an initial state
    (`Environment.shortest_episode`)."""


class State(NamedTuple):
    """State of one environment."""

    inner: Any
    """State of the task itself."""
    time: jax.Array  # int32 [], steps since the reset


def make(task: str, **kwargs: Any) -> Environment:
    """Builds a task; `kwargs` go to its class, such as `backend`."""
    from brax import envs

    env = adapt(task, envs.get_environment(task, **kwargs))
    # Other arguments may make episodes shorter than those that were measured.
    is_measured = kwargs.keys() <= {"backend"} and task not in _PENDULUMS
    return env._replace(shortest_episode=_SHORTEST_EPISODE if is_measured else 1)


def adapt(name: str, env: Any) -> Environment:
    """Converts an object with the interface of brax to an `Environment`.

    The interface is `action_size`, `reset(key) -> state` and `step(state, action) -> state`, where
    a state has `obs`, `reward` and `done`. MuJoCo Playground has it as well. Actions are in
    [-1, 1]. Without brax's wrappers `done` is a termination, never a time limit.
    """
    # brax has no description of observations; the shapes of a reset are one.
    initial = jax.eval_shape(lambda: env.reset(jax.random.key(0)))
    space = _space(name, initial.obs)
    # Terms of the reward and positions, which brax adds up over an episode, too.
    found = getattr(initial, "metrics", {})
    metrics = tuple(key for key, x in found.items() if x.shape == () and is_metric_name(key))
    size = int(env.action_size)

    def reset(key: jax.Array, params: Params) -> tuple[Any, State]:
        del params
        inner = env.reset(key)
        return cast(space, inner.obs), State(inner, jnp.zeros((), jnp.int32))

    def step(key: jax.Array, state: State, action: jax.Array, params: Params) -> Step:
        del key  # a task that is random keeps a key in its state
        # The tasks are made for actions in this range and do not clip them.
        try:
            inner = env.step(state.inner, jnp.clip(action, -1.0, 1.0))
        # For tasks in a fluid (swimmer), brax 0.14.2 passes arguments to JAX that JAX 0.10 has
        # removed.
        except (TypeError, AttributeError) as error:
            raise ConfigError(
                f"{name} must be one that can be stepped with jax {jax.__version__}, which fails: "
                f"{error}. Choose another task."
            ) from error
        time = state.time + 1
        return Step(
            obs=cast(space, inner.obs),
            state=State(inner, time),
            reward=jnp.asarray(inner.reward, jnp.float32),
            terminated=jnp.asarray(inner.done, bool),
            truncated=time >= params.max_steps_in_episode,
            metrics={key: inner.metrics[key] for key in metrics},
        )

    return Environment(
        name=name,
        reset=reset,
        step=step,
        params=Params(),
        observation_space=space,
        action_space=Box((size,), low=(-1.0,) * size, high=(1.0,) * size),
        renderer=Renderer(State, page=lambda states: _page(env, states)),
        metrics=metrics,
    )


def _page(env: Any, states: Sequence[State]) -> str:
    """Returns brax's page of an episode, whose viewer is loaded from the internet."""
    from brax.io import html

    system = env.sys.tree_replace({"opt.timestep": env.dt})
    return html.render(system, [state.inner.pipeline_state for state in states], colab=False)


def _space(name: str, shape: Any) -> Space:
    """Returns the space of observations of these shapes."""
    if isinstance(shape, Mapping):
        return Dict.of({key: _space(name, entry) for key, entry in shape.items()})
    if isinstance(shape, jax.ShapeDtypeStruct):
        return Box(tuple(map(int, shape.shape)), shape.dtype.name)
    raise ConfigError(
        f"an observation must be an array, or a mapping of them; {name} has {shape}. "
        "Change the obs of its states."
    )
