"""Suites whose environments are stepped on the host by threads: ale-py and EnvPool.

`make test-suites` installs EnvPool, whose files take 600 MB, and runs these tests.
"""

import gc
import json
import os

import jax
import numpy as np
import pytest

import ppo_jax
from ppo_jax import Config, ConfigError, cli, envs, make_env, presets
from ppo_jax.envs.host import HostError
from ppo_jax.envs.spaces import Box, Dict, Discrete
from ppo_jax.envs.suites import HOST_SUITES
from ppo_jax.runs.host_evaluation import evaluate_on_host
from ppo_jax.stages import host_rollout
from tests.test_host import untrained

N = 2
LIVES = {
    "ale:Breakout": {"life_loss_info": True},
    "envpool:Breakout-v5": {"episodic_life": True},
}
MS_PACMAN = {
    "ale:MsPacman": {},
    "envpool:MsPacman-v5": {"reward_clip": True},
}
LIMITS = {
    "ale:Pong": {"max_num_frames_per_episode": 38},
    "envpool:Pong-v5": {"max_episode_steps": 10},
    "envpool:CartPole-v1": {"max_episode_steps": 5},
}


def each(names):
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                not HOST_SUITES[name.partition(":")[0]].is_installed,
                reason=f"pip install 'ppo-jax[{name.partition(':')[0]}]'",
            ),
        )
        for name in names
    ]


def config_of(name, kwargs, **changes):
    small = {"network": "cnn", "conv_layers": ((4, 8, 8),)} if "CartPole" not in name else {}
    return Config(
        **{"env": name, "env_kwargs": kwargs, "num_envs": N, "hidden_sizes": (8,)} | small | changes
    )


def play(name, kwargs, num_steps, groups=1):
    """Returns a trajectory of an untrained policy."""
    config = config_of(name, kwargs, num_steps=num_steps)
    env = make_env(config)
    made = [env.host.make_envs(N // groups) for _ in range(groups)]
    policy = untrained(config, env)
    state = host_rollout.reset(made, 3, None)
    key = jax.random.key(0)
    rollout = host_rollout.rollout(made, policy, state, key, num_steps=num_steps)
    for group in made:
        group.close()
    return rollout.trajectory


@pytest.mark.parametrize("name", each(LIVES))
def test_successors_are_true_where_a_life_or_a_game_ends(name):
    ends = []
    for kwargs in ({}, LIVES[name]):
        trajectory = play(name, kwargs, 400)
        assert trajectory.obs.shape == (400, N, 84, 84, 4)
        # The stack moves by one frame a step, also where an episode ends.
        np.testing.assert_array_equal(trajectory.final_obs[..., :3], trajectory.obs[..., 1:])
        moves = (trajectory.final_obs[..., 3] != trajectory.obs[..., 3]).any((-1, -2))
        assert moves.mean() > 0.8
        goes_on = ~trajectory.done[:-1]
        successors = trajectory.final_obs[:-1][goes_on]
        np.testing.assert_array_equal(trajectory.obs[1:][goes_on], successors)
        assert not trajectory.truncated.any()
        ends.append(trajectory.terminated.sum())
    # A game has five lives. Where one is lost, the game goes on, and so does the stack of frames:
    # at once, or after a step without an action in EnvPool.
    assert 2 <= ends[0] < ends[1] / 3
    ended = trajectory.terminated[:-1]
    before, after = trajectory.final_obs[:-1][ended], trajectory.obs[1:][ended]
    moved = (after[..., :3] == before[..., 1:]).all((-1, -2, -3))
    goes_on = moved | (after == before).all((-1, -2, -3))
    assert 1 <= (~goes_on).sum() < goes_on.sum() / 3


@pytest.mark.parametrize("name", each(LIMITS))
def test_a_limit_truncates(name):
    trajectory = play(name, LIMITS[name], 25)
    steps = envs.make(name, **LIMITS[name]).longest_episode(())
    assert steps in (5, 10)
    expected = (np.arange(25) % steps == steps - 1)[:, None]
    np.testing.assert_array_equal(trajectory.truncated, np.broadcast_to(expected, (25, N)))
    assert not trajectory.terminated.any()


@pytest.mark.parametrize("name", each(["envpool:CartPole-v1"]))
def test_successors_follow_from_the_physics(name):
    trajectory = play(name, {"max_episode_steps": 15}, 100, groups=2)
    assert trajectory.terminated.any()
    assert trajectory.truncated.any()
    # Cart and pole move by a fiftieth of a second of their speeds, also in the last step.
    for place, speed in ((0, 1), (2, 3)):
        moved = trajectory.obs[..., place] + 0.02 * trajectory.obs[..., speed]
        np.testing.assert_allclose(trajectory.final_obs[..., place], moved, rtol=0, atol=1e-6)
    # A new episode starts near the middle, and not where the last one ended.
    firsts = trajectory.obs[1:][trajectory.done[:-1]]
    assert (np.abs(firsts) <= 0.05).all()
    ends = np.abs(trajectory.final_obs[trajectory.terminated])
    assert ((ends[:, 0] > 2.4) | (ends[:, 2] > 0.2)).all()


@pytest.mark.parametrize("name", each(MS_PACMAN))
def test_an_evaluation_plays_whole_games_for_their_own_rewards(name):
    trajectory = play(name, MS_PACMAN[name], 60)
    assert trajectory.reward.max() == 1.0
    config = config_of(name, MS_PACMAN[name])
    env = make_env(config)
    found = evaluate_on_host(untrained(config, env), env, jax.random.key(1), 2, greedy=False)
    assert found.finished.all()
    # A dot is worth 10 points. A game with three lives has at least a hundred steps.
    assert (found.returns >= 60).all()
    assert (found.returns % 10 == 0).all()
    assert (found.lengths > 100).all()


@pytest.mark.parametrize("name", each(LIMITS))
def test_the_same_seed_gives_the_same_training(name, tmp_path):
    config = config_of(name, LIMITS[name], num_steps=8, total_timesteps=3 * 8 * N)
    runs = []
    for i in range(2):
        folder = tmp_path / str(i)
        runs.append(ppo_jax.train(config, run_dir=folder, eval_episodes=1, progress=False))
        assert np.isfinite(runs[-1].metrics["train/policy_loss"]).all()
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.leaves(run.policy) for run in runs))
    assert ppo_jax.resume(folder, total_timesteps=6 * 8 * N, progress=False).timesteps == 6 * 8 * N


