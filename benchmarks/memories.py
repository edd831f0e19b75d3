"""Compares recurrent policies on tasks that need one old observation, or many recent ones.

python benchmarks/memories.py --json benchmarks/results/memories-cpu.json
"""

import argparse
import math
import os
import sys
import typing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import machine
from ppo_jax import Config, HParams, envs
from ppo_jax.config import MemoryKind
from ppo_jax.envs.environment import Environment, Step
from ppo_jax.envs.spaces import Box, Discrete
from ppo_jax.runs.run import train

SUITS = 4
REPEAT = "repeat_previous"


class Cards(NamedTuple):
    """Suits of all cards of an episode, and how many were shown before the current one."""

    suits: jax.Array  # int32 [length + 1]
    time: jax.Array  # int32 []


def repeat_previous(steps: int, length: int) -> Environment:
    """Shows a suit each step; the action that is right is the one shown `steps` steps before.

    Modelled on RepeatPrevious of POPGym (Morad et al. 2023, arXiv:2303.01859), which shuffles whole
    decks and shows when an action counts. Returns are in [-1, 1]; random actions have one of -0.5.
    """

    def observe(state: Cards) -> jax.Array:
        return jax.nn.one_hot(state.suits[state.time], SUITS)

    def reset(key: jax.Array, params: Any) -> tuple[jax.Array, Cards]:
        del params
        suits = jax.random.randint(key, (length + 1,), 0, SUITS)
        state = Cards(suits, jnp.zeros((), jnp.int32))
        return observe(state), state

    def step(key: jax.Array, state: Cards, action: jax.Array, params: Any) -> Step:
        del key, params
        is_right = action == state.suits[jnp.maximum(state.time - steps, 0)]
        points = jnp.where(is_right, 1.0, -1.0) / (length - steps)
        reward = jnp.where(state.time >= steps, points, 0.0)
        state = state._replace(time=state.time + 1)
        return Step(observe(state), state, reward, state.time >= length, jnp.array(False))

    space, actions = Box((SUITS,)), Discrete(SUITS)
    return Environment(REPEAT, reset, step, (), space, actions)


TASKS: dict[str, dict[str, Any]] = {
    "MemoryChain-bsuite": {"env_params": {"memory_length": 100}},
    REPEAT: {},
}
WINDOWS = {"MemoryChain-bsuite": 128, REPEAT: 64}
# A transformer learns from fewer steps, each of which takes longer.
TIMESTEPS = dict.fromkeys(typing.get_args(MemoryKind), 1_000_000) | {"gtrxl": 500_000}
HPARAMS = HParams(learning_rate=1e-3, value_clip_eps=0.2)


def config_of(task: str, memory: str, **changes: Any) -> Config:
    """Returns the training of a task with a memory; registers the task."""
    envs.register(REPEAT, lambda: repeat_previous(32, 104), overwrite=True)
    config = Config(
        env=task,
        memory=typing.cast(MemoryKind, memory),
        memory_size=64,
        memory_window=WINDOWS[task] if memory == "gtrxl" else None,
        num_envs=64,
        num_steps=128,
        num_minibatches=8,
        total_timesteps=TIMESTEPS[memory],
    )
    return config.replace(**TASKS[task], **changes)


def measure(task: str, memory: str, num_seeds: int) -> dict[str, Any]:
    """Trains and evaluates one memory."""
    config = config_of(task, memory)
    run = train(config, HPARAMS, num_seeds=num_seeds, log_every=1, progress=False)
    assert run.evaluation is not None
    curves = run.metrics.dropna(subset="episode/return")
    # Both tasks are solved at a return of 1.
    solved = curves[curves["episode/return"] >= 0.9].groupby("seed")["timesteps"].min()
    return {
        "task": task,
        "memory": memory,
        "seeds": num_seeds,
        "timesteps": run.timesteps,
        "returns": np.asarray(run.evaluation.returns).mean(axis=1).tolist(),
        "steps_to_0.9": sorted(solved.tolist()),
        "steps_per_second": run.timesteps * num_seeds / run.run_seconds,
        "seconds": run.run_seconds,
    }


def main() -> None:
    kinds = typing.get_args(MemoryKind)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--memory", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", math.gcd(arguments.seeds, os.cpu_count() or 1))
    print("| task | memory | steps | returns | steps to 0.9 | steps/s |\n|---|---|---|---|---|---|")
    results = []
    for task in arguments.task:
        for memory in arguments.memory:
            result = measure(task, memory, arguments.seeds)
            results.append(result)
            returns = ", ".join(f"{x:.2f}" for x in result["returns"])
            solved = ", ".join(f"{steps:,}" for steps in result["steps_to_0.9"]) or "never"
            print(
                f"| {task} | {memory} | {result['timesteps']:,} | {returns} | {solved} "
                f"| {result['steps_per_second']:,.0f} |",
                flush=True,
            )
    if arguments.json:
        machine.write_results(arguments.json, results)


if __name__ == "__main__":
    main()
