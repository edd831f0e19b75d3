"""Several devices share the environments of one training."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from ppo_jax import Config, ConfigError, envs, make_trainer
from ppo_jax.algorithms import get_algorithm
from ppo_jax.envs.spaces import Box, Discrete
from ppo_jax.ops import objectives
from ppo_jax.policy import spec as spec_module
from ppo_jax.policy.policy import Policy
from ppo_jax.policy.spec import PolicySpec, images_in_cache, init_params, make_spec
from ppo_jax.resolve import complete_config, complete_hparams
from ppo_jax.stages.algorithm import UpdateInputs
from ppo_jax.stages.collect import collect
from ppo_jax.stages.losses import Losses
from ppo_jax.stages.optimizers import make_optimizer
from ppo_jax.stages.rollout import reset
from ppo_jax.types import Shard, Statistics

SHARDS = 4


def sharded(function, *arrays):
    """`function(*shards, axis_name)` on every shard, as on so many devices."""
    shards = [x.reshape(SHARDS, -1) for x in arrays]
    return jax.vmap(lambda *x: function(*x, "env"), axis_name="env")(*shards)


def test_statistics_of_shards_are_those_of_the_whole():
    keys = jax.random.split(jax.random.key(0), 3)
    # Shards that differ in mean and in how many of their elements count.
    x = jax.random.normal(keys[0], (64,)) + jnp.arange(64) / 8
    y = jax.random.normal(keys[1], (64,)) + x
    mask = jax.random.uniform(keys[2], (64,)) < jnp.linspace(0.1, 1.0, 64)
    for m in (mask, jnp.ones(64, bool)):
        np.testing.assert_allclose(
            sharded(objectives.standardize, x, m).ravel(), objectives.standardize(x, m), rtol=1e-4
        )
        for ours in (objectives.masked_mean, objectives.masked_variance):
            np.testing.assert_allclose(sharded(ours, x, m), jnp.full(SHARDS, ours(x, m)), rtol=1e-5)
        np.testing.assert_allclose(
            sharded(objectives.explained_variance, x, y, m),
            jnp.full(SHARDS, objectives.explained_variance(x, y, m)),
            rtol=1e-4,
        )
        shares = sharded(objectives.mean_share, x, m)
        np.testing.assert_allclose(shares.mean(), objectives.masked_mean(x, m), rtol=1e-5)


def collected(**settings):
    """Returns the configuration, the specification, parameters, hyperparameters and a batch."""
    config = complete_config(Config(num_steps=8, hidden_sizes=(16,), **settings))
    env = envs.make(config.env)
    spec = make_spec(config, env)
    hparams = complete_hparams(None, config)
    algorithm = get_algorithm(config.algorithm)
    policy = Policy(params=None, spec=spec)
    state = reset(
        env,
        env.params,
        jax.random.key(2),
        num_envs=config.num_envs,
        recurrent_state=policy.initial_recurrent_state((config.num_envs,)),
    )
    params = init_params(spec, jax.random.key(1), state.obs)
    batch = collect(
        policy.replace(params=params),
        state,
        Statistics(),
        config=config,
        algorithm=algorithm,
        env=env,
        env_params=env.params,
        hparams=hparams,
        key=jax.random.key(3),
        shard=Shard(config.num_envs),
    ).batch
    return config, spec, params, hparams, batch


def learned_in_chunks(num_envs, chunk_sizes, **settings):
    """Returns parameters and metrics after an update, for each size of the chunks."""
    config, spec, params, hparams, batch = collected(num_envs=num_envs, **settings)
    algorithm = get_algorithm(config.algorithm)
    learned = []
    for chunk_size in chunk_sizes:
        shard = Shard(num_envs, chunk_size=chunk_size)
        losses = Losses(config, spec, algorithm.objective, shard)
        rule = algorithm.update_rule(config, losses, make_optimizer(config))
        inputs = UpdateInputs(batch, jax.random.key(4), hparams, jnp.ones(()))
        state = rule.init(params, hparams)
        after, _, metrics = jax.jit(rule.update)(params, state, inputs)
        learned.append(ravel_pytree((after, metrics))[0])
    return learned


def step_memory(**settings):
    """Returns the bytes of temporary memory of an update."""
    config = Config(
        env="Breakout-MinAtar",
        network="minatar_cnn",
        num_envs=32,
        num_steps=32,
        num_minibatches=16,
        hidden_sizes=(32,),
        **settings,
    )
    trainer = make_trainer(config)
    state = jax.eval_shape(trainer.init, jax.random.key(0))
    program = jax.jit(trainer.step, donate_argnums=0).lower(state).compile()
    return program.memory_analysis().temp_size_in_bytes


def test_the_kl_of_an_update_takes_the_memory_of_a_minibatch():
    bound = 1.2 * step_memory()
    assert step_memory(lr_schedule="kl_adaptive") < bound
    assert step_memory(algorithm="off_policy_pg") < bound


@pytest.mark.parametrize("memory", [None, "gru"])
def test_the_kl_of_an_update_is_that_of_all_samples(memory):
    config, spec, params, _, batch = collected(num_envs=4, num_minibatches=4, memory=memory)
    losses = Losses(config, spec, get_algorithm("ppo").objective, Shard(4))
    moved = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(5), x.shape), params)
    kl = jax.jit(losses.kl_of_update)(moved, batch)
    assert kl > 1e-4
    np.testing.assert_allclose(kl, losses.kl(moved, batch), rtol=1e-5)
    log_ratio = jax.jit(losses.log_ratio)(moved, batch)
    assert log_ratio.shape == (8, 4)
    # The mean of the estimator k1 and the exact KL differ by sampling alone.
    assert 0 < -log_ratio.mean() < 10 * kl


def test_chunks_of_a_minibatch_add_up_to_its_gradient():
    whole, in_fours, in_fives = learned_in_chunks(8, (None, 4, 5))
    np.testing.assert_allclose(in_fours, whole, rtol=1e-3, atol=1e-5)
    assert not np.array_equal(in_fours, whole)  # it was added up in another order
    # A minibatch has 16 samples, and chunks are equal.
    np.testing.assert_array_equal(in_fives, in_fours)
    # The only chunks of 13 samples would be single ones.
    whole, in_sixes = learned_in_chunks(13, (None, 6), num_minibatches=8)
    np.testing.assert_array_equal(in_sixes, whole)


def test_a_cpu_convolves_as_many_images_as_fit_its_cache(monkeypatch):
    settings = {
        "env": "Breakout-MinAtar",
        "network": "cnn",
        "conv_layers": ((4, 4, 2), (8, 3, 1)),
        "num_minibatches": 4,
    }
    (whole,) = learned_in_chunks(8, (None,), **settings)
    # The patches of an image: 4 x 4 positions of 4 x 4 x 4 numbers of four bytes each.
    monkeypatch.setattr(spec_module, "_CACHE", 5 * 4**6)
    (in_chunks,) = learned_in_chunks(8, (None,), **settings)
    np.testing.assert_allclose(in_chunks, whole, rtol=1e-3, atol=1e-5)
    assert not np.array_equal(in_chunks, whole)


@pytest.mark.parametrize(
    ("network", "expected"),
    [("nature_cnn", 40), ("impala_cnn", 16), ("minatar_cnn", 17)],
)
def test_the_number_of_images_follows_from_their_patches(network, expected):
    image = Box((84, 84, 4), "uint8")
    spec = PolicySpec(observation_space=image, action_space=Discrete(4), network=network)
    assert images_in_cache(spec) == expected


@pytest.mark.parametrize("space", [Box((84, 84, 4), "uint8"), Box((4,))])
def test_an_mlp_convolves_nothing(space):
    spec = PolicySpec(observation_space=space, action_space=Discrete(4))
    assert images_in_cache(spec) is None


def test_on_eight_devices():
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "tests.device_checks"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert result.stdout == "all checks passed\n", result.stderr


def test_environments_are_divided_evenly():
    with pytest.raises(ConfigError, match="divisible by num_devices; got 6 and 4. Try 3 or 6"):
        Config(num_envs=6, num_devices=4)
    with pytest.raises(ConfigError, match=r"got 4 \* 4 / 4 devices and 8. Try 4"):
        Config(num_envs=4, num_steps=4, num_devices=4, num_minibatches=8)
