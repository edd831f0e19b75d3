"""Several processes share one training; each runs the command in a process of its own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from ppo_jax import load_state
from ppo_jax.cli import main
from ppo_jax.runs import processes

COMMAND = [sys.executable, "-m", "ppo_jax.cli"]
TRAIN = [
    "train",
    "CartPole-v1",
    "--num-envs",
    "8",
    "--num-steps",
    "16",
    "--hidden-sizes",
    "16",
    "--num-minibatches",
    "2",
    "--normalize-obs",
    "--normalize-reward",
    "--env-params",
    "max_steps_in_episode",
    "20",
    "--eval-episodes",
    "2",
    "--log-every",
    "4",
    "--quiet",
]
SHORT = ["--total-timesteps", "2048"]
MEDIUM = ["--total-timesteps", "38400"]
# A training that lasts until it is stopped, on however fast a machine.
LONG = ["--total-timesteps", "12800000"]
# Stated in docs/machines.md: the others end at once, apart from the pause of the first process.
SECONDS_TO_END = 30


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


class Started(SimpleNamespace):
    """Processes of one training that are running."""

    def results(self, timeout=240):
        """Waits for all, and returns their exit status, output and errors."""
        found = []
        for process in self.processes:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                for other in self.processes:
                    other.kill()
                raise
            found.append(SimpleNamespace(status=process.returncode, out=out, err=err))
        return found


def start(words, count, *, late=0.0, others=(), limit=None, slurm=False):
    """Starts the processes of one training.

    Args:
      words: of the command.
      count: processes.
      late: seconds by which the last one starts late.
      others: more words for the last one.
      limit: blocks of 512 bytes that a file of the first may have.
      slurm: describe the processes by the environment of a SLURM job, and not by options.
    """
    port, started = free_port(), []
    for i in range(1, count + 1):
        own = ["--distributed", "--coordinator", f"localhost:{port}", "--process", f"{i}/{count}"]
        environment = {}
        if slurm:
            own = ["--distributed"]
            environment = {
                "SLURM_JOB_ID": str(port),  # JAX derives the coordinator's port from it
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": str(count),
                "SLURM_PROCID": str(i - 1),
                "SLURM_LOCALID": "0",
            }
        if i == count:
            own += others
            time.sleep(late)
        limited = ["sh", "-c", f'ulimit -f {limit}; exec "$@"', "sh"] if i == 1 and limit else []
        started.append(
            subprocess.Popen(
                [*limited, *COMMAND, *words, *own],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **environment},
            )
        )
    return Started(processes=started)


def alone(words):
    """Runs a command in one process, and returns its output."""
    result = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def rows_of(path):
    """Returns the rows of metrics of a run, without times."""
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [
        {name: x for name, x in json.loads(line).items() if not name.startswith("time/")}
        for line in lines
    ]


def assert_close(ours, theirs, *, rtol):
    assert len(ours) == len(theirs) > 0
    for x, y in zip(ours, theirs, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_allclose(
                float(x[name]), float(y[name]), rtol=rtol, atol=rtol / 10, err_msg=name
            )


def wait_for(condition, timeout=120):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("count", "mesh"),
    [
        (2, ["--mesh", "env=2"]),
        pytest.param(4, ["--mesh", "env=2,member=2", "--seeds", "2"], marks=pytest.mark.slow),
    ],
)
def test_processes_equal_one_process(count, mesh, tmp_path):
    words = [*TRAIN, *SHORT, *mesh]
    together = start([*words, "--run-dir", str(tmp_path / "together")], count, late=2.0)
    printed = alone([*words, "--run-dir", str(tmp_path / "alone")])
    first, *others = together.results()
    assert first.status == 0, first.err
    for other in others:
        assert (other.status, re.sub(r"\[Gloo\].*\n", "", other.out)) == (0, ""), other.err
        assert "has lost" not in other.err
    # One command prints and writes; numbers agree to rounding, as do the two evaluations.
    assert len(re.findall("evaluation of seed", first.out)) == max(1, count // 2)
    assert re.findall(r"return \S+", first.out) == re.findall(r"return \S+", printed)
    assert_close(rows_of(tmp_path / "together"), rows_of(tmp_path / "alone"), rtol=1e-4)
    checkpoint = "checkpoints/000000002048"
    ours, theirs = (load_state(tmp_path / x / checkpoint).state for x in ("together", "alone"))
    np.testing.assert_allclose(ours.rollout.obs, theirs.rollout.obs, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(ours.updates_done, theirs.updates_done)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Returns the rows of a training of two processes that nothing interrupted."""
    path = tmp_path_factory.mktemp("whole") / "run"
    results = start([*TRAIN, *MEDIUM, "--mesh", "env=2", "--run-dir", str(path)], 2).results()
    assert [x.status for x in results] == [0, 0]
    return rows_of(path)


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_all_and_the_run_resumes_exactly(killed, uninterrupted, tmp_path):
    path = tmp_path / "run"
    words = [*TRAIN, *MEDIUM, "--mesh", "env=2", "--run-dir", str(path), "--resume"]
    running = start([*words, "--checkpoint-every", "0.01"], 2)
    wait_for(lambda: any((path / "checkpoints").glob("[0-9]*")))
    running.processes[killed].kill()
    killed_at = time.monotonic()
    survivor = running.results()[1 - killed]
    assert time.monotonic() - killed_at < SECONDS_TO_END
    assert not (path / "evaluation.json").exists()
    assert survivor.status == 1
    assert survivor.err.count("ppo-jax: error: process") == 1
    assert re.search("has lost (another|the first) process of the training", survivor.err)
    if killed:
        assert [x.status for x in start(words, 2).results()] == [0, 0]
        assert rows_of(path) == uninterrupted
    else:
        alone(words)
        # One process adds up in another order, which a long training amplifies.
        assert_close(rows_of(path)[:4], uninterrupted[:4], rtol=1e-4)
        assert len(rows_of(path)) == len(uninterrupted)


