import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import ppo_jax
from ppo_jax import Config, HParams, cli, flags
from ppo_jax.algorithms import ALGORITHMS
from ppo_jax.cli import _parse, main
from ppo_jax.commands.common import new_run_dir
from ppo_jax.config import MemoryKind
from ppo_jax.defaults import OPTIMIZERS
from ppo_jax.envs import suites
from ppo_jax.envs.wrappers import WRAPPERS
from ppo_jax.runs.directory import RunDirectory
from ppo_jax.stages.optimizers import SCHEDULES

SMALL = ["--num-envs", "4", "--num-steps", "16", "--hidden-sizes", "8", "--eval-episodes", "3"]


def test_train_then_eval_then_resume(tmp_path, capsys):
    path = str(tmp_path / "run")
    arguments = ["--total-timesteps", "200", "--run-dir", path, "--learning-rate", "3e-4"]
    assert main(["train", "CartPole-v1", *SMALL, *arguments, "--seeds", "2"]) == 0
    out, err = capsys.readouterr()
    assert "200 steps are not a whole number of updates of 64: training takes 192 in all." in err
    assert "evaluation of seed 1: return" in out
    assert "over 3 greedy episodes" in out
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["config"]["num_envs"] == 4
    assert record["hparams"]["learning_rate"] == 3e-4
    assert record["hparams"]["value_clip_eps"] == 0.2  # the preset's, not overridden

    assert main(["eval", path, "--episodes", "2", "--actions", "sampled"]) == 0
    assert "over 2 sampled episodes" in capsys.readouterr().out

    assert main(["train", "CartPole-v1", *SMALL, *arguments]) == 2
    assert "must be new or empty" in capsys.readouterr().err

    assert main(["resume", path, "--num-devices", "3"]) == 2
    assert "num_envs must be divisible by num_devices; got 4 and 3" in capsys.readouterr().err
    assert main(["resume", path, "--total-timesteps", "256", "--eval-episodes", "2"]) == 0
    out = capsys.readouterr().out
    assert "trained CartPole-v1 with ppo: 128 steps" in out  # 64 more of each seed
    assert "over 2 greedy episodes" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --mesh env=2,env=2", "such as env=4,member=2; got env=2,env=2"),
        ("train --mesh env:2", "such as env=4,member=2; got env:2"),
        (
            "train --mesh member=2",
            r"\(the mesh axis member\) divides seeds; got 2 and no num_seeds",
        ),
        ("train --mesh env=2 --num-devices 4", "same setting; got 4 and 2. Leave one out"),
        ("train --mesh env=3", "num_envs must be divisible by num_devices; got 8 and 3"),
        ("sweep --mesh env=0", "such as env=4,member=2; got env=0"),
        ("train --seeds 2 --mesh member=0", "such as env=4,member=2; got member=0"),
        ("sweep --search pbt --mesh env=2", "--mesh does not go with --search. Leave it out"),
        ("sweep --search pbt --learning-rate 1e-4,1e-3 --num-devices 2", "must be 1 in a search"),
    ],
)
def test_a_mesh_that_does_not_fit_is_named(words, message, tmp_path, capsys):
    command, *options = words.split()
    assert main([command, "CartPole-v1", *options, "--run-dir", str(tmp_path / "run")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["resume", "sweep"])
def test_deterministic_operations_are_asked_for(command, tmp_path, monkeypatch, capsys):
    directory = RunDirectory.create(tmp_path / "run", overwrite=False)
    directory.write_config(Config(num_envs=4), HParams(), seeds=[0])
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    # Both are refused afterwards: there is no checkpoint, and no seed.
    arguments = {"resume": [str(directory.path)], "sweep": ["--seeds", "0"]}
    assert main([command, *arguments[command], "--deterministic"]) == 2
    assert os.environ["XLA_FLAGS"].split()[1:] == ["--xla_gpu_deterministic_ops=true"]


def test_a_diverged_training_is_an_error(tmp_path, capsys):
    path = str(tmp_path / "run")
    arguments = ["--total-timesteps", "640", "--learning-rate", "1e30", "--run-dir", path]
    assert main(["train", "CartPole-v1", *SMALL, *arguments, "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert "ppo-jax: error: seed 0 failed with update" in err
    assert "; the first quantity that is not finite is " in err
    assert "Try a lower learning_rate" in err
    assert f"run: {path}" in out


def test_a_file_of_settings_is_between_the_preset_and_the_flags(tmp_path):
    file, path = tmp_path / "settings.yaml", tmp_path / "run"
    file.write_text(
        "env: CartPole-v1\ntotal_timesteps: 1e3\nnum_steps: 32\nlearning_rate: 1e-3\n"
        "hidden_sizes: [16, 8]\nseparate_grad_norms: true\n"
    )
    arguments = ["--config", str(file), *SMALL, "--hidden-sizes", "8x8", "--run-dir", str(path)]
    assert main(["train", *arguments, "--total-timesteps=1.28e2"]) == 0
    record = json.loads((path / "config.json").read_text())
    config, hparams = record["config"], record["hparams"]
    assert config["env"] == "CartPole-v1"
    assert config["total_timesteps"] == 128  # of two that are given, the flag
    assert (config["num_steps"], config["hidden_sizes"]) == (16, [8, 8])
    assert config["separate_grad_norms"] is True  # of the file only
    assert hparams["learning_rate"] == 1e-3
    assert hparams["value_clip_eps"] == 0.2  # of the preset only


@pytest.mark.parametrize("name", ["run", "run/config.json"])
def test_the_settings_of_a_run_are_used_again(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = ["CartPole-v1", *SMALL, "--total-timesteps", "128", "--env-params", "gravity", "9.0"]
    first += ["--learning-rate", "3e-3", "--target-kl", "0.5", "--run-dir", "run"]
    assert main(["train", *first, "--quiet"]) == 0
    config, hparams = ppo_jax.load_config("run")
    assert (config.env_params, hparams.target_kl) == ((("gravity", 9.0),), 0.5)
    again = ["--config", name, "--seed", "1", "--total-timesteps", "256", "--run-dir", "again"]
    assert main(["train", *again, "--quiet"]) == 0
    found, same = ppo_jax.load_config("again")
    assert (found, same) == (config.replace(total_timesteps=256), hparams)
    # Not those of the preset, where the run has None.
    ppo_jax.train(
        Config(num_envs=2, num_steps=8, total_timesteps=64),
        run_dir="plain",
        eval_episodes=2,
        progress=False,
    )
    command = _parse(["train", "--config", "plain"])
    assert command.config.config == ppo_jax.load_config("plain")[0]
    assert main(["train", "--config", "plain", "--algorithm", "trpo"]) == 2


@pytest.mark.parametrize(
    ("words", "env", "rate"),
    [
        ("Acrobot-v1", "Acrobot-v1", 3e-3),
        ("--run-dir Acrobot-v1", "Pendulum-v1", 5e-4),
        ("--run-dir=Acrobot-v1 CartPole-v1", "CartPole-v1", 1e-3),
        ("--quiet Acrobot-v1", "Acrobot-v1", 3e-3),  # behind an option, but not its value
        ("--run-dir 8x8 --hidden-sizes 8x4 --total-timesteps 1e3", "Pendulum-v1", 5e-4),
    ],
)
def test_the_environment_is_the_word_that_names_it(words, env, rate, tmp_path, monkeypatch):
    """Not a directory of that name; and the preset is that of the environment."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.yaml").write_text("env: Pendulum-v1\n")
    command = _parse(["train", "--config", "settings.yaml", *words.split()])
    assert (command.config.env, command.hparams.learning_rate) == (env, rate)
    if "8x8" in words:
        assert command.run_dir == Path("8x8")
        assert (command.config.hidden_sizes, command.config.total_timesteps) == ((8, 4), 1000)


def test_ctrl_c_ends_a_command_without_a_traceback(monkeypatch, capsys):
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_parse", interrupted)
    assert main(["eval", "run"]) == 130
    assert capsys.readouterr().err == "ppo-jax: stopped\n"


def test_every_option_of_a_sweep_is_a_setting():
    command = _parse(["sweep", "CartPole-v1"])
    assert vars(command.space).keys() <= {*vars(Config()), *flags.hparam_names()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1e-3", "unknown setting 'learning_rat'. Did you mean learning_rate"),
        ("learning_rate: 1e-3,1e-2", "a single value of every setting"),
        ("gamma: 2.0", "gamma"),
        ("- 1", "must map settings to values"),
        ("env: 5", "env must be a name; .*settings.yaml gives 5"),
        ("algorithm:", "algorithm must be a name; .*settings.yaml gives None"),
        ("gamma: 2023-01-01", r"must be a number, .* got gamma=datetime.date\(2023, 1, 1\)"),
        ("optimizer_kwargs: {eps: abc}", "optax.adam must be a number .* got eps='abc' and 1e-08"),
        (
            "env_params: {length: abc}",
            "of CartPole-v1 must be a number .* got length='abc'",
        ),
    ],
)
def test_a_file_of_settings_is_checked(text, message, tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    path = str(tmp_path / "run")
    assert main(["train", "CartPole-v1", "--config", str(file), "--run-dir", path]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_sweep_is_no_training_for_a_directory_named_train(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.yaml").write_text("learning_rate: 1e-3,1e-2")
    words = ["--hidden-sizes", "8x8,16x16", "--config", "space.yaml", "--run-dir", "train"]
    assert main(["sweep", "CartPole-v1", *words, "--seeds", "0"]) == 2
    assert "seeds must be one or more" in capsys.readouterr().err


def test_run_directories_of_the_same_second_differ():
    names = {new_run_dir("brax:hopper", "ppo_seed3").name for _ in range(20)}
    assert len(names) == 20
    assert all(name.startswith("brax-hopper_ppo_seed3_") for name in names)


def test_a_preset_belongs_to_an_algorithm(capsys):
    """Without one the algorithm's own defaults hold: PPO's would set what reinforce cannot use."""
    path = ["--run-dir", "/nowhere/x"]
    assert main(["train", "Acrobot-v1", "--algorithm=reinforce", *path]) == 2
    assert "whole episodes: num_steps must be at least" in capsys.readouterr().err
    with_preset = ["train", "CartPole-v1", "--algorithm", "reinforce", "--num-steps", "7", *path]
    assert main(with_preset) == 2
    assert "got 7 and 500" in capsys.readouterr().err


def test_envs_lists_what_can_be_trained(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(suites.Suite, "is_installed", property(lambda self: self.module == "brax"))

    def said(*words):
        assert main(["envs", *words]) == 0
        return capsys.readouterr().out

    out = said()
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert rows["brax"][1:3] == ["12", "yes"]
    assert rows["pgx"][1:3] == ["20", "no"]
    out = said("--suite", "gymnax")
    assert "CartPole-v1" in out
    assert "500,000 steps" in out
    assert "hopper" not in out
    out = said("TIC")
    assert "pgx:tic_tac_toe" in out
    assert "CartPole" not in out
    assert "pip install 'ppo-jax[pgx]'" in out
    out = said("cartpole-v1", "--spaces")
    assert "float32 4" in out
    assert "2 values" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "CartPol-v1"], "unknown environment 'CartPol-v1'. Did you mean CartPole-v1"),
        (["train", "CartPole-v1", "--num-minibatches", "3"], "Try 2 or 4."),
        (["train", "CartPole-v1", "--gamma", "nan"], "gamma must be in [0, 1]; got nan."),
        (["train", "CartPole-v1", "--num-envs", "0"], "num_envs must be a positive integer"),
        (["eval", "/nowhere"], "a run's directory must hold config.json; /nowhere does not exist."),
        (["train", "--resume"], "--resume continues the run in a directory; got no --run-dir."),
        (["sweep", "--run-dir", "/dev/null/x", "--seeds", "1"], "must be a directory that can be"),
        (["eval", "/nowhere", "--episodes", "0"], "episodes must be a positive integer; got 0."),
    ],
)
def test_a_wrong_setting_is_one_sentence_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_an_unknown_flag_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "CartPole-v1", "--num-envz", "3"])
    assert exit_info.value.code == 2
    assert "--num-envs" in capsys.readouterr().err


def help_of(arguments, capsys):
    """The text of a command's help without its frame, by option."""
    with pytest.raises(SystemExit):
        main([*arguments, "--help"])
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    options = re.sub(r", --no-[\w-]+", "", words).split(" --")
    return {option.split()[0]: option for option in options[1:]}


def test_every_setting_is_an_explained_option(capsys):
    options = help_of(["train"], capsys)
    for cls in (Config, HParams):
        for field in dataclasses.fields(cls):
            if field.name != "env":
                assert len(options[field.name.replace("_", "-")]) > 40, field.name


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_help_shows_the_resolved_defaults_of_the_preset(command, capsys):
    options = help_of([command, "CartPole-v1"], capsys)
    assert "(default: 8)" in options["num-envs"]  # of the preset
    assert "(default: 0.001)" in options["learning-rate"]
    assert "(default: 4)" in options["num-minibatches"]  # of the algorithm
    assert "(default: 0.95)" in options["gae-lambda"]
    assert "(not used by ppo)" in options["max-kl"]
    assert "(not used with lr_schedule linear)" in options["desired-kl"]
    options = help_of([command, "Pendulum-v1", "--algorithm=trpo"], capsys)
    assert "(default: 32)" in options["num-envs"]
    assert "(not used by trpo)" in options["learning-rate"]
    assert "(default: 0.01)" in options["max-kl"]


def test_help_shows_the_resolved_defaults_of_a_file(tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text("algorithm: trpo\nmax_kl: 0.02\nlr_schedule: kl_adaptive\n")
    options = help_of(["train", "CartPole-v1", "--config", str(file)], capsys)
    assert "(default: 0.02)" in options["max-kl"]
    assert "(default: 0.01)" in options["desired-kl"]


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_help_shows_the_choices(command, capsys):
    options = {name: text.replace(", ", ",") for name, text in help_of([command], capsys).items()}
    for name, choices in {
        "algorithm": ALGORITHMS,
        "optimizer": OPTIMIZERS,
        "lr-schedule": SCHEDULES,
        "network": ["mlp", "cnn", "impala_cnn"],
        "memory": get_args(MemoryKind),
    }.items():
        assert all(choice in options[name] for choice in choices), name
    if command == "train":
        assert all(name in options["wrappers"] for name in WRAPPERS)


def test_a_sweep_of_algorithms_leaves_defaults_to_them(capsys):
    options = help_of(["sweep", "CartPole-v1", "--algorithm", "ppo,trpo"], capsys)
    assert "(default: the algorithm's)" in options["max-kl"]
    assert "(default: 8)" in options["num-envs"]


@pytest.mark.parametrize("is_on", [True, False])
def test_compiled_programs_are_kept_unless_the_cache_is_off(is_on, tmp_path):
    environment = {k: x for k, x in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    if not is_on:
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    small = "--num-envs 2 --num-steps 8 --total-timesteps 16 --num-minibatches 2 --quiet"
    command = [sys.executable, "-m", "ppo_jax", "train", "CartPole-v1", *small.split()]
    command += ["--eval-episodes", "1", "--run-dir", str(tmp_path / "run")]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    folder = tmp_path / "cache" / "ppo_jax" / "compiled"
    assert (folder.is_dir() and any(folder.iterdir())) == is_on


def test_an_imported_algorithm_brings_its_options(tmp_path, monkeypatch, capsys):
    (tmp_path / "rolled_back.py").write_text(ROLLED_BACK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    command = ["--import", "rolled_back", "train", "CartPole-v1", "--algorithm", "rolled_back"]
    try:
        options = help_of(command, capsys)
        assert "Slope of the objective" in options["rollback"]
        assert "(default: 0.3)" in options["rollback"]
        assert ",rolled_back}" in options["algorithm"]
        assert main([*command, "--rollback", "2"]) == 2
        assert "rollback must be in [0, 1]; got 2.0." in capsys.readouterr().err
        assert main(["train", "CartPole-v1", "--algorithm", "rolled"]) == 2
        assert "Did you mean rolled_back" in capsys.readouterr().err
    finally:
        ALGORITHMS.pop("rolled_back")


def test_a_closed_pipe_is_no_traceback():
    command = f"{sys.executable} -m ppo_jax train --help | head -1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert result.stdout.startswith("usage:")
    assert result.stderr == ""


ROLLED_BACK = '''
import dataclasses
from typing import Any

from ppo_jax import HParams, hyperparameter
from ppo_jax.algorithms import ALGORITHMS, register_algorithm


@dataclasses.dataclass(frozen=True)
class RollbackHParams(HParams):
    rollback: Any = hyperparameter(high=1.0)
    """Slope of the objective outside of the clip range."""


ppo = ALGORITHMS["ppo"]
hparams = {**ppo.hparams, "rollback": 0.3}
row = ppo._replace(hparams=hparams, hparams_type=RollbackHParams)
register_algorithm("rolled_back", row)
'''
