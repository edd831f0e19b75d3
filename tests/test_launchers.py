"""Launchers of shards, each in its local form; `make test-launchers` installs Ray for its test."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import pandas as pd
import pytest
import submitit
import yaml

from ppo_jax import Config, ConfigError, cli, sweep
from ppo_jax.cli import main
from ppo_jax.population import proposals
from ppo_jax.population.search_space import LogUniform
from ppo_jax.runs import launchers
from ppo_jax.runs.sweep_merge import merge

PAGE = Path(__file__).parent.parent / "docs" / "machines.md"
SWEEP = [
    "CartPole-v1",
    "--learning-rate",
    "1e-4,1e-3",
    "--seeds",
    "2",
    "--num-envs",
    "4",
    "--num-steps",
    "16",
    "--num-minibatches",
    "2",
    "--hidden-sizes",
    "8",
    "--eval-episodes",
    "2",
    "--chunk",
    "2",
    "--total-timesteps",
]
SHORT, LONG = [*SWEEP, "512"], [*SWEEP, "4000000"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Returns the members of the sweep in one process."""
    path = tmp_path_factory.mktemp("whole") / "sweep"
    assert main(["sweep", *SHORT, "--run-dir", str(path), "--quiet"]) == 0
    return pd.read_parquet(path / "members.parquet")


def test_processes_train_the_shards_of_a_sweep(whole, tmp_path, capsys):
    command = ["launch", "local", "-n", "2", "-o", str(tmp_path / "sweep"), "--", *SHORT]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "shard 2 of 2 is complete" in captured.err
    assert "merged 4 members of 2 directories" in captured.out
    members = pd.read_parquet(tmp_path / "sweep" / "members.parquet")
    pd.testing.assert_frame_equal(members, whole)
    # The same command finds everything done, and other arguments are another sweep.
    assert main(command) == 0
    assert main([*command, "--gamma", "0.9"]) == 1
    assert re.search(
        r"shard 1 of 2 failed: run_dir must be new or hold the same sweep; .* \(/.*log.err\)",
        capsys.readouterr().err,
    )


def test_a_preempted_job_is_submitted_again():
    job = launchers.SubmittedJob()
    again = job.checkpoint(main, ["sweep"])
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert (again.function, again.args) == (job, (main, ["sweep"]))


SCHEDULER = {
    # Runs the tasks of the array beside each other, as SLURM does on its nodes.
    "sbatch": """#!/bin/sh
cp "$1" "$(dirname "$0")/script"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
for i in $(seq 0 "$last"); do
  SLURM_JOB_ID=$((70 + i)) SLURM_ARRAY_JOB_ID=70 SLURM_ARRAY_TASK_ID=$i SLURM_NTASKS=1 \\
  SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 \\
  SLURM_JOB_NODELIST=localhost bash "$1" > /dev/null 2>&1 &
done
echo "Submitted batch job 70"
""",
    "srun": """#!/bin/sh
while [ "${1#-}" != "$1" ]; do
  case $1 in --unbuffered) shift;; *) shift 2;; esac
done
exec "$@"
""",
    "sacct": """#!/bin/sh
echo "JobID|State|NodeList"
for i in 0 1; do echo "70_$i|RUNNING|localhost"; done
""",
}


def test_slurm_trains_the_shards_as_one_array(whole, tmp_path, monkeypatch, capsys):
    for name, script in SCHEDULER.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    options = ["--options", "timeout_min=7,gpus_per_node=1,slurm_partition=gpu"]
    words = ["-n", "2", "-o", str(tmp_path / "sweep"), *options, "--", *SHORT]
    assert main(["launch", "slurm", *words]) == 0
    assert "merged 4 members of 2 directories" in capsys.readouterr().out
    script = (tmp_path / "script").read_text()
    for line in ("--array=0-1", "--time=7", "--gpus-per-node=1", "--partition=gpu"):
        assert f"#SBATCH {line}" in script
    members = pd.read_parquet(tmp_path / "sweep" / "members.parquet")
    pd.testing.assert_frame_equal(members, whole)


