"""Environments that are stepped on the host: their data, trainings, failures and refusals."""

import multiprocessing
import os
import signal

import gymnasium
import jax
import numpy as np
import pytest

import ppo_jax
from ppo_jax import Config, ConfigError, HParams, cli, envs, make_env, make_trainer
from ppo_jax.algorithms import ALGORITHMS
from ppo_jax.envs.checks import example
from ppo_jax.envs.host import HostError
from ppo_jax.envs.spaces import Box, Dict, Discrete, MultiDiscrete, Tuple
from ppo_jax.policy.policy import Policy
from ppo_jax.policy.spec import init_params, make_spec
from ppo_jax.results.render import play
from ppo_jax.runs import periodic_evaluation
from ppo_jax.runs.host_evaluation import evaluate_on_host
from ppo_jax.stages import host_rollout
from tests import host_envs

N, T = 4, 12
COUNTING = "gymnasium:tests.host_envs:Counting-v0"
CARTPOLE = "gymnasium:CartPole-v1"


def counting(**changes):
    return Config(
        **{"env": COUNTING, "num_envs": N, "num_steps": T, "total_timesteps": 4 * N * T} | changes
    )


def untrained(config, env):
    spec = make_spec(config, env)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), example(env.observation_space, (N,)))
    return Policy(init_params(spec, jax.random.key(3), zeros), spec=spec)


