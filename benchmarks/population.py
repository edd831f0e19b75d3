"""Measures the cost of a member of a population by the size of the population.

Members are divided among the devices, as `ppo-jax sweep` does; on a CPU a device is a core.

python benchmarks/population.py --json benchmarks/results/population-cpu.json
"""

import argparse
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import machine
from ppo_jax import Config, make_train
from ppo_jax.devices import member_sharding, population_mesh

SIZES = (1, 4, 16, 64, 256, 1024)
CONFIG = Config(env="CartPole-v1", num_envs=4, num_steps=128, total_timesteps=20 * 512)


def compiled(size: int) -> Any:
    """Compiles a population of that size."""
    keys = jax.vmap(jax.random.key)(jnp.arange(size))
    by_member = member_sharding(population_mesh(size))
    train = jax.vmap(make_train(CONFIG))
    return jax.jit(train, in_shardings=by_member, out_shardings=by_member).lower(keys).compile()


def seconds(program: Any, size: int, first_seed: int) -> float:
    """Returns the seconds of one run."""
    keys = jax.vmap(jax.random.key)(first_seed + jnp.arange(size))
    start = time.perf_counter()
    jax.block_until_ready(program(keys))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    sizes = sorted({1, *arguments.sizes})
    programs = {size: compiled(size) for size in sizes}
    runs: dict[int, list[float]] = {size: [] for size in sizes}
    for repeat in range(arguments.repeats + 1):
        for size, program in programs.items():
            taken = seconds(program, size, first_seed=repeat)
            if repeat > 0:  # the first warms up
                runs[size].append(taken)
    timesteps = CONFIG.num_updates * CONFIG.batch_size
    alone = statistics.median(runs[1])
    print(
        "| members | steps/s of all | cost of a member, alone = 1 | memory of a member |\n"
        "|---|---|---|---|"
    )
    results = []
    for size in sizes:
        taken = statistics.median(runs[size])
        pairs = zip(runs[size], runs[1], strict=True)
        analysis = programs[size].memory_analysis()
        device_bytes = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
        memory = device_bytes * math.gcd(size, jax.device_count()) / size
        result = {
            "members": size,
            "steps_per_second": size * timesteps / taken,
            "cost_of_a_member": statistics.median(many / size / one for many, one in pairs),
            "bytes_of_a_member": memory,
            "seconds": runs[size],
        }
        results.append(result)
        print(
            f"| {size} | {result['steps_per_second']:,.0f} | {result['cost_of_a_member']:.2f} "
            f"| {memory / 1024:,.0f} KiB |",
            flush=True,
        )
    worth_it = [r["members"] for r in results if r["cost_of_a_member"] < 1]
    print(
        f"one after another, a member takes {alone:.2f} s; together, less from "
        f"{min(worth_it, default='no')} members on"
    )
    if arguments.json:
        machine.write_results(arguments.json, results)


if __name__ == "__main__":
    main()
