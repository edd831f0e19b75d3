"""Stable-Baselines3 and SBX, which share an interface, with environments of gymnasium on the host.

They are slower by one to two orders of magnitude, so they run only the first updates of a workload.
"""

import time
from collections.abc import Callable
from typing import Any

import gymnasium
from stable_baselines3.common.vec_env import DummyVecEnv

_UPDATES = 16


def build_with(ppo: Any, activation: Any) -> Callable[[dict[str, Any]], Any]:
    """Returns `build` for `serving.serve`, for a class like stable_baselines3.PPO."""

    def build(workload: dict[str, Any]) -> Any:
        hparams = workload["hparams"]
        num_envs, num_steps = workload["num_envs"], workload["num_steps"]
        timesteps = _UPDATES * num_envs * num_steps
        env = DummyVecEnv([lambda: gymnasium.make(workload["env"])] * num_envs)

        def train(seed: int, total_timesteps: int) -> None:
            model = ppo(
                "MlpPolicy",
                env,
                learning_rate=hparams["learning_rate"],
                n_steps=num_steps,
                batch_size=num_envs * num_steps // workload["num_minibatches"],
                n_epochs=workload["num_epochs"],
                gamma=hparams["gamma"],
                gae_lambda=hparams["gae_lambda"],
                clip_range=hparams["clip_eps"],
                ent_coef=hparams["ent_coef"],
                vf_coef=hparams["vf_coef"],
                max_grad_norm=hparams["max_grad_norm"],
                policy_kwargs={"net_arch": [64, 64], "activation_fn": activation},
                device="cpu",
                seed=seed,
            )
            model.learn(total_timesteps)

        start = time.perf_counter()
        train(0, num_envs * num_steps)
        figures = {"compile_seconds": time.perf_counter() - start}

        def run(seed: int) -> dict[str, float | None]:
            start = time.perf_counter()
            train(seed, timesteps)
            seconds = time.perf_counter() - start
            return {"seconds": seconds, "timesteps": timesteps, "return": None}

        return figures, run

    return build