def rollouts_of(config, num_groups):
    """Returns two consecutive rollouts of an untrained policy."""
    env = make_env(config)
    policy = untrained(config, env)
    groups = [env.host.make_envs(N // num_groups) for _ in range(num_groups)]
    try:
        before = host_rollout.reset(groups, 40, policy.initial_recurrent_state((N,)))
        rollouts = []
        for key in jax.random.split(jax.random.key(1)):
            rollouts.append(host_rollout.rollout(groups, policy, before, key, num_steps=T))
            before = rollouts[-1].after
        return rollouts
    finally:
        for envs in groups:
            envs.close()


def with_processes(config):
    return config.replace(env_kwargs={**dict(config.env_kwargs), "vectorization": "async"})


@pytest.mark.parametrize("env", [COUNTING, "gymnasium:tests.host_envs:Reusing-v0"])
@pytest.mark.parametrize("num_groups", [1, 2])
def test_a_rollout_has_the_true_successors_and_the_right_ends(num_groups, env):
    rollouts = rollouts_of(counting(env=env), num_groups)
    trajectory = jax.tree.map(lambda *x: np.concatenate(x), *(r.trajectory for r in rollouts))
    for i in range(N):
        # Episodes of three and of four steps in turn; seeds of the environments are consecutive.
        expected = [
            (40 + i, episode, time)
            for episode in range(1, 2 * T)
            for time in range(3 if episode % 2 else 4)
        ]
        np.testing.assert_array_equal(rollouts[1].after.obs[i], expected[2 * T])
        assert rollouts[1].after.episode_length[i] == expected[2 * T][-1]
        expected = expected[: 2 * T]
        np.testing.assert_array_equal(trajectory.obs[:, i], expected)
        successors = [(seed, episode, time + 1) for seed, episode, time in expected]
        np.testing.assert_array_equal(trajectory.final_obs[:, i], successors)
        ends = [(episode % 2, time) for _, episode, time in expected]
        np.testing.assert_array_equal(trajectory.terminated[:, i], [x == (1, 2) for x in ends])
        np.testing.assert_array_equal(trajectory.truncated[:, i], [x == (0, 3) for x in ends])
    # The environment adds up its actions, which start at 5.
    np.testing.assert_array_equal(trajectory.reward, trajectory.action + 5)
    assert {0, 1} == set(np.unique(trajectory.action))
    for rollout in rollouts:
        assert rollout.ended.num_episodes == rollout.trajectory.done.sum()
    total = sum(r.ended.return_sum for r in rollouts) + rollouts[1].after.episode_return.sum()
    np.testing.assert_allclose(total, trajectory.reward.sum())


def test_images_with_their_channels_first_are_transposed():
    config = counting(env="gymnasium:tests.host_envs:Frames-v0", network="minatar_cnn")
    trajectory = rollouts_of(config, 1)[0].trajectory
    assert trajectory.obs.shape == (T, N, 6, 5, 2)
    assert trajectory.final_obs.shape == trajectory.obs.shape
    np.testing.assert_array_equal(trajectory.obs[:, 0, 2, 4, 1], np.arange(T) % 3)
    np.testing.assert_array_equal(trajectory.final_obs[:, 0, 2, 4, 1], np.arange(T) % 3 + 1)
    assert trajectory.obs[..., :4, :].sum() == trajectory.obs[..., 0].sum() == 0


def test_processes_change_no_number():
    found = [rollouts_of(config, 2) for config in (counting(), with_processes(counting()))]
    jax.tree.map(np.testing.assert_array_equal, *found)
    # The groups draw different numbers from each other.
    action = found[0][0].trajectory.action
    assert not np.array_equal(action[:, : N // 2], action[:, N // 2 :])


def test_successors_are_those_of_gymnasium_where_a_limit_cuts_an_episode():
    config = Config(env=CARTPOLE, env_kwargs={"max_episode_steps": 5}, num_envs=N, num_steps=T)
    first, _ = rollouts_of(config, 2)
    trajectory = first.trajectory
    assert not trajectory.terminated.any()  # no pole falls in five steps
    np.testing.assert_array_equal(np.flatnonzero(trajectory.truncated[:, 0]), [4, 9])
    for i in range(N):
        env = gymnasium.make("CartPole-v1", max_episode_steps=5)
        obs, _ = env.reset(seed=40 + i)
        for t in range(T):
            np.testing.assert_array_equal(trajectory.obs[t, i], obs)
            obs, *_ = env.step(int(trajectory.action[t, i]))
            np.testing.assert_array_equal(trajectory.final_obs[t, i], obs)
            if trajectory.truncated[t, i]:
                obs, _ = env.reset()
        env.close()


SPACES = {
    "Box": (host_envs.Counting, {}, Box((3,)), Discrete(2)),
    "entries": (
        host_envs.Entries,
        {},
        Dict.of(
            {"image": Box((4, 4, 1), "uint8"), "rest": Tuple((Discrete(3), Box((2,), "bool")))}
        ),
        MultiDiscrete((2, 3)),
    ),
    "continuous": (
        host_envs.Entries,
        {"actions": "continuous"},
        None,
        Box((2,), low=(np.float32(-0.1),) * 2, high=(np.float32(0.1),) * 2),
    ),
    "flags": (host_envs.Entries, {"actions": "flags"}, None, MultiDiscrete((2, 2, 2))),
}


@pytest.mark.parametrize("case", SPACES)
def test_spaces_are_converted(case):
    made, kwargs, observation_space, action_space = SPACES[case]
    env = envs.make(f"gymnasium:tests.host_envs:{made.__name__}-v0", **kwargs)
    assert observation_space in (None, env.observation_space)
    assert env.action_space == action_space


ENTRIES = "gymnasium:tests.host_envs:Entries-v0"
CASES = {
    **{name: counting(algorithm=name, num_steps=T) for name in ALGORITHMS},
    "normalised": counting(normalize_obs=True, normalize_reward=True),
    "gru": counting(memory="gru", memory_size=4, num_minibatches=2),
    "odd": counting(num_envs=3, total_timesteps=4 * 3 * T, num_minibatches=1),
    "entries": counting(env=ENTRIES),
    "continuous": counting(
        env=ENTRIES, env_kwargs={"actions": "continuous"}
    ),  # it checks the bounds
    "flags": counting(env=ENTRIES, env_kwargs={"actions": "flags"}),
    "half bounded": counting(env=ENTRIES, env_kwargs={"actions": "half"}),
}


def test_acting_is_compiled_once():
    act = host_rollout.act
    config = counting(memory="gru", memory_size=4, num_minibatches=2, hidden_sizes=(7,))
    before = act._cache_size()
    ppo_jax.train(config, eval_episodes=2, progress=False)
    # Once for the training, and once for the evaluation, which has fewer environments.
    assert act._cache_size() == before + 2


@pytest.mark.parametrize("case", CASES)
def test_everything_trains_and_the_same_seed_gives_the_same_numbers(case):
    config = CASES[case]
    runs = [ppo_jax.train(config, eval_episodes=2, progress=False) for _ in range(2)]
    assert runs[0].timesteps == config.total_timesteps
    for name, values in runs[0].metrics.items():
        if name.startswith("train/"):
            assert np.isfinite(values).all(), name
    policies = [jax.tree.leaves(run.policy) for run in runs]
    jax.tree.map(np.testing.assert_array_equal, *policies)


def test_an_evaluation_fixes_the_number_of_episodes_of_each_environment():
    config = counting(env="gymnasium:tests.host_envs:BySeed-v0")
    run = ppo_jax.train(config, eval_episodes=2, eval_every=2, progress=False)
    assert len(run.evaluations) == 2
    env = make_env(config)
    for num_episodes in (1, 16, 53):
        result = evaluate_on_host(run.policy, env, jax.random.key(0), num_episodes)
        assert result.returns.shape == (num_episodes,)
        assert result.finished.all()
        if num_episodes == 53:
            # Sixteen environments of consecutive seeds, with lengths of 2 to 6 in turn: one length
            # is that of four environments, and others of three. The first five play four episodes.
            counts = np.bincount(np.asarray(result.lengths), minlength=7)[2:]
            assert sorted(counts) == [10, 10, 10, 10, 13]
        np.testing.assert_array_equal(result.returns, result.lengths)


def test_an_episode_without_an_end_does_not_hold_up_an_evaluation():
    config = counting(env="gymnasium:tests.host_envs:Endless-v0")
    env = make_env(config)
    result = evaluate_on_host(untrained(config, env), env, jax.random.key(0), 20, max_steps=5)
    assert not result.finished.any()
    np.testing.assert_array_equal(result.returns, np.full(20, 5.0))


def test_a_training_with_nan_rewards_fails_in_one_sentence():
    config = counting(env="gymnasium:tests.host_envs:NotANumber-v0", max_skipped_updates=1)
    with pytest.warns(RuntimeWarning, match="a rollout on the host cannot be repeated"):
        ppo_jax.train(config, eval_episodes=1, progress=False)


def test_cartpole_is_learned():
    config = Config(
        env=CARTPOLE,
        num_envs=8,
        num_steps=128,
        total_timesteps=100_000,
        num_epochs=4,
        num_minibatches=4,
    )
    run = ppo_jax.train(config, HParams(learning_rate=1e-3), eval_episodes=32, progress=False)
    assert run.evaluation.returns.mean() >= 400


def test_the_tasks_of_a_suite_on_the_host_are_listed(capsys):
    assert cli.main(["envs", "--suite", "gymnasium"]) == 0
    assert "gymnasium:CartPole-v1" in capsys.readouterr().out


def test_a_run_is_saved_continued_and_evaluated_by_commands(tmp_path, capsys):
    folder = str(tmp_path / "run")
    command = ["train", CARTPOLE, "--num-envs", "8", "--num-steps", "16", "--run-dir", folder]
    assert cli.main([*command, "--total-timesteps", "1280", "--eval-episodes", "4"]) == 0
    assert cli.main(["resume", folder, "--total-timesteps", "2560"]) == 0
    assert cli.main(["eval", folder, "--episodes", "4"]) == 0
    assert "return" in capsys.readouterr().out
    policy = ppo_jax.load(folder)
    assert policy(np.zeros(4, np.float32)) in (0, 1)


HOT = "ValueError: the motor is hot. The training"
FAILURES = {
    "raise": ({}, f"an environment failed in a step: {HOT}"),
    "raise-async": ({"vectorization": "async"}, f"an environment failed in a step: {HOT}"),
    "raise-reset": ({"in_reset": True}, f"an environment failed in a step: {HOT}"),
    "kill": ({"vectorization": "async"}, "the process of an environment ended"),
    "hang": ({"vectorization": "async", "timeout": 2.0}, "an environment must answer in 2 seconds"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failing_environment_ends_the_run_with_a_checkpoint(case, tmp_path):
    kwargs, message = FAILURES[case]
    fixed = tmp_path / "fixed"
    failing = {"how": case.split("-")[0], "at": 2 * T + 5, "fixed": str(fixed)}
    config = counting(env="gymnasium:tests.host_envs:Failing-v0", env_kwargs={**failing, **kwargs})
    folder = tmp_path / "run"
    with pytest.raises(HostError, match=message) as caught:
        ppo_jax.train(config, run_dir=folder, eval_episodes=2, progress=False)
    assert "resume continues it" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()
    assert list((folder / "checkpoints").iterdir())
    fixed.touch()
    run = ppo_jax.resume(folder, progress=False)
    assert run.timesteps == config.total_timesteps
    assert 0 < run.timesteps_before < run.timesteps


def test_a_failure_in_an_evaluation_keeps_the_training(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise HostError("the room is cold.")

    monkeypatch.setattr(periodic_evaluation, "evaluate_on_host", fail)
    with pytest.raises(
        HostError, match=f"cold. The training ended after {2 * N * T} steps; resume"
    ):
        ppo_jax.train(counting(), run_dir=tmp_path / "run", eval_every=2, progress=False)
    monkeypatch.undo()
    assert ppo_jax.resume(tmp_path / "run", progress=False).timesteps_before == 2 * N * T


def test_processes_are_closed_and_leave_the_signals_of_the_training_alone(tmp_path):
    config = with_processes(
        counting(env="gymnasium:tests.host_envs:WithChild-v0", env_kwargs={"folder": str(tmp_path)})
    )
    handlers = [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)]
    ppo_jax.train(config, eval_episodes=1, progress=False)
    assert handlers == [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)]
    assert not multiprocessing.active_children()
    # The environments of processes; those of this one only describe the spaces.
    notes = [x for x in tmp_path.iterdir() if not x.name.startswith(f"{os.getpid()}-")]
    assert len(notes) == N + 1
    assert {x.read_text() for x in notes} == {"closed"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ppo_jax.train(counting(), num_seeds=2),
            r"num_seeds \(--seeds\) needs an environment in JAX",
        ),
        (
            lambda: ppo_jax.train(counting(wrappers={"time_limit": 3})),
            "wrappers needs an environment in JAX.*its own suite",
        ),
        (lambda: ppo_jax.train(counting(reset_pool=4)), "reset_pool needs an environment in JAX"),
        (lambda: make_trainer(counting()).init(jax.random.key(0)), "is stepped on the host"),
        (lambda: envs.make("gymnasium:Cartpole-v7"), "a name that Gymnasium has registered"),
        (lambda: envs.make(CARTPOLE, vectorization="none"), "unknown vectorization 'none'"),
        (lambda: envs.make(CARTPOLE, timeout=3.0), "timeout must be positive, and needs processes"),
        (lambda: envs.make("gymnasium:nowhere:X-v0"), "there is no nowhere.*--import nowhere for"),
        (
            lambda: play(None, make_env(counting()), None, max_steps=9),
            "drawn in an environment in JAX; gymnasium:t",
        ),
        (lambda: envs.make("gymnasium:a:b:c"), "a name that Gymnasium has registered"),
        (lambda: envs.make(ENTRIES, actions="bytes"), "actions must be integers or floating"),
        (lambda: ppo_jax.train(counting(), debug_nans=True), "debug_nans repeats an update"),
        (lambda: envs.make("gymnasiums:CartPole-v1"), "unknown environment"),
        (lambda: make_env(counting(env_kwargs={"colour": 1})), "env_kwargs must be"),
        (
            lambda: make_trainer(counting(algorithm="reinforce", env=CARTPOLE)),
            "needs whole episodes.*max_episode_steps; got 12 and 500.*env_kwargs",
        ),
    ],
)
def test_what_the_host_cannot_do_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
