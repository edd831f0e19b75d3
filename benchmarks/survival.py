"""Cost of the guard against NaN, and of checkpoints.

python benchmarks/survival.py

A training with the guard and one without it run in turn in one process, and so do a training that
writes checkpoints and one that writes none. The minimum of each counts, because other work on a
machine only adds to a time. The cost of the guard is small, so it is measured with twenty times as
many pairs of much shorter trainings. Checkpoints are written every second; at the default of 60
seconds they cost a sixtieth of what is measured.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).parent.parent))

import ppo_jax
from benchmarks import machine
from benchmarks.throughput import build, time_once
from benchmarks.workloads import WORKLOADS
from ppo_jax import make_trainer

_RESULTS = Path(__file__).parent / "results"
_GUARD_UPDATES = {"W1": 150, "W2": 2}
_CHECKPOINT_UPDATES = {"W1": 5_000, "W2": 100}
_INTERVALS = {"on": 1.0, "off": 0.0}  # seconds between two checkpoints


def compare(timers: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, Any]:
    """Calls two timers, "on" and "off", in turn, and compares their seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for repeat in range(repeats):
        # The order alternates, because the first timer of a pair may find the other's caches.
        for name in timers if repeat % 2 else reversed(list(timers)):
            seconds[name].append(timers[name]())
    result: dict[str, Any] = {"seconds": seconds}
    for statistic in (min, statistics.median):
        result[f"ratio_of_{statistic.__name__}s"] = statistic(seconds["on"]) / statistic(
            seconds["off"]
        )
    return result


def measure_guard(name: str, repeats: int) -> dict[str, Any]:
    """Measures the compiled training of a workload with and without the guard."""
    config = WORKLOADS[name].config
    config = config.replace(total_timesteps=_GUARD_UPDATES[name] * config.batch_size)
    key = jax.random.key(0)
    timers = {}
    for state, max_skipped_updates in (("on", 10), ("off", 0)):
        run = make_trainer(config.replace(max_skipped_updates=max_skipped_updates)).run
        program = build(run, key)
        time_once(program, key)
        timers[state] = lambda program=program: time_once(program, key)
    return {"workload": name, "of": "guard", **compare(timers, repeats)}


def measure_checkpoints(name: str, repeats: int) -> dict[str, Any]:
    """Measures `ppo_jax.train` of a workload with and without checkpoints."""
    config = WORKLOADS[name].config
    config = config.replace(total_timesteps=_CHECKPOINT_UPDATES[name] * config.batch_size)

    def run_seconds(every: float) -> float:
        with tempfile.TemporaryDirectory() as folder:
            return ppo_jax.train(
                config, run_dir=folder, checkpoint_every=every, eval_episodes=1, progress=False
            ).run_seconds

    timers = {name: lambda every=every: run_seconds(every) for name, every in _INTERVALS.items()}
    result = {"workload": name, "of": "a checkpoint every second", **compare(timers, repeats)}
    share = (result["ratio_of_mins"] - 1) / 60
    return {**result, "share_of_time_at_60_seconds": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=12)
    repeats = parser.parse_args().repeats
    guards = [measure_guard(name, 10 * repeats) for name in _GUARD_UPDATES]
    machine.write_results(_RESULTS / "nan-guard-cpu.json", guards)
    checkpoints = [measure_checkpoints(name, repeats // 2) for name in _CHECKPOINT_UPDATES]
    machine.write_results(_RESULTS / "checkpoints-cpu.json", checkpoints)
    for result in guards + checkpoints:
        print({name: value for name, value in result.items() if name != "seconds"})


if __name__ == "__main__":
    main()
