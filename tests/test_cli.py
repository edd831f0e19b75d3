import json

import pytest

from ppo_jax.cli import _new_run_dir, _spell_out, main

SMALL = ["--num-envs", "4", "--num-steps", "16", "--hidden-sizes", "8", "--eval-episodes", "3"]


def test_train_then_eval(tmp_path, capsys):
    path = str(tmp_path / "run")
    arguments = ["--total-timesteps", "200", "--run-dir", path, "--learning-rate", "3e-4"]
    assert main(["train", "CartPole-v1", *SMALL, *arguments, "--seeds", "2"]) == 0
    out, err = capsys.readouterr()
    assert "200 steps are not a whole number of updates of 64: 192 will run." in err
    assert "evaluation of seed 1: return" in out
    assert "over 3 greedy episodes" in out
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["config"]["num_envs"] == 4
    assert record["hparams"]["learning_rate"] == 3e-4
    assert record["hparams"]["value_clip_eps"] == 0.2  # the preset's, not overridden

    assert main(["eval", path, "--episodes", "2", "--sample"]) == 0
    assert "over 2 sampled episodes" in capsys.readouterr().out

    assert main(["train", "CartPole-v1", *SMALL, *arguments]) == 2
    assert "must be new or empty" in capsys.readouterr().err


def test_a_diverged_training_is_an_error(tmp_path, capsys):
    path = str(tmp_path / "run")
    arguments = ["--total-timesteps", "640", "--learning-rate", "1e30", "--run-dir", path]
    assert main(["train", "CartPole-v1", *SMALL, *arguments, "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert "ppo-jax: error: seed 0 diverged: update 1, after 64 steps" in err
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1e-3", "unknown setting 'learning_rat'. Did you mean learning_rate"),
        ("learning_rate: 1e-3,1e-2", "a single value of every setting"),
        ("gamma: 2.0", "gamma"),
        ("- 1", "must map settings to values"),
    ],
)
def test_a_file_of_settings_is_checked(text, message, tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    assert main(["train", "CartPole-v1", "--config", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_a_sweep_is_no_training_for_a_directory_named_train(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.yaml").write_text("learning_rate: 1e-3,1e-2")
    words = ["--hidden-sizes", "8x8,16x16", "--config", "space.yaml", "--run-dir", "train"]
    assert main(["sweep", "CartPole-v1", *words, "--seeds", "0"]) == 2
    assert "seeds must be one or more" in capsys.readouterr().err
    assert _spell_out(["sweep", "--hidden-sizes", "8x8", *words[4:]])[2] == "8x8"


def test_run_directories_of_the_same_second_differ():
    names = {_new_run_dir("brax:hopper", "ppo_seed3").name for _ in range(20)}
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


def test_envs_lists_what_can_be_trained(capsys):
    assert main(["envs"]) == 0
    out = capsys.readouterr().out
    assert "CartPole-v1" in out
    assert "500,000 steps" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "CartPol-v1"], "unknown environment 'CartPol-v1'. Did you mean CartPole-v1"),
        (["train", "CartPole-v1", "--num-minibatches", "3"], "Try 2 or 4."),
        (["train", "CartPole-v1", "--gamma", "nan"], "gamma must be in [0, 1]; got nan."),
        (["train", "CartPole-v1", "--num-envs", "0"], "num_envs must be a positive integer"),
        (["eval", "/nowhere"], "a run's directory must hold config.json; /nowhere does not."),
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


def test_every_setting_is_an_explained_flag(capsys):
    import dataclasses

    from ppo_jax import Config, HParams

    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    for cls in (Config, HParams):
        for field in dataclasses.fields(cls):
            if field.name != "env":
                flag = f"--{field.name.replace('_', '-')}"
                assert f"{flag} " in out or f"{flag}, --no-" in out, flag