SPACES = {
    "ale:Breakout": ({}, Box((84, 84, 4), "uint8"), Discrete(4)),
    "ale:Pong": (
        {"grayscale": False, "stack_num": 2, "full_action_space": True},
        Box((84, 84, 6), "uint8"),
        Discrete(18),
    ),
    "envpool:Breakout-v5": ({}, Box((84, 84, 4), "uint8"), Discrete(4)),
    "envpool:CarRacing-v3": (
        {},
        Box((96, 96, 3), "uint8"),
        Box((3,), low=(-1.0, 0.0, 0.0), high=(1.0, 1.0, 1.0)),
    ),
    "envpool:CheetahRun-v1": (
        {},
        Dict.of({"position": Box((8,)), "velocity": Box((9,))}),
        Box((6,), low=(-1.0,) * 6, high=(1.0,) * 6),
    ),
    # EnvPool gives numbers without bounds the limits of their type.
    "envpool:D1Basic-v1": ({}, Box((84, 84, 4), "uint8"), Box((3,))),
    "envpool:FrozenLake-v1": ({}, Discrete(16), Discrete(4)),
}


@pytest.mark.parametrize("name", each(SPACES))
def test_spaces_are_those_of_the_environments(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # ViZDoom leaves its settings in the current folder
    kwargs, observation_space, action_space = SPACES[name]
    env = envs.make(name, **kwargs)
    assert env.observation_space == observation_space
    assert env.action_space == action_space
    made = env.host.make_envs(2)
    obs = made.reset(2**31 - 1)  # the next seed is too large for them
    for leaf, x in zip(envs.spaces.leaves(observation_space), jax.tree.leaves(obs), strict=True):
        assert x.shape == (2, *envs.spaces.shape_of(leaf))
        assert x.dtype == envs.spaces.dtype_of(leaf)
    if name == "envpool:D1Basic-v1":
        convert = envs.gymnasium_spaces.action_converter(made._envs.action_space)
        np.testing.assert_array_equal(convert(np.full((2, 3), -7.0)), np.full((2, 3), -7.0))
    made.close()


REFUSED = {
    "ale:Brekout": ({}, "Did you mean Breakout.*ppo-jax envs --suite ale"),
    "ale:Warlords": ({}, "unknown game"),  # ale-py would end the process
    "ale:Breakout": ({"num_envs": 3}, "env_kwargs must not have num_envs"),
    "ale:Pong": ({"frameskip": 0}, "env_kwargs must be what AtariVectorEnv takes"),
    "ale:Boxing": ({"stack_num": 0}, "stack_num must be a positive integer"),
    "ale:Tennis": ({"colour": 1}, "env_kwargs must be what"),
    "envpool:Pongg-v5": ({}, "Did you mean Pong-v5"),
    "envpool:Pong-v5": ({"seed": 3}, "env_kwargs must not have seed"),
    "envpool:Boxing-v5": ({"mode": 99}, "env_kwargs must be what EnvPool takes"),
    "envpool:Tennis-v5": ({"colour": 1}, "env_kwargs must be what EnvPool takes"),
    "envpool:TicTacToe-v1": ({}, "must have one player"),
}


@pytest.mark.parametrize("name", each(REFUSED))
def test_what_a_suite_cannot_make_is_refused(name):
    kwargs, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        envs.make(name, **kwargs)


@pytest.mark.parametrize("name", each(["ale:Pong", "envpool:Breakout-v5", "envpool:Pong-v5"]))
def test_presets_are_made_and_keep_what_they_are_given(name):
    config, hparams = presets.preset(name, env_kwargs={"frame_stack_is_not_a_name": 1})
    assert len(config.env_kwargs) >= 2  # the preset's, and the one that is given
    config, hparams = presets.preset(name)
    env = make_env(config)
    assert env.observation_space == Box((84, 84, 4), "uint8")
    assert hparams.clip_eps == 0.1


@pytest.mark.parametrize("name", each(["ale:Pong"]))
def test_arguments_of_the_command_are_added_to_those_of_the_preset(name, tmp_path):
    folder = tmp_path / "run"
    command = ["train", name, "--env-kwargs", "max_num_frames_per_episode", "40"]
    small = ["--num-steps", "8", "--total-timesteps", "128", "--eval-episodes", "1"]
    network = ["--network", "mlp", "--hidden-sizes", "8"]
    assert cli.main([*command, *small, *network, "--run-dir", str(folder), "--quiet"]) == 0
    config = json.loads((folder / "config.json").read_text())["config"]
    expected = {"life_loss_info": True, "max_num_frames_per_episode": 40}
    assert dict(config["env_kwargs"]) == expected


@pytest.mark.parametrize("name", each(["ale:Pong"]))
def test_wrong_actions_are_one_sentence(name):
    made = envs.make(name).host.make_envs(2)
    made.reset(0)
    with pytest.raises(HostError, match="an environment failed in a step"):
        made.send(np.zeros(3, np.int32))
    made.close()


@pytest.mark.parametrize("name", each(["ale:Pong", "envpool:Pong-v5"]))
def test_threads_are_closed(name):
    env = envs.make(name)

    def used():
        before = len(os.listdir("/proc/self/task"))
        made = env.host.make_envs(2)
        made.reset(0)
        during = len(os.listdir("/proc/self/task"))
        made.close()
        gc.collect()
        return during - before, len(os.listdir("/proc/self/task")) - before

    used()
    during, after = used()
    assert during > 0
    assert after == 0


@pytest.mark.parametrize("name", each(["ale:Pong", "envpool:CartPole-v1"]))
def test_whole_episodes_ask_for_the_limit_of_the_suite(name):
    limit = "max_num_frames_per_episode" if name.startswith("ale") else "max_episode_steps"
    with pytest.raises(ConfigError, match=f"needs whole episodes.*lower {limit} in env_kwargs"):
        ppo_jax.make_trainer(Config(env=name, algorithm="reinforce", num_steps=8))


@pytest.mark.parametrize("name", each(["ale:MontezumaRevenge", "envpool:MontezumaRevenge-v5"]))
def test_tasks_are_listed(name, capsys):
    assert cli.main(["envs", "--suite", name.partition(":")[0]]) == 0
    assert name in capsys.readouterr().out
