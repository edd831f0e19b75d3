"""Environment steps per second of `trainer.run`, compiled whole.

python benchmarks/throughput.py --workload W1 W2 --repeats 5 --json benchmarks/results/x.json
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import machine
from ppo_jax import Config, make_trainer


class Workload(NamedTuple):
    """What is run: a training, perhaps of several seeds at once."""

    title: str
    config: Config
    num_seeds: int | None = None

    @property
    def timesteps(self) -> int:
        """Environment steps of one call, over all seeds."""
        return self.config.num_updates * self.config.batch_size * (self.num_seeds or 1)


def _config(env: str, num_envs: int, num_steps: int, updates: int, minibatches: int = 4) -> Config:
    return Config(
        env=env,
        num_envs=num_envs,
        num_steps=num_steps,
        total_timesteps=updates * num_envs * num_steps,
        num_epochs=4,
        num_minibatches=minibatches,
        hidden_sizes=(64, 64),
    )


WORKLOADS = {
    "W1": Workload("CartPole-v1, 4 x 128", _config("CartPole-v1", 4, 128, 976)),
    "W2": Workload("CartPole-v1, 2048 x 32", _config("CartPole-v1", 2048, 32, 10)),
    "W3": Workload("Breakout-MinAtar, 64 x 128, MLP", _config("Breakout-MinAtar", 64, 128, 20, 8)),
    "W4": Workload("16 seeds of W1 under vmap", _config("CartPole-v1", 4, 128, 100), 16),
    "W5": Workload("Pendulum-v1, 2048 x 32", _config("Pendulum-v1", 2048, 32, 10)),
}


class Compiled(NamedTuple):
    """A workload ready to be timed."""

    workload: Workload
    call: Callable[[jax.Array], Any]
    lower_seconds: float
    compile_seconds: float
    program_bytes: int


def build(workload: Workload) -> Compiled:
    """Lowers and compiles, timing each."""
    run = make_trainer(workload.config).run
    if workload.num_seeds is not None:
        run = jax.vmap(run)
    start = time.perf_counter()
    lowered = jax.jit(run).lower(_key(workload, 0))
    lowered_at = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    memory = compiled.memory_analysis()
    assert memory is not None
    size = memory.temp_size_in_bytes + memory.output_size_in_bytes + memory.argument_size_in_bytes
    return Compiled(workload, compiled, lowered_at - start, end - lowered_at, size)


def time_once(compiled: Compiled, seed: int) -> float:
    """Seconds of one call."""
    key = jax.block_until_ready(_key(compiled.workload, seed))
    start = time.perf_counter()
    jax.block_until_ready(compiled.call(key))
    return time.perf_counter() - start


def _key(workload: Workload, seed: int) -> jax.Array:
    key = jax.random.key(seed)
    return key if workload.num_seeds is None else jax.random.split(key, workload.num_seeds)


def measure(name: str, repeats: int) -> dict[str, Any]:
    """All figures of one workload."""
    compiled = build(WORKLOADS[name])
    time_once(compiled, 0)
    seconds = [time_once(compiled, seed) for seed in range(1, repeats + 1)]
    timesteps = compiled.workload.timesteps
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "workload": name,
        "title": compiled.workload.title,
        "timesteps": timesteps,
        "steps_per_second": timesteps / statistics.median(seconds),
        "seconds": seconds,
        "lower_seconds": compiled.lower_seconds,
        "compile_seconds": compiled.compile_seconds,
        "program_bytes": compiled.program_bytes,
        "peak_device_bytes": stats.get("peak_bytes_in_use"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=5, help="timed calls; the median counts")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    results = []
    for name in arguments.workload:
        result = measure(name, arguments.repeats)
        results.append(result)
        print(
            f"{name}  {result['title']:<34} {result['steps_per_second']:>12,.0f} steps/s   "
            f"lower {result['lower_seconds']:.1f} s, compile {result['compile_seconds']:.1f} s, "
            f"memory {result['program_bytes'] / 2**20:.1f} MiB",
            flush=True,
        )
    if arguments.json:
        command = " ".join(["python", *sys.argv])
        record = {"command": command, **machine.describe(), "results": results}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
