"""`check_env` names every fault, and finds none in environments that are sound."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from ppo_jax import ConfigError, envs, make_trainer
from ppo_jax.config import Config
from ppo_jax.envs.environment import Environment, Step
from ppo_jax.envs.spaces import Box, Dict, Discrete
from ppo_jax.envs.suites import GYMNAX_NAMES, SUITES
from ppo_jax.testing import check_env

pytestmark = pytest.mark.xdist_group("check_env")

LIMIT = 6
calls = []


@struct.dataclass
class Params:
    max_steps_in_episode: int = LIMIT


@struct.dataclass
class State:
    time: jax.Array
    x: jax.Array


def reset(key, params):
    x = jax.random.uniform(key, (), minval=-0.5, maxval=0.5)
    return x[None], State(jnp.int32(0), x)


def step(key, state, action, params):
    del key
    x = jnp.clip(state.x + 0.1 * jnp.clip(action, -1.0, 1.0)[0], -1.0, 1.0)
    state = State(state.time + 1, x)
    truncated = state.time >= params.max_steps_in_episode
    return Step(x[None], state, -jnp.square(x), jnp.abs(x) >= 1.0, truncated)


def sound():
    space = Box((1,), low=(-1.0,), high=(1.0,))
    return Environment("mine", reset, step, Params(), space, space)


def with_step(change, **fields):
    """The sound environment with a step that `change(step, arguments)` changes."""

    def changed(key, state, action, params):
        return change(step(key, state, action, params), (key, state, action, params))

    return sound()._replace(step=changed, **fields)


def auto_reset(after, arguments):
    obs, state = reset(arguments[0], arguments[3])
    done = after.terminated | after.truncated
    obs, state = jax.tree.map(
        lambda x, y: jnp.where(done, x, y), (obs, state), (after.obs, after.state)
    )
    return after._replace(obs=obs, state=state)


def counting(after, _):
    calls.append(0)
    return after._replace(reward=after.reward + len(calls))


def constant_start(key, params):
    del key, params
    return jnp.zeros(1), State(jnp.int32(0), jnp.float32(0))


def always_reset_alike(after, arguments):
    obs, state = constant_start(*arguments[::3])
    done = after.terminated | after.truncated
    # Without a count of steps that tells it.
    state = State(after.state.time % LIMIT, jnp.where(done, state.x, after.state.x))
    return after._replace(obs=jnp.where(done, obs, after.obs), state=state)


def unclipped(key, state, action, params):
    after = step(key, state, action, params)
    return after._replace(reward=after.reward - jnp.square(action[0]))


def masked(allowed):
    spaces = Dict.of({"x": Box((1,)), "action_mask": Box((2,), "bool")})

    def observe(obs):
        return {"x": obs, "action_mask": jnp.full(2, allowed)}

    def masked_reset(key, params):
        obs, state = reset(key, params)
        return observe(obs), state

    def masked_step(key, state, action, params):
        after = step(key, state, jnp.float32(action)[None], params)
        return after._replace(obs=observe(after.obs))

    env = sound()._replace(reset=masked_reset, step=masked_step)
    return env._replace(observation_space=spaces, action_space=Discrete(2))


def drifting(*, resets, is_noisy=False):
    """Random starts, and a state in which nothing counts steps."""

    def start(key, params):
        x = jax.random.uniform(key, (1,), minval=-0.5, maxval=0.5)
        return x, x

    def move(key, x, action, params):
        noise = 0.1 * jax.random.normal(key, (1,)) if is_noisy else 0.0
        x = jnp.clip(x + 0.3 * action + 0.05 + noise, -2.0, 2.0)
        terminated = jnp.abs(x[0]) > 1.0
        if resets:
            x = jnp.where(terminated, start(key, params)[0], x)
        return Step(x, x, jnp.ones(()), terminated, jnp.array(False))

    box = Box((1,), low=(-2.0,), high=(2.0,))
    actions = Discrete(2)
    return Environment("mine", start, move, (), box, actions)


FAULTS = {
    "random reset": (drifting(resets=True), "must return the true successor and not reset; at the"),
    "values": (
        with_step(lambda after, _: after._replace(obs=after.obs * 3.0)),
        r"observations must be in their space; mine returns values from -\d.* and the space is Box",
    ),
    "nan": (
        with_step(lambda after, _: after._replace(reward=jnp.log(after.obs[0]))),
        r"the reward must be finite; that of mine is not at step \d of environment \d",
    ),
    "python if": (
        with_step(lambda after, _: after if after.reward > 0 else after._replace(reward=0.0)),
        "step must be a function that JAX can trace; that of mine needs the value of an array",
    ),
    "numpy": (
        with_step(lambda after, _: after._replace(reward=np.exp(after.reward))),
        "step must be a function that JAX can trace; that of mine",
    ),
    "randomness": (
        with_step(lambda after, _: after._replace(reward=after.reward + random.random())),
        "equal keys, states and actions must give equal results; mine gives different",
    ),
    "hidden state": (with_step(counting), "keep everything that changes in the state"),
    "dtype": (
        with_step(lambda after, _: after._replace(terminated=jnp.float32(after.terminated))),
        "terminated must be bool; that of mine is float32",
    ),
    "time limit": (
        with_step(
            lambda after, _: after._replace(
                terminated=after.terminated | after.truncated, truncated=jnp.array(False)
            )
        ),
        r"must be truncated, not terminated, .*; all \d+ episodes of mine that reach 6 steps",
    ),
    "time limit twice": (
        with_step(lambda after, _: after._replace(terminated=after.terminated | after.truncated)),
        r"must be truncated, not terminated, .*; all \d+ episodes of mine that reach 6 steps",
    ),
    "too short": (
        sound()._replace(shortest_episode=20),
        "at least shortest_episode steps, .*; mine says 20, and one ended after 6",
    ),
    "too long": (
        sound()._replace(longest_episode=lambda params: 3),
        "must end within longest_episode steps; mine says 3, and one went on after 5",
    ),
    "reset": (with_step(auto_reset), "must return the true successor and not reset; at the ends"),
    "constant reset": (
        with_step(always_reset_alike, reset=constant_start),
        "must return the true successor and not reset; at the ends",
    ),
    "unclipped": (
        sound()._replace(step=unclipped),
        r"must clip continuous actions .*; mine treats \[-10.0\] differently than \[-1.0\]",
    ),
    "mask": (masked(False), "an action mask must allow some action; mine has one that allows none"),
    "shapes": (
        sound()._replace(observation_space=Box((2,))),
        r"observations must be as observation_space describes them; reset of mine",
    ),
}


def bounded_above():
    """Actions that have one bound: there is nothing to clip to below."""

    def step_above(key, state, action, params):
        return step(key, state, jnp.minimum(action, 1.0) * 0.1, params)

    space = Box((1,), low=(-np.inf,), high=(1.0,))
    return sound()._replace(step=step_above, action_space=space)


@struct.dataclass
class KeyedState(State):
    key: jax.Array = None


def keyed(key_of):
    """The sound environment with a random key in its state, `key_of(key, previous)`."""

    def keyed_reset(key, params):
        obs, state = reset(key, params)
        return obs, KeyedState(state.time, state.x, key_of(key, key))

    def keyed_step(key, state, action, params):
        after = step(key, State(state.time, state.x), action, params)
        state = KeyedState(after.state.time, after.state.x, key_of(key, state.key))
        return after._replace(state=state)

    return sound()._replace(reset=keyed_reset, step=keyed_step)


def unseeded_key(key, previous):
    del key, previous
    return jax.random.key(random.randrange(2**30))


FAULTS["unseeded key"] = (
    keyed(unseeded_key),
    "equal keys, states and actions must give equal results; mine gives different",
)


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_fault_has_its_sentence(name):
    env, message = FAULTS[name]
    with pytest.raises(ConfigError, match=message) as error:
        check_env(env, num_steps=32)
    # And no other fault is seen.
    assert len(str(error.value).splitlines()) == 1, str(error.value)


@pytest.mark.parametrize(
    "env",
    [sound(), masked(True), bounded_above(), keyed(lambda key, previous: previous)],
    ids=["continuous", "masked", "bounded above", "keyed"],
)
def test_a_sound_environment_has_no_fault(env):
    check_env(env)
    check_env(env, Params(max_steps_in_episode=3), num_steps=32)


def test_every_fault_is_named_at_once():
    env = with_step(lambda after, _: after._replace(obs=after.obs * jnp.nan), shortest_episode=20)
    with pytest.raises(ConfigError) as error:
        check_env(env, num_steps=32)
    assert "the observation must be finite" in str(error.value)
    assert "at least shortest_episode steps" in str(error.value)


@pytest.mark.parametrize(
    "name", ["CartPole-v1", "Pendulum-v1", "Breakout-MinAtar", "CartPole-v1-positions"]
)
def test_our_environments_have_no_fault(name):
    check_env(name, num_steps=64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *(name for name in (*GYMNAX_NAMES, *envs.VARIANTS) if "MNIST" not in name),
        *(f"brax:{task}" for task in SUITES["brax"].tasks if task != "swimmer"),
    ],
)
def test_no_environment_of_gymnax_and_brax_has_a_fault(name):
    check_env(name, num_envs=4, num_steps=256)


def test_a_trainer_checks_what_costs_nothing():
    env, message = FAULTS["python if"]
    envs.register("python-if", lambda: env)
    with pytest.raises(ConfigError, match=message):
        make_trainer(Config(env="python-if"))


@pytest.mark.parametrize("is_noisy", [False, True])
def test_a_step_that_does_not_reset_has_no_fault(is_noisy):
    check_env(drifting(resets=False, is_noisy=is_noisy))
