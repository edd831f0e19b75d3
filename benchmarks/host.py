r"""Compares trainings in environments on the host with other trainers, one run of each in turn.

python benchmarks/host.py --cleanrl path/to/cleanrl --json benchmarks/results/host-cpu.json

All trainers get the same hyperparameters; compilation is left out. The return is that of the greedy
policy over 20 episodes, and in Breakout, where CleanRL is the other trainer, of the sampled one.
CleanRL's is that of the last 20 episodes of its training, with sampled actions. Tasks need
`pip install -e ".[gymnasium,envpool]" "gymnasium[mujoco]"`. CleanRL is not a package; pass a
checkout.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import machine, peers

_HPARAMS = {
    "learning_rate": 3e-4,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "clip_eps": 0.2,
    "ent_coef": 0.0,
    "vf_coef": 0.5,
    "max_grad_norm": 0.5,
}
_ROLLOUTS: dict[str, Any] = {
    "num_envs": 8,
    "num_steps": 256,
    "num_epochs": 10,
    "num_minibatches": 32,
    "hparams": _HPARAMS,
    "config": {"hidden_sizes": (64, 64)},
}
WORKLOADS: dict[str, dict[str, Any]] = {
    "CartPole-v1": {
        **_ROLLOUTS,
        "env": "gymnasium:CartPole-v1",
        "total_timesteps": 100_352,
        "trainers": ("ppo_jax", "sb3", "cleanrl"),
        "cleanrl_script": "ppo.py",
    },
    "Hopper-v5": {
        **_ROLLOUTS,
        "env": "gymnasium:Hopper-v5",
        "total_timesteps": 200_704,
        "trainers": ("ppo_jax", "sb3"),
    },
    # With the normalisation that CleanRL always has.
    "Hopper-v4": {
        **_ROLLOUTS,
        "env": "gymnasium:Hopper-v4",
        "total_timesteps": 200_704,
        "config": {**_ROLLOUTS["config"], "normalize_obs": True, "normalize_reward": True},
        "trainers": ("ppo_jax", "cleanrl"),
        "cleanrl_script": "ppo_continuous_action.py",
    },
    # Both with `nature_cnn`; an episode of the training is a life. The limit is for evaluations:
    # the greedy policy of so short a training may never start the ball.
    "Breakout-v5": {
        "env": "envpool:Breakout-v5",
        "config": {
            "env_kwargs": {"episodic_life": True, "reward_clip": True, "max_episode_steps": 2000},
            "network": "nature_cnn",
            "hidden_sizes": (512,),
            "activation": "relu",
            "shared_torso": True,
        },
        "num_envs": 8,
        "num_steps": 128,
        "num_epochs": 4,
        "num_minibatches": 4,
        "total_timesteps": 20_480,
        "hparams": {
            **_HPARAMS,
            "learning_rate": 2.5e-4,
            "clip_eps": 0.1,
            "value_clip_eps": 0.1,
            "ent_coef": 0.01,
        },
        "is_sampled": True,
        "trainers": ("ppo_jax", "cleanrl"),
        "cleanrl_script": "ppo_atari_envpool.py",
    },
}
_SCRIPTS = {
    "ppo_jax": "ours_on_host.py",
    "sb3": "stable_baselines3_ppo.py",
    "cleanrl": "cleanrl.py",
}


def measure(name: str, pythons: dict[str, Path], repeats: int) -> dict[str, Any]:
    """Measures the trainers of one workload."""
    workload = {**WORKLOADS[name], "task": name, "evaluation_episodes": 20}
    contenders = {
        trainer: peers.Contender(pythons[trainer], _SCRIPTS[trainer], workload, 1)
        for trainer in workload["trainers"]
        if trainer in pythons
    }
    runs: dict[str, list[dict[str, Any]]] = {trainer: [] for trainer in contenders}
    peers.Contender.prepare(contenders.values())
    for seed in range(1, repeats + 1):
        for trainer, contender in contenders.items():
            runs[trainer].append(contender.ask({"seed": seed}))
    for contender in contenders.values():
        contender.close()
    return {
        "task": name,
        "trainers": {
            trainer: {
                "steps_per_second": workload["total_timesteps"]
                / statistics.median(run["seconds"] for run in found),
                "seconds": [run["seconds"] for run in found],
                "returns": [run["return"] for run in found],
            }
            for trainer, found in runs.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--cleanrl", type=Path, help="a checkout of CleanRL")
    parser.add_argument("--environments", type=Path, default=Path(".cache/peers"))
    parser.add_argument("--repeats", type=int, default=3, help="seeds; the median time counts")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    others = ["sb3"]
    if arguments.cleanrl is not None:
        if not (arguments.cleanrl / "cleanrl").is_dir():
            parser.error("--cleanrl must name a checkout of CleanRL, which holds cleanrl/.")
        os.environ["CLEANRL"] = str(arguments.cleanrl.resolve())
        others.append("cleanrl")
    pythons = {name: peers.python_of(name, arguments.environments) for name in others}
    pythons["ppo_jax"] = Path(sys.executable)
    print("| task | trainer | steps/s | return of each seed |\n|---|---|---|---|")
    results = []
    for task in arguments.task:
        results.append(measure(task, pythons, arguments.repeats))
        for name, found in results[-1]["trainers"].items():
            returns = ", ".join(f"{x:.3g}" for x in found["returns"])
            rate = found["steps_per_second"]
            print(f"| {task} | {name} | {rate:,.0f} | {returns} |", flush=True)
        if arguments.json:
            machine.write_results(arguments.json, results)


if __name__ == "__main__":
    main()