def examples_in_yaml():
    """Returns the files of YAML in docs/machines.md, by the word in their first comment."""
    found = re.findall(r"```yaml\n# (\w+).*?\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    return {name: yaml.safe_load(text) for name, text in found}


def test_the_files_for_kubernetes_and_skypilot_train_every_shard(tmp_path):
    examples = examples_in_yaml()
    job = examples["Kubernetes"]
    assert job["spec"]["completions"] == 16 == job["spec"]["parallelism"]
    assert job["spec"]["completionMode"] == "Indexed"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["sh", "-c"]
    (mount,) = container["volumeMounts"]
    assert {x["name"] for x in job["spec"]["template"]["spec"]["volumes"]} == {mount["name"]}
    sky = examples["SkyPilot"]
    assert sky["num_nodes"] == 16
    commands = (
        (container["args"][0], lambda i: {"JOB_COMPLETION_INDEX": str(i)}),
        (sky["run"], lambda i: {"SKYPILOT_NODE_RANK": str(i), "SKYPILOT_NUM_NODES": "16"}),
    )
    for command, environment in commands:
        # A command in place of ppo-jax prints its arguments.
        script = f'ppo_jax() {{ echo "$@"; }}; {command.replace("ppo-jax", "ppo_jax")}'
        for i in (0, 15):
            out = subprocess.run(
                ["sh", "-c", script],
                env={**os.environ, **environment(i)},
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()
            assert out[:2] == ["sweep", "CartPole-v1"]
            cli._parse(out)
            assert out[out.index("--shard") + 1] == f"{i + 1}/16"
            assert out[out.index("--run-dir") + 1].endswith(f"/shards/{i + 1}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-n", "2"], "needs the arguments of a sweep after --"),
        (
            ["-n", "0", "--", "CartPole-v1"],
            "the number of shards must be a positive integer; got 0",
        ),
        (["-n", "2", "--", "CartPole-v1", "--shard", "1/2"], "--shard is not for a sweep that is"),
        (
            ["-n", "2", "--", "CartPole-v1", "--search", "pbt"],
            "--search is not for a sweep that is",
        ),
        (["-n", "2", "--options", "gpus", "--", "CartPole-v1"], "must be names and values"),
        (["-n", "2", "--options", "name=[", "--", "CartPole-v1"], "must have values of YAML"),
        (["-n", "2", "--options", "timeout_min=x", "--", "CartPole-v1"], "options {'timeout_min':"),
        (["-n", "2", "--", "CartPole-v1", "--storage", "x"], "--storage is not for a sweep that"),
        (["-n", "2", "--", "CartPool-v1"], "Did you mean CartPole-v1"),
        (["-n", "2", "--", "CartPole-v1", "--sampler", "tpe"], "start its workers with --storage"),
        (["-n", "2", "--options", "gpus=1", "--", "CartPole-v1"], "options {'gpus': 1}: Parameter"),
    ],
)
def test_a_mistake_is_named_before_a_job_starts(words, message, tmp_path, capsys):
    assert main(["launch", "local", "-o", str(tmp_path / "sweep"), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch):
    for name, launcher in (("submitit", "slurm"), ("ray", "ray")):
        monkeypatch.setitem(sys.modules, name, None)
        words = ["launch", launcher, "-n", "2", "-o", str(tmp_path / "sweep"), "--", *SHORT]
        assert main(words) == 2
        assert f"pip install 'ppo-jax[{name}]'" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # of Ray, whose processes and sockets end in their own time
def test_ray_trains_a_shard_again_whose_worker_was_killed(tmp_path, capsys):
    ray = pytest.importorskip("ray", reason="make test-launchers installs Ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    killed = []

    def kill_a_worker():
        end = time.monotonic() + 120
        while not killed and time.monotonic() < end:
            # In the middle: a checkpoint is there, and no result.
            if any((tmp_path / "sweep-shards" / "2" / "checkpoints").glob("[0-9]*")):
                for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
                    try:
                        name = Path(f"/proc/{pid}/cmdline").read_text()
                    except OSError:
                        continue
                    if name.startswith("ray::") and "_train_on_ray" in name:
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)
                        return
            time.sleep(0.05)

    killer = threading.Thread(target=kill_a_worker)
    killer.start()
    try:
        words = [
            "-n",
            "2",
            "-o",
            str(tmp_path / "sweep"),
            "--options",
            f"address={cluster.address}",
        ]
        sweep = [*LONG, "--checkpoint-every", "0.2"]
        assert main(["launch", "ray", *words, "--", *sweep]) == 0
    finally:
        killer.join()
        ray.shutdown()
        cluster.shutdown()
    assert killed
    assert "merged 4 members of 2 directories" in capsys.readouterr().out
    assert main(["sweep", *LONG, "--run-dir", str(tmp_path / "whole"), "--quiet"]) == 0
    ours, theirs = (
        pd.read_parquet(tmp_path / name / "members.parquet") for name in ("sweep", "whole")
    )
    pd.testing.assert_frame_equal(ours, theirs)


def test_files_of_a_worker_are_received_where_it_has_a_disk_of_its_own(tmp_path):
    files = {"sweep.json": b"{}", "parts/members-000000.parquet": b"rows"}
    shard = tmp_path / "shards" / "1"
    launchers._receive(files, shard)
    assert (shard / "parts" / "members-000000.parquet").read_bytes() == b"rows"
    # A first attempt on this machine was lost, and another machine finished the shard.
    launchers._receive({**files, "parts/members-000001.parquet": b"more"}, shard)
    assert (shard / "parts" / "members-000001.parquet").read_bytes() == b"more"
    with pytest.raises(ConfigError, match=r"hold the same sweep; .*/1 holds another"):
        launchers._receive({**files, "sweep.json": b"other"}, shard)
    assert (shard / "sweep.json").read_bytes() == b"{}"


CONFIG = Config(num_envs=2, num_steps=8, hidden_sizes=(4,), total_timesteps=64)


def worker(storage, run_dir=None, say=None, num_draws=6):
    """Runs a worker of a sweep with two seeds of each configuration."""
    return sweep(
        CONFIG,
        {"learning_rate": LogUniform(1e-4, 1e-1)},
        sampler="tpe",
        num_draws=num_draws,
        batch=2,
        seeds=2,
        storage=storage,
        run_dir=run_dir,
        eval_episodes=2,
        num_rows=2,
        say=say,
        progress=False,
    )


def check_workers(storage, tmp_path):
    """Kills a worker in its second batch, lets another one go on, and then continues it."""
    batches = []

    def die(line):
        if line.startswith("configurations"):
            batches.append(line)
            if len(batches) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worker(storage, tmp_path / "1", die)
    second = worker(storage, tmp_path / "2")
    assert list(second.members["configuration"]) == [4, 4, 5, 5]
    assert second.is_complete
    merged = merge([tmp_path / "1", tmp_path / "2"], tmp_path / "early")
    assert (merged.num_members, merged.num_missing, merged.is_shared) == (8, 4, True)
    first = worker(storage, tmp_path / "1")
    assert list(first.members["configuration"]) == [0, 0, 1, 1, 2, 2, 3, 3]
    merged = merge([tmp_path / "1", tmp_path / "2"], tmp_path / "whole")
    assert (merged.num_members, merged.num_missing) == (12, 0)
    members = pd.read_parquet(tmp_path / "whole" / "members.parquet")
    assert list(members["member"]) == list(range(12))
    assert members["learning_rate"].nunique() == 6
    with pytest.raises(ConfigError, match="/1 are both the same worker. Leave one out"):
        merge([tmp_path / "1", tmp_path / "1"], tmp_path / "twice")
    # Workers that come late have nothing to do.
    assert len(worker(storage, tmp_path / "3").members) == 0


def test_workers_share_the_draws_of_a_file(tmp_path):
    check_workers(str(tmp_path / "tpe.log"), tmp_path)
    with pytest.raises(ConfigError, match=r"another \(num_draws differ\). Use another file"):
        worker(str(tmp_path / "tpe.log"), num_draws=7)


def test_a_trial_that_a_killed_worker_did_not_claim_is_drawn_again(tmp_path, monkeypatch):
    storage = str(tmp_path / "tpe.log")

    def die(self, name, value):
        del self, name, value
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optuna.Trial, "set_user_attr", die)
        with pytest.raises(KeyboardInterrupt):
            worker(storage, tmp_path / "1")
    # It could be that of a worker that is about to claim it.
    assert len(worker(storage, tmp_path / "2").members) == 5 * 2
    monkeypatch.setattr(proposals, "_CLAIM_SECONDS", 0.0)
    third = worker(storage, tmp_path / "3")
    assert list(third.members["configuration"]) == [6, 6]
    merged = merge([tmp_path / name for name in "123"], tmp_path / "whole")
    assert (merged.num_members, merged.num_missing) == (12, 0)


def test_workers_share_the_draws_of_a_database(tmp_path):
    postgres = pytest.importorskip("pgserver", reason="make test-launchers installs PostgreSQL")
    server = postgres.get_server(tmp_path / "database", cleanup_mode="delete")
    try:
        check_workers(f"{server.get_uri()}#learning-rates", tmp_path)
    finally:
        server.cleanup()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "random", "num_draws": 2}, "storage is for sampler tpe"),
        ({"storage": "other://me:secret@host/name"}, r"answers; got other://me:\*\*\*@host/name: "),
        (
            {"sampler": "random", "num_draws": 2, "storage": "other://me:secret@host/name"},
            r"got other://me:\*\*\*@host/name and random",
        ),
        ({"storage": "/proc/no/such/folder"}, "storage must be a file, .*; got /proc/no"),
    ],
)
def test_a_storage_that_does_not_fit_is_refused(arguments, message):
    fixed = {"sampler": "tpe", "num_draws": 2, "batch": 1, "storage": "file"}
    if arguments.get("sampler") == "random":
        fixed["batch"] = None
    with pytest.raises(ConfigError, match=message):
        sweep(CONFIG, {"learning_rate": LogUniform(1e-4, 1e-1)}, **(fixed | arguments))
