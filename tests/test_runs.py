import collections
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import ppo_jax
from ppo_jax import Config, ConfigError, HParams, envs, make_trainer, trainer
from ppo_jax.envs.spaces import Box, Discrete
from ppo_jax.population import member
from ppo_jax.population.search_space import LogUniform
from ppo_jax.runs import kept, lock, periodic_evaluation, progress, training
from ppo_jax.runs.directory import RunDirectory
from ppo_jax.runs.interrupt import deferred_interrupt
from ppo_jax.runs.metrics_log import MetricsLog
from ppo_jax.runs.trained import evaluate_run
from ppo_jax.stages.metrics import Metrics
from tests.conftest import exact_jit
from tests.test_checkpoint import assert_same_bits

pytestmark = pytest.mark.xdist_group("runs")

CONFIG = Config(num_envs=4, num_steps=16, hidden_sizes=(8,), total_timesteps=64 * 11)
HPARAMS = HParams(learning_rate=1e-3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    kept.forget()
    with pytest.MonkeyPatch.context() as patch:
        # A test compares its bits with those of another program.
        patch.setattr(training, "jax", SimpleNamespace(**{**vars(jax), "jit": exact_jit}))
        run = ppo_jax.train(
            CONFIG,
            HPARAMS,
            seed=3,
            run_dir=tmp_path_factory.mktemp("runs") / "one",
            eval_episodes=5,
            log_every=2,
            progress=False,
        )
    kept.forget()
    return run


@pytest.fixture(scope="module")
def population(tmp_path_factory):
    return ppo_jax.train(
        CONFIG,
        HPARAMS,
        seed=3,
        num_seeds=2,
        run_dir=tmp_path_factory.mktemp("runs") / "two",
        eval_episodes=5,
        progress=False,
    )


def rows_of(run):
    return [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def traces(monkeypatch):
    """The number of times that an update and an evaluation were traced."""
    kept.forget()
    count = collections.Counter()
    for module, name in (
        (trainer, "_step"),
        (periodic_evaluation, "evaluate"),
        (member, "evaluate"),
    ):
        function = getattr(module, name)

        def traced(*args, name=name, function=function, **kwargs):
            count[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, traced)
    yield count
    kept.forget()


@pytest.mark.parametrize("num_seeds", [None, 2])
def test_a_repeated_training_traces_nothing(num_seeds, traces, tmp_path):
    arguments = {"num_seeds": num_seeds, "progress": False, "eval_episodes": 2}
    first = ppo_jax.train(CONFIG, HPARAMS, run_dir=tmp_path / "run", **arguments)
    once = dict(traces)
    assert set(once) == {"_step", "evaluate"}
    other = ppo_jax.train(CONFIG, HPARAMS.replace(learning_rate=0.1), seed=5, **arguments)
    again = ppo_jax.train(Config(**vars(CONFIG)), HPARAMS, **arguments)
    ppo_jax.train(CONFIG, HPARAMS, run_dir=tmp_path / "run", resume=True, **arguments)
    assert traces == once
    assert_same_bits(first.state, again.state)
    assert_same_bits(first.evaluation, again.evaluation)
    assert not np.array_equal(first.evaluation.returns, other.evaluation.returns)
    ppo_jax.train(CONFIG.replace(num_epochs=1), HPARAMS, **arguments)
    assert traces["_step"] > once["_step"]


def test_a_repeated_sweep_traces_nothing(traces):
    arguments = {"seeds": 2, "progress": False, "eval_episodes": 2}
    first = ppo_jax.sweep(CONFIG, {"learning_rate": [1e-3, 1e-2]}, **arguments)
    once = dict(traces)
    assert set(once) == {"_step", "evaluate"}
    other = ppo_jax.sweep(CONFIG, {"learning_rate": [1e-4, 1e-3]}, **arguments)
    again = ppo_jax.sweep(CONFIG, {"learning_rate": [1e-3, 1e-2]}, **arguments)
    assert traces == once
    assert (first.members["eval/return"] == again.members["eval/return"]).all()
    assert not (first.members["eval/return"] == other.members["eval/return"]).all()


def test_a_user_s_environment_is_traced_again_for_it_may_read_variables(traces):
    bonus = 1.0
    env = ppo_jax.envs.make("CartPole-v1")

    def step(key, state, action, params):
        result = env.step(key, state, action, params)
        return result._replace(reward=result.reward * bonus)

    ppo_jax.envs.register("with-a-bonus", lambda: env._replace(step=step), overwrite=True)
    config, arguments = CONFIG.replace(env="with-a-bonus"), {"progress": False, "eval_episodes": 2}
    one = ppo_jax.train(config, HPARAMS, **arguments)
    bonus = 2.0
    two = ppo_jax.train(config, HPARAMS, **arguments)
    assert (one.evaluation.returns == one.evaluation.lengths).all()
    assert not kept._entries  # a user's environment may be large
    assert (two.evaluation.returns == 2 * two.evaluation.lengths).all()


def test_programs_of_the_last_four_configs_are_kept(traces):
    arguments = {"progress": False, "eval_episodes": 2}
    configs = [CONFIG.replace(total_timesteps=64 * updates) for updates in range(1, 6)]
    for config in configs:
        ppo_jax.train(config, HPARAMS, **arguments)
    once = dict(traces)
    ppo_jax.train(configs[1], HPARAMS, **arguments)
    assert traces == once
    ppo_jax.train(configs[0], HPARAMS, **arguments)
    assert traces["_step"] > once["_step"]
    one = configs[0].replace(env_params={"max_steps_in_episode": 9})
    same = [kept.trainer_of(one), kept.trainer_of(one)]
    assert same[0] is same[1]
    equal = one.replace(env_params={"max_steps_in_episode": 9.0})
    assert equal == one
    assert kept.trainer_of(equal) is not same[0]


@pytest.mark.slow
def test_a_watched_run_has_the_numbers_of_trainer_run_as_users_compile():
    code = (
        "import jax, ppo_jax\nfrom tests import test_runs as t\n"
        "run = ppo_jax.train(t.CONFIG, t.HPARAMS, seed=3, progress=False, eval_episodes=2)\n"
        "state, _ = jax.jit(ppo_jax.make_trainer(t.CONFIG).run)(jax.random.key(3), t.HPARAMS)\n"
        "t.assert_same_bits(run.state, state)\n"
    )
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=3"}
    command = [sys.executable, "-c", code]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent, env=environment)


def test_a_watched_run_has_the_numbers_of_trainer_run_bit_for_bit(run):
    trainer = make_trainer(CONFIG)
    state, metrics = exact_jit(trainer.run)(jax.random.key(3), HPARAMS)
    for ours, whole in zip(
        jax.tree.leaves(run.state.learner), jax.tree.leaves(state.learner), strict=True
    ):
        np.testing.assert_array_equal(ours, whole)
    rows = rows_of(run)
    assert [row["update"] for row in rows] == [2, 4, 6, 8, 10, 11]
    assert [row["timesteps"] for row in rows] == [128, 256, 384, 512, 640, 704]
    assert rows[1]["train/entropy"] == pytest.approx(float(metrics["train/entropy"][2:4].mean()))
    assert rows[-1]["train/entropy"] == pytest.approx(float(metrics["train/entropy"][10]))
    episodes = sum(row["episode/count"] for row in rows)
    assert episodes == metrics["episode/count"].sum()
    assert run.timesteps == 704


def test_what_a_run_writes_can_be_read(run):
    directory = RunDirectory.open(run.run_dir)
    (config, hparams), seeds = directory.read_config(), directory.read_seeds()
    assert config == CONFIG
    assert seeds == 3
    assert hparams.learning_rate == 1e-3
    assert hparams.gamma == 0.99  # the algorithm's defaults are written down too
    policy = ppo_jax.load(run.run_dir)
    obs = jnp.array([[0.1, 0.2, 0.3, 0.4], [-0.1, -0.2, -0.3, -0.4]])
    np.testing.assert_array_equal(policy.action_params(obs), run.policy.action_params(obs))
    record = json.loads((run.run_dir / "evaluation.json").read_text())
    assert record["episodes"] == 5
    assert record["eval/return"] == pytest.approx(float(run.evaluation.returns.mean()))
    again = evaluate_run(run.run_dir, seed=3, num_episodes=5)
    assert again["eval/return"] == pytest.approx(record["eval/return"])


def test_seeds_run_at_once_and_are_kept_apart(run, population):
    assert population.seeds == (3, 4)
    assert population.evaluation.returns.shape == (2, 5)
    np.testing.assert_allclose(
        np.concatenate([x[0].ravel() for x in jax.tree.leaves(population.policy)]),
        np.concatenate([x.ravel() for x in jax.tree.leaves(run.policy)]),
        atol=1e-4,
    )
    rows = rows_of(population)
    assert [(row["update"], row["seed"]) for row in rows[:4]] == [(1, 3), (1, 4), (2, 3), (2, 4)]
    for seed, index in ((None, 0), (3, 0), (4, 1)):
        policy = ppo_jax.load(population.run_dir, seed=seed)
        for ours, theirs in zip(
            jax.tree.leaves(policy), jax.tree.leaves(population.policy), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs[index])
    with pytest.raises(ConfigError, match="got 9. It has"):
        ppo_jax.load(population.run_dir, seed=9)
    result = evaluate_run(population.run_dir, num_episodes=4)
    assert [row["seed"] for row in result["seeds"]] == [3, 4]


def test_a_run_is_never_overwritten_unasked(run):
    def contents():
        return {path: path.read_bytes() for path in run.run_dir.rglob("*") if path.is_file()}

    before = contents()
    with pytest.raises(ConfigError, match="must be new or empty.*ppo-jax resume.*--overwrite"):
        ppo_jax.train(CONFIG, run_dir=run.run_dir, progress=False)
    assert contents() == before


def test_overwriting_replaces_a_runs_files_and_no_others(tmp_path):
    RunDirectory.create(tmp_path, overwrite=False).write_config(Config(), HPARAMS, seeds=0)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "metrics.jsonl").write_text("old")
    directory = RunDirectory.create(tmp_path, overwrite=True)
    # A training that cannot start replaces nothing.
    assert (tmp_path / "metrics.jsonl").read_text() == "old"
    directory.write_config(ppo_jax.Config(), ppo_jax.HParams(), seeds=0)
    directory.metrics.append([{"a": np.float32(1.5), "b": float("nan")}])
    assert (tmp_path / "metrics.jsonl").read_text() == '{"a": 1.5, "b": null}\n'
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(("name", "found"), [("config.json", "no run"), ("sweep.json", "a sweep")])
def test_overwriting_leaves_all_but_runs_alone(name, found, tmp_path):
    """Such as a project with checkpoints of its own, or the best run of a sweep."""
    (tmp_path / name).write_text("{}")
    for folder in ("checkpoints", "best"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.bin").write_text("mine")
    with pytest.raises(ConfigError, match=f"overwrite replaces the run.*holds.*{found}. Choose"):
        ppo_jax.train(CONFIG, run_dir=tmp_path, overwrite=True, progress=False)
    assert (tmp_path / "checkpoints" / "model.bin").exists()
    assert (tmp_path / "best" / "model.bin").exists()


def test_the_largest_seed_is_trained():
    run = ppo_jax.train(CONFIG, seed=2**32 - 1, eval_episodes=2, progress=False)
    state, _ = exact_jit(make_trainer(CONFIG).run)(jax.random.key(2**32 - 1))
    assert (run.seeds, run.state.updates_done) == ((2**32 - 1,), 11)
    np.testing.assert_array_equal(
        jax.random.key_data(run.state.key), jax.random.key_data(state.key)
    )
    with pytest.raises(ConfigError, match=f"a seed must be .* got {2**32}"):
        ppo_jax.train(CONFIG, seed=2**32 - 1, num_seeds=2, progress=False)


def test_spaces_of_numpy_integers_are_saved(tmp_path):
    """The shapes of gymnax's FlattenObservationWrapper hold NumPy integers."""

    class Flat(type(gymnax.make("CartPole-v1")[0])):
        def observation_space(self, params):
            space = super().observation_space(params)
            space.shape = (np.prod(space.shape),)
            return space

    def own():
        env = envs.make("CartPole-v1")
        return env._replace(
            observation_space=Box((np.int64(4),)), action_space=Discrete(np.int8(2))
        )

    for name, factory in {"numpy-gymnax": Flat, "numpy-own": own}.items():
        envs.register(name, factory)
        run = ppo_jax.train(
            CONFIG.replace(env=name), run_dir=tmp_path / name, eval_episodes=2, progress=False
        )
        assert ppo_jax.load(tmp_path / name)(jnp.zeros(4)) == run.policy(jnp.zeros(4))


def test_a_policy_that_cannot_be_saved_is_known_before_the_training(tmp_path, monkeypatch):
    def refuse(policy):
        raise TypeError("not serialisable")

    monkeypatch.setattr("ppo_jax.runs.run.encode_policy", refuse)
    with pytest.raises(TypeError, match="not serialisable"):
        ppo_jax.train(CONFIG, run_dir=tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_of_several_devices_is_evaluated_on_one(tmp_path):
    run = ppo_jax.train(CONFIG, run_dir=tmp_path / "run", eval_episodes=2, progress=False)
    path = run.run_dir / "config.json"  # as a machine with two devices writes it
    path.write_text(path.read_text().replace('"num_devices": 1', '"num_devices": 2'))
    assert RunDirectory.open(run.run_dir).read_config()[0].num_devices == 2
    assert evaluate_run(run.run_dir, num_episodes=3)["episodes"] == 3


def test_a_run_that_cannot_start_leaves_nothing(tmp_path):
    with pytest.raises(ConfigError, match="unknown environment"):
        ppo_jax.train(Config(env="CartPol-v1"), run_dir=tmp_path / "x", progress=False)
    assert not (tmp_path / "x").exists()
    for bad in ({"num_seeds": 0}, {"eval_episodes": 0}, {"log_every": 0}):
        with pytest.raises(ConfigError, match="must be a positive integer; got 0"):
            ppo_jax.train(CONFIG, run_dir=tmp_path / "x", progress=False, **bad)
    assert not (tmp_path / "x").exists()


def test_what_is_no_run_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"must hold config\.json"):
        ppo_jax.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        RunDirectory.create(tmp_path / "file", overwrite=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_between_pieces_and_keeps_what_was_learnt(number, tmp_path, request):
    config = CONFIG.replace(total_timesteps=64 * 1_000_000)
    path = tmp_path / "stopped"

    def press_when_training():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if (path / "metrics.jsonl").exists():
                signal.raise_signal(number)
                return
            time.sleep(0.05)

    received = []
    before = signal.signal(number, lambda *arguments: received.append(arguments))
    request.addfinalizer(lambda: signal.signal(number, before))
    thread = threading.Thread(target=press_when_training)
    thread.start()
    run = ppo_jax.train(config, run_dir=path, progress=False, log_every=1)
    thread.join()
    # The handler that the program had is called once everything is saved.
    assert [x for x, _ in received] == [number]
    assert run.evaluation is None
    assert 0 < run.timesteps < config.total_timesteps
    assert rows_of(run)[-1]["timesteps"] == run.timesteps
    assert ppo_jax.load(path)(jnp.zeros(4)) in (0, 1)


@pytest.mark.parametrize("kind", ["train", "sweep", "search"])
def test_ctrl_c_ends_a_script_that_trains_in_a_loop(kind, tmp_path, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    path = tmp_path / "stopped"
    config = CONFIG.replace(total_timesteps=64 * 1_000_000)
    common = {"run_dir": path, "progress": False, "checkpoint_every": 1e-3}
    space = {"learning_rate": LogUniform(1e-4, 1e-2)}
    call = {
        "train": lambda: ppo_jax.train(config, **common),
        "sweep": lambda: ppo_jax.sweep(config, space, num_draws=2, seeds=1, **common),
        "search": lambda: ppo_jax.search(
            config, space, method="pbt", num_members=4, num_rounds=10, **common
        ),
    }[kind]

    def press_when_there_is_a_checkpoint():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not list(path.glob("*/[0-9]*/manifest.json")):
            time.sleep(0.05)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=press_when_there_is_a_checkpoint)
    thread.start()
    with pytest.raises(KeyboardInterrupt) as stopped:
        call()
    thread.join()
    (note,) = stopped.value.__notes__
    result = stopped.value.result
    if kind == "train":
        assert note == f"ppo_jax.resume('{path}') continues the run."
        assert 0 < result.timesteps < config.total_timesteps
    else:
        assert note == f"The same call with run_dir='{path}' continues."
        assert not result.is_complete
    with lock.owned(path):  # the directory is free again
        pass


def test_a_second_ctrl_c_interrupts_at_once(request):
    # A process in a shell's background ignores Ctrl-C from its start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with deferred_interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_metrics_rows_are_means_over_windows_weighted_by_episodes():
    log = MetricsLog(seeds=[7], batch_size=10, log_every=2)

    def metrics(loss, returns, count):
        totals = {
            "train/policy_loss": np.array(loss)[:, None],
            "episode/return": (np.array(returns) * count)[:, None],
        }
        return Metrics(totals, np.ones((len(loss), 1)), np.array(count)[:, None])

    assert log.add(metrics([1.0], [0.0], [0])) == []
    (row,) = log.add(metrics([3.0, 5.0], [4.0, 8.0], [2, 6]))
    assert row["update"] == 2
    assert row["timesteps"] == 20
    assert row["seed"] == 7
    assert row["train/policy_loss"] == 2.0
    assert row["episode/return"] == 4.0
    assert row["episode/count"] == 2
    assert log.unfinished()[0]["episode/return"] == 8.0
    assert log.unfinished()[0]["update"] == 3
    (row,) = log.add(metrics([7.0], [0.0], [2]))
    assert row["train/policy_loss"] == 6.0
    assert row["episode/return"] == (8.0 * 6 + 0.0 * 2) / 8
    assert log.add(metrics([1.0], [0.0], [0])) == []
    assert np.isnan(log.unfinished()[0]["episode/return"])


def test_a_diverged_training_says_so_and_keeps_the_last_finite_policy(tmp_path):
    config, hparams = CONFIG.replace(max_skipped_updates=2), HParams(learning_rate=1e30)
    with pytest.warns(RuntimeWarning, match="seed 7 failed with update .* NaN or infinite"):
        run = ppo_jax.train(
            config, hparams, seed=7, run_dir=tmp_path / "run", log_every=1, progress=False
        )
    (failure,) = run.failures
    assert failure.seed == 7
    assert failure.timesteps == failure.update * 64
    # The first step makes parameters of 1e30; the update is skipped as a whole.
    assert failure.cause == "a gradient after the first gradient step"
    assert run.evaluation is None
    assert run.metrics["update"].max() == failure.update
    # Nothing was learnt in the last two updates.
    assert (run.metrics["train/skipped_fraction"] == 1.0).sum() == 2
    for x in jax.tree.leaves(ppo_jax.load(tmp_path / "run").params):
        assert np.isfinite(x).all()


def test_a_seed_that_failed_has_no_rows_of_later_windows():
    log = MetricsLog(seeds=[0, 1], batch_size=1, log_every=2)
    ones = np.ones((6, 2))
    rows = log.add(Metrics({"train/policy_loss": ones}, ones, ones), np.array([-1, 2]))
    assert [(row["update"], row["seed"]) for row in rows] == [
        (2, 0),
        (2, 1),
        (4, 0),
        (4, 1),
        (6, 0),
    ]


def test_a_run_has_its_learning_curve_and_a_short_repr(run, population):
    table = run.metrics
    on_disk = pd.DataFrame(rows_of(run))
    pd.testing.assert_frame_equal(table, on_disk[table.columns], check_dtype=False)
    assert list(table["update"]) == [2, 4, 6, 8, 10, 11]
    assert set(population.metrics["seed"]) == {3, 4}
    assert repr(run).startswith("Run(1 seed, 704 steps each in ")
    assert len(repr(population)) < 200
    axes = population.plot()
    assert axes.get_xlabel() == "environment steps"
    assert len(axes.lines) == 3  # two seeds and their mean
    assert len(run.plot().lines) == 1


def test_progress_is_lines_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    ppo_jax.train(CONFIG, eval_episodes=2)
    out, err = capsys.readouterr()
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert re.fullmatch(
        r"704 of 704 steps, [\d,]+ steps/s, return [\d.]+, 0:00:\d\d elapsed, 0:00:00 left", last
    )
    ppo_jax.train(CONFIG, eval_episodes=2, progress=False)
    assert capsys.readouterr().err == ""


def test_a_run_records_what_it_was_resolved_to_and_made_with(run):
    record = json.loads((run.run_dir / "config.json").read_text())
    assert record["config"]["num_epochs"] is None  # as it was asked for
    assert record["resolved"]["num_epochs"] == 4
    assert record["resolved"]["normalize_advantage"] == "minibatch"
    made_with = record["made_with"]
    assert made_with["versions"]["jax"] == jax.__version__
    assert made_with["versions"]["ppo-jax"] == ppo_jax.__version__
    assert made_with["platform"] == "cpu"
    assert datetime.datetime.fromisoformat(made_with["time"]).tzinfo is not None


def test_the_version_is_the_same_everywhere():
    root = Path(__file__).parent.parent
    assert f"\nversion: {ppo_jax.__version__}\n" in (root / "CITATION.cff").read_text()
