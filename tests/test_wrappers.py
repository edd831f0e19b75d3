"""Each wrapper by itself around an environment that counts, and several together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import Config, ConfigError, envs, make_trainer
from ppo_jax.envs import wrappers
from ppo_jax.envs.environment import Environment, Step
from ppo_jax.envs.spaces import Box, Dict, Discrete, MultiDiscrete
from ppo_jax.testing import check_env
from tests.random_env import random_env


def counter(ends=10):
    """Observes the time and the last action; the reward is the action; ends after a while."""

    def reset(key, params):
        del key, params
        return jnp.zeros(2), jnp.zeros((), jnp.int32)

    def step(key, state, action, params):
        del key, params
        obs = jnp.stack([state + 1.0, jnp.float32(action)])
        return Step(obs, state + 1, jnp.float32(action), state + 1 >= ends, jnp.array(False))

    return Environment("counter", reset, step, (), Box((2,)), Discrete(5))


def play(env, actions, seed=0):
    """The reset's observation, and the steps that the actions lead to."""
    key = jax.random.key(seed)
    obs, state = env.reset(key, ())
    step = jax.jit(env.step)
    steps = []
    for i, action in enumerate(actions):
        result = step(jax.random.fold_in(key, i), state, jnp.int32(action), ())
        state = result.state
        steps.append(result)
    return obs, steps


def test_time_limit_truncates_and_does_not_terminate():
    _, steps = play(wrappers.time_limit(counter(ends=5), 3), [0] * 5)
    assert [bool(step.truncated) for step in steps] == [False, False, True, True, True]
    assert [bool(step.terminated) for step in steps] == [False] * 4 + [True]


def test_sticky_actions_repeat_as_often_as_they_should():
    env = wrappers.sticky_actions(counter(ends=10**6), 0.25)
    actions = jnp.arange(20_000, dtype=jnp.int32) % 5  # never the same twice in a row
    _, state = env.reset(jax.random.key(0), ())

    def step(state, inputs):
        key, action = inputs
        result = env.step(key, state, action, ())
        return result.state, result.reward

    keys = jax.random.split(jax.random.key(1), len(actions))
    _, done = jax.lax.scan(step, state, (keys, actions))
    stuck = np.asarray(done != actions)
    assert not stuck[0]
    # What is repeated is what was done, so two sticks in a row take the action before both.
    np.testing.assert_array_equal(np.asarray(done)[1:][stuck[1:]], np.asarray(done)[:-1][stuck[1:]])
    assert abs(stuck.mean() - 0.25) < 0.015


def test_action_repeat_adds_rewards_and_stops_at_the_end():
    _, steps = play(wrappers.action_repeat(counter(ends=5), 3), [2, 3])
    first, last = steps
    assert first.reward == 6
    np.testing.assert_array_equal(first.obs, [3, 2])
    assert not first.terminated
    assert last.reward == 6  # two steps, then the end
    np.testing.assert_array_equal(last.obs, [5, 3])
    assert last.terminated


def test_wrappers_that_shorten_episodes_say_so():
    env = counter()._replace(shortest_episode=7)
    assert wrappers.time_limit(env, 9).shortest_episode == 7
    assert wrappers.time_limit(env, 3).shortest_episode == 3
    assert wrappers.action_repeat(env, 2).shortest_episode == 4
    assert wrappers.frame_stack(env, 2).shortest_episode == 7


