"""Published settings of Brax's PPO, translated."""

import math

import jax
import numpy as np
import pytest

from ppo_jax import Config, make_trainer, presets
from ppo_jax.envs.suites import SUITES
from ppo_jax.published import BRAX_ARGUMENTS, from_brax
from ppo_jax.resolve import complete_hparams


def test_the_settings_of_ant_are_those_of_braxs_notebook():
    """Numbers are written out here, from the notebook's call for ant and the defaults of Brax."""
    config, hparams = presets.preset("brax:ant")
    assert (config.num_envs, config.num_epochs, config.num_minibatches) == (4096, 4, 32)
    # 2,048 segments of 5 steps in each of 32 minibatches, from 4,096 environments.
    assert config.num_steps == 80
    assert config.batch_size // config.num_minibatches == 10_240
    assert config.total_timesteps == 50_000_000
    assert dict(config.env_kwargs) == {"backend": "positional"}
    assert dict(config.optimizer_kwargs) == {"eps": 1e-8}
    assert (config.hidden_sizes, config.critic_hidden_sizes) == ((32,) * 4, (256,) * 5)
    given = {"learning_rate": 3e-4, "gamma": 0.97, "ent_coef": 0.01, "reward_scale": 10.0}
    assert given.items() <= hparams.given().items()
    assert {"clip_eps": 0.3, "gae_lambda": 0.95, "vf_coef": 0.5}.items() <= hparams.given().items()
    assert complete_hparams(hparams, config).max_grad_norm == math.inf


def test_repeated_actions_count_as_steps_of_brax():
    config, _ = presets.preset("brax:reacher")
    assert dict(config.wrappers) == {"action_repeat": 4}
    assert config.total_timesteps == 12_500_000


@pytest.mark.parametrize("name", BRAX_ARGUMENTS)
def test_an_update_has_the_samples_and_gradient_steps_of_brax(name):
    arguments = BRAX_ARGUMENTS[name]
    suite, _, task = name.partition(":")
    assert task in SUITES[suite].tasks
    config = Config(**from_brax(arguments)[0])
    minibatch = arguments["batch_size"] * arguments["unroll_length"]
    assert config.batch_size == minibatch * arguments["num_minibatches"]
    assert config.num_minibatches == arguments["num_minibatches"]
    assert config.num_epochs == arguments["num_updates_per_batch"]


def test_what_was_tuned_here_comes_first_and_other_algorithms_have_no_published_settings():
    assert presets.preset("playground:CartpoleBalance")[0].num_envs == 64
    assert presets.algorithms("brax:ant") == ("ppo",)
    assert presets.preset("brax:ant", "trpo")[0] == Config(env="brax:ant", algorithm="trpo")


def test_arguments_are_added_to_those_that_were_published():
    config, _ = presets.preset("brax:humanoid", env_kwargs={"backend": "spring"}, num_envs=1024)
    assert (dict(config.env_kwargs), config.num_envs) == ({"backend": "spring"}, 1024)


@pytest.mark.usefixtures("braxs_broadcasting")
def test_an_update_with_published_settings():
    small = {"num_envs": 8, "num_steps": 4, "num_minibatches": 2}
    arguments = {"backend": "spring"}
    config, hparams = presets.preset("brax:inverted_pendulum", env_kwargs=arguments, **small)
    trainer = make_trainer(config)
    init, step = jax.jit(trainer.init), jax.jit(trainer.step)
    state, metrics = step(init(jax.random.key(0), hparams), hparams)
    assert np.isfinite(metrics["train/value_loss"])
    critic = trainer.policy(state).params["params"]["critic_torso"]["MLP_0"]
    assert [layer["kernel"].shape[1] for layer in critic.values()] == [256] * 5
