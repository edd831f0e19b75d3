"""Finds performance regressions: compares trainings with the time of a fixed computation.

python benchmarks/guard.py           # fails if a ratio exceeds 1.3 times the stored one
python benchmarks/guard.py --store   # stores new ratios after an intended change

A ratio of times in one process depends on the code and hardly on the machine. The reference is
gradient steps of a small network, arithmetic that every training needs. The minimum of several
interleaved times counts, because other work on a machine only adds to a time. A ratio that is too
large is measured again, at most twice: on a busy machine, the same program had 1.1 and 1.4 times
the stored ratio within minutes.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import machine
from benchmarks.throughput import Compiled, build, time_once
from benchmarks.workloads import WORKLOADS
from ppo_jax import make_trainer

_STORED = Path(__file__).parent / "results" / "guard.json"
_BAND = 1.3
_UPDATES = {"W1": 150, "W2": 2}


def reference(samples: int, steps: int) -> Callable[[jax.Array], Any]:
    """Returns gradient steps of a 4-64-64-2 network, without code of ppo_jax. Never change it."""
    sizes = (4, 64, 64, 2)

    def run(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(sizes))
        x = jax.random.normal(keys[0], (samples, sizes[0]))
        shapes = itertools.pairwise(sizes)
        weights = [
            jax.random.normal(key, shape) / shape[0] ** 0.5
            for key, shape in zip(keys[1:], shapes, strict=True)
        ]

        def loss(weights: list[jax.Array]) -> jax.Array:
            hidden = jnp.tanh(jnp.tanh(x @ weights[0]) @ weights[1])
            return jnp.mean(jnp.square(hidden @ weights[2] - 1.0))

        def step(weights: list[jax.Array], _: None) -> tuple[list[jax.Array], None]:
            descended = jax.tree.map(lambda w, g: w - 1e-3 * g, weights, jax.grad(loss)(weights))
            return descended, None

        return jax.lax.scan(step, weights, length=steps)[0]

    return run


def ratio(name: str, repeats: int) -> float:
    """Returns the time of a workload's training over that of the reference."""
    config = WORKLOADS[name].config
    config = config.replace(total_timesteps=_UPDATES[name] * config.batch_size)
    key = jax.random.key(0)
    programs: list[Compiled] = [
        build(make_trainer(config).run, key),
        build(reference(config.batch_size // 4, config.num_updates * 16), key),
    ]
    for program in programs:
        time_once(program, key)
    seconds = [[time_once(program, key) for program in programs] for _ in range(repeats)]
    training, fixed = (min(times) for times in zip(*seconds, strict=True))
    return training / fixed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", action="store_true", help="store the ratios instead")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    if arguments.store:
        results = [{"workload": name, "ratio": ratio(name, arguments.repeats)} for name in _UPDATES]
        machine.write_results(_STORED, results)
        return
    stored = {row["workload"]: row["ratio"] for row in json.loads(_STORED.read_text())["results"]}
    slower = False
    for name in _UPDATES:
        found = ratio(name, arguments.repeats)
        for _ in range(2):
            if found > _BAND * stored[name]:
                found = min(found, ratio(name, arguments.repeats))
        slower |= found > _BAND * stored[name]
        print(f"{name}: {found:.2f} x the reference, {found / stored[name]:.2f} x the stored ratio")
    if slower:
        sys.exit(f"A training takes more than {_BAND} times what is stored in {_STORED.name}.")


if __name__ == "__main__":
    main()
