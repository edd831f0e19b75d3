"""New episodes: drawn at every step, or as rarely as they can begin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ppo_jax import Config, ConfigError, envs, make_trainer
from ppo_jax.envs.environment import Environment, Step
from ppo_jax.envs.spaces import Box, Discrete
from ppo_jax.stages.rollout import _unrolled_steps, rollout
from tests.conftest import exact_jit
from tests.test_platforms import as_accelerators_do

N, T = 64, 16


def make_lottery(length, shortest_episode):
    """Every episode lasts `length` steps, and its number, drawn at its start, is all it shows."""

    def reset(key, params):
        del params
        number = jax.random.uniform(key, (1,))
        return number, (number, jnp.zeros((), jnp.int32))

    def step(key, state, action, params):
        del key, action, params
        number, time = state
        ended = time + 1 >= length
        return Step(number, (number, time + 1), jnp.float32(time), ended, jnp.array(False))

    spaces = Box((1,)), Discrete(2)
    return Environment("lottery", reset, step, (), *spaces, shortest_episode=shortest_episode)


def numbers(length, shortest_episode, key, reset_pool=None):
    """Returns observations of two consecutive rollouts, `[2 T, N]`."""
    name = f"lottery-{length}-{shortest_episode}"
    if name not in envs.names():
        envs.register(name, lambda: make_lottery(length, shortest_episode))
    trainer = make_trainer(Config(env=name, num_envs=N, num_steps=T))

    @jax.jit
    def twice(key):
        state = trainer.init(key)
        policy, env, current = trainer.policy(state), trainer.env, state.rollout
        seen = []
        for rollout_key in jax.random.split(key):
            current, trajectory, ended = rollout(
                env, (), policy, current, rollout_key, num_steps=T, reset_pool=reset_pool
            )
            seen.append(trajectory.obs)
        return jnp.concatenate(seen)[:, :, 0], ended.num_episodes

    seen, episodes = twice(key)
    assert episodes == N * T // length
    return np.asarray(seen)


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
@pytest.mark.parametrize("shortest_episode", [1, 3, 4])
def test_every_episode_starts_from_a_new_state(shortest_episode, make_key):
    episodes = numbers(4, shortest_episode, make_key(0)).reshape(2 * T // 4, 4, N)
    starts = episodes[:, 0]
    np.testing.assert_array_equal(episodes, np.broadcast_to(starts[:, None], episodes.shape))
    assert len(np.unique(starts)) == starts.size
    assert scipy.stats.kstest(starts.ravel(), scipy.stats.uniform.cdf).pvalue > 1e-3


@pytest.mark.parametrize("is_accelerator", [False, True])
def test_every_episode_starts_from_a_new_state_of_a_pool(is_accelerator, monkeypatch):
    if is_accelerator:
        monkeypatch.setattr(jax.lax, "platform_dependent", as_accelerators_do)
    ended = N * T // 4  # in each rollout
    for pool in (ended, ended + 7):
        episodes = numbers(4, 1, jax.random.key(0), pool).reshape(2 * T // 4, 4, N)
        starts = episodes[:, 0]
        # An episode keeps the number with which it started.
        np.testing.assert_array_equal(episodes, np.broadcast_to(starts[:, None], episodes.shape))
        # Two of 512 numbers of 23 bits are equal in one of sixty tests.
        assert len(np.unique(starts)) >= starts.size - 1
        assert scipy.stats.kstest(starts.ravel(), scipy.stats.uniform.cdf).pvalue > 1e-3


def test_a_pool_that_is_too_small_is_used_again_in_order():
    size = N // 2
    starts = numbers(4, 1, jax.random.key(0), size).reshape(2 * T // 4, 4, N)[:, 0]
    for rollout_starts in (starts[1 : T // 4], starts[T // 4 + 1 :]):
        np.testing.assert_array_equal(rollout_starts[:, :size], rollout_starts[:, size:])
        assert len(np.unique(rollout_starts)) == size
    assert len(np.unique(starts[1:])) == 2 * size  # another pool for each rollout


def test_a_pool_changes_nothing_but_how_episodes_start():
    """Until the first episode ends, a rollout with a pool has the bits of one without."""
    trainer = make_trainer(Config(num_envs=8, num_steps=8))
    state = trainer.init(jax.random.key(0))
    play = exact_jit(
        lambda pool: rollout(
            trainer.env,
            trainer.env.params,
            trainer.policy(state),
            state.rollout,
            jax.random.key(1),
            num_steps=8,
            reset_pool=pool,
        )[1],
        static_argnums=0,
    )
    with_pool, without = play(3), play(None)
    assert not without.done.any()
    for x, y in zip(*map(jax.tree.leaves, (with_pool, without)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_pool_is_divided_between_devices():
    with pytest.raises(ConfigError, match="reset_pool must be divisible.*got 5 and 2. Try 6"):
        Config(num_envs=8, num_steps=8, reset_pool=5, num_devices=2)
    with pytest.raises(ConfigError, match="reset_pool must be a positive integer; got 0"):
        Config(reset_pool=0)


def test_two_episodes_that_begin_in_what_one_lasts_begin_alike():
    starts = numbers(2, 4, jax.random.key(0))[::2]  # a draw for two of them
    np.testing.assert_array_equal(starts[1:-1:2], starts[2::2])
    assert len(np.unique(starts[1::2])) == starts[1::2].size


def test_few_steps_of_a_large_environment_are_unrolled():
    def step(x):
        return jax.lax.fori_loop(0, 1_000, lambda _, x: jnp.sin(x) + 1.0, x)  # a loop counts once

    def large(x, times):
        for _ in range(times):
            x = jax.jit(step)(x)
        return x

    steps = [
        _unrolled_steps(jax.make_jaxpr(large, static_argnums=1)(1.0, times).jaxpr)
        for times in (1, 300, 3_000)
    ]
    assert steps[0] == 8
    assert 1 < steps[1] < 8
    assert steps[2] == 1