@pytest.fixture
def first_process(monkeypatch):
    """Returns the connections of a first process, and a way to reach it, after another server."""
    connections = []
    monkeypatch.setattr(processes, "_connections", connections)
    monkeypatch.setattr(processes, "count", lambda: 2)
    names, port, token = processes._start_server()
    assert socket.gethostname() in names
    return connections, ("127.0.0.1", port, token)


def watch(names, port, token):
    ended = threading.Event()
    arguments = (names, port, token, ended.set)
    thread = threading.Thread(target=processes._watch, args=arguments, daemon=True)
    thread.start()
    return thread, ended


def test_a_process_ends_when_the_connection_to_the_first_closes(first_process):
    connections, (name, port, token) = first_process
    thread, ended = watch([name], port, token)
    wait_for(lambda: connections, timeout=20)
    assert not ended.wait(0.2)  # as long as the first process is
    connections.pop().close()
    assert ended.wait(10)
    thread.join(10)


def test_a_process_watches_no_other_server(first_process):
    connections, (name, port, token) = first_process
    thread, ended = watch([name], port, "another" * 9)
    thread.join(20)
    assert not thread.is_alive()
    assert not ended.is_set()
    assert not connections
    # The right one may be the second that is tried: nobody listens at the first address.
    thread, ended = watch(["::2", name], port, token)
    wait_for(lambda: connections, timeout=20)
    connections.pop().close()
    assert ended.wait(10)


def test_a_process_ends_even_if_nobody_reads_its_errors():
    code = (
        "import sys; from ppo_jax.runs import processes; sys.stderr.close(); "
        "processes.say_and_end('lost', 7)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 7


@pytest.mark.slow
def test_the_processes_of_a_slurm_job_find_each_other(tmp_path):
    words = [*TRAIN, *SHORT, "--mesh", "env=2", "--run-dir", str(tmp_path / "run")]
    first, second = start(words, 2, slurm=True).results()
    assert (first.status, second.status) == (0, 0), first.err
    assert "evaluation of seed 0" in first.out


def test_a_signal_to_one_process_stops_all_of_them(tmp_path):
    path = tmp_path / "run"
    running = start([*TRAIN, *LONG, "--mesh", "env=2", "--run-dir", str(path)], 2)
    wait_for((path / "metrics.jsonl").exists)
    running.processes[1].send_signal(signal.SIGTERM)
    first, second = running.results(timeout=60)
    assert (first.status, second.status) == (128 + signal.SIGINT, 128 + signal.SIGTERM)
    assert "continues the run" in first.out
    (checkpoint,) = (path / "checkpoints").iterdir()
    assert load_state(checkpoint).state.updates_done == int(checkpoint.name) // 128


def test_other_settings_are_refused_by_name(tmp_path):
    words = [*TRAIN, *SHORT, "--mesh", "env=2", "--run-dir", str(tmp_path / "run")]
    results = start(words, 2, others=["--gamma", "0.5"]).results()
    for result in results:
        assert result.status == 2
        assert "gamma is 0.99 in the first process and 0.5 in process 2" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_full_disk_stops_no_process(tmp_path):
    words = [*TRAIN, *SHORT, "--mesh", "env=2", "--run-dir", str(tmp_path / "run")]
    first, second = start(words, 2, limit=12).results()
    assert (first.status, second.status) == (1, 0)
    assert "could not be written: File too large" in first.err
    assert "evaluation of seed 0" in first.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--process 3/2 --coordinator localhost:1", "i/n with i from 1 to n; got 3/2"),
        ("--process 0/2 --coordinator localhost:1", "i/n with i from 1 to n; got 0/2"),
        ("--process two --coordinator localhost:1", "--process must be i/n, such as 3/16; got two"),
        ("--process 1/2", "go together; got None and (1, 2)"),
        ("--process 1/2 --coordinator here", "a coordinator must be host:port; got here"),
        ("--process 1/2 --coordinator 12345", "a coordinator must be host:port; got 12345"),
        ("--dry-run", "--dry-run compiles in a single process; got --distributed True"),
        ("--connect-timeout 0", "above 0 and at most 86,400; got 0.0"),
        ("", "could not be connected: coordinator_address should be defined"),
    ],
)
def test_a_mistake_is_named_before_anything_is_connected(words, message, capsys, monkeypatch):
    # JAX in this process has computed something, after which it connects to nobody.
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    assert main([*TRAIN, "--distributed", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_an_option_of_several_processes_needs_them(capsys):
    assert main([*TRAIN, "--process", "1/2"]) == 2
    assert (
        "this option needs --distributed; got --process 1/2. Leave it out."
        in capsys.readouterr().err
    )


def test_processes_that_do_not_connect_in_time_are_told(tmp_path):
    """A coordinator that cannot be reached, and a first process that waits for the others."""
    for i in (1, 2):
        own = ["--distributed", "--coordinator", f"localhost:{free_port()}", "--process", f"{i}/2"]
        words = [*COMMAND, *TRAIN, *own, "--connect-timeout", "2"]
        result = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert result.returncode == 1
        assert "did not all connect at localhost:" in result.stderr
        assert "within 2 s. Start all of them" in result.stderr


def test_a_training_uses_all_devices_of_all_processes(tmp_path):
    for result in start([*TRAIN, *SHORT, "--run-dir", str(tmp_path / "run")], 2).results():
        assert result.status == 2
        assert "got a mesh of env=1 times member=1, and 2 devices of 2 processes" in result.err
