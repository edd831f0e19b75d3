"""Environments of several agents, which share a policy and are told apart by what they see."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import Config, ConfigError, HParams, envs, evaluate, make_trainer
from ppo_jax.envs.environment import Environment, Renderer, Step
from ppo_jax.envs.spaces import ACTION_MASK, Box, Dict, Discrete
from ppo_jax.results.render import play
from ppo_jax.stages.rollout import reset, rollout
from ppo_jax.testing import check_env
from tests.test_checkpoint import assert_same_bits
from tests.test_platforms import as_accelerators_do

A, LIMIT = 3, 4


class TeamState(NamedTuple):
    bits: jax.Array  # [A]
    time: jax.Array


def make_team():
    """Each agent is shown a bit and paid for naming it, and a tenth of what its neighbour earns."""

    def observed(state):
        time = jnp.full(A, state.time, jnp.float32)
        return {
            "seen": jnp.stack([state.bits.astype(jnp.float32), time], axis=-1),
            ACTION_MASK: jnp.ones((A, 2), bool),
        }

    def reset(key, params):
        state = TeamState(jax.random.bernoulli(key, 0.5, (A,)), jnp.zeros((), jnp.int32))
        return observed(state), state

    def step(key, state, action, params):
        earned = jnp.float32(action == state.bits)
        after = TeamState(~state.bits, state.time + 1)
        reward = earned + 0.1 * jnp.roll(earned, 1)
        metrics = {"right": jnp.mean(earned)}
        ends = (jnp.array(False), after.time >= LIMIT)
        return Step(observed(after), after, reward, *ends, metrics)

    return Environment(
        "team",
        reset,
        step,
        (),
        Dict.of({"seen": Box((2,)), ACTION_MASK: Box((2,), "bool")}),
        Discrete(2),
        longest_episode=lambda params: LIMIT,
        renderer=Renderer(TeamState),
        num_agents=A,
        metrics=("right",),
    )


@pytest.fixture(autouse=True, scope="module")
def _registered():
    envs.register("team", make_team, overwrite=True)


def config_of(**changes):
    fields = {"env": "team", "num_envs": 12, "num_steps": 8, "hidden_sizes": (16,)}
    return Config(**(fields | changes))


def test_a_rollout_is_what_each_environment_plays_alone():
    trainer = make_trainer(config_of())
    state = trainer.init(jax.random.key(0))
    policy, env = trainer.policy(state), trainer.env
    key = jax.random.key(1)
    _, trajectory, ended = jax.jit(
        lambda current: rollout(env, (), policy, current, key, num_steps=8)
    )(state.rollout)
    assert trajectory.reward.shape == (8, 12)
    assert ended.num_episodes == 12 * 8 // LIMIT
    starts = []
    for i in range(0, 12, A):
        agents = slice(i, i + A)
        for t in range(8):
            seen = np.asarray(trajectory.obs["seen"][t, agents])
            if t % LIMIT == 0:  # a new episode, for all agents together
                alone = TeamState(jnp.asarray(seen[:, 0] > 0.5), jnp.zeros((), jnp.int32))
                starts.append(tuple(seen[:, 0]))
            step = env.step(key, alone, trajectory.action[t, agents], ())
            np.testing.assert_array_equal(seen[:, 0], alone.bits)
            np.testing.assert_array_equal(trajectory.reward[t, agents], step.reward)
            np.testing.assert_array_equal(trajectory.final_obs["seen"][t, agents], step.obs["seen"])
            np.testing.assert_array_equal(trajectory.truncated[t, agents], [step.truncated] * A)
            alone = step.state
    assert len(set(starts)) > 2


def test_agents_take_whole_episodes_of_a_pool():
    """Observations and states of a pool belong together."""
    trainer = make_trainer(config_of())
    state = trainer.init(jax.random.key(0))
    policy, env = trainer.policy(state), trainer.env
    _, trajectory, _ = jax.jit(
        lambda current: rollout(
            env, (), policy, current, jax.random.key(1), num_steps=8, reset_pool=4
        )
    )(state.rollout)
    seen = np.asarray(trajectory.obs["seen"][..., 0]).reshape(8, 4, A)
    for t in (4, 5, 6):  # bits flip from step to step, in states and in what is shown
        np.testing.assert_array_equal(seen[t + 1], 1 - seen[t])
    assert len({tuple(x) for x in seen[4]}) > 1


def test_the_pool_has_a_key_of_its_own():
    """A key that the pool shared with a step would make their random numbers equal."""

    def reset(key, params):
        return jnp.zeros(1), jax.random.key_data(key)

    def step(key, state, action, params):
        return Step(jnp.zeros(1), jax.random.key_data(key), 0.0, jnp.array(True), jnp.array(False))

    env = Environment("keys", reset, step, (), Box((1,)), Discrete(2))
    envs.register("keys", lambda: env, overwrite=True)
    trainer = make_trainer(Config(env="keys", num_envs=4, num_steps=4, hidden_sizes=()))
    state = trainer.init(jax.random.key(0))
    policy = trainer.policy(state)
    for key in jax.random.split(jax.random.key(1), 8):
        key_of_steps = jax.random.split(key, 3)[1]
        steps = jax.random.split(key_of_steps, (4, 4, 2)).reshape(-1)
        after, _, _ = rollout(env, (), policy, state.rollout, key, num_steps=4, reset_pool=16)
        # The states of new episodes hold the keys of their resets.
        keys = {tuple(x) for x in np.asarray(after.env_state)}
        assert not keys & {tuple(x) for x in np.asarray(jax.random.key_data(steps))}
        assert len(keys) == 4


def test_agents_learn_by_what_each_of_them_sees():
    config = config_of(num_envs=48, num_steps=16, total_timesteps=48 * 16 * 40)
    trainer = make_trainer(config)
    for seed in range(3):
        state, _ = jax.jit(trainer.run)(jax.random.key(seed), HParams(learning_rate=3e-3))
        policy = trainer.policy(state)
        result = evaluate(policy, trainer.env, (), jax.random.key(100), 16)
        assert result.returns.shape == (16,)
        np.testing.assert_allclose(result.returns, 1.1 * LIMIT, rtol=1e-5)
        np.testing.assert_array_equal(result.lengths, LIMIT)


@pytest.mark.parametrize("memory", [None, "gru"])
def test_an_accelerator_s_program_trains_as_a_cpu_s(memory, monkeypatch):
    config = config_of(num_minibatches=2, memory=memory, total_timesteps=96)

    def run():
        trainer = make_trainer(config)
        return jax.jit(trainer.run)(jax.random.key(0))[0]

    state = run()
    monkeypatch.setattr(jax.lax, "platform_dependent", as_accelerators_do)
    for x, y in zip(*map(jax.tree.leaves, (state, run())), strict=True):
        if jnp.issubdtype(x.dtype, jnp.floating):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)
        else:
            assert_same_bits(x, y)


@pytest.mark.parametrize(
    "wrappers",
    [
        {},
        {"time_limit": 3, "action_repeat": 2, "scale_reward": 0.5},
        {"sticky_actions": 0.5, "previous_action_reward": True},
    ],
    ids=str,
)
def test_wrappers_take_several_agents(wrappers):
    env = envs.make_env(config_of(wrappers=wrappers))
    check_env(env, num_steps=32)
    assert env.num_agents == A


def test_wrappers_of_vectors_take_several_agents():
    def of_vectors():
        env = make_team()
        return envs.wrappers.transform_observation(env, lambda obs: obs["seen"], Box((2,)))

    envs.register("vectors", of_vectors, overwrite=True)
    wrappers = {"observe_only": "0", "frame_stack": 3, "flatten_observation": True}
    env = envs.make_env(config_of(env="vectors", wrappers=wrappers))
    check_env(env, num_steps=32)
    obs, state = env.reset(jax.random.key(0), ())
    step = env.step(jax.random.key(0), state, jnp.zeros(A, jnp.int32), ())
    np.testing.assert_array_equal(step.obs[:, :2], np.repeat(obs[:, -1:], 2, axis=1))
    np.testing.assert_array_equal(step.obs[:, 2], 1 - obs[:, 2])


def test_an_episode_of_several_agents_is_played_for_pictures():
    trainer = make_trainer(config_of())
    policy = trainer.policy(trainer.init(jax.random.key(0)))
    (episode,) = play(policy, trainer.env, jax.random.split(jax.random.key(0), 1), max_steps=9)
    assert len(episode.states) == LIMIT + 1
    assert episode.rewards.shape == (LIMIT,)


def test_num_envs_counts_agents():
    with pytest.raises(ConfigError, match="counts every agent.*got 10 and 3 agents of team. Try 9"):
        make_trainer(config_of(num_envs=10))
    with pytest.raises(ConfigError, match="got 4 on 2 devices and 3 agents of team. Try 6"):
        make_trainer(config_of(num_envs=4, num_devices=2))


def test_a_reward_of_one_agent_is_refused():
    def lonely():
        env = make_team()

        def step(*arguments):
            result = env.step(*arguments)
            return result._replace(reward=result.reward[0])

        return env._replace(step=step)

    envs.register("lonely", lonely, overwrite=True)
    with pytest.raises(ConfigError, match=r"reward must have the shape \(3,\); team has .*\(\)"):
        envs.make("lonely")


def test_rollouts_reset_environments_whole():
    """The state is that of environments, not of agents."""
    env = make_team()
    state = reset(env, (), jax.random.key(0), num_envs=6)
    assert state.env_state.bits.shape == (2, A)
    assert state.obs["seen"].shape == (6, 2)
