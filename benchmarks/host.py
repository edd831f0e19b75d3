r"""Compares trainings in environments of Gymnasium with Stable-Baselines3, one run of each in turn.

python benchmarks/host.py --json benchmarks/results/host-cpu.json

Both trainers get the same hyperparameters; compilation is left out. The return is that of the
greedy policy over 20 episodes. Stable-Baselines3 does not clip the critic's error, as ppo_jax does
not here. Tasks of MuJoCo need `pip install "gymnasium[mujoco]"`.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import machine, peers

_SHARED = {
    "num_epochs": 10,
    "num_minibatches": 32,
    "evaluation_episodes": 20,
    "hparams": {
        "learning_rate": 3e-4,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "clip_eps": 0.2,
        "ent_coef": 0.0,
        "vf_coef": 0.5,
        "max_grad_norm": 0.5,
    },
}
WORKLOADS = {
    "CartPole-v1": {"num_envs": 8, "num_steps": 256, "total_timesteps": 100_352},
    "Hopper-v5": {"num_envs": 8, "num_steps": 256, "total_timesteps": 200_704},
}
_SCRIPTS = {"ppo_jax": "ours_on_host.py", "sb3": "stable_baselines3_ppo.py"}


def measure(env: str, pythons: dict[str, Path], repeats: int) -> dict[str, Any]:
    """Measures both trainers in one environment."""
    workload = {"env": env, **_SHARED, **WORKLOADS[env]}
    contenders = {
        name: peers.Contender(python, _SCRIPTS[name], workload, 1)
        for name, python in pythons.items()
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    peers.Contender.prepare(contenders.values())
    for seed in range(1, repeats + 1):
        for name, contender in contenders.items():
            runs[name].append(contender.ask({"seed": seed}))
    for contender in contenders.values():
        contender.close()
    return {
        "env": env,
        "trainers": {
            name: {
                "steps_per_second": workload["total_timesteps"]
                / statistics.median(run["seconds"] for run in found),
                "seconds": [run["seconds"] for run in found],
                "returns": [run["return"] for run in found],
            }
            for name, found in runs.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--environments", type=Path, default=Path(".cache/peers"))
    parser.add_argument("--repeats", type=int, default=3, help="seeds; the median time counts")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    pythons = {
        "ppo_jax": Path(sys.executable),
        "sb3": peers.python_of("sb3", arguments.environments),
    }
    print("| environment | trainer | steps/s | return of each seed |\n|---|---|---|---|")
    results = []
    for env in arguments.env:
        results.append(measure(env, pythons, arguments.repeats))
        for name, found in results[-1]["trainers"].items():
            returns = ", ".join(f"{x:.0f}" for x in found["returns"])
            rate = found["steps_per_second"]
            print(f"| {env} | {name} | {rate:,.0f} | {returns} |", flush=True)
        if arguments.json:
            machine.write_results(arguments.json, results)


if __name__ == "__main__":
    main()
