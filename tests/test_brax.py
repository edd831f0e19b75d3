"""brax's interface under our protocol: a small suite of our own, and brax itself."""

import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import Config, ConfigError, HParams, envs, evaluate, make_trainer, presets
from ppo_jax.envs.spaces import Box, Dict
from ppo_jax.envs.suites import SUITES
from ppo_jax.envs.suites.brax import Params, adapt
from tests.conftest import optimized_jit


class WalkState(NamedTuple):
    place: jax.Array
    obs: dict
    reward: jax.Array
    done: jax.Array


class Walk:
    """Starts in [0, 1), walks by the first action, is paid its place; dies below zero, or never."""

    mortal = True

    action_size = 2

    def reset(self, key):
        return self._state(jax.random.uniform(key))

    def step(self, state, action):
        return self._state(state.place + action[0])

    def _state(self, place):
        obs = {"state": jnp.stack([place, 1.0]), "sign": jnp.sign(place)[None]}
        done = (place < 0).astype(jnp.float32) if self.mortal else 0.0  # as brax has it
        return WalkState(place, obs, place, done)


class Immortal(Walk):
    mortal = False


def walk(actions, limit, task=Walk):
    """Observations, rewards and ends of a walk from a known place."""
    env = adapt("walk", task())
    params = Params(max_steps_in_episode=limit)
    _, state = env.reset(jax.random.key(0), params)
    state = state._replace(inner=task()._state(jnp.array(0.5)))

    def act(state, action):
        step = env.step(jax.random.key(1), state, action, params)
        return step.state, step

    return jax.lax.scan(act, state, actions)[1]


def test_spaces():
    env = adapt("walk", Walk())
    assert env.observation_space == Dict.of({"state": Box((2,)), "sign": Box((1,))})
    assert env.action_space == Box((2,), low=(-1.0, -1.0), high=(1.0, 1.0))


def test_a_death_is_no_time_limit_and_the_true_successor_is_shown():
    steps = jnp.array([[0.25, 0.0], [0.25, 0.0], [-3.0, 0.0], [0.0, 0.0]])  # −3 is clipped to −1
    result = jax.vmap(walk, in_axes=(None, 0))(steps, jnp.array([2, 9]))
    np.testing.assert_allclose(result.reward, [[0.75, 1.0, 0.0, 0.0]] * 2)
    np.testing.assert_allclose(result.obs["state"][0], [[0.75, 1], [1, 1], [0, 1], [0, 1]])
    assert not result.terminated.any()
    np.testing.assert_array_equal(result.truncated, [[False, True, True, True], [False] * 4])
    died = walk(jnp.array([[-0.25, 0.0], [-1.0, 0.0]]), 9)
    np.testing.assert_array_equal(died.terminated, [False, True])
    np.testing.assert_allclose(died.obs["state"][:, 0], [0.25, -0.75])


def test_a_task_may_know_no_death():
    assert not walk(jnp.array([[-1.0, 0.0], [-1.0, 0.0]]), 9, Immortal).terminated.any()


def test_what_is_no_environment_is_said_so():
    if "nothing" not in envs.names():
        envs.register("nothing", dict)
    with pytest.raises(ConfigError, match="must return an Environment, .* got dict"):
        envs.make("nothing")


def test_a_task_that_cannot_be_stepped_is_said_so():
    class Broken(Walk):
        def step(self, state, action):
            return jnp.clip(action, a_minimum=state.place)

    env = adapt("broken", Broken())
    _, state = env.reset(jax.random.key(0), env.params)
    with pytest.raises(ConfigError, match="one that can be stepped with jax .*: .*a_minimum"):
        env.step(jax.random.key(0), state, jnp.zeros(2), env.params)


