"""Wrappers: functions that take an `Environment` and return a changed one.

The wrappers in `WRAPPERS` can be named in `Config.wrappers`, innermost first; each has one
argument.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.config import Value
from ppo_jax.envs import spaces
from ppo_jax.envs.environment import Environment, Step
from ppo_jax.envs.spaces import ACTION_MASK, Box, Dict, Discrete
from ppo_jax.errors import (
    ConfigError,
    require_known,
    require_positive_integer,
)
from ppo_jax.registry import Registry


def time_limit(env: Environment, steps: int) -> Environment:
    """Truncates an episode after `steps` steps, unless it ends earlier."""
    require_positive_integer("time_limit", steps)

    def reset(key: jax.Array, params: Any) -> tuple[Any, Any]:
        obs, state = env.reset(key, params)
        return obs, (state, jnp.zeros((), jnp.int32))

    def step(key: jax.Array, state: Any, action: jax.Array, params: Any) -> Step:
        inner, time = state
        result = env.step(key, inner, action, params)
        truncated = jnp.logical_or(result.truncated, time + 1 >= steps)
        return result._replace(state=(result.state, time + 1), truncated=truncated)

    def longest(params: Any) -> float | None:
        inner = env.longest_episode(params)
        return steps if inner is None else min(steps, inner)

    return env._replace(
        reset=reset,
        step=step,
        shortest_episode=min(steps, env.shortest_episode),
        longest_episode=longest,
    )


def sticky_actions(env: Environment, probability: float) -> Environment:
    """Repeats the previous action instead of the given one, with some probability.

    Machado et al. 2018 (arXiv:1709.06009), section 5.2. The first action of an episode is never
    replaced.
    """
    _require_number("the probability of sticky_actions", probability)
    if not 0 <= probability < 1:
        raise ConfigError(
            f"the probability of sticky_actions must be in [0, 1); got {probability}."
        )

    def reset(key: jax.Array, params: Any) -> tuple[Any, Any]:
        obs, state = env.reset(key, params)
        return obs, (state, _no_action(env), jnp.array(False))

    def step(key: jax.Array, state: Any, action: jax.Array, params: Any) -> Step:
        inner, previous, has_previous = state
        stick_key, step_key = jax.random.split(key)
        # There is no action to repeat in an episode's first step.
        sticks = jnp.logical_and(has_previous, jax.random.bernoulli(stick_key, probability))
        action = jnp.where(sticks, previous, action)
        result = env.step(step_key, inner, action, params)
        return result._replace(state=(result.state, action, jnp.array(True)))

    return env._replace(reset=reset, step=step)


def action_repeat(env: Environment, times: int) -> Environment:
    """Takes every action several times and adds up the rewards, until the episode ends."""
    require_positive_integer("action_repeat", times)

    def step(key: jax.Array, state: Any, action: jax.Array, params: Any) -> Step:
        # Unrolled: `times` is small, and a scan would need a state whose dtypes never change.
        first_key, *keys = jax.random.split(key, times)
        result = env.step(first_key, state, action, params)
        # Numbers, because two True of a metric are 2.
        result = result._replace(metrics=jax.tree.map(jnp.float32, result.metrics))
        for key_i in keys:
            done = jnp.logical_or(result.terminated, result.truncated)
            after = env.step(key_i, result.state, action, params)
            # Computed in every case, and dropped where the episode is over: under `vmap` a branch
            # would compute both sides.
            after = after._replace(
                reward=result.reward + after.reward,
                metrics=jax.tree.map(jnp.add, result.metrics, after.metrics),
            )
            result = jax.tree.map(
                lambda old, new, done=done: jnp.where(done, old, new), result, after
            )
        return result

    def longest(params: Any) -> float | None:
        inner = env.longest_episode(params)
        return None if inner is None else math.ceil(inner / times)

    shortest = math.ceil(env.shortest_episode / times)
    return env._replace(step=step, shortest_episode=shortest, longest_episode=longest)


def frame_stack(env: Environment, frames: int) -> Environment:
    """Concatenates the last observations along their last axis, oldest first.

    The first observation of an episode stands in for the missing earlier ones.
    """
    require_positive_integer("frame_stack", frames)
    space = env.observation_space
    if not (isinstance(space, Box) and space.shape):
        raise ConfigError(
            f"frame_stack needs observations that are arrays; {env.name} has {space}. "
            "Put flatten_observation before it."
        )
    width = space.shape[-1]

    def reset(key: jax.Array, params: Any) -> tuple[Any, Any]:
        obs, state = env.reset(key, params)
        # Along channels, so that images stay images for convolutions.
        stacked = jnp.concatenate([obs] * frames, axis=-1)
        return stacked, (state, stacked)

    def step(key: jax.Array, state: Any, action: jax.Array, params: Any) -> Step:
        inner, stacked = state
        result = env.step(key, inner, action, params)
        stacked = jnp.concatenate([stacked[..., width:], result.obs], axis=-1)
        return result._replace(obs=stacked, state=(result.state, stacked))

    stacked_space = Box((*space.shape[:-1], width * frames), space.dtype)
    return env._replace(reset=reset, step=step, observation_space=stacked_space)


def transform_observation(
    env: Environment, function: Callable[[Any], Any], space: spaces.Space
) -> Environment:
    """Applies `function` to every observation; `space` describes the results."""
    if env.num_agents > 1:
        function = jax.vmap(function)

    def reset(key: jax.Array, params: Any) -> tuple[Any, Any]:
        obs, state = env.reset(key, params)
        return function(obs), state

    def step(key: jax.Array, state: Any, action: jax.Array, params: Any) -> Step:
        result = env.step(key, state, action, params)
        return result._replace(obs=function(result.obs))

    return env._replace(reset=reset, step=step, observation_space=space)


def flatten_observation(env: Environment) -> Environment:
    """Flattens an observation to one float32 vector, integers one-hot."""
    leaves = spaces.leaves(env.observation_space)
    if isinstance(env.observation_space, Dict) and ACTION_MASK in env.observation_space.names:
        raise ConfigError(
            f"flatten_observation would hide {env.name}'s {ACTION_MASK} from the policy. "
            "Leave it out: networks flatten by themselves."
        )

    def flat(leaf: spaces.Leaf, x: jax.Array) -> jax.Array:
        if isinstance(leaf, Box):
            return x.astype(jnp.float32).reshape(-1)
        if isinstance(leaf, Discrete):
            return jax.nn.one_hot(x, leaf.num_values)
        parts = [jax.nn.one_hot(x[i], size) for i, size in enumerate(leaf.num_values)]
        return jnp.concatenate(parts)

    def function(obs: Any) -> jax.Array:
        return jnp.concatenate(list(map(flat, leaves, jax.tree.leaves(obs))))

    sizes = [
        int(np.prod(leaf.shape)) if isinstance(leaf, Box) else int(np.sum(leaf.num_values))
        for leaf in leaves
    ]
    return transform_observation(env, function, Box((sum(sizes),)))


def observe_only(env: Environment, entries: str | int) -> Environment:
    """Hides all entries of a vector except some; "0,2" is CartPole without velocities."""
    space = env.observation_space
    # A command line passes a single entry as a number, several as text.
    words = str(entries).split(",")
    indices = [int(word) if word.strip().isdigit() else -1 for word in words]
    if not (isinstance(space, Box) and len(space.shape) == 1):
        raise ConfigError(f"observe_only needs vectors; {env.name} has {space}.")
    if not all(0 <= index < space.shape[0] for index in indices):
        raise ConfigError(
            f"observe_only takes entries from 0 to {space.shape[0] - 1}; got {entries}."
        )
    kept = Box((len(indices),), space.dtype)
    return transform_observation(env, lambda obs: obs[np.array(indices)], kept)


def previous_action_reward(env: Environment) -> Environment:
    """Adds the previous action and reward: `{"obs", "previous_action", "previous_reward"}`.

    Both are zero at the start of an episode. For policies with a memory: Duan et al. 2016
    (arXiv:1611.02779), section 2.2.
    """
    action_space = env.action_space
    mask: dict[str, spaces.Space] = {}
    inner = env.observation_space
    if isinstance(inner, Dict) and ACTION_MASK in inner.names:  # a policy looks for it at the top
        entries = dict(inner.spaces)
        mask = {ACTION_MASK: entries.pop(ACTION_MASK)}
        inner = Dict.of(entries)

    def observed(obs: Any, action: jax.Array, reward: jax.Array) -> dict[str, Any]:
        seen = {name: obs[name] for name in mask}
        rest = {name: x for name, x in obs.items() if name not in mask} if mask else obs
        return {"obs": rest, "previous_action": action, "previous_reward": reward, **seen}

    def done_action(action: jax.Array) -> jax.Array:
        """Returns the action that the environment takes: a Gaussian's is clipped to the bounds."""
        action = action.astype(spaces.dtype_of(action_space))
        if not isinstance(action_space, Box) or action_space.low is None:
            return action
        low, high = (
            jnp.reshape(jnp.asarray(bound, action.dtype), action_space.shape)
            for bound in (action_space.low, action_space.high)
        )
        return jnp.clip(action, low, high)

    def reset(key: jax.Array, params: Any) -> tuple[Any, Any]:
        obs, state = env.reset(key, params)
        return observed(obs, _no_action(env), jnp.zeros(env.agent_axes)), state

    def step(key: jax.Array, state: Any, action: jax.Array, params: Any) -> Step:
        result = env.step(key, state, action, params)
        return result._replace(obs=observed(result.obs, done_action(action), result.reward))

    shown = {
        "obs": inner,
        "previous_action": action_space,
        "previous_reward": Box(()),
        **mask,
    }
    return env._replace(reset=reset, step=step, observation_space=Dict.of(shown))


