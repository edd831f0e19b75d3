"""Faults at the edges of a run, each forced alone; `test_resume` stops and damages whole runs."""

import json
import math
import resource
import signal
from pathlib import Path
from types import SimpleNamespace

import filelock
import jax
import numpy as np
import pytest

from ppo_jax import Config, ConfigError, HParams, make_trainer
from ppo_jax.commands.training import ProcessOptions, _run_training
from ppo_jax.population.member import Guard
from ppo_jax.runs import checkpoint, failure, files
from ppo_jax.runs.checkpoint_writer import CheckpointWriter
from ppo_jax.runs.chunk_checkpoints import ChunkCheckpoints
from ppo_jax.runs.compiled_population import best_of
from ppo_jax.runs.directory import RunDirectory
from ppo_jax.runs.metrics_file import MetricsFile
from ppo_jax.runs.periodic_evaluation import Best
from ppo_jax.runs.sweep_store import SweepStore

CONFIG = Config(num_envs=2, num_steps=8, hidden_sizes=(4,), total_timesteps=32)


@pytest.fixture
def directory(tmp_path):
    found = RunDirectory.create(tmp_path / "run", overwrite=False)
    found.write_config(CONFIG, HParams(gamma=0.9), seeds=[0, 1])
    return found


@pytest.mark.parametrize("name", ["max_grad_norm", "value_clip_eps", "target_kl"])
def test_infinite_hyperparameters_are_read_as_they_were_written(name, tmp_path):
    directory = RunDirectory.create(tmp_path / "run", overwrite=False)
    hparams = HParams(**{name: math.inf})
    directory.write_config(CONFIG, hparams, seeds=0)
    assert getattr(directory.read_config()[1], name) == math.inf
    directory.require_same_run(CONFIG, hparams, 0)


def test_a_best_policy_is_kept_although_another_seed_has_no_score(directory):
    trainer = make_trainer(CONFIG)
    states = jax.jit(jax.vmap(trainer.init))(jax.random.split(jax.random.key(0), 2))
    best = Best(trainer.policy(states), np.array([-np.inf, 3.0]), np.array([0, 6]))
    directory.write_best(best)
    found = directory.read_best()
    np.testing.assert_array_equal(found.returns, best.returns)
    np.testing.assert_array_equal(found.updates, best.updates)


def test_a_nan_is_never_the_best_score():
    assert best_of(np.array([1.0, np.nan, 2.0])) == 2
    assert best_of(np.array([2.0, 1.0, 2.0, 2.0])) == 0
    assert best_of(np.array([2.0, 1.0, 2.0, 2.0]), ties=np.array([1.0, 9.0, 3.0, 3.0])) == 2
    store = SweepStore(None)
    for score in (math.nan, 1.0, math.nan, 0.5):
        store.offer_policy(score, score, member=None, config=None)
    assert (store.best_policy, store.best_score) == (1.0, 1.0)


def found_failure(monkeypatch, quantity, operation, *, debug_nans=True):
    """Returns the failure of one seed whose diagnoses give these results."""

    def diagnosis(result):
        def diagnose(*_):
            if isinstance(result, Exception):
                raise result
            return result

        return lambda _: diagnose

    monkeypatch.setattr(failure, "make_diagnosis", diagnosis(quantity))
    monkeypatch.setattr(failure, "make_operation_finder", diagnosis(operation))
    find = failure.failure_finder(CONFIG, HParams(), [7], debug_nans=debug_nans)
    guard = Guard(np.zeros(1), np.array([2]))
    return find(SimpleNamespace(key=np.zeros(())), np.array([False]), guard)[0]


def test_a_diagnosis_that_fails_does_not_end_the_training(monkeypatch):
    found = found_failure(monkeypatch, MemoryError(), None)
    assert found.update == 3
    assert "is not known, because its search failed with MemoryError" in str(found)
    found = found_failure(monkeypatch, None, "the operation div")
    assert "is a gradient after the first gradient step; the operation div made the" in str(found)


def test_rows_that_do_not_fit_the_disk_are_written_once_there_is_space(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.append([{"update": 1, "a": math.inf}])
    size = path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Half of the first row fits.
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            file.append([{"update": i} for i in range(2, 20)])
        with pytest.raises(OSError, match="not written yet"):
            file.sync()  # a checkpoint must not be ahead of them
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == '{"update": 1, "a": "inf"}\n'
    file.append([{"update": 20, "a": math.nan}])
    file.sync()
    assert [row["update"] for row in MetricsFile(path).read()] == list(range(1, 21))
    file.cut_back(2)
    assert MetricsFile(path).read() == [{"update": 1, "a": math.inf}, {"update": 2}]


def test_a_damaged_row_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"update": 1}\n{"upd\xffte": 2}\n{"update": 3}\n')
    assert [row["update"] for row in MetricsFile(path).read()] == [1, 3]
    MetricsFile(path).cut_back(9)
    assert path.read_text() == '{"update": 1}\n{"update": 3}\n'