def test_an_object_with_braxs_interface_can_be_registered_and_learned():
    if "walk" not in envs.names():
        envs.register("walk", Walk)
    config = Config(env="walk", num_envs=16, num_steps=16, total_timesteps=40_000)
    trainer = make_trainer(config.replace(env_params={"max_steps_in_episode": 16}))
    state, _ = jax.jit(trainer.run)(jax.random.key(0), HParams(learning_rate=3e-3))
    result = evaluate(trainer.policy(state), trainer.env, state.env_params, jax.random.key(1), 32)
    # Walking straight on from 0.5 is worth 16 · 0.5 + 1 + 2 + … + 16.
    assert result.returns.mean() > 0.9 * (8 + 136)
    np.testing.assert_array_equal(result.lengths, 16)


def test_the_list_of_names_is_braxs():
    from brax.envs import _envs

    assert set(SUITES["brax"].tasks) == set(_envs)


def test_a_missing_package_is_said_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "brax", None)
    with pytest.raises(ConfigError, match=r"needs brax.*pip install 'ppo-jax\[brax\]'"):
        envs.make("brax:hopper")


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("CartPole-v1", {"gravity": 1}),
        ("brax:inverted_pendulum", {"frames": 1}),
        ("brax:inverted_pendulum", {"backend": "spings"}),
    ],
)
def test_arguments_that_a_task_does_not_take(name, kwargs):
    with pytest.raises(ConfigError, match=f"env_kwargs must be .* {name} takes; got"):
        envs.make(name, **kwargs)


@pytest.mark.usefixtures("braxs_broadcasting")
def test_steps_are_those_of_brax():
    from brax.envs import get_environment

    theirs = get_environment("inverted_pendulum", backend="spring")
    ours = envs.make("brax:inverted_pendulum", backend="spring")
    key = jax.random.key(0)

    @jax.jit
    def push(actions):
        def act(states, action):
            state, step = states
            state = theirs.step(state, action)
            step = ours.step(key, step.state, action, ours.params)
            return (state, step), (state.obs, state.reward, state.done, step)

        first = theirs.reset(key)
        obs, state = ours.reset(key, ours.params)
        zero, no = jnp.zeros(()), jnp.array(False)
        start = first, envs.environment.Step(obs, state, zero, no, no)
        return jax.lax.scan(act, start, actions)[1]

    obs, reward, done, step = push(jnp.full((40, 1), 0.3))
    np.testing.assert_allclose(step.obs, obs, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(step.reward, reward)
    np.testing.assert_array_equal(step.terminated, done > 0)
    assert done[-1] == 1.0
    assert done[0] == 0.0


@pytest.mark.slow
@pytest.mark.usefixtures("braxs_broadcasting")
def test_published_settings_balance_braxs_pole():
    config, hparams = presets.preset("brax:inverted_pendulum")
    trainer = make_trainer(config)
    state, _ = optimized_jit(trainer.run)(jax.random.key(0), hparams)
    policy = trainer.policy(state)
    play = optimized_jit(lambda key: evaluate(policy, trainer.env, state.env_params, key, 64))
    assert play(jax.random.key(1)).returns.mean() > 950.0  # 25 at the start, 1,000 at most


@pytest.mark.slow
@pytest.mark.usefixtures("braxs_broadcasting")
def test_ppo_balances_braxs_pole():
    config = Config(
        env="brax:inverted_pendulum",
        env_kwargs={"backend": "spring"},
        num_envs=64,
        num_steps=64,
        num_epochs=10,
        num_minibatches=16,
        # With half of the steps, one policy of twelve still lets the cart drift, and loses the pole
        # after 800 to 950 steps.
        total_timesteps=3_600_000,
    )
    trainer = make_trainer(config)
    # A cart that drifts loses the pole after hundreds of steps: credit must reach as far.
    hparams = HParams(learning_rate=5e-4, ent_coef=0.0, gamma=0.995, gae_lambda=0.98)

    def score(key):
        state, _ = trainer.run(key, hparams)
        policy = trainer.policy(state)
        return evaluate(policy, trainer.env, state.env_params, key, 16).returns.mean()

    scores = optimized_jit(jax.vmap(score))(jax.random.split(jax.random.key(0), 4))
    assert scores.min() > 950.0, scores  # 18 at the start, 1,000 at most
