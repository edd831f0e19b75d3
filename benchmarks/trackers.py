"""Cost of the trackers that a training logs to.

python benchmarks/trackers.py

A training runs with each tracker and without one, in turn in one process. The minimum of each
counts, because other work on a machine only adds to a time. Trackers run in threads of their own,
which on a CPU take part of the cores that train: an accelerator would not wait for them.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import ppo_jax
from benchmarks import machine
from benchmarks.workloads import WORKLOADS
from ppo_jax.runs.trackers import TRACKERS

_RESULTS = Path(__file__).parent / "results" / "trackers-cpu.json"
_WORKLOAD = "W2"


def run_seconds(log: tuple[str, ...], num_updates: int) -> float:
    """Returns the seconds of a training of some updates, with a row of each update."""
    config = WORKLOADS[_WORKLOAD].config
    config = config.replace(total_timesteps=num_updates * config.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        # Nothing leaves the machine.
        os.environ["WANDB_MODE"] = "offline"
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        os.environ["TRACKIO_DIR"] = f"{folder}/trackio"
        run = ppo_jax.train(
            config, run_dir=f"{folder}/run", log=log, eval_episodes=1, progress=False
        )
        return run.run_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--updates", type=int, default=100)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {"none": [], **{name: [] for name in TRACKERS}}
    run_seconds((), 1)
    for _ in range(arguments.repeats):
        for name, times in seconds.items():
            times.append(run_seconds(() if name == "none" else (name,), arguments.updates))
    results = [
        {
            "workload": _WORKLOAD,
            "tracker": name,
            "rows": arguments.updates,
            "seconds": times,
            "ratio_of_minimums": min(times) / min(seconds["none"]),
        }
        for name, times in seconds.items()
    ]
    machine.write_results(_RESULTS, results)
    for result in results:
        ratio = result["ratio_of_minimums"]
        print(f"{result['tracker']:12} {min(result['seconds']):6.2f} s  {ratio:.3f}")


if __name__ == "__main__":
    main()
