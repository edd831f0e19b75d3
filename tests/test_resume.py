"""Runs that are stopped, killed and damaged, and go on as if nothing had happened."""

import functools
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import filelock
import jax
import numpy as np
import pandas as pd
import pytest

import ppo_jax
from ppo_jax import Config, ConfigError, HParams
from ppo_jax.runs import checkpoint, checkpoint_writer, files, sweep_store, trained
from ppo_jax.runs import run as runs
from ppo_jax.runs import search as searches
from ppo_jax.runs import sweep as sweeps
from ppo_jax.runs.checkpoint_writer import find_newest, list_checkpoints
from ppo_jax.runs.directory import RunDirectory
from ppo_jax.runs.periodic_evaluation import make_evaluate
from tests.test_checkpoint import KINDS, SMALL, assert_same_bits

pytestmark = pytest.mark.xdist_group("resume")

CONFIG = Config(**{**SMALL, "total_timesteps": 9 * 16})
ROOT = Path(__file__).parent.parent


class StopsAfter:
    """Takes the place of `Interrupt`: a signal comes after some pieces."""

    def __init__(self, pieces):
        self.left, self.signal = pieces, None

    @property
    def requested(self):
        self.left -= 1
        if self.left < 0:
            self.signal = signal.SIGTERM
        return self.left < 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def deliver(self, result, _):
        return result


def stop_after(patch, pieces, module=runs):
    """Sets the number of pieces after which trainings are stopped; None for never."""
    limit = 10**9 if pieces is None else pieces
    patch.setattr(module, "deferred_interrupt", lambda: StopsAfter(limit))


@pytest.fixture
def stopped_after(monkeypatch):
    return functools.partial(stop_after, monkeypatch)


def train(config, path, **arguments):
    # Windows of four updates, which pieces of 1, 2, 4, … cut at several places.
    common = {"log_every": 4, "eval_episodes": 2, "progress": False}
    return ppo_jax.train(config, run_dir=path, **{**common, **arguments})


def rows_of(path, name="metrics.jsonl"):
    rows = [json.loads(line) for line in (path / name).read_text().splitlines()]
    # What a run did does not depend on how long it took.
    return [{name: x for name, x in row.items() if not name.startswith("time/")} for row in rows]


def assert_same_run(one, other):
    assert_same_bits(one.state, other.state)
    assert rows_of(one.run_dir) == rows_of(other.run_dir)
    times = ["time/steps_per_second", "time/seconds"]
    pd.testing.assert_frame_equal(
        one.metrics.drop(columns=times), other.metrics.drop(columns=times), check_exact=True
    )
    names = ["policy/state.safetensors", "evaluation.json"]
    if (one.run_dir / "best").exists():
        evaluations = "evaluations.jsonl"
        assert rows_of(one.run_dir, evaluations) == rows_of(other.run_dir, evaluations)
        names.append("best/state.safetensors")
    for name in names:
        assert (one.run_dir / name).read_bytes() == (other.run_dir / name).read_bytes()


def check_resume(config, tmp_path, stopped_after, **arguments):
    arguments = {"eval_every": 3, **arguments}
    whole = train(config, tmp_path / "whole", **arguments)
    stopped_after(1)
    path = tmp_path / "stopped"
    run = train(config, path, **arguments)
    count = 0
    while run.evaluation is None:
        assert run.signal == signal.SIGTERM
        count += 1
        stopped_after(1 + count % 2)
        run = train(config, path, resume=True, **arguments)
    assert count > 3
    assert_same_run(run, whole)
    assert list(run.evaluations["update"].unique()) == [3, 6, 9]
    return run


MIXED = [
    (
        {
            "normalize_obs": True,
            "normalize_reward": True,
            "memory": "gru",
            "num_minibatches": 2,
            "lr_schedule": "kl_adaptive",
            "wrappers": {"time_limit": 5, "sticky_actions": 0.25, "frame_stack": 2},
        },
        {"num_seeds": 2},
    ),
    ({"algorithm": "ppo_adaptive", "env": "Pendulum-v1", "optimizer": "rmsprop"}, {}),
]


