"""Environments whose answer is known, each failing for one reason only."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from ppo_jax import envs
from ppo_jax.envs.environment import Environment, Step
from ppo_jax.envs.spaces import Box, Discrete, Space


@struct.dataclass
class ProbeParams:
    bonus: float = 0.0  # added to every reward


class ProbeState(NamedTuple):
    time: jax.Array
    sign: jax.Array  # drawn at the episode's start: -1 or 1


def probe(
    *,
    observe: Callable[[ProbeState], jax.Array],
    reward: Callable[[ProbeState, jax.Array], jax.Array],
    terminal_time: int | None = None,
    time_limit: int | None = None,
    action_space: Space = Discrete(2),
) -> Callable[[], Environment]:
    """An environment that ends, or is cut, after a number of steps."""

    def reset(key, params):
        state = ProbeState(jnp.zeros((), jnp.int32), jax.random.rademacher(key, (), jnp.float32))
        return observe(state), state

    def step(key, state, action, params):
        successor = state._replace(time=state.time + 1)
        terminated = jnp.array(False) if terminal_time is None else successor.time >= terminal_time
        truncated = jnp.array(False) if time_limit is None else successor.time >= time_limit
        value = jnp.float32(reward(state, action) + params.bonus)
        return Step(observe(successor), successor, value, terminated, truncated)

    def make():
        shape = jax.eval_shape(observe, ProbeState(jnp.int32(0), jnp.float32(0))).shape
        return Environment("probe", reset, step, ProbeParams(), Box(shape), action_space)

    return make


def _constant(state):
    return jnp.ones(1)


def _sign(state):
    return state.sign[None]


def _time(state):
    return jnp.float32(state.time)[None]


def _begun(state):
    return jnp.float32(state.time > 0)[None]


PROBES = {
    "constant-value": probe(observe=_constant, reward=lambda s, a: 1.0, terminal_time=1),
    "value-of-observation": probe(observe=_sign, reward=lambda s, a: s.sign, terminal_time=1),
    "discounting": probe(observe=_time, reward=lambda s, a: s.time == 1, terminal_time=2),
    "choose": probe(observe=_constant, reward=lambda s, a: 2.0 * a - 1.0, terminal_time=1),
    "choose-by-observation": probe(
        observe=_sign, reward=lambda s, a: s.sign * (2.0 * a - 1.0), terminal_time=1
    ),
    "choose-continuous": probe(
        observe=_constant,
        reward=lambda s, a: -jnp.square(a[0] - 0.5),
        terminal_time=1,
        action_space=Box((1,)),
    ),
    # State A once (reward 0), then state B for ever (reward 1), cut by a time limit. A trainer
    # that takes the limit for a death, or looks at the observation after the reset, gets less.
    "time-limit": probe(observe=_begun, reward=lambda s, a: s.time > 0, time_limit=4),
}


def probe_name(name: str) -> str:
    """Registers a probe if it is not registered yet; returns its name for `Config.env`."""
    full = f"probe:{name}"
    if full not in envs.names():
        envs.register(full, PROBES[name])
    return full
