import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import Config, HParams, make_trainer
from ppo_jax.ops import running_stats
from ppo_jax.ops.advantages import discounted_returns


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_merged_batches_are_the_whole_stream(shape):
    rng = np.random.default_rng(0)
    scale = 10.0 ** np.arange(np.prod(shape, dtype=int)).reshape(shape)
    batches = [100.0 + scale * rng.normal(size=(*n, *shape)) for n in ((1,), (4, 5), (300,))]
    stats = running_stats.initial(shape)
    for batch in batches:
        stats = running_stats.merge(stats, jnp.asarray(batch, jnp.float32))
    stream = np.concatenate([batch.reshape(-1, *shape) for batch in batches])
    assert stats.num_samples == len(stream)
    np.testing.assert_allclose(stats.mean, stream.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats.var, stream.var(0), rtol=1e-3)
    seen = running_stats.normalize(stats, jnp.asarray(stream, jnp.float32))
    expected = np.clip((stream - stream.mean(0)) / stream.std(0), -10, 10)
    np.testing.assert_allclose(seen, expected, atol=5e-3)


def test_an_element_whose_variance_overflows_keeps_its_statistics_alone():
    x = np.random.default_rng(0).normal(3.0, 2.0, (3, 50, 2)).astype(np.float32)
    clean = dirty = running_stats.initial((2,))
    for batch in x:
        clean = running_stats.merge(clean, jnp.asarray(batch))
        batch = batch.copy()
        batch[7, 1] = 1e20
        dirty = running_stats.merge(dirty, jnp.asarray(batch))
    assert (dirty.num_samples, clean.num_samples) == (150, 150)
    assert (dirty.mean[1], dirty.var[1]) == (0.0, 1.0)
    np.testing.assert_array_equal(dirty.mean[0], clean.mean[0])
    np.testing.assert_array_equal(dirty.var[0], clean.var[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_batch_with_a_nan_is_left_out_as_a_whole(bad):
    """Otherwise the samples after it would weigh too little in its element."""
    x = np.random.default_rng(0).normal(100.0, 10.0, (4, 50, 2)).astype(np.float32)
    expected = found = running_stats.initial((2,))
    for i, batch in enumerate(x):
        if i % 2:
            expected = running_stats.merge(expected, jnp.asarray(batch))
        else:
            batch[3, 0] = bad
        found = running_stats.merge(found, jnp.asarray(batch))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_devices_together_have_the_statistics_of_one():
    x = jnp.asarray(np.random.default_rng(0).normal(5.0, 2.0, (4, 10, 3)), jnp.float32)
    start = running_stats.merge(running_stats.initial((3,)), x[0] - 3.0)
    alone = running_stats.merge(start, x)
    shared = jax.vmap(lambda x: running_stats.merge(start, x, "env"), axis_name="env")(x)
    for one, many in zip(alone, shared, strict=True):
        np.testing.assert_allclose(many, np.broadcast_to(one, many.shape), rtol=1e-5)


def test_discounted_returns_restart_after_the_last_reward():
    rng = np.random.default_rng(1)
    reward, done = rng.normal(size=(20, 3)), rng.random((20, 3)) < 0.2
    carried = start = rng.normal(size=3)
    expected = []
    for r, d in zip(reward, done, strict=True):
        carried = 0.9 * carried + r
        expected.append(carried)
        carried = np.where(d, 0.0, carried)
    arrays = (jnp.asarray(x, jnp.float32) for x in (reward, start))
    reward, start = arrays
    returns, last = discounted_returns(reward, jnp.asarray(done), start, gamma=0.9)
    np.testing.assert_allclose(returns, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(last, carried, rtol=1e-4, atol=1e-5)


def small(**changes):
    return Config(num_envs=4, num_steps=16, hidden_sizes=(8,), total_timesteps=5 * 64, **changes)


def test_a_training_s_statistics_are_those_of_all_it_saw():
    trainer = make_trainer(small(normalize_obs=True, normalize_reward=True))
    state = jax.jit(trainer.init)(jax.random.key(0))
    step = jax.jit(trainer.step)
    for _ in range(3):
        state, _ = step(state)
    obs, reward = state.statistics.obs[0], state.statistics.reward
    assert obs.num_samples == 3 * 64
    assert reward.num_samples == 3 * 64
    assert (np.asarray(obs.var) > 0).all()
    assert reward.mean > 1.0  # CartPole's rewards are 1: discounted returns lie above
    assert state.rollout.discounted_return.shape == (4,)


def test_a_donated_state_takes_nothing_of_the_trainer_with_it():
    trainer = make_trainer(small(normalize_obs=True))
    step = jax.jit(trainer.step, donate_argnums=0)
    for _ in range(2):
        state, _ = step(trainer.init(jax.random.key(0)))
    assert state.statistics.obs[0].num_samples == 64


def test_seeds_share_no_statistics():
    trainer = make_trainer(small(normalize_obs=True, normalize_reward=True))
    keys = jax.random.split(jax.random.key(0), 3)
    together, _ = jax.jit(jax.vmap(trainer.run))(keys)
    others, _ = jax.jit(jax.vmap(trainer.run))(keys.at[0].set(jax.random.key(9)))
    for a, b in zip(
        jax.tree.leaves(together.statistics), jax.tree.leaves(others.statistics), strict=True
    ):
        np.testing.assert_array_equal(a[1:], b[1:])
        if a[0].ndim:
            assert not np.array_equal(a[0], b[0])


def test_scaled_and_clipped_rewards_change_what_is_learned_and_not_what_is_reported():
    trainer = make_trainer(small(lr_schedule="constant"))
    run = jax.jit(trainer.run)
    plain, seen = run(jax.random.key(0), HParams(reward_scale=1.0, reward_clip=jnp.inf))
    scaled, same = run(jax.random.key(0), HParams(reward_scale=0.1, reward_clip=jnp.inf))
    clipped, _ = run(jax.random.key(0), HParams(reward_scale=1.0, reward_clip=0.1))
    first = {name: values[0] for name, values in seen.items() if name.startswith("episode/")}
    for name, value in first.items():
        np.testing.assert_array_equal(same[name][0], value)
    assert same["train/value_loss"][0] < 0.5 * seen["train/value_loss"][0]
    kernels = [s.learner.params["params"]["critic_out"]["kernel"] for s in (plain, scaled, clipped)]
    assert not np.array_equal(kernels[0], kernels[1])
    np.testing.assert_allclose(kernels[1], kernels[2], rtol=1e-3, atol=1e-6)