def test_a_run_that_was_killed_at_once_leaves_a_directory_that_can_be_used(tmp_path):
    (tmp_path / ".config.json.unfinished").write_text("{")
    RunDirectory.check(tmp_path, overwrite=False)
    (tmp_path / "notes").write_text("")
    with pytest.raises(ConfigError, match="holds files"):
        RunDirectory.check(tmp_path, overwrite=False)


@pytest.mark.parametrize(("num_failures", "status"), [(0, 143), (1, 143), (2, 1)])
def test_a_stopped_run_is_continued_unless_all_its_seeds_failed(num_failures, status, capsys):
    result = SimpleNamespace(
        timesteps=32,
        timesteps_before=0,
        seeds=(0, 1),
        run_seconds=1.0,
        evaluation_seconds=0.0,
        evaluations=(),
        compile_seconds=1.0,
        failures=("seed failed",) * num_failures,
        unwritten=(),
        evaluation=None,
        run_dir=Path("nowhere"),
        signal=signal.SIGTERM,
        is_stopped=False,
    )
    assert _run_training(lambda: result, CONFIG, ProcessOptions()) == status
    assert ("stopped after 32 steps of each seed" in capsys.readouterr().out) == (status == 143)


@pytest.mark.parametrize("calls", [1, 2])
def test_a_directory_is_replaced_by_a_whole_one_or_not_at_all(calls, tmp_path, monkeypatch):
    path = tmp_path / "best"
    files.write_directory(path, {"a": b"old"})
    replace, left = files.os.replace, [calls]

    def killed(*arguments):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        replace(*arguments)

    with monkeypatch.context() as context:
        context.setattr(files.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            files.write_directory(path, {"a": b"new"})
    files.mend(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["best"]
    assert (path / "a").read_bytes() == b"old"
    files.write_directory(path, {"a": b"new"})
    assert [entry.name for entry in tmp_path.iterdir()] == ["best"]
    assert (path / "a").read_bytes() == b"new"


def test_double_precision_is_not_cut_silently(tmp_path):
    template = {"x": jax.ShapeDtypeStruct((2,), np.float32)}
    with pytest.raises(ConfigError, match=r"x float64\[2\] instead of float32\[2\].*ENABLE_X64"):
        checkpoint.unflatten(template, {"x": np.zeros(2)}, {}, tmp_path)


def test_whatever_ends_the_writing_of_a_checkpoint_is_told(tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(checkpoint, "write", fail)
    writer = CheckpointWriter(tmp_path, 1e-9)
    writer.save(3, {"x": np.zeros(2)}, {})
    writer.wait()
    assert writer.error == f"{tmp_path / '000000000003'} could not be written: MemoryError"


def test_a_failed_checkpoint_of_a_finished_chunk_is_forgotten(tmp_path, monkeypatch):
    checkpoints = ChunkCheckpoints(tmp_path, 1e-9)
    with monkeypatch.context() as context:
        context.setattr(checkpoint.files, "write_directory", lambda *_: 1 / 0)
        checkpoints.save(1, {"x": np.zeros(2)}, {})
        with pytest.warns(RuntimeWarning, match="ZeroDivisionError.*The sweep goes on"):
            checkpoints.save(2, {"x": np.zeros(2)}, {})
        assert "could not be written" in checkpoints.finish()
    checkpoints.clear()
    assert checkpoints.finish() is None


def test_a_run_is_compared_with_the_defaults_that_it_had(directory):
    path = directory.path / "config.json"
    record = json.loads(path.read_text())
    # A setting that an earlier version did not know has its default.
    del record["config"]["max_skipped_updates"]
    path.write_text(json.dumps(record))
    directory.require_same_run(CONFIG, HParams(gamma=0.9), [0, 1])
    with pytest.raises(ConfigError, match=r"max_skipped_updates \(was 10, now 5\)"):
        directory.require_same_run(
            CONFIG.replace(max_skipped_updates=5), HParams(gamma=0.9), [0, 1]
        )
    record["resolved"]["num_epochs"] = 99
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"num_epochs \(was 99, now"):
        directory.require_same_run(CONFIG, HParams(gamma=0.9), [0, 1])


def test_a_sweep_writes_nothing_into_a_directory_of_another_process(tmp_path):
    lock = filelock.FileLock(tmp_path / ".lock")
    opened = SweepStore.opened(tmp_path, {"seeds": [0]})
    with lock, pytest.raises(ConfigError, match="one process at a time"), opened:
        pass
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == []
    (tmp_path / "file").write_text("")
    opened = SweepStore.opened(tmp_path / "file" / "sweep", {"seeds": [0]})
    with pytest.raises(ConfigError, match="must be a directory that can be written"), opened:
        pass
