"""ppo_jax, with environments on the host."""

from typing import Any

import jax
from serving import serve

from ppo_jax import Config, HParams, make_env, train
from ppo_jax.runs.host_evaluation import evaluate_on_host


def build(workload: dict[str, Any]) -> Any:
    """Returns a run of `ppo_jax.train`, which compiles again for each seed."""
    names = ("num_envs", "num_steps", "total_timesteps", "num_epochs", "num_minibatches")
    config = Config(
        env=workload["env"],
        **{name: workload[name] for name in names},
        **workload["config"],
        lr_schedule="constant",
    )
    hparams = HParams(**workload["hparams"])

    def run(seed: int) -> dict[str, float | None]:
        # A single episode: the policy is evaluated below as the workload says.
        result = train(config, hparams, seed=seed, eval_episodes=1, progress=False)
        found = evaluate_on_host(
            result.policy,
            make_env(config),
            jax.random.key(seed),
            workload["evaluation_episodes"],
            greedy=not workload.get("is_sampled"),
        )
        return {"seconds": result.run_seconds, "return": float(found.returns.mean())}

    return {}, run


if __name__ == "__main__":
    serve(build)