def transform_reward(env: Environment, function: Callable[[jax.Array], jax.Array]) -> Environment:
    """Applies `function` to every reward; reported returns are sums of the results."""

    def step(key: jax.Array, state: Any, action: jax.Array, params: Any) -> Step:
        result = env.step(key, state, action, params)
        return result._replace(reward=function(result.reward))

    return env._replace(step=step)


def scale_reward(env: Environment, factor: float) -> Environment:
    """Multiplies rewards by a factor. `HParams.reward_scale` leaves reported returns unscaled."""
    _require_number("scale_reward", factor)
    return transform_reward(env, lambda reward: factor * reward)


def randomize_params(env: Environment, sample: Callable[[jax.Array, Any], Any]) -> Environment:
    """Draws the parameters of the environment for every episode: domain randomisation.

    Tobin et al. 2017 (arXiv:1703.06907). An episode keeps its parameters until it ends.

    Args:
      env: the environment.
      sample: `(key, params) -> params` of an episode, given those of the training. It is traced,
        and must not change how long episodes can be.
    """

    def reset(key: jax.Array, params: Any) -> tuple[Any, Any]:
        sample_key, key = jax.random.split(key)
        # In the dtypes of the given ones, so that the state has the same ones in every step.
        own = jax.tree.map(
            lambda x, y: jnp.asarray(x, jnp.result_type(y)), sample(sample_key, params), params
        )
        obs, state = env.reset(key, own)
        return obs, (state, own)

    def step(key: jax.Array, state: Any, action: jax.Array, params: Any) -> Step:
        del params
        inner, own = state
        result = env.step(key, inner, action, own)
        return result._replace(state=(result.state, own))

    return env._replace(reset=reset, step=step)


