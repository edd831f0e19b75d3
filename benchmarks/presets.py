"""Measures the return that each preset reaches: greedy evaluation of several seeds.

python benchmarks/presets.py --seeds 5 --json benchmarks/results/presets.json
"""

import argparse
import dataclasses
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import machine
from ppo_jax import presets
from ppo_jax.runs.run import train


def measure(env: str, num_seeds: int) -> dict[str, Any]:
    """Trains and evaluates one preset."""
    config, hparams = presets.preset(env)
    start = time.perf_counter()
    run = train(config, hparams, num_seeds=num_seeds, progress=False)
    assert run.evaluation is not None
    returns = np.asarray(run.evaluation.returns).mean(axis=1)
    return {
        "env": env,
        "timesteps": run.timesteps,
        "returns": returns.tolist(),
        "mean": float(returns.mean()),
        "minimum": float(returns.min()),
        "episodes": run.evaluation.returns.shape[1],
        "seconds": time.perf_counter() - start,
        "config": dataclasses.asdict(config),
        "hparams": hparams.given(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", nargs="+", choices=presets.names(), default=presets.names())
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    # A number of devices that divides both the seeds and the cores.
    jax.config.update("jax_num_cpu_devices", math.gcd(arguments.seeds, os.cpu_count() or 1))
    print("| environment | steps | mean return | minimum |\n|---|---|---|---|")
    results = []
    for env in arguments.env:
        result = measure(env, arguments.seeds)
        results.append(result)
        print(
            f"| {env} | {result['timesteps']:,} | {result['mean']:.1f} | {result['minimum']:.1f} |",
            flush=True,
        )
    if arguments.json:
        machine.write_results(arguments.json, results)


if __name__ == "__main__":
    main()
