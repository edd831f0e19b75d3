"""Learning runs over several seeds, measured by evaluation."""

import jax
import numpy as np
import pytest

from benchmarks import memories
from ppo_jax import Config, HParams, evaluate, make_trainer, presets
from tests.conftest import optimized_jit


def evaluate_seeds(config, hparams, num_seeds, episodes=64):
    """Mean evaluation return of each seed, `[num_seeds]`."""
    trainer = make_trainer(config)

    def one(key):
        train_key, eval_key = jax.random.split(key)
        state, _ = trainer.run(train_key, hparams)
        policy = trainer.policy(state)
        result = evaluate(policy, trainer.env, trainer.env.params, eval_key, episodes)
        return result.returns.mean()

    return np.asarray(optimized_jit(jax.vmap(one))(jax.random.split(jax.random.key(0), num_seeds)))


PUREJAXRL = Config(
    env="CartPole-v1",
    num_envs=4,
    num_steps=128,
    total_timesteps=500_000,
    num_epochs=4,
    num_minibatches=4,
    lr_schedule="linear",
)


@pytest.mark.parametrize("num_seeds", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_ppo_solves_cartpole_with_purejaxrls_settings(num_seeds):
    hparams = HParams(
        learning_rate=2.5e-4,
        gamma=0.99,
        gae_lambda=0.95,
        clip_eps=0.2,
        value_clip_eps=0.2,
        ent_coef=0.01,
        vf_coef=0.5,
        max_grad_norm=0.5,
    )
    returns = evaluate_seeds(PUREJAXRL, hparams, num_seeds)
    assert returns.mean() >= 475, returns
    assert returns.min() >= 400, returns


BARS = {
    "CartPole-v1": 450.0,
    "Acrobot-v1": -85.0,
    "Pendulum-v1": -200.0,
    "MountainCar-v0": -112.0,
    "MountainCarContinuous-v0": 90.0,
    "Catch-bsuite": 0.95,
    "DeepSea-bsuite": 0.95,
    "DiscountingChain-bsuite": 0.95,
    "MemoryChain-bsuite": 0.95,
    "CartPole-v1-positions": 450.0,
    "UmbrellaChain-bsuite": 0.6,
    "FourRooms-misc": 0.95,
}
EASIER = dict.fromkeys(("reinforce", "reinforce_to_go", "reinforce_baseline"), 195.0)


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "is_long_enough"), [("lru", True), ("mingru", False)])
def test_a_linear_recurrent_unit_remembers_a_hundred_steps(memory, is_long_enough):
    config, hparams = presets.preset(
        "MemoryChain-bsuite",
        env_params={"memory_length": 100},
        memory=memory,
        num_steps=128,
        total_timesteps=1_000_000,
    )
    trainer = make_trainer(config)
    run = optimized_jit(jax.vmap(lambda key: trainer.run(key, hparams)[1]["episode/return"]))
    returns = run(jax.random.split(jax.random.key(0), 4))[:, -20:].mean(axis=1)
    assert (returns > 0.9).all() if is_long_enough else (returns < 0.5).all(), returns


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "is_large_enough"), [("gtrxl", True), ("lru", False)])
def test_a_transformer_remembers_many_things_at_once(memory, is_large_enough):
    trainer = make_trainer(memories.config_of(memories.REPEAT, memory, total_timesteps=500_000))
    run = optimized_jit(lambda key: trainer.run(key, memories.HPARAMS)[1]["episode/return"])
    last = run(jax.random.key(0))[-5:].mean()
    assert last > 0.8 if is_large_enough else last < 0.3, last


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "algorithm"),
    [(env, algorithm) for env in BARS for algorithm in presets.algorithms(env)],
)
def test_presets_solve_their_environments(env, algorithm):
    config, hparams = presets.preset(env, algorithm)
    returns = evaluate_seeds(config, hparams, num_seeds=5, episodes=128)
    assert returns.mean() >= EASIER.get(algorithm, BARS[env]), returns


def test_every_preset_has_a_bar():
    games = {env for env in presets.names() if env.endswith("-MinAtar")}
    of_suites = {env for env in presets.names() if ":" in env}  # measured in test_suites
    assert set(presets.names()) == games | of_suites | set(BARS)


@pytest.mark.slow
def test_breakout_is_learned_in_a_million_steps():
    config, hparams = presets.preset("Breakout-MinAtar", total_timesteps=1_000_000)
    untrained = config.replace(total_timesteps=config.batch_size)
    still = evaluate_seeds(untrained, hparams.replace(learning_rate=0.0), num_seeds=3)
    assert still.mean() < 1.0, still
    returns = evaluate_seeds(config, hparams, num_seeds=3)
    assert returns.mean() > 10.0, returns
