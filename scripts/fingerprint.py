"""Fingerprints of short trainings, to show that a change of structure changes no number.

python scripts/fingerprint.py --write before.json     # at the old commit
python scripts/fingerprint.py --compare before.json   # at the new one

One short run of every algorithm, memory, action distribution, network and normaliser. A comparison
fails unless all parameters have the same bits and all metrics agree to 1e-6. Bits hold for one
machine and one version of JAX, so the file is not kept.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_num_cpu_devices", 2)

import numpy as np

import ppo_jax
from ppo_jax import Config, HParams, envs
from ppo_jax.envs import spaces

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.random_env import random_env

_UPDATES = 4
_CASES: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "reinforce": ({}, {}),
    "reinforce_to_go": ({}, {"ent_coef": 0.01}),
    "reinforce_baseline": ({}, {"max_grad_norm": 0.5}),
    "actor_critic": ({"n_step": 5}, {}),
    "off_policy_pg": ({}, {}),
    "trpo": ({"normalize_obs": True}, {}),
    "ppo_penalty": ({"value_target": "td"}, {}),
    "ppo_adaptive": ({"optimizer": "rmsprop"}, {"d_targ": 1e-4}),
    "ppo": ({"exact_kl": True}, {}),
    "spo": ({"optimizer": "sgd"}, {}),
    "dpo": ({"lr_schedule": "cosine"}, {}),
    "ppo adaptive rate": ({"lr_schedule": "kl_adaptive"}, {"desired_kl": 1e-3}),
    "ppo_adaptive both": ({"lr_schedule": "kl_adaptive"}, {}),
    "trpo adaptive rate": ({"lr_schedule": "kl_adaptive"}, {}),
    "ppo gru": ({"memory": "gru"}, {}),
    "ppo lstm shared": ({"memory": "lstm", "shared_torso": True}, {}),
    "ppo mingru": ({"memory": "mingru", "memory_size": 16}, {}),
    "ppo lru": ({"memory": "lru", "memory_size": 16}, {}),
    "ppo gtrxl": ({"memory": "gtrxl", "memory_size": 16, "memory_window": 4}, {}),
    "trpo gru": ({"memory": "gru", "memory_size": 16}, {}),
    "ppo target": ({"lr_schedule": "constant"}, {"learning_rate": 0.01, "target_kl": 0.01}),
    "ppo clips": (
        {"separate_grad_norms": True},
        {"value_clip_eps": 0.2, "dual_clip": 3.0, "max_grad_value": 0.1},
    ),
    "ppo normal": (
        {"normalize_obs": True, "normalize_reward": True, "normalize_advantage": "batch"},
        {"reward_scale": 0.5, "reward_clip": 2.0, "hidden_gain": 1.0},
    ),
    "ppo gaussian": ({"env": "Pendulum-v1"}, {}),
    "ppo gaussian of state": ({"env": "Pendulum-v1", "state_dependent_std": True}, {}),
    "trpo tanh": ({"env": "Pendulum-v1", "action_distribution": "tanh_gaussian"}, {}),
    "ppo beta": ({"env": "Pendulum-v1", "action_distribution": "beta"}, {}),
    "ppo wrapped": ({"wrappers": {"time_limit": 9, "action_repeat": 2, "frame_stack": 3}}, {}),
    "ppo dict": ({"env": "noise", "embedding_size": 4, "layer_norm": True}, {}),
    "ppo images": ({"env": "Breakout-MinAtar", "network": "minatar_cnn", "activation": "relu"}, {}),
    "ppo devices": ({"num_devices": 2}, {}),
    "ppo_adaptive devices gru": ({"num_devices": 2, "memory": "gru", "normalize_obs": True}, {}),
    "trpo devices": ({"num_devices": 2}, {}),
    "reinforce_baseline devices": ({"num_devices": 2}, {}),
}


def register_noise() -> None:
    """Registers an environment with a dict observation, an action mask and two actions at once."""
    observation = spaces.Dict.of(
        {
            "vector": spaces.Box((3,)),
            "kind": spaces.Discrete(4),
            "action_mask": spaces.Box((5,), "bool"),
        }
    )
    envs.register("noise", lambda: random_env(observation, spaces.MultiDiscrete((2, 3))))


def fingerprints() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name, the digest of all parameters, and the metrics of each run."""
    for name, (fields, values) in _CASES.items():
        algorithm = name.split()[0]
        whole_episodes = algorithm.startswith("reinforce")
        changes = {"env_params": {"max_steps_in_episode": 16}} if whole_episodes else {}
        config = Config(
            algorithm=algorithm,
            num_envs=8,
            num_steps=16,
            total_timesteps=_UPDATES * 128,
            **{"hidden_sizes": (16, 16), **changes, **fields},
        )
        run = jax.jit(ppo_jax.make_train(config))
        state, metrics = run(jax.random.key(0), HParams(**values))
        digest = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.learner.params):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.asarray(leaf).tobytes())
        numbers = {key: np.asarray(value, float).tolist() for key, value in metrics.items()}
        yield name, {"params": digest.hexdigest(), "metrics": numbers}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Lists what differs between the fingerprints of one run."""
    result = [] if found["params"] == expected["params"] else ["parameters"]
    for key in sorted(found["metrics"].keys() ^ expected["metrics"].keys()):
        result.append(f"{key} is there only once")
    for key in sorted(found["metrics"].keys() & expected["metrics"].keys()):
        pair = found["metrics"][key], expected["metrics"][key]
        if not np.allclose(*pair, rtol=1e-6, atol=1e-6, equal_nan=True):
            gap = np.nanmax(np.abs(np.subtract(*pair)))
            result.append(f"{key} by {gap if math.isfinite(gap) else 'NaN'}")
    return result


def main() -> int:
    """Writes or compares; returns 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path)
    parser.add_argument("--compare", type=Path)
    arguments = parser.parse_args()
    register_noise()
    found = dict(fingerprints())
    if arguments.write is not None:
        arguments.write.write_text(json.dumps(found))
    if arguments.compare is None:
        return 0
    expected = json.loads(arguments.compare.read_text())
    failed = False
    for name, one in found.items():
        lines = differences(one, expected[name])
        failed |= bool(lines)
        print(f"{name}: {'; '.join(lines) or 'same'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