@pytest.mark.parametrize(("kind", "arguments"), MIXED, ids=["seeds", "one"])
def test_a_run_that_was_stopped_again_and_again_ends_as_one_that_was_not(
    kind, arguments, tmp_path, stopped_after
):
    check_resume(CONFIG.replace(**kind), tmp_path, stopped_after, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, {"env": "brax:fast"}], ids=str)
@pytest.mark.parametrize("num_seeds", [None, 2])
def test_runs_of_every_kind_resume_exactly(kind, num_seeds, tmp_path, stopped_after):
    if kind.get("env") == "brax:fast":
        kind = {**kind, "env_params": {}}
    check_resume(CONFIG.replace(**kind), tmp_path, stopped_after, num_seeds=num_seeds)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_runs_resume_with_keys_of_any_implementation(implementation, tmp_path, stopped_after):
    with jax.default_prng_impl(implementation):
        check_resume(CONFIG, tmp_path, stopped_after, num_seeds=2)
    message = f"has {implementation}. Call jax.config.update"
    with pytest.raises(ConfigError, match=re.escape(message)):
        train(CONFIG, tmp_path / "stopped", resume=True, num_seeds=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of nine updates, with a schedule that does not depend on their number."""
    path = tmp_path_factory.mktemp("finished") / "run"
    config = CONFIG.replace(lr_schedule="constant")
    return train(config, path, checkpoint_every=1e-9)


def copied(finished, tmp_path):
    return Path(shutil.copytree(finished.run_dir, tmp_path / "run"))


def test_a_finished_run_is_extended_as_if_it_had_been_longer(finished, tmp_path):
    path = copied(finished, tmp_path)
    extended = ppo_jax.resume(path, total_timesteps=14 * 16, progress=False)
    assert (extended.timesteps_before, extended.timesteps) == (9 * 16, 14 * 16)
    config = CONFIG.replace(lr_schedule="constant", total_timesteps=14 * 16)
    assert_same_run(extended, train(config, tmp_path / "whole"))
    record = json.loads((path / "config.json").read_text())
    assert record["config"]["total_timesteps"] == 14 * 16
    assert [entry["updates"] for entry in record["continued"]] == [9]
    with pytest.raises(ConfigError, match="at least the steps that a run has done; got 160, and"):
        ppo_jax.resume(path, total_timesteps=160, progress=False)


def test_a_run_may_continue_with_other_logging_and_no_other_settings(finished, tmp_path):
    path = copied(finished, tmp_path)
    run = ppo_jax.resume(path, log_every=5, total_timesteps=14 * 16, progress=False)
    # Eight updates were logged; the window of the ninth has the new length.
    assert list(run.metrics["update"]) == [4, 8, 13, 14]
    config = CONFIG.replace(lr_schedule="constant", hidden_sizes=(8,), env="Acrobot-v1")
    message = (
        r"env \(was CartPole-v1, now Acrobot-v1\), hidden_sizes \(was \[4\], now \[8\]\), "
        r"gamma \(was 0.99, now 0.9\), seeds \(was 0, now 3\)"
    )
    with pytest.raises(ConfigError, match=message):
        train(config, path, hparams=HParams(gamma=0.9), seed=3, resume=True)


def test_a_resumed_run_with_nothing_to_resume_is_started(tmp_path, stopped_after):
    run = train(CONFIG, tmp_path / "run", resume=True)
    assert run.timesteps == 9 * 16
    # Killed before its first checkpoint, it starts again.
    shutil.rmtree(run.run_dir / "checkpoints")
    assert_same_run(train(CONFIG, run.run_dir, resume=True), run)
    without = train(CONFIG, tmp_path / "without", checkpoint_every=0)
    assert not (without.run_dir / "checkpoints").exists()
    with pytest.raises(ConfigError, match="checkpoint_every=0 and has none"):
        ppo_jax.resume(without.run_dir, checkpoint_every=60, progress=False)
    # As the best run of a sweep, which has no options.
    change_options(without.run_dir, lambda options: options.clear())
    with pytest.raises(ConfigError, match="a member of a sweep, and no checkpoint. Train with its"):
        ppo_jax.resume(without.run_dir, progress=False)


def change_options(path, change):
    record = json.loads((path / "config.json").read_text())
    change(record["options"])
    (path / "config.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resume": True}, "resume needs the run_dir"),
        ({"resume": True, "overwrite": True, "run_dir": "x"}, "continues a run and overwrite"),
        ({"checkpoint_every": -1}, "checkpoint_every must be a number of seconds.*got -1"),
        ({"checkpoint_every": float("nan")}, "checkpoint_every must be .*got nan"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        ppo_jax.train(CONFIG, **arguments)


def test_the_newest_two_checkpoints_are_kept(finished):
    names = [path.name for path in list_checkpoints(finished.run_dir / "checkpoints")]
    assert len(names) == 2
    assert names[-1] == f"{9 * 16:012d}"
    found = ppo_jax.load_state(finished.run_dir / "checkpoints" / names[-1])
    assert_same_bits(found.state, finished.state)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(finished, tmp_path):
    path = copied(finished, tmp_path)
    older, newest = list_checkpoints(path / "checkpoints")
    content = bytearray((newest / "state.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "state.safetensors").write_bytes(content)
    with pytest.warns(
        RuntimeWarning, match=f"{newest.name} is damaged.*Training continues from .*{older.name}"
    ):
        run = ppo_jax.resume(path, progress=False)
    assert run.timesteps_before == int(older.name)
    assert_same_run(run, finished)
    for one in list_checkpoints(path / "checkpoints"):
        (one / "manifest.json").write_bytes(b"")
    with pytest.raises(ConfigError, match="from a checkpoint that is whole.*damaged.*damaged"):
        ppo_jax.resume(path, progress=False)


def test_a_checkpoint_that_cannot_be_read_is_named_and_the_one_before_is_used(
    finished, tmp_path, monkeypatch
):
    path = copied(finished, tmp_path)
    older, newest = list_checkpoints(path / "checkpoints")
    read = checkpoint.read

    def fail_or_read(where):
        if where == newest:
            raise OSError(5, "Input/output error")
        return read(where)

    monkeypatch.setattr(checkpoint, "read", fail_or_read)
    with pytest.warns(RuntimeWarning, match=f"{newest.name} cannot be read: Input/output error"):
        assert ppo_jax.resume(path, progress=False).timesteps_before == int(older.name)


def test_a_state_that_is_no_checkpoint_of_a_run_is_refused(finished, tmp_path):
    path = copied(finished, tmp_path)
    foreign = path / "checkpoints" / "000000999999"
    ppo_jax.save_state(foreign, finished.state, CONFIG, HParams())
    with pytest.raises(ConfigError, match="from a checkpoint of a run; .*999999 is not one"):
        ppo_jax.resume(path, progress=False)


def test_a_damaged_best_policy_does_not_stop_a_run(finished, tmp_path):
    path = copied(finished, tmp_path)
    shutil.copytree(path / "policy", path / "best")
    (path / "best" / "manifest.json").write_text("{}")
    with pytest.warns(RuntimeWarning, match="best is damaged.*The best policies start again"):
        run = ppo_jax.resume(path, total_timesteps=12 * 16, eval_every=3, progress=False)
    assert RunDirectory.open(path).read_best().updates == [12]
    assert list(run.evaluations["update"]) == [12]


def test_other_versions_and_devices_are_told(finished, tmp_path, monkeypatch):
    path = copied(finished, tmp_path)
    describe = checkpoint_writer.provenance.describe

    def other(*arguments):
        found = describe(*arguments)
        versions = {**found["versions"], "jax": "99.0"}
        return {**found, "device_count": 7, "xla_flags": "--other", "versions": versions}

    monkeypatch.setattr(checkpoint_writer.provenance, "describe", other)
    message = (
        f"device_count 1, now 7; xla_flags .*, now --other; jax {jax.__version__}, now 99.0. .* "
        "may round differently"
    )
    with pytest.warns(RuntimeWarning, match=message):
        ppo_jax.resume(path, progress=False)


def test_a_directory_belongs_to_one_process_at_a_time(finished, tmp_path):
    path = copied(finished, tmp_path)
    message = "one process at a time; another one uses"
    with filelock.FileLock(path / ".lock"), pytest.raises(ConfigError, match=message):
        ppo_jax.resume(path, progress=False)
    ppo_jax.resume(path, progress=False)
    assert not (path / ".lock").exists()


class FullDisk:
    """Makes writes fail as a full disk does."""

    def __init__(self, monkeypatch, module, name):
        self.is_full = True
        write = getattr(module, name)

        def fail_or_write(*arguments, **keywords):
            if self.is_full:
                raise OSError(28, "No space left on device")
            return write(*arguments, **keywords)

        monkeypatch.setattr(module, name, fail_or_write)


def test_a_checkpoint_that_cannot_be_written_is_told_once_and_an_error_at_the_end(
    tmp_path, monkeypatch
):
    FullDisk(monkeypatch, checkpoint.files, "write_directory")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = train(CONFIG, tmp_path / "run", checkpoint_every=1e-9)
    # Once for the checkpoints, although each failed, and once for the policy.
    messages = [str(warning.message) for warning in caught]
    assert len([m for m in messages if "No space left on device. The training goes on" in m]) == 2
    assert run.evaluation is not None
    assert len(run.unwritten) == 2
    assert "000000000144 could not be written: No space left on device" in run.unwritten[0]
    assert list((run.run_dir / "checkpoints").glob(".*")) == []


def test_a_best_policy_that_could_not_be_written_is_written_later(tmp_path, monkeypatch):
    whole = train(CONFIG, tmp_path / "whole", eval_every=3)
    disk = FullDisk(monkeypatch, RunDirectory, "write_best")
    append = ppo_jax.runs.metrics_file.MetricsFile.append

    def append_and_clear(self, rows):
        append(self, rows)
        # There is space again after the last evaluation.
        disk.is_full &= "evaluations" not in self._path.name or self.read()[-1]["update"] < 9

    monkeypatch.setattr(ppo_jax.runs.metrics_file.MetricsFile, "append", append_and_clear)
    with pytest.warns(RuntimeWarning, match="the best policy in .* could not be written"):
        run = train(CONFIG, tmp_path / "run", eval_every=3)
    assert run.unwritten == ()
    assert_same_run(run, whole)


def test_a_training_that_raises_waits_for_its_checkpoint(tmp_path, monkeypatch):
    write, running = checkpoint.write, []

    def slow_write(*arguments):
        running.append(threading.current_thread())
        time.sleep(0.5)
        write(*arguments)

    def add(*_):
        if running:
            raise RuntimeError("a fault")
        return []

    monkeypatch.setattr(checkpoint, "write", slow_write)
    monkeypatch.setattr(runs.MetricsLog, "add", add)
    with pytest.raises(RuntimeError, match="a fault"):
        train(CONFIG, tmp_path / "run", checkpoint_every=1e-9)
    assert not running[0].is_alive()
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 1


def test_a_run_that_is_stopped_before_its_evaluation_is_evaluated_by_the_next(
    finished, tmp_path, monkeypatch
):
    path = copied(finished, tmp_path)
    interrupt = StopsAfter(10**9)
    finish = runs.RunWriter.finish

    def finish_and_stop(*arguments):
        finish(*arguments)
        interrupt.left = 0

    with monkeypatch.context() as context:
        context.setattr(runs, "deferred_interrupt", lambda: interrupt)
        context.setattr(runs.RunWriter, "finish", finish_and_stop)
        stopped = ppo_jax.resume(path, progress=False)
    assert (stopped.evaluation, stopped.signal) == (None, signal.SIGTERM)
    # It would be that of another policy, if the run had been extended.
    assert not (path / "evaluation.json").exists()
    assert_same_run(ppo_jax.resume(path, progress=False), finished)


def test_a_row_that_was_cut_off_is_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 1}\n{"update": 2}\n{"upda')
    ppo_jax.runs.metrics_file.MetricsFile(path).cut_back(9)
    assert path.read_text() == '{"update": 1}\n{"update": 2}\n'


def test_leftovers_of_killed_processes_are_removed(finished, tmp_path):
    path = copied(finished, tmp_path)
    newest = list_checkpoints(path / "checkpoints")[-1]
    files.unfinished(newest).mkdir()
    shutil.copytree(newest, newest.with_name(".000000000001.removed"))
    ppo_jax.resume(path, progress=False)
    assert [p for p in path.rglob("*") if p.name.startswith(".")] == []


def kill_checks(tmp_path, kills):
    command = [sys.executable, "-m", "tests.kill_checks", str(tmp_path / "run"), str(kills), "0"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "ended bit for bit" in result.stdout


def test_a_run_survives_kill_9(tmp_path):
    kill_checks(tmp_path, 3)


@pytest.mark.slow
def test_a_run_survives_kill_9_at_50_moments(tmp_path):
    kill_checks(tmp_path, 50)


def test_a_second_signal_ends_the_command_at_once():
    # Derives a key for minutes without a return to Python, as a program that is compiled or run.
    code = (
        "import hashlib\n"
        "from ppo_jax.runs.interrupt import deferred_interrupt, exit_at_second_signal\n"
        "with exit_at_second_signal(), deferred_interrupt():\n"
        "    print('ready', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
        "print('never')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert time.monotonic() - started < 2.0
    assert process.returncode == 143
    assert out == ""
    assert "again to exit at once" in err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_command_within_a_piece(number, status, tmp_path):
    path = tmp_path / "run"
    arguments = ["--num-envs", "2", "--num-steps", "8", "--hidden-sizes", "4", "--quiet"]
    arguments += ["--total-timesteps", "1e9", "--log-every", "64", "--run-dir", str(path)]
    # A process in a shell's background ignores Ctrl-C from its start.
    code = (
        "import signal, sys\nfrom ppo_jax.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.exit(main(['train', *{arguments}]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    while not (path / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(1.0)
    started = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    seconds = time.monotonic() - started
    assert process.returncode == status
    assert f"ppo-jax resume {path} continues the run" in out
    assert "again to exit at once" in err
    # Rows of the same piece have the same speed. A piece takes longer on a busy machine.
    lines = (path / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["time/steps_per_second"] for line in lines]
    piece = max(64 * 16 * rates.count(rate) / rate for rate in set(rates))
    assert seconds < max(piece, 1.0) + 2.0, (seconds, piece)
    assert len(list_checkpoints(path / "checkpoints")) == 1


def test_a_signal_ends_the_command_of_a_sweep_within_a_piece(tmp_path):
    path = tmp_path / "sweep"
    words = ["--num-envs", "2", "--num-steps", "8", "--hidden-sizes", "4", "--quiet"]
    words += ["--total-timesteps", "1e8", "--seeds", "2", "--run-dir", str(path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "ppo_jax", "sweep", "CartPole-v1", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    # Said once it is compiled.
    while "members together" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(2.0)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    # A piece takes about a second, and longer on a busy machine.
    assert time.monotonic() - started < 10.0
    assert process.returncode == 143, err
    assert f"the same command with --run-dir {path} continues it" in out
    assert len(list_checkpoints(path / "checkpoints")) == 1


def stopped_sweep(train, stopped_after, module, pieces, folder):
    """Trains until it is complete, stopped after every few pieces; returns the result."""
    times = []
    while True:
        stopped_after(pieces, module)
        result = train()
        if result.is_complete:
            # The seconds of processes that were stopped are added up.
            times.append(result.run_seconds)
            assert times == sorted(set(times))
            return result, len(times) - 1
        assert result.signal == signal.SIGTERM
        times.append(find_newest(folder / "checkpoints").record["seconds"])


def test_a_sweep_of_one_chunk_goes_on_in_its_middle(tmp_path, stopped_after):
    config = CONFIG.replace(total_timesteps=12 * 16, normalize_obs=True)
    rates = {"learning_rate": [1e-3, 1e-2]}
    common = {"seeds": 2, "eval_episodes": 2, "num_rows": 3, "progress": False, "say": print}
    whole = ppo_jax.sweep(config, rates, **common)
    path = tmp_path / "sweep"
    said = []
    result, stops = stopped_sweep(
        lambda: ppo_jax.sweep(config, rates, run_dir=path, **{**common, "say": said.append}),
        stopped_after,
        sweeps,
        pieces=3,
        folder=path,
    )
    assert stops >= 2
    continued = [int(line.split()[4]) for line in said if line.startswith("continuing 4 members")]
    assert len(continued) >= 2
    assert continued == sorted(set(continued))
    pd.testing.assert_frame_equal(result.members, whole.members, check_exact=True)
    pd.testing.assert_frame_equal(result.curves, whole.curves, check_exact=True)
    assert list_checkpoints(path / "checkpoints") == []
    assert [p for p in path.rglob("*") if p.name.startswith(".")] == []


@pytest.mark.parametrize("method", ["pbt", "halving"])
def test_a_search_goes_on_where_it_was_stopped(method, tmp_path, stopped_after):
    config = CONFIG.replace(total_timesteps=12 * 16)
    space = {"learning_rate": [1e-3, 1e-2, 1e-1]}
    common = {"num_members": 4, "num_rounds": 3, "eval_episodes": 2, "progress": False}
    whole = ppo_jax.search(config, space, method=method, **common)
    path = tmp_path / "search"
    result, stops = stopped_sweep(
        lambda: ppo_jax.search(config, space, method=method, run_dir=path, **common),
        stopped_after,
        searches,
        pieces=2,
        folder=path,
    )
    assert stops >= 2
    pd.testing.assert_frame_equal(
        result.members, whole.members, check_exact=True, check_dtype=False
    )
    pd.testing.assert_frame_equal(result.curves, whole.curves, check_exact=True, check_dtype=False)
    assert list_checkpoints(path / "checkpoints") == []


def test_checkpoints_of_other_members_are_not_used(tmp_path, stopped_after):
    path = tmp_path / "sweep"
    common = {"seeds": 2, "eval_episodes": 2, "num_rows": 3, "run_dir": path, "progress": False}
    train = functools.partial(ppo_jax.sweep, CONFIG, {"learning_rate": [1e-3, 1e-2]}, **common)
    stopped_after(3, sweeps)
    assert not train().is_complete
    stopped_after(None, sweeps)
    said = []
    # Two members are another chunk than four.
    assert train(chunk=2, say=said.append).is_complete
    assert not [line for line in said if "continuing" in line]


def test_a_sweep_whose_disk_is_full_goes_on_and_says_so(tmp_path, monkeypatch):
    disk = FullDisk(monkeypatch, sweep_store.files, "write_file")
    disk.is_full = False
    common = {"seeds": 1, "eval_episodes": 2, "num_rows": 3, "run_dir": tmp_path / "sweep"}

    def say(line):
        disk.is_full = disk.is_full or "members together" in line

    with pytest.warns(RuntimeWarning, match="No space left on device. The sweep goes on"):
        result = ppo_jax.sweep(
            CONFIG, {"learning_rate": [1e-3, 1e-2]}, progress=False, say=say, **common
        )
    assert len(result.members) == 2
    assert any("parts in" in problem for problem in result.unwritten)


def test_the_best_policy_of_the_evaluations_is_kept(tmp_path):
    run = train(
        CONFIG, tmp_path / "run", num_seeds=2, eval_every=2, hparams=HParams(learning_rate=0.1)
    )
    table = run.evaluations
    assert list(table.columns[:3]) == ["update", "timesteps", "seed"]
    assert list(table["update"].unique()) == [2, 4, 6, 8]
    best = RunDirectory.open(run.run_dir).read_best()
    for i, seed in enumerate(run.seeds):
        rows = table[table["seed"] == seed]
        first = rows.loc[rows["eval/return"].idxmax()]
        assert (best.returns[i], best.updates[i]) == (first["eval/return"], first["update"])
    # The same episodes as in the evaluation while it trained.
    again = make_evaluate(ppo_jax.make_env(CONFIG), jax.vmap(jax.random.key)(np.arange(2)), 2)
    np.testing.assert_array_equal(again(best.policy).returns.mean(axis=1), best.returns)
    policy = ppo_jax.load(run.run_dir, seed=1, best=True)
    for one, both in zip(jax.tree.leaves(policy), jax.tree.leaves(best.policy), strict=True):
        np.testing.assert_array_equal(one, both[1])
    assert trained.evaluate_run(run.run_dir, num_episodes=2, best=True)["episodes"] == 2
    without = train(CONFIG, tmp_path / "without")
    with pytest.raises(ConfigError, match="has none. Train with eval_every"):
        ppo_jax.load(without.run_dir, best=True)


def test_the_best_policy_of_another_history_is_forgotten(tmp_path, stopped_after):
    """A killed run had evaluations after its last checkpoint, which a shorter run does not have."""
    stopped_after(2)
    path = train(CONFIG, tmp_path / "run", eval_every=1).run_dir
    directory = RunDirectory.open(path)
    assert [row["update"] for row in rows_of(path, "evaluations.jsonl")] == [1, 2]
    later = directory.read_best()._replace(returns=np.array([1e3]), updates=np.array([8]))
    directory.write_best(later)
    stopped_after(0)
    train(CONFIG, path, eval_every=1, resume=True)
    assert directory.read_best().updates == [8]  # the same run comes to it again
    stopped_after(None)
    run = ppo_jax.resume(path, total_timesteps=4 * 16, progress=False)
    best = directory.read_best()
    top = run.evaluations.loc[run.evaluations["eval/return"][2:].idxmax()]
    assert (best.returns, best.updates) == (top["eval/return"], top["update"])


def test_a_sweep_that_is_stopped_after_a_chunk_keeps_the_checkpoint_of_the_next(
    tmp_path, stopped_after
):
    path = tmp_path / "sweep"
    common = {"seeds": 2, "eval_episodes": 2, "num_rows": 3, "chunk": 2, "run_dir": path}
    said = []
    train = functools.partial(
        ppo_jax.sweep, CONFIG, {"learning_rate": [1e-3, 1e-2]}, progress=False, **common
    )
    # Nine updates are pieces of 1, 2, 4 and 2; the second chunk is stopped in its middle.
    stopped_after(8, sweeps)
    result = train()
    assert len(result.members) == 2
    assert not result.is_complete
    # On the disk when the sweep returns: a process that ends now loses nothing.
    assert len(list_checkpoints(path / "checkpoints")) == 1
    stopped_after(None, sweeps)
    assert train(say=said.append).is_complete
    assert [line for line in said if line.startswith("continuing 2 members after")]


def test_a_checkpoint_of_a_sweep_that_cannot_be_written_is_told(
    tmp_path, monkeypatch, stopped_after
):
    FullDisk(monkeypatch, checkpoint.files, "write_directory")
    stopped_after(3, sweeps)
    common = {"seeds": 1, "eval_episodes": 2, "num_rows": 3, "run_dir": tmp_path / "sweep"}
    result = ppo_jax.sweep(CONFIG, {"learning_rate": [1e-3, 1e-2]}, progress=False, **common)
    assert any("could not be written: No space" in problem for problem in result.unwritten)


def test_a_training_that_does_not_fail_is_not_built_for_a_diagnosis(monkeypatch):
    def refuse(config):
        raise AssertionError("nothing failed")

    for name in ("make_diagnosis", "make_operation_finder"):
        monkeypatch.setattr(f"ppo_jax.runs.failure.{name}", refuse)
    ppo_jax.train(CONFIG, eval_episodes=2, progress=False)