def test_frame_stack_keeps_the_last_frames_in_order():
    env = wrappers.frame_stack(counter(), 3)
    assert env.observation_space == Box((6,))
    obs, steps = play(env, [1, 2, 3, 4])
    np.testing.assert_array_equal(obs, np.zeros(6))
    np.testing.assert_array_equal(steps[1].obs, [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(steps[3].obs, [2, 2, 3, 3, 4, 4])


def test_flatten_observation_joins_all_entries():
    space = Dict.of(
        {"a": Box((2, 2), "uint8"), "b": Discrete(3), "c": MultiDiscrete((2, 3)), "d": Box(())}
    )
    inner = random_env(space, Discrete(2))
    env = wrappers.flatten_observation(inner)
    assert env.observation_space == Box((4 + 3 + 5 + 1,))
    key = jax.random.key(3)
    raw, flat = inner.reset(key, ())[0], env.reset(key, ())[0]
    np.testing.assert_array_equal(flat[:4], raw["a"].ravel())
    np.testing.assert_array_equal(flat[4:7], np.eye(3)[raw["b"]])
    np.testing.assert_array_equal(flat[7:9], np.eye(2)[raw["c"][0]])
    np.testing.assert_array_equal(flat[9:12], np.eye(3)[raw["c"][1]])
    assert flat[12] == raw["d"]


def test_observe_only_hides_the_rest():
    env = wrappers.observe_only(counter(), "1")
    assert env.observation_space == Box((1,))
    _, steps = play(env, [4])
    np.testing.assert_array_equal(steps[0].obs, [4])


def test_previous_action_reward_shows_both():
    env = wrappers.previous_action_reward(wrappers.scale_reward(counter(), 0.5))
    obs, steps = play(env, [4, 1])
    assert obs["previous_action"] == 0
    assert obs["previous_reward"] == 0
    assert steps[0].obs["previous_action"] == 4
    assert steps[0].obs["previous_reward"] == 2
    np.testing.assert_array_equal(steps[1].obs["obs"], [2, 1])
    assert env.observation_space.names == ("obs", "previous_action", "previous_reward")


def test_an_action_mask_stays_where_the_policy_looks_for_it():
    space = Dict.of({"seen": Box((2,)), "action_mask": Box((3,), "bool")})
    inner = random_env(space, Discrete(3))
    env = wrappers.previous_action_reward(inner)
    assert env.observation_space.names == (
        "action_mask",
        "obs",
        "previous_action",
        "previous_reward",
    )
    obs, _ = env.reset(jax.random.key(0), ())
    np.testing.assert_array_equal(
        obs["action_mask"], inner.reset(jax.random.key(0), ())[0]["action_mask"]
    )
    assert set(obs["obs"]) == {"seen"}
    with pytest.raises(ConfigError, match="would hide noise's action_mask"):
        wrappers.flatten_observation(inner)


def test_a_previous_action_is_the_one_that_was_done():
    inner = random_env(Box((1,)), Box((2,), low=(-1.0, 0.0), high=(1.0, 0.5)))
    env = wrappers.previous_action_reward(inner)
    _, state = env.reset(jax.random.key(0), ())
    step = env.step(jax.random.key(1), state, jnp.array([3.0, 0.2]), ())
    np.testing.assert_allclose(step.obs["previous_action"], [1.0, 0.2])


def test_transforms_of_rewards_and_observations():
    env = wrappers.transform_reward(counter(), jnp.sign)
    assert play(env, [3])[1][0].reward == 1
    env = wrappers.transform_observation(counter(), jnp.sum, Box(()))
    assert play(env, [3])[1][0].obs == 4


def test_wrappers_compose_from_the_inside_out():
    inner = wrappers.apply(counter(), [("action_repeat", 2), ("time_limit", 2)])
    outer = wrappers.apply(counter(), [("time_limit", 2), ("action_repeat", 2)])
    assert [bool(step.truncated) for step in play(inner, [0, 0])[1]] == [False, True]
    assert [bool(step.truncated) for step in play(outer, [0])[1]] == [True]


def test_a_config_keeps_the_order_of_its_wrappers():
    config = Config(wrappers={"time_limit": 2, "action_repeat": 2})
    assert config.wrappers == (("time_limit", 2), ("action_repeat", 2))


@pytest.mark.parametrize("name", wrappers.WRAPPERS)
def test_every_wrapper_trains(name):
    argument = {
        "sticky_actions": 0.25,
        "observe_only": "0,2",
        "scale_reward": 0.1,
        "flatten_observation": True,
        "previous_action_reward": True,
    }.get(name, 2)
    config = Config(
        num_envs=2, num_steps=8, hidden_sizes=(4,), total_timesteps=32, wrappers={name: argument}
    )
    trainer = make_trainer(config)
    state, metrics = jax.jit(trainer.run)(jax.random.key(0))
    assert np.isfinite(metrics["train/value_loss"]).all()
    for leaf, space in zip(
        jax.tree.leaves(state.rollout.obs),
        jax.tree.leaves(trainer.env.reset(jax.random.key(0), trainer.env.params)[0]),
        strict=True,
    ):
        assert leaf.dtype == space.dtype


def test_every_episode_has_its_own_parameters():
    plain = envs.make("CartPole-v1")

    def sample(key, params):
        return params.replace(gravity=params.gravity * jax.random.uniform(key, minval=0.5))

    env = wrappers.randomize_params(plain, sample)
    check_env(env, num_steps=64)
    keys = jax.random.split(jax.random.key(0), 64)
    obs, state = jax.vmap(env.reset, in_axes=(0, None))(keys, env.params)
    inner, own = state
    assert len(np.unique(own.gravity)) > 60
    assert (own.gravity >= 0.5 * plain.params.gravity).all()
    assert (own.gravity <= plain.params.gravity).all()
    action = jnp.ones(64, jnp.int32)
    step = jax.vmap(env.step, in_axes=(0, 0, 0, None))(keys, state, action, env.params)
    # Each is the environment with these parameters, which do not change within an episode.
    expected = jax.vmap(plain.step)(keys, inner, action, own)
    np.testing.assert_array_equal(step.obs, expected.obs)
    np.testing.assert_array_equal(step.state[1].gravity, own.gravity)
    assert len(np.unique(step.obs[:, 3] - obs[:, 3])) > 30


def test_a_training_draws_parameters_around_those_that_it_is_given():
    def sample(key, params):
        return params.replace(gravity=params.gravity + jax.random.uniform(key))

    name = "CartPole-random"
    plain = envs.make("CartPole-v1")
    envs.register(name, lambda: wrappers.randomize_params(plain, sample), overwrite=True)
    config = Config(env=name, num_envs=8, num_steps=16, hidden_sizes=(4,), total_timesteps=256)
    trainer = make_trainer(config)
    params = trainer.env.params.replace(gravity=jnp.array([5.0, 20.0]))
    axes = jax.tree.map(lambda _: None, params).replace(gravity=0)
    run = jax.vmap(trainer.run, in_axes=(None, None, axes))
    states, _ = jax.jit(run)(jax.random.key(0), None, params)
    gravity = np.asarray(states.rollout.env_state[1].gravity)
    assert gravity.shape == (2, 8)
    assert (np.floor(gravity) == [[5.0], [20.0]]).all()
