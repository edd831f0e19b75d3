"""Published settings of Brax's PPO, converted to `Config` and `HParams`.

Sources: google/brax, notebooks/training.ipynb (June 2026), and `config/dm_control_suite_params.py`
of MuJoCo Playground 0.2. They are made for one GPU.
"""

import math
from collections.abc import Mapping
from typing import Any

# Arguments of `brax.training.agents.ppo.train`, which the notebook gives for most tasks.
_NOTEBOOK = {
    "num_timesteps": 50_000_000,
    "num_envs": 2048,
    "unroll_length": 5,
    "batch_size": 1024,
    "num_minibatches": 32,
    "num_updates_per_batch": 8,
    "learning_rate": 3e-4,
    "entropy_cost": 1e-2,
    "discounting": 0.97,
    "reward_scaling": 10.0,
}
_PENDULUM = {**_NOTEBOOK, "num_updates_per_batch": 4}
_SHORT_SIGHTED = {**_NOTEBOOK, "discounting": 0.95, "reward_scaling": 5.0}
_BRAX = {
    "ant": {**_NOTEBOOK, "num_envs": 4096, "batch_size": 2048, "num_updates_per_batch": 4},
    "halfcheetah": {
        **_SHORT_SIGHTED,
        "unroll_length": 20,
        "batch_size": 512,
        "entropy_cost": 1e-3,
        "reward_scaling": 1.0,
    },
    "humanoid": {**_NOTEBOOK, "unroll_length": 10, "entropy_cost": 1e-3, "reward_scaling": 0.1},
    "humanoidstandup": {
        **_NOTEBOOK,
        "num_timesteps": 100_000_000,
        "unroll_length": 15,
        "learning_rate": 6e-4,
        "reward_scaling": 0.1,
    },
    "inverted_double_pendulum": {**_PENDULUM, "num_timesteps": 20_000_000},
    "inverted_pendulum": {**_PENDULUM, "num_timesteps": 2_000_000},
    "pusher": {**_SHORT_SIGHTED, "unroll_length": 30, "batch_size": 512, "num_minibatches": 16},
    "reacher": {
        **_SHORT_SIGHTED,
        "unroll_length": 50,
        "batch_size": 256,
        "entropy_cost": 1e-3,
        "action_repeat": 4,
    },
}

# Tasks of the DeepMind Control Suite. `CartpoleBalance` has a preset that was tuned here.
_CONTROL = {
    **_NOTEBOOK,
    "num_timesteps": 60_000_000,
    "unroll_length": 30,
    "num_updates_per_batch": 16,
    "learning_rate": 1e-3,
    "discounting": 0.995,
}
_LONG = {**_CONTROL, "num_timesteps": 100_000_000}
_PLAYGROUND = {
    "AcrobotSwingup": _LONG,
    "AcrobotSwingupSparse": _LONG,
    "BallInCup": {**_CONTROL, "discounting": 0.95},
    "CartpoleBalanceSparse": _CONTROL,
    "CartpoleSwingup": _CONTROL,
    "CartpoleSwingupSparse": _CONTROL,
    "CheetahRun": _CONTROL,
    "FingerSpin": {**_CONTROL, "discounting": 0.95},
    "FingerTurnEasy": _CONTROL,
    "FingerTurnHard": _CONTROL,
    "FishSwim": _CONTROL,
    "HopperHop": _CONTROL,
    "HopperStand": _CONTROL,
    "HumanoidRun": _CONTROL,
    "HumanoidStand": _CONTROL,
    "HumanoidWalk": _CONTROL,
    # In Playground 0.2, the line that sets action_repeat for this task misspells the task's name.
    "PendulumSwingup": _CONTROL,
    "PointMass": _CONTROL,
    "ReacherEasy": _CONTROL,
    "ReacherHard": _CONTROL,
    "SwimmerSwimmer6": _LONG,
    "WalkerRun": _LONG,
    "WalkerStand": _CONTROL,
    "WalkerWalk": _CONTROL,
}

BRAX_ARGUMENTS: dict[str, dict[str, Any]] = {
    **{f"brax:{task}": settings for task, settings in _BRAX.items()},
    **{f"playground:{task}": settings for task, settings in _PLAYGROUND.items()},
}
"""Arguments of Brax's PPO by environment. All normalise observations, and use the defaults of its
networks."""


def from_brax(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """Returns fields of `Config` and of `HParams` from arguments of Brax's PPO.

    An update of Brax collects `batch_size * num_minibatches` segments of `unroll_length` steps, and
    computes advantages within each segment. Here all segments of an environment form one rollout,
    so that advantages are not cut at the ends of segments. Minibatches have the same number of
    samples as in Brax, but single samples are shuffled instead of segments. Brax rounds the number
    of updates up, to a multiple of the evaluations times the resets per evaluation; here the number
    is rounded down.

    Returns:
      `(config, hparams)`: arguments of `Config` and of `HParams`, by name.
    """
    # Every environment contributes the same number of segments to an update.
    segments = arguments["batch_size"] * arguments["num_minibatches"] // arguments["num_envs"]
    repeats = arguments.get("action_repeat", 1)  # Brax counts the repeated steps as well
    config = {
        "num_envs": arguments["num_envs"],
        "num_steps": segments * arguments["unroll_length"],
        "num_epochs": arguments["num_updates_per_batch"],
        "num_minibatches": arguments["num_minibatches"],
        "total_timesteps": arguments["num_timesteps"] // repeats,
        "normalize_obs": True,
        "hidden_sizes": (32,) * 4,
        "critic_hidden_sizes": (256,) * 5,
        "optimizer_kwargs": {"eps": 1e-8},
        # Below, defaults of Brax's networks.
        "activation": "silu",
        "action_distribution": "tanh_gaussian",
        "state_dependent_std": True,
        "lr_schedule": "constant",
    }
    if repeats > 1:
        config["wrappers"] = {"action_repeat": repeats}
    hparams = {
        "learning_rate": arguments["learning_rate"],
        "gamma": arguments["discounting"],
        "gae_lambda": 0.95,
        "clip_eps": 0.3,
        "ent_coef": arguments["entropy_cost"],
        "vf_coef": 0.5,
        "max_grad_norm": math.inf,
        "reward_scale": arguments["reward_scaling"],
    }
    return config, hparams
