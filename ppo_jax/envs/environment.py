"""The protocol of environments inside ppo_jax, whatever suite they come from."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.envs.spaces import Dict, Leaf, Space, Tuple, dtype_of
from ppo_jax.types import NO_METRICS


class Step(NamedTuple):
    """The result of one step: the true successor, whether or not the episode ends there."""

    obs: Any
    state: Any
    reward: jax.Array
    """float32 scalar; `[A]` with several agents."""
    terminated: jax.Array
    """bool: the episode reached a terminal state, whose value is 0."""
    truncated: jax.Array
    """bool: a time limit cut the episode; the successor keeps its value."""
    metrics: dict[str, jax.Array] = NO_METRICS
    """A scalar for each name in `Environment.metrics`. Like rewards, they are summed over an
    episode: a success is 1 in the step in which it happens, and 0 in all others."""


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

    With `num_agents` A above 1, observations, actions and rewards have a first axis `[A]`, and the
    episode of all agents ends together. One policy plays them all, each by its own observation.
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
    host: Any = None
    """A `HostSource` of `envs.host`, for an environment that is stepped on the host, whose `reset`
    and `step` raise a `ConfigError`."""
    num_agents: int = 1
    """Agents of an environment. `Config.num_envs` counts each of them as an environment."""
    metrics: tuple[str, ...] = ()
    """Names of what a step reports besides the reward. The mean over episodes of the sum over their
    steps is `episode/NAME` of a training and `eval/NAME` of an evaluation."""

    @property
    def agent_axes(self) -> tuple[int, ...]:
        """The first axes of an observation, an action and a reward: `(A,)`, or none for one."""
        return () if self.num_agents == 1 else (self.num_agents,)


class Vectorized(NamedTuple):
    """Many environments of one kind: `[N]` counts every agent, M = N / A counts environments."""

    reset: Callable[[jax.Array, Any], tuple[Any, Any]]
    """`(keys [N], params) -> (obs [N, ...], state [M, ...])`."""
    step: Callable[[jax.Array, Any, jax.Array, Any], Step]
    """`(keys [N], state [M, ...], actions [N, ...], params) -> Step`, `[N]` but for the state."""
    where: Callable[[jax.Array, tuple[Any, Any], tuple[Any, Any]], tuple[Any, Any]]
    """`(done [N], new, old) -> (obs, state)`: `new` where an episode is done, and `old` elsewhere.
    Both are `(obs, state)`."""
    take: Callable[[tuple[Any, Any], jax.Array, jax.Array], tuple[tuple[Any, Any], jax.Array]]
    """`(pool, done [N], used []) -> ((obs, state), used)`. Environments that are done take the next
    episodes of a pool `(obs, state)`; `used` counts the episodes taken so far."""


def vectorized(env: Environment) -> Vectorized:
    """Returns the functions of many environments, with the agents of each one after another."""
    num_agents = env.num_agents
    reset_many = jax.vmap(env.reset, in_axes=(0, None))
    step_many = jax.vmap(env.step, in_axes=(0, 0, 0, None))

    def merge(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)

    def reset(keys: jax.Array, params: Any) -> tuple[Any, Any]:
        obs, state = reset_many(keys[::num_agents], params)
        return merge(obs), state

    def step(keys: jax.Array, state: Any, action: jax.Array, params: Any) -> Step:
        actions = action.reshape(-1, num_agents, *action.shape[1:])
        after = step_many(keys[::num_agents], state, actions, params)
        shared = (after.terminated, after.truncated, after.metrics)
        shared = jax.tree.map(lambda x: jnp.repeat(x, num_agents), shared)
        return Step(merge(after.obs), after.state, merge(after.reward), *shared)

    def where(done: jax.Array, new: tuple[Any, Any], old: tuple[Any, Any]) -> tuple[Any, Any]:
        return select(done, new[0], old[0]), select(done[::num_agents], new[1], old[1])

    def take(
        pool: tuple[Any, Any], done: jax.Array, used: jax.Array
    ) -> tuple[tuple[Any, Any], jax.Array]:
        ended = done[::num_agents].astype(jnp.int32)
        # Episodes take entries of the pool in the order in which they end. No entry is chosen by
        # what happened in an episode, so until the pool is used up, initial states are independent.
        size = jax.tree.leaves(pool[0])[0].shape[0] // num_agents
        place = (used + jnp.cumsum(ended) - ended) % size
        # Rows of the observations of all agents of an environment.
        rows = (place[:, None] * num_agents + jnp.arange(num_agents)[None]).reshape(-1)
        obs = jax.tree.map(lambda x: x[rows], pool[0])
        return (obs, jax.tree.map(lambda x: x[place], pool[1])), used + jnp.sum(ended)

    def select(done: jax.Array, new: Any, old: Any) -> Any:
        def choose(x: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.where(done.reshape(-1, *[1] * (x.ndim - 1)), x, y)

        return jax.tree.map(choose, new, old)

    # The functions of one agent are those of `vmap` alone, whose programs are leaner.
    if num_agents == 1:
        return Vectorized(reset_many, step_many, where, take)
    return Vectorized(reset, step, where, take)


def cast(space: Space, obs: Any) -> Any:
    """Returns an observation as plain dicts, tuples and arrays of the dtypes of its space."""
    if isinstance(space, Dict):
        return {name: cast(entry, obs[name]) for name, entry in space.spaces}
    if isinstance(space, Tuple):
        return tuple(map(cast, space.spaces, obs))
    return jnp.asarray(obs, dtype_of(space))


def one_hot_channels(grid: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """Returns one-hot channels, bool `[..., sum(sizes)]`, of K integers `[..., K]`.

    Categories such as the objects of a grid have no order, so a network must not see them as
    numbers. `sizes` has the number of values of each integer.
    """
    parts = [jax.nn.one_hot(grid[..., k], size, dtype=bool) for k, size in enumerate(sizes)]
    return jnp.concatenate(parts, axis=-1)
