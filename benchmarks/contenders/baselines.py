"""Stable-Baselines3 and SBX, which share an interface, with environments of gymnasium on the host.

Where other trainers have environments in JAX, these are slower by one to two orders of magnitude,
and run only the first updates of a workload. A workload with `evaluation_episodes` is run to its
end, and its policy is evaluated.
"""

import time
from collections.abc import Callable
from typing import Any

import gymnasium
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

_UPDATES = 16


def build_with(ppo: Any, activation: Any) -> Callable[[dict[str, Any]], Any]:
    """Returns `build` for `serving.serve`, for a class like stable_baselines3.PPO."""

    def build(workload: dict[str, Any]) -> Any:
        hparams = workload["hparams"]
        num_envs, num_steps = workload["num_envs"], workload["num_steps"]
        episodes = workload.get("evaluation_episodes")
        timesteps = workload["total_timesteps"] if episodes else _UPDATES * num_envs * num_steps

        def make() -> Any:
            env = gymnasium.make(workload["env"].removeprefix("gymnasium:"))
            return Monitor(env) if episodes else env  # which reports whole episodes

        env = DummyVecEnv([make] * num_envs)

        def train(seed: int, total_timesteps: int) -> Any:
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
            return model.learn(total_timesteps)

        start = time.perf_counter()
        train(0, num_envs * num_steps)
        figures = {"compile_seconds": time.perf_counter() - start}

        def run(seed: int) -> dict[str, float | None]:
            start = time.perf_counter()
            model = train(seed, timesteps)
            seconds = time.perf_counter() - start
            mean = None
            if episodes:
                mean, _ = evaluate_policy(model, env, episodes)
            return {"seconds": seconds, "timesteps": timesteps, "return": mean}

        return figures, run

    return build
