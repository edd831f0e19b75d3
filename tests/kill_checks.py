"""Kills a run again and again with SIGKILL, and checks that it ends as if nothing had happened.

`test_resume` runs it in a process of its own: python -m tests.kill_checks FOLDER KILLS SEED

The training runs in forked children, which inherit the imports. This process must not start JAX's
backend, whose threads a fork would not have; it only reads files.
"""

import json
import os
import random
import select
import signal
import sys
import time
import warnings
from pathlib import Path

import ppo_jax.runs.run
from ppo_jax import Config
from ppo_jax.runs import checkpoint
from ppo_jax.runs.checkpoint_writer import list_checkpoints

CONFIG = Config(
    num_envs=2,
    num_steps=8,
    hidden_sizes=(4,),
    normalize_obs=True,
    env_params={"max_steps_in_episode": 8},
)
LONGEST_LIFE = 1.0  # seconds, after the first piece of the training


def train(folder, num_updates):
    """Trains in this process, to the end."""
    config = CONFIG.replace(total_timesteps=num_updates * CONFIG.batch_size)
    # A checkpoint after nearly every piece: most kills meet one that is being written.
    ppo_jax.train(
        config, run_dir=folder, resume=True, checkpoint_every=1e-3, progress=False, eval_episodes=2
    )


def fork(folder, num_updates):
    """Starts a training in a child; returns its number and a pipe that tells when it trains."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    append = ppo_jax.runs.metrics_file.MetricsFile.append

    def append_and_tell(self, rows):
        append(self, rows)
        os.write(writer, b"x")

    ppo_jax.runs.metrics_file.MetricsFile.append = append_and_tell
    try:
        train(folder, num_updates)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def check_files(folder):
    """Checks the files of a run that was killed."""
    paths = list_checkpoints(folder / "checkpoints")
    logged = 0
    for path in paths:
        _, record = checkpoint.read(path)
        logged = record["logged_updates"]
    metrics = folder / "metrics.jsonl"
    # There is no file before the first window of updates is complete.
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    # Only the last line may be cut off.
    updates = [json.loads(line)["update"] for line in lines if line.endswith("\n")]
    assert updates == sorted(set(updates)), "an update was logged twice"
    assert not updates or updates[-1] >= logged, "a checkpoint is ahead of its metrics"
    return len(paths)


def main(folder, num_kills, seed):
    warnings.simplefilter("ignore")
    rng = random.Random(seed)
    # About as many as the lives can do, and some for the end.
    num_updates = 600 * num_kills + 500
    without = 0
    for _ in range(num_kills):
        child, reader = fork(folder, num_updates)
        ready, _, _ = select.select([reader], [], [], 300)
        assert ready, "the training did not start"
        time.sleep(rng.uniform(0, LONGEST_LIFE))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(reader)
        # A fast machine may be done before the last kill.
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
        without += not check_files(folder)
    print(f"survived {num_kills} kills, {without} of them before the first checkpoint")
    done = int(list_checkpoints(folder / "checkpoints")[-1].name) // CONFIG.batch_size
    print(f"{done} updates were done")
    # To the end, and once more without a stop.
    whole = folder.with_name("whole")
    for path in (folder, whole):
        child, _ = fork(path, num_updates)
        _, status = os.waitpid(child, 0)
        assert status == 0
    strays = [path for path in folder.rglob("*") if path.name.startswith(".")]
    assert not strays, strays
    ends = [checkpoint.read(list_checkpoints(path / "checkpoints")[-1]) for path in (folder, whole)]
    for name, array in ends[0][0].items():
        assert array.tobytes() == ends[1][0][name].tobytes(), name
    rows = []
    for path in (folder, whole):
        lines = (path / "metrics.jsonl").read_text().splitlines()
        rows.append([json.loads(line) for line in lines])
        for row in rows[-1]:
            del row["time/steps_per_second"], row["time/seconds"]
    assert rows[0] == rows[1]
    assert (folder / "evaluation.json").read_text() == (whole / "evaluation.json").read_text()
    print("the run ended bit for bit as one that was never stopped")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
