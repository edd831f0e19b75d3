"""Adapter for the games of JaxMARL, whose agents share a policy. No other module imports it."""

import contextlib
import io
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.envs.environment import Environment, Step
from ppo_jax.envs.spaces import ACTION_MASK, Box, Dict, Discrete, Leaf
from ppo_jax.errors import ConfigError


class State(NamedTuple):
    """State of one game."""

    inner: Any
    time: jax.Array  # int32 [], steps since the reset


def make(task: str, **kwargs: Any) -> Environment:
    """Builds a game that one policy plays for all agents; `kwargs` go to `jaxmarl.make`.

    An agent sees its own observation, zero-padded to the largest shape, and its index. Agents with
    fewer actions than others have an action mask. JaxMARL does not distinguish time limits from
    other ends. Here every end at the game's limit of steps counts as a truncation, even if the
    rules of the game ended it.
    """
    # jaxmarl prints at import which of its optional parts are missing.
    with contextlib.redirect_stdout(io.StringIO()):
        import jaxmarl

    inner = jaxmarl.make(task, **kwargs)
    agents = list(inner.agents)
    key = jax.eval_shape(lambda: jax.random.key(0))
    start, inner_state = jax.eval_shape(inner.reset, key)
    shapes = [start[agent].shape for agent in agents]
    if len(set(map(len, shapes))) > 1 or (len(shapes[0]) > 1 and len(set(shapes)) > 1):
        raise ConfigError(
            f"agents must all see vectors, or images of one shape; those of {task} see {shapes}. "
            "Choose another game."
        )
    shape = tuple(int(max(sizes)) for sizes in zip(*shapes, strict=True))
    # Hanabi has no limit: it ends by its rules.
    limit = getattr(inner, "max_steps", None)
    if task == "coin_game":
        limit = inner.num_inner_steps * inner.num_outer_steps
    actions, counts = _actions(task, [inner.action_space(agent) for agent in agents])
    allows = None
    if isinstance(actions, Discrete):
        with contextlib.suppress(NotImplementedError):
            jax.eval_shape(inner.get_avail_actions, inner_state)
            allows = inner.get_avail_actions
    has_mask = isinstance(actions, Discrete) and (allows is not None or len(set(counts)) > 1)

    def observed(obs: Mapping[str, jax.Array], state: Any) -> Any:
        seen = jnp.stack([_padded(jnp.asarray(obs[agent], jnp.float32), shape) for agent in agents])
        result = {"observation": seen, "agent": jnp.arange(len(agents), dtype=jnp.int32)}
        if has_mask:
            mask = jnp.arange(max(counts)) < jnp.array(counts)[:, None]
            if allows is not None:
                given = allows(state)
                mask &= jnp.stack([jnp.asarray(given[agent], bool) for agent in agents])
            result[ACTION_MASK] = mask
        # A single agent has no axis of agents.
        return result if len(agents) > 1 else jax.tree.map(lambda x: x[0], result)

    def reset(key: jax.Array, params: tuple[()]) -> tuple[Any, State]:
        del params
        obs, state = inner.reset(key)
        return observed(obs, state), State(state, jnp.zeros((), jnp.int32))

    def step(key: jax.Array, state: State, action: jax.Array, params: tuple[()]) -> Step:
        del params
        action = action.reshape(len(agents), *action.shape[(len(agents) > 1) :])
        if isinstance(actions, Box):
            action = jnp.clip(action, actions.low[0], actions.high[0])  # type: ignore[index]
        each = {
            agent: action[i] if isinstance(actions, Discrete) else action[i, : counts[i]]
            for i, agent in enumerate(agents)
        }
        # `step_env` does not reset, unlike `step`.
        obs, after, reward, done, _ = inner.step_env(key, state.inner, each)
        time = state.time + 1
        # Some games count the step that ends them, and others do not.
        is_limit = time >= (math.inf if limit is None else limit)
        rewards = jnp.stack([jnp.asarray(reward[agent], jnp.float32) for agent in agents])
        return Step(
            obs=observed(obs, after),
            state=State(after, time),
            reward=rewards if len(agents) > 1 else rewards[0],
            terminated=done["__all__"] & ~is_limit,
            truncated=done["__all__"] & is_limit,
        )

    entries: dict[str, Any] = {"observation": Box(shape), "agent": Discrete(len(agents))}
    if has_mask:
        entries[ACTION_MASK] = Box((max(counts),), "bool")
    return Environment(
        name=task,
        reset=reset,
        step=step,
        params=(),
        observation_space=Dict.of(entries),
        action_space=actions,
        longest_episode=lambda params: None if limit is None else limit + 1,
        num_agents=len(agents),
    )


def _actions(task: str, each: list[Any]) -> tuple[Leaf, list[int]]:
    """Returns the space of all agents' actions, and the number of actions or entries of each."""
    if all(hasattr(space, "n") for space in each):
        counts = [int(space.n) for space in each]
        return Discrete(max(counts)), counts
    if all(len(getattr(space, "shape", ())) == 1 for space in each):
        low, high = ({float(np.min(getattr(s, name))) for s in each} for name in ("low", "high"))
        counts = [int(space.shape[0]) for space in each]
        if len(low) == len(high) == 1:
            size = max(counts)
            return Box((size,), low=(*low,) * size, high=(*high,) * size), counts
    raise ConfigError(
        f"actions of all agents must be integers, or vectors with the same bounds; those of {task} "
        f"are {each}. Choose another game."
    )


def _padded(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.pad(x, [(0, size - own) for size, own in zip(shape, x.shape, strict=True)])
