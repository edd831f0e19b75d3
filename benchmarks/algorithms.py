"""Measures the steps and the time that each algorithm needs to solve a task.

python benchmarks/algorithms.py --seeds 5 --json benchmarks/results/algorithms-cartpole.json
python benchmarks/algorithms.py --env Pendulum-v1 --seeds 5
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import machine
from ppo_jax import evaluate, make_trainer, presets

# Mean returns over 100 episodes at which a task counts as learned, and as solved. Those of CartPole
# are Gym's for v0 and v1. Pendulum has none; -200 is an upright pole after the swing.
THRESHOLDS = {"CartPole-v1": (195.0, 475.0), "Pendulum-v1": (-400.0, -200.0)}
_EPISODES = 100


def steps_to_reach(
    returns: np.ndarray, counts: np.ndarray, threshold: float, batch_size: int
) -> int | None:
    """Returns the steps until at least 100 recent episodes have a mean return of `threshold`, or
    None.

    Args:
      returns: mean return of the episodes that ended in each update, NaN where none did, `[U]`.
      counts: their number, `[U]`.
      threshold: the mean return to reach.
      batch_size: steps of an update.
    """
    totals = np.concatenate([[0.0], np.cumsum(np.nan_to_num(returns) * counts)])
    episodes = np.concatenate([[0], np.cumsum(counts)])
    # For each update, the latest start of a window that holds enough episodes.
    start = np.searchsorted(episodes, episodes - _EPISODES, side="right") - 1
    enough = episodes >= _EPISODES
    window = np.maximum(episodes - episodes[np.maximum(start, 0)], 1)
    mean = (totals - totals[np.maximum(start, 0)]) / window
    reached = np.flatnonzero(enough & (mean >= threshold))
    return int(reached[0]) * batch_size if reached.size else None


def measure(env: str, algorithm: str, num_seeds: int) -> dict[str, Any]:
    """Trains and evaluates one algorithm with its preset."""
    config, hparams = presets.preset(env, algorithm)
    trainer = make_trainer(config)
    keys = jax.random.split(jax.random.key(0), num_seeds)
    start = time.perf_counter()
    run = jax.jit(jax.vmap(lambda key: trainer.run(key, hparams))).lower(keys).compile()
    compiled = time.perf_counter()
    states, metrics = jax.block_until_ready(run(keys))
    done = time.perf_counter()

    def returns_of(state: Any, key: jax.Array) -> jax.Array:
        return evaluate(trainer.policy(state), trainer.env, state.env_params, key, 128).returns

    returns = np.asarray(jax.jit(jax.vmap(returns_of))(states, keys)).mean(axis=1)
    curves = np.asarray(metrics["episode/return"]), np.asarray(metrics["episode/count"])
    steps = {
        f"{threshold:g}": [
            steps_to_reach(*seed, threshold, config.batch_size)
            for seed in zip(*curves, strict=True)
        ]
        for threshold in THRESHOLDS[env]
    }
    return {
        "algorithm": algorithm,
        "timesteps": config.num_updates * config.batch_size,
        "steps_to_reach": steps,
        "returns": returns.tolist(),
        "mean": float(returns.mean()),
        "minimum": float(returns.min()),
        "compile_seconds": compiled - start,
        "run_seconds": done - compiled,
        "config": dataclasses.asdict(config),
        "hparams": hparams.given(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", choices=THRESHOLDS, default="CartPole-v1")
    parser.add_argument("--algorithm", nargs="+", help="by default all that have a preset")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    low, high = (f"{threshold:g}" for threshold in THRESHOLDS[arguments.env])
    print(
        f"| algorithm | steps | steps to {low} | steps to {high} | final return | minimum "
        "| run, all seeds | compile |\n|---|---|---|---|---|---|---|---|"
    )
    results = []
    for algorithm in arguments.algorithm or presets.algorithms(arguments.env):
        result = measure(arguments.env, algorithm, arguments.seeds)
        results.append(result)
        to_low, to_high = (_median(result["steps_to_reach"][key]) for key in (low, high))
        print(
            f"| {algorithm} | {result['timesteps']:,} | {to_low} | {to_high} "
            f"| {result['mean']:.1f} | {result['minimum']:.1f} "
            f"| {result['run_seconds']:.1f} s | {result['compile_seconds']:.1f} s |",
            flush=True,
        )
    if arguments.json:
        machine.write_results(arguments.json, results)


def _median(steps: list[int | None]) -> str:
    """Returns the median over seeds as text, or a dash unless more than half reach the return."""
    median = float(np.median([np.inf if step is None else step for step in steps]))
    return f"{median:,.0f}" if np.isfinite(median) else "-"


if __name__ == "__main__":
    main()
