import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import Config, envs, evaluate, make_trainer
from ppo_jax.envs.environment import Environment, Step
from ppo_jax.envs.spaces import Box, Discrete
from ppo_jax.runs.periodic_evaluation import PeriodicEvaluation


def random_length_env():
    """Episodes of length 1 or 9, told by the first observation; the reward is 1 a step."""

    def reset(key, params):
        length = jnp.where(jax.random.bernoulli(key), 9, 1)
        return jnp.float32(length)[None], (jnp.int32(0), length)

    def step(key, state, action, params):
        time, length = state
        terminated = time + 1 >= length
        obs = jnp.float32(length)[None]
        return Step(obs, (time + 1, length), jnp.float32(1), terminated, jnp.array(False))

    return Environment("random-length", reset, step, (), Box((1,)), Discrete(2))


def untrained_policy(env_name):
    trainer = make_trainer(Config(env=env_name, num_envs=2, num_steps=4, num_minibatches=1))
    return trainer.policy(jax.jit(trainer.init)(jax.random.key(0))), trainer.env


def test_first_episodes_are_counted_whole_and_once():
    """Episodes that end first are nine times as frequent in a stream; here they are half."""
    if "random-length" not in envs.names():
        envs.register("random-length", random_length_env)
    policy, env = untrained_policy("random-length")
    result = jax.jit(evaluate, static_argnums=(1, 4))(policy, env, (), jax.random.key(1), 1000)
    assert result.finished.all()
    np.testing.assert_array_equal(result.returns, result.lengths)
    assert set(np.asarray(result.lengths).tolist()) == {1, 9}
    assert np.mean(np.asarray(result.lengths) == 9) == np.clip(
        np.mean(np.asarray(result.lengths) == 9), 0.45, 0.55
    )


def test_evaluation_stops_at_max_steps_and_says_so():
    policy, env = untrained_policy("CartPole-v1")
    result = evaluate(policy, env, env.params, jax.random.key(0), 8, max_steps=3)
    assert not result.finished.any()
    np.testing.assert_array_equal(result.lengths, 3)


def test_greedy_is_deterministic_and_sampling_is_not():
    policy, env = untrained_policy("CartPole-v1")
    key = jax.random.key(0)

    def returns(**how):
        return np.asarray(evaluate(policy, env, env.params, key, 16, **how).returns)

    np.testing.assert_array_equal(returns(), returns())
    assert (returns(greedy=False) != returns()).any()


def test_a_population_is_evaluated_under_vmap():
    trainer = make_trainer(Config(num_envs=2, num_steps=4, num_minibatches=1))
    keys = jax.random.split(jax.random.key(0), 3)
    policies = trainer.policy(jax.vmap(trainer.init)(keys))
    one = jax.jit(lambda policy, key: evaluate(policy, trainer.env, trainer.env.params, key, 4))
    many = jax.vmap(one)(policies, keys)
    for i in range(3):
        alone = one(jax.tree.map(lambda x, i=i: x[i], policies), keys[i])
        np.testing.assert_array_equal(many.returns[i], alone.returns)


def test_a_policy_is_evaluated_once_after_an_update():
    policy, env = untrained_policy("CartPole-v1")
    calls = []

    def evaluated(policy):
        calls.append(policy)
        return evaluate(policy, env, env.params, jax.random.key(0), 2)

    periodic = PeriodicEvaluation(evaluated, (0,), batch_size=8, every=2)
    rows = periodic.after(2, policy)
    assert periodic.evaluate(2, policy).returns.mean() == rows[0]["eval/return"]
    assert len(calls) == 1
    periodic.evaluate(3, policy)
    assert len(calls) == 2


def test_returns_of_episodes_that_are_cut_are_warned_of():
    policy, env = untrained_policy("CartPole-v1")
    periodic = PeriodicEvaluation(
        lambda policy: evaluate(policy, env, env.params, jax.random.key(0), 4, max_steps=3),
        (0,),
        batch_size=8,
        every=None,
    )
    with pytest.warns(RuntimeWarning, match="4 of 4 episodes .* after 16 steps .* within 3 steps"):
        periodic.evaluate(2, policy)