def _no_action(env: Environment) -> jax.Array:
    """Returns zeros in place of the previous action of an episode's first step."""
    space = env.action_space
    return jnp.zeros((*env.agent_axes, *spaces.shape_of(space)), spaces.dtype_of(space))


def _require_number(name: str, value: Any) -> None:
    """Raises a `ConfigError` unless an argument is a finite number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise ConfigError(f"{name} must be a number; got {value!r}.")


def _if_asked(wrapper: Callable[[Environment], Environment]) -> Callable[..., Environment]:
    def apply_or_not(env: Environment, wanted: bool) -> Environment:
        if not isinstance(wanted, bool):
            raise ConfigError(f"{wrapper.__name__} must be True or False; got {wanted!r}.")
        return wrapper(env) if wanted else env

    return apply_or_not


_OURS: dict[str, Callable[..., Environment]] = {
    "time_limit": time_limit,
    "sticky_actions": sticky_actions,
    "action_repeat": action_repeat,
    "frame_stack": frame_stack,
    "observe_only": observe_only,
    "scale_reward": scale_reward,
    "flatten_observation": _if_asked(flatten_observation),
    "previous_action_reward": _if_asked(previous_action_reward),
}
WRAPPERS = Registry("wrapper", _OURS)
"""Functions `(env, argument) -> env` by name. The argument of `flatten_observation` and
`previous_action_reward` is a bool; with False they return `env` unchanged."""


def register(name: str, wrapper: Callable[..., Environment], *, overwrite: bool = False) -> None:
    """Makes `wrapper(env, argument) -> env` available in `Config.wrappers` under `name`.

    Args:
      name: a name that is not taken.
      wrapper: returns the changed environment.
      overwrite: replace a wrapper that was registered under this name.

    Raises:
      ConfigError: the name is taken.
    """
    WRAPPERS.register(name, wrapper, overwrite=overwrite)


def apply(env: Environment, wrappers: Iterable[tuple[str, Value]]) -> Environment:
    """Returns `env` in the named wrappers, the first of them innermost.

    Raises:
      ConfigError: unknown wrapper, or an argument or an environment that it cannot take.
    """
    for name, argument in wrappers:
        require_known("wrapper", name, WRAPPERS)
        env = WRAPPERS[name](env, argument)
        if not isinstance(env, Environment):
            raise ConfigError(
                f"a wrapper must return an Environment; {name} returns {type(env).__name__}. "
                "Return env._replace(…)."
            )
    return env
