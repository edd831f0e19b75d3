"""The real trainer on environments whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import Config, HParams, make_trainer
from ppo_jax.algorithms import ALGORITHMS
from tests.probes import probe_name

GAMMA = 0.9


def solve(name, *, learning_rate=3e-3, total_timesteps=40_000, **changes):
    fields = {"num_envs": 16, "num_steps": 16, "hidden_sizes": (16,), **changes}
    config = Config(env=probe_name(name), total_timesteps=total_timesteps, **fields)
    used = ALGORITHMS[config.algorithm].hparams
    rates = {rate: learning_rate for rate in used if rate.endswith("learning_rate")}
    trainer = make_trainer(config)
    hparams = HParams(gamma=GAMMA, ent_coef=0.0, **rates)
    state, metrics = jax.jit(trainer.run)(jax.random.key(0), hparams)
    return trainer.policy(state), metrics


def values(policy, *observations):
    return np.asarray(policy.value(jnp.array(observations, jnp.float32)[:, None]))


def test_a_constant_reward_is_the_value():
    policy, _ = solve("constant-value")
    np.testing.assert_allclose(values(policy, 1), [1.0], atol=0.05)


def test_the_value_follows_the_observation():
    policy, _ = solve("value-of-observation")
    np.testing.assert_allclose(values(policy, -1, 1), [-1.0, 1.0], atol=0.05)


def test_a_later_reward_is_discounted():
    policy, metrics = solve("discounting")
    np.testing.assert_allclose(values(policy, 0, 1), [GAMMA, 1.0], atol=0.05)
    assert metrics["episode/return"][-1] == 1.0
    assert metrics["episode/length"][-1] == 2.0


def test_the_better_action_is_chosen():
    policy, metrics = solve("choose")
    assert policy(jnp.ones(1)) == 1
    assert metrics["episode/return"][-1] > 0.95


def test_the_action_follows_the_observation():
    policy, metrics = solve("choose-by-observation")
    np.testing.assert_array_equal(policy(jnp.array([[-1.0], [1.0]])), [0, 1])
    assert metrics["episode/return"][-1] > 0.95


@pytest.mark.parametrize("algorithm", ["reinforce_baseline", "trpo", "ppo_penalty", "ppo"])
def test_a_continuous_action_finds_its_optimum(algorithm):
    policy, _ = solve(
        "choose-continuous",
        algorithm=algorithm,
        num_envs=64,
        num_steps=4,
        total_timesteps=80_000,
        learning_rate=1e-2,
    )
    assert policy(jnp.ones(1))[0] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_learns_that_the_action_follows_the_observation(algorithm):
    policy, metrics = solve(
        "choose-by-observation",
        algorithm=algorithm,
        num_envs=64,
        num_steps=4,
        learning_rate=1e-2,
        lr_schedule="constant",
    )
    np.testing.assert_array_equal(policy(jnp.array([[-1.0], [1.0]])), [0, 1])
    assert metrics["episode/return"][-1] > 0.9


@pytest.mark.parametrize("algorithm", [name for name, row in ALGORITHMS.items() if row.has_critic])
def test_a_time_limit_is_not_a_death(algorithm):
    """The value learnt is that of the task that goes on: 1 / (1 − γ), and γ times that before."""
    policy, _ = solve(
        "time-limit", algorithm=algorithm, learning_rate=1e-2, total_timesteps=200_000
    )
    np.testing.assert_allclose(
        values(policy, 0, 1), [GAMMA / (1 - GAMMA), 1 / (1 - GAMMA)], rtol=0.02
    )
