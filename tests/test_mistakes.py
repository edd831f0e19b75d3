"""Mistakes of a user: each is one sentence with the rule, the values and the remedy."""

import json
import shutil
from urllib.error import URLError

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import ppo_jax
from ppo_jax import Config, ConfigError, envs, make_trainer
from ppo_jax.cli import main
from ppo_jax.runs import device_memory
from ppo_jax.runs.trained import evaluate_run

CONFIG = Config(num_envs=2, num_steps=8, hidden_sizes=(4,), total_timesteps=32)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("mistakes") / "run"
    ppo_jax.train(CONFIG, run_dir=path, eval_episodes=2, progress=False)
    return path


def change_config(path, change):
    record = json.loads((path / "config.json").read_text())
    change(record)
    (path / "config.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: (path / "config.json").write_text("{"),
            "config.json must hold JSON; it is damaged: Expecting property name",
        ),
        (
            lambda path: (path / "config.json").write_text("{}"),
            "must hold the settings of a run; it holds something else",
        ),
        (
            lambda path: change_config(path, lambda r: r["config"].update(num_envz=2)),
            "unknown setting in .*config.json 'num_envz'. Did you mean num_envs",
        ),
        (
            lambda path: change_config(path, lambda r: r["hparams"].update(gamma=3.0)),
            r"config.json breaks a rule: gamma must be in \[0, 1\]; got 3.0",
        ),
        (
            lambda path: change_config(path, lambda r: r["hparams"].update(gama=0.9)),
            "config.json breaks a rule: unknown hyperparameter 'gama'. Did you mean gamma",
        ),
        (
            lambda path: change_config(path, lambda r: r["config"].update(env="Acrobot-v1")),
            r"its spaces; that of .* has the observation_space Box\(shape=\(4,\).*Acrobot-v1 has",
        ),
        (
            lambda path: (path / "policy" / "state.safetensors").write_bytes(b"not a policy"),
            "policy is damaged: state.safetensors is missing or has another size",
        ),
        (
            lambda path: (path / "policy" / "manifest.json").write_bytes(b"{}"),
            "policy is damaged: manifest.json is not what was written",
        ),
        (
            lambda path: shutil.copytree(
                next((path / "checkpoints").iterdir()), path / "policy", dirs_exist_ok=True
            ),
            "policy must hold a policy; it holds something else",
        ),
        (
            lambda path: (path / "policy.msgpack").write_bytes(b""),
            "policy.msgpack was written by an earlier version",
        ),
    ],
)
def test_a_damaged_run_is_said_to_be_so(damage, message, run_dir, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(run_dir, path)
    damage(path)
    with pytest.raises(ConfigError, match=message):
        evaluate_run(path, num_episodes=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "CartPole-v1", "--seed", "-1"], "a seed must be a whole number from 0 to"),
        (["train", "CartPole-v1", "--seeds", "0"], "num_seeds must be a positive integer; got 0"),
        (
            ["train", "CartPole-v1", "--run-dir", "/proc/none/x"],
            "run_dir must be a directory that can be written; /proc/none/x cannot",
        ),
        (
            ["sweep", "CartPole-v1", "--learning-rate", "lognormal(1e-4,1e-2)", "--draws", "2"],
            "unknown distribution 'lognormal'. Did you mean loguniform",
        ),
        (["sweep", "CartPole-v1", "--config", "bad.yaml"], "bad.yaml is malformed at line 2"),
        (
            ["sweep", "CartPole-v1", "--config", "misspelt.yaml", "--run-dir", "sweep"],
            "unknown parameter of CartPole-v1 'gravty'. Did you mean gravity",
        ),
        (["eval", "a-sweep"], "a-sweep is a sweep and not a run. Its best policy is the run"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("gamma: [0.9\n")
    (tmp_path / "misspelt.yaml").write_text("env_params.gravty: [9.8, 10.0]\n")
    (tmp_path / "a-sweep").mkdir()
    (tmp_path / "a-sweep" / "sweep.json").write_text("{}")
    if arguments[0] == "train" and "--run-dir" not in arguments:
        arguments = [*arguments, "--run-dir", "run"]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err.replace("\n", " ")
    assert "Traceback" not in err
    assert not (tmp_path / "sweep").exists()  # nothing was written


def test_an_environment_that_is_an_object_is_to_be_registered():
    with pytest.raises(ConfigError, match="env must be the name of an environment; got Environmen"):
        Config(env=envs.make("CartPole-v1"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ppo_jax.train("CartPole-v1"), "described by a Config; got 'CartPole-v1'"),
        (lambda: make_trainer(ppo_jax.preset("CartPole-v1")), "the first of the two records"),
        (lambda: make_trainer(CONFIG, ppo_jax.HParams()), "mesh must be a Mesh.* got HParams"),
        (
            lambda: ppo_jax.preset("CartPole-v1", learning_rate=1e-3),
            r"learning_rate is a hyperparameter. Use hparams.replace\(learning_rate=…\)",
        ),
    ],
)
def test_an_argument_in_the_wrong_place_is_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_an_environment_of_gymnax_0_is_refused():
    class Old:
        default_params = ()

    envs.register("gymnax-0", Old, overwrite=True)
    with pytest.raises(ConfigError, match="the interface of gymnax 1.x.*gymnax-0 has an older one"):
        make_trainer(CONFIG.replace(env="gymnax-0"))


def test_a_module_with_dropout_is_refused():
    class Dropping(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dropout(0.5, deterministic=False)(nn.Dense(4)(x))

    config = Config(num_envs=2, num_steps=8, total_timesteps=32, network=Dropping())
    with pytest.raises(ConfigError, match="Dropping fails for a batch of 3"):
        make_trainer(config)


def test_a_policy_takes_lists_and_refuses_other_shapes(run_dir):
    policy = ppo_jax.load(run_dir)
    observation = [0.1, 0.2, -0.1, 0.3]
    assert policy(observation) == policy(jnp.array(observation))
    assert policy(np.zeros((3, 2, 4))).shape == (3, 2)
    for wrong in (jnp.zeros(3), jnp.zeros((4, 5)), 1.0):
        with pytest.raises(ConfigError, match=r"the observation space, \[\(4,\)\].*got \["):
            policy(wrong)


def test_a_training_that_does_not_fit_the_memory_is_refused_before_it_allocates(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(device_memory, "limit", lambda device: 2**20)
    config = CONFIG.replace(num_envs=1024, total_timesteps=8 * 1024)
    with pytest.raises(ConfigError) as error:
        ppo_jax.train(config, run_dir=tmp_path / "run", progress=False)
    message = str(error.value)
    assert message.startswith("a training must fit the memory of its device; 1024 environments")
    assert "MiB of 1. About" in message
    assert list((tmp_path / "run").iterdir()) == []
    # The suggestion fits.
    fitting = int(message.split("About ")[1].split()[0])
    assert fitting % 8 == 0
    smaller = config.replace(num_envs=fitting)
    assert ppo_jax.train(smaller, progress=False, eval_episodes=2).timesteps > 0


def test_an_environment_whose_files_cannot_be_had_is_one_sentence():
    def factory():
        raise URLError("Name or service not known")

    envs.register("needs_a_download", factory, overwrite=True)
    with pytest.raises(ConfigError, match="needs_a_download reads or downloads some when it is"):
        envs.make("needs_a_download")
