"""The stages of an update, measured."""

import time

import jax
import numpy as np
import pytest

import ppo_jax
from ppo_jax import Config, cli, profiling
from ppo_jax.profiling import STAGES, profile
from ppo_jax.trainer import make_trainer

SMALL = {"num_envs": 4, "num_steps": 16, "hidden_sizes": (8,)}


@pytest.mark.parametrize(
    "config",
    [
        Config(**SMALL, normalize_obs=True, normalize_reward=True),
        Config(**SMALL, memory="gru", memory_size=4, num_minibatches=2),
        Config(**SMALL, algorithm="reinforce", env_params={"max_steps_in_episode": 16}),
        Config(**{**SMALL, "num_envs": 2}, env="Pendulum-v1", algorithm="trpo"),
    ],
    ids=["ppo", "gru", "reinforce", "trpo"],
)
def test_stages_add_up_to_an_update(config):
    found = profile(config, repeats=2)
    assert tuple(found.stages) == STAGES
    assert all(seconds >= 0 for seconds in found.stages.values())
    # A stage of noise is cut at 0, so that the sum can only be larger.
    assert sum(found.stages.values()) >= found.seconds > 0
    assert found.timesteps == config.batch_size
    assert found.compile_seconds > 0


def test_each_program_contains_the_stages_before_it():
    """The partial programs compute what an update computes."""
    config = Config(**SMALL)
    trainer = make_trainer(config)
    state = trainer.init(jax.random.key(0))
    programs = profiling._partial_updates(config, trainer)
    _, trajectory, _ = programs["policy"](state, trainer.hparams)
    (values, _, _), again, _ = programs["values"](state, trainer.hparams)
    collected = programs["advantages"](state, trainer.hparams)
    after, _ = trainer.step(state)
    jax.tree.map(np.testing.assert_array_equal, trajectory, again)
    np.testing.assert_array_equal(trajectory.action, collected.batch.action)
    np.testing.assert_allclose(values.value, collected.batch.value, rtol=1e-6)
    np.testing.assert_allclose(after.rollout.obs, collected.rollout.obs, rtol=1e-6)
    _, random, _ = programs["environment"](state, trainer.hparams)
    # The same environments and keys, with actions that do not depend on the observation.
    np.testing.assert_array_equal(trajectory.obs[0], random.obs[0])
    assert not np.array_equal(trajectory.action, random.action)


def test_a_slow_environment_is_found():
    base = ppo_jax.envs.make("CartPole-v1")

    def wait(x):
        time.sleep(0.002)
        return x

    def step(key, state, action, params):
        result = base.step(key, state, action, params)
        shape = jax.ShapeDtypeStruct((), result.reward.dtype)
        # `pure_callback` is called at every step of the rollout.
        reward = jax.pure_callback(wait, shape, result.reward, vmap_method="expand_dims")
        return result._replace(reward=reward)

    ppo_jax.envs.register("Slow", lambda: base._replace(name="Slow", step=step), overwrite=True)
    found = profile(Config(env="Slow", **SMALL), repeats=2)
    assert found.stages["environment"] > 16 * 0.002
    assert found.stages["environment"] == max(found.stages.values())


def test_the_command_profiles_an_environment_and_a_run(tmp_path, capsys):
    config = Config(**SMALL, total_timesteps=64)
    ppo_jax.train(config, run_dir=tmp_path / "run", eval_episodes=2, progress=False)
    arguments = ["profile", str(tmp_path / "run"), "--repeats", "1", "--trace", str(tmp_path / "t")]
    assert cli.main(arguments) == 0
    output = capsys.readouterr().out
    assert "an update of CartPole-v1 with ppo: 64 steps" in output
    assert all(f"  {stage} " in output for stage in STAGES)
    assert list((tmp_path / "t").rglob("*.xplane.pb"))
    assert cli.main(["profile", str(tmp_path / "run"), "--algorithm", "trpo"]) == 2
    assert cli.main(["profile", "CartPol-v1"]) == 2
    assert cli.main(["profile", "CartPole-v1", "--repeats", "0"]) == 2
