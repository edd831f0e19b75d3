"""Environment steps per second of the compiled `trainer.run`, and the parts of its time.

python benchmarks/throughput.py --set cpu --repeats 5 --json benchmarks/results/throughput-cpu.json
python benchmarks/throughput.py --workload W1 W2

Four ceilings are measured in turn with each training: the environments alone with random actions,
the update alone on the data of one rollout, all passes through the networks and nothing else, and
the arithmetic of these passes, as the compiler counts it, at the rate at which this machine
multiplies matrices. A share of 70 % means that the part alone takes 70 % of the training's time.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import ceilings, first_update, machine
from benchmarks.workloads import SETS, WORKLOADS, Workload
from ppo_jax import make_trainer

_PARTS = ("environment", "update", "networks")
"""Methods of `ceilings.Stages` that are measured alone."""


class Compiled(NamedTuple):
    """A compiled function of keys, with the time and memory that it took."""

    call: Callable[[jax.Array], Any]
    lower_seconds: float
    compile_seconds: float
    program_bytes: int


def build(function: Callable[[jax.Array], Any], keys: jax.Array) -> Compiled:
    """Lowers and compiles a function, timing both; several keys are several seeds under `vmap`."""
    if keys.ndim:
        function = jax.vmap(function)
    start = time.perf_counter()
    lowered = jax.jit(function).lower(keys)
    lowered_at = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    memory = compiled.memory_analysis()
    assert memory is not None
    size = memory.temp_size_in_bytes + memory.output_size_in_bytes + memory.argument_size_in_bytes
    return Compiled(compiled, lowered_at - start, end - lowered_at, size)


def time_once(compiled: Compiled, keys: jax.Array) -> float:
    """Returns the seconds of one call."""
    keys = jax.block_until_ready(keys)
    start = time.perf_counter()
    jax.block_until_ready(compiled.call(keys))
    return time.perf_counter() - start


def _key(workload: Workload, seed: int) -> jax.Array:
    key = jax.random.key(seed)
    return key if workload.num_seeds is None else jax.random.split(key, workload.num_seeds)


def measure(name: str, repeats: int, *, with_ceilings: bool = True) -> dict[str, Any]:
    """Measures the training of one workload and its ceilings, one run of each in turn."""
    workload = WORKLOADS[name]
    stages = ceilings.Stages(workload.config)
    programs: dict[str, Callable[[jax.Array], Any]] = {
        "training": make_trainer(workload.config).run
    }
    if with_ceilings:
        programs |= {part: getattr(stages, part) for part in _PARTS}
    compiled = {part: build(program, _key(workload, 0)) for part, program in programs.items()}
    seconds: dict[str, list[float]] = {part: [] for part in compiled}
    for seed in range(repeats + 1):
        for part, program in compiled.items():
            taken = time_once(program, _key(workload, seed))
            if seed > 0:  # the first warms up
                seconds[part].append(taken)
    rates = {part: workload.timesteps / statistics.median(seconds[part]) for part in seconds}
    stats = jax.devices()[0].memory_stats() or {}
    training = compiled["training"]
    return {
        "workload": name,
        "title": workload.title,
        "timesteps": workload.timesteps,
        "steps_per_second": rates["training"],
        "seconds": seconds["training"],
        "lower_seconds": training.lower_seconds,
        "compile_seconds": training.compile_seconds,
        "program_bytes": training.program_bytes,
        "peak_device_bytes": stats.get("peak_bytes_in_use"),
        **(_ceilings(name, stages, rates) if with_ceilings else {}),
    }


def _ceilings(name: str, stages: ceilings.Stages, rates: dict[str, float]) -> dict[str, float]:
    """Returns the rates of the parts, and the times of a new process to its first update."""
    arithmetic = stages.arithmetic()
    return {
        **{f"{part}_steps_per_second": rates[part] for part in _PARTS},
        "arithmetic_steps_per_second": ceilings.matrix_flops_per_second() / arithmetic.flops,
        "flops_per_step": arithmetic.flops,
        "bytes_per_step": arithmetic.bytes,
        **first_update.measure(name),
    }


def row(result: dict[str, Any]) -> str:
    """Returns a row of the table: the rate, and the share of the time that each part takes
    alone.
    """
    rate = result["steps_per_second"]
    cells = [f"{result['workload']} {result['title']}", f"{rate:,.0f}"]
    if "first_update_cold_seconds" in result:
        cells += [
            f"{rate / result[f'{part}_steps_per_second']:.0%}" for part in (*_PARTS, "arithmetic")
        ]
        cold, warm = (result[f"first_update_{kind}_seconds"] for kind in ("cold", "warm"))
        updates = f"{cold:.1f} s, {warm:.1f} s"
    else:
        cells += ["–"] * (len(_PARTS) + 1)
        updates = "–"
    seconds = result["lower_seconds"] + result["compile_seconds"]
    cells += [f"{seconds:.1f} s", updates, f"{result['program_bytes'] / 2**20:.1f} MiB"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=SETS, default="cpu", help="set of workloads to measure")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, help="measure these instead")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls; the median counts")
    parser.add_argument(
        "--only-training", action="store_true", help="without ceilings and first updates"
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    print(
        "| workload | steps/s | environments alone | update alone | networks alone "
        "| arithmetic alone | compile | first update, cold and warm | memory |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    results = []
    for name in arguments.workload or SETS[arguments.set]:
        with_ceilings = not arguments.only_training
        results.append(measure(name, arguments.repeats, with_ceilings=with_ceilings))
        print(row(results[-1]), flush=True)
    if arguments.json:
        rates = {
            "matrix_flops_per_second": ceilings.matrix_flops_per_second(),
            "copied_bytes_per_second": ceilings.copied_bytes_per_second(),
        }
        machine.write_results(arguments.json, results, **rates)


if __name__ == "__main__":
    main()
