"""Trains the presets of tasks of suites: returns before and after, and speed.

python benchmarks/suites.py --json benchmarks/results/suites-cpu.json
"""

import argparse
import importlib.metadata
import math
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import machine
from ppo_jax import evaluate, make_trainer, presets
from ppo_jax.runs.run import train

# Of the tasks with published settings, one that a CPU trains in minutes.
TASKS = ("brax:inverted_pendulum", *(name for name in presets.names() if ":" in name))


def sampled_return(policy: Any, env: Any, seed: int, num_episodes: int) -> float:
    """Returns the mean return of sampled actions."""
    play = jax.jit(
        lambda policy, key: evaluate(policy, env, env.params, key, num_episodes, greedy=False)
    )
    return float(play(policy, jax.random.key(seed)).returns.mean())


def measure(name: str, num_seeds: int, num_episodes: int) -> dict[str, Any]:
    """Trains a preset, and plays before and after."""
    config, hparams = presets.preset(name)
    trainer = make_trainer(config)
    untrained = trainer.policy(jax.jit(trainer.init)(jax.random.key(0)))
    before = sampled_return(untrained, trainer.env, 1, num_episodes)
    started = time.perf_counter()
    run = train(config, hparams, num_seeds=num_seeds, eval_episodes=num_episodes, progress=False)
    seconds = time.perf_counter() - started
    assert run.evaluation is not None
    policies = [jax.tree.map(lambda x, i=i: x[i], run.policy) for i in range(num_seeds)]
    after = [sampled_return(policy, trainer.env, 1, num_episodes) for policy in policies]
    return {
        "env": name,
        "version": importlib.metadata.version(name.partition(":")[0]),  # the package's name, too
        "command": f"ppo-jax train {name}",
        "timesteps": run.timesteps,
        "seeds": num_seeds,
        "before": before,
        "after_sampled": after,
        "after_greedy": np.asarray(run.evaluation.returns).mean(axis=1).tolist(),
        "steps_per_second": run.timesteps * num_seeds / run.run_seconds,
        "run_seconds": run.run_seconds,
        "compile_seconds": run.compile_seconds,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", math.gcd(arguments.seeds, os.cpu_count() or 1))
    warnings.simplefilter("ignore")
    print("| task | steps | before | after, sampled | after, greedy | steps/s | compile |")
    print("|---|---|---|---|---|---|---|")
    results = []
    for name in arguments.env:
        result = measure(name, arguments.seeds, arguments.episodes)
        results.append(result)
        after, greedy = np.mean(result["after_sampled"]), np.mean(result["after_greedy"])
        print(
            f"| {name} | {result['timesteps']:,} | {result['before']:.2f} | {after:.2f} | "
            f"{greedy:.2f} | {result['steps_per_second']:,.0f} | "
            f"{result['compile_seconds']:.0f} s |",
            flush=True,
        )
    if arguments.json:
        machine.write_results(arguments.json, results)


if __name__ == "__main__":
    main()
