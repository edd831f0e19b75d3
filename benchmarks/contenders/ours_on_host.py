"""ppo_jax, with environments of gymnasium on the host."""

from typing import Any

from serving import serve

from ppo_jax import Config, HParams, train


def build(workload: dict[str, Any]) -> Any:
    """Returns a run of `ppo_jax.train`, which compiles again for each seed."""
    names = ("num_envs", "num_steps", "total_timesteps", "num_epochs", "num_minibatches")
    config = Config(
        env=f"gymnasium:{workload['env']}",
        **{name: workload[name] for name in names},
        hidden_sizes=(64, 64),
        lr_schedule="constant",
    )
    hparams = HParams(**workload["hparams"])

    def run(seed: int) -> dict[str, float | None]:
        episodes = workload["evaluation_episodes"]
        result = train(config, hparams, seed=seed, eval_episodes=episodes, progress=False)
        assert result.evaluation is not None
        return {
            "seconds": result.run_seconds,
            "return": float(result.evaluation.returns.mean()),
        }

    return {}, run


if __name__ == "__main__":
    serve(build)
