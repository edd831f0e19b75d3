"""Trainings that start from the policy of another one: fine-tuning and transfer."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppo_jax
from ppo_jax import Config, ConfigError, HParams, cli, make_trainer
from tests.test_checkpoint import assert_same_bits

CONFIG = Config(
    num_envs=4, num_steps=8, hidden_sizes=(8,), normalize_obs=True, total_timesteps=32 * 6
)
STILL = HParams(learning_rate=0.0)  # a training that changes no parameter
QUIET = {"eval_episodes": 2, "progress": False}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Returns a run that others start from."""
    return ppo_jax.train(CONFIG, run_dir=tmp_path_factory.mktemp("first") / "run", **QUIET)


def test_a_state_starts_from_a_policy_and_leaves_it_alone(first):
    # Another task with the same spaces, and other bounds of its parameters.
    trainer = make_trainer(CONFIG.replace(env_params={"length": 1.0}, algorithm="ppo_adaptive"))
    fresh = jax.jit(trainer.init)(jax.random.key(0))
    state = jax.jit(trainer.init)(jax.random.key(0), policy=first.policy)
    assert_same_bits(trainer.policy(state), first.policy)
    assert state.statistics.obs[0].num_samples == CONFIG.total_timesteps
    # Everything else is that of a training from the beginning.
    for name in ("rollout", "env_params", "key", "updates_done"):
        assert_same_bits(getattr(state, name), getattr(fresh, name))
    assert_same_bits(state.learner.rule_state, fresh.learner.rule_state)
    step = jax.jit(trainer.step, donate_argnums=0)
    state, _ = step(state)
    assert np.isfinite(first.policy([0.0, 0.1, 0.0, 0.1]))  # its arrays were not donated
    assert step._cache_size() == 1
    step(state)
    assert step._cache_size() == 1


@pytest.mark.parametrize("num_seeds", [None, 2])
@pytest.mark.parametrize("kind", ["path", "policy"])
def test_every_seed_of_a_run_starts_from_the_policy(kind, num_seeds, first, tmp_path):
    start = str(first.run_dir) if kind == "path" else first.policy
    run = ppo_jax.train(
        CONFIG, STILL, start_from=start, num_seeds=num_seeds, run_dir=tmp_path / "run", **QUIET
    )
    for i in range(num_seeds or 1):
        policy = run.policy if num_seeds is None else jax.tree.map(lambda x, i=i: x[i], run.policy)
        assert_same_bits(policy.params, first.policy.params)
        assert policy.obs_stats[0].num_samples == 2 * CONFIG.total_timesteps


def test_a_run_that_lost_its_checkpoints_starts_from_the_same_policy(first, tmp_path):
    path = tmp_path / "run"
    whole = ppo_jax.train(CONFIG, start_from=first.policy, run_dir=path, **QUIET)
    shutil.rmtree(path / "checkpoints")
    again = ppo_jax.resume(path, progress=False)
    assert again.timesteps_before == 0
    assert_same_bits(again.state, whole.state)
    # A scheduler repeats the whole command.
    again = ppo_jax.train(CONFIG, start_from=first.policy, run_dir=path, resume=True, **QUIET)
    assert again.timesteps_before == whole.timesteps
    assert_same_bits(again.state, whole.state)
    # With a checkpoint, the policy is not needed any more.
    (path / "start" / "manifest.json").write_text("{}")
    again = ppo_jax.resume(path, total_timesteps=CONFIG.total_timesteps + 32, progress=False)
    assert again.timesteps_before == whole.timesteps
    # A run that replaces it does not start from its policy.
    ppo_jax.train(CONFIG, run_dir=path, overwrite=True, **QUIET)
    assert not (path / "start").exists()
    with pytest.raises(ConfigError, match="keeps its start; .* started from new parameters"):
        ppo_jax.train(CONFIG, start_from=first.policy, run_dir=path, resume=True, **QUIET)


def test_the_command_starts_from_a_run(first, tmp_path, capsys):
    words = ["train", "CartPole-v1", "--num-envs", "4", "--num-steps", "8", "--hidden-sizes", "8"]
    words += ["--normalize-obs", "--total-timesteps", "64", "--eval-episodes", "2", "--quiet"]
    words += ["--learning-rate", "0", "--num-minibatches", "4", "--activation", "tanh"]
    assert (
        cli.main([*words, "--start-from", str(first.run_dir), "--run-dir", f"{tmp_path}/run"]) == 0
    )
    assert_same_bits(ppo_jax.load(tmp_path / "run").params, first.policy.params)
    assert cli.main([*words, "--start-from", str(tmp_path), "--run-dir", f"{tmp_path}/other"]) == 2
    assert "must hold config.json" in capsys.readouterr().err


def test_a_training_on_the_host_starts_from_a_policy(tmp_path):
    config = CONFIG.replace(env="gymnasium:tests.host_envs:Counting-v0", normalize_obs=False)
    one = ppo_jax.train(config, **QUIET)
    run = ppo_jax.train(config, STILL, seed=1, start_from=one.policy, **QUIET)
    assert_same_bits(run.policy.params, one.policy.params)
    with pytest.raises(ConfigError, match="its hidden_sizes is"):
        ppo_jax.train(config.replace(hidden_sizes=(4,)), start_from=one.policy, **QUIET)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "relu"}, "its activation is tanh, and that of the training is relu"),
        ({"normalize_obs": False}, "it normalises observations. Set normalize_obs to True"),
        ({"env": "Acrobot-v1"}, r"its observation_space is Box\(shape=\(4,\).*shape=\(6,\)"),
        ({"memory": "gru"}, "its memory is None, and that of the training is gru"),
        ({"algorithm": "reinforce", "num_steps": 500}, "its has_critic is True"),
    ],
)
def test_a_policy_of_another_kind_is_refused(changes, message, first, tmp_path):
    changes = {"total_timesteps": 2000, **changes}
    with pytest.raises(ConfigError, match=f"start from a policy of its own kind; {message}"):
        ppo_jax.train(
            CONFIG.replace(**changes), start_from=first.policy, run_dir=tmp_path / "run", **QUIET
        )
    assert not (tmp_path / "run").exists()


def test_something_else_than_a_policy_is_refused(first):
    with pytest.raises(ConfigError, match="got 3. Pass what trainer.policy"):
        ppo_jax.train(CONFIG, start_from=3, **QUIET)
    seeds = jax.tree.map(lambda x: jnp.stack([x, x]), first.policy)
    with pytest.raises(ConfigError, match=r"other shapes. Choose one .*jax.tree.map\(lambda x: x"):
        ppo_jax.train(CONFIG, start_from=seeds, **QUIET)


def test_parameters_of_another_precision_are_converted(first):
    half = first.policy.replace(
        params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), first.policy.params)
    )
    run = ppo_jax.train(CONFIG, STILL, start_from=half, **QUIET)
    jax.tree.map(np.testing.assert_array_equal, run.policy.params, half.params)
    assert {x.dtype for x in jax.tree.leaves(run.policy.params)} == {jnp.dtype("float32")}
