"""ppo_jax."""

from typing import Any

from jax_timing import compile_and_time
from serving import serve

from ppo_jax import Config, HParams, make_train


def build(workload: dict[str, Any]) -> Any:
    """Compiles `make_train`."""
    names = ("env", "num_envs", "num_steps", "total_timesteps", "num_epochs", "num_minibatches")
    config = Config(**{name: workload[name] for name in names}, hidden_sizes=(64, 64))
    hparams = HParams(**workload["hparams"])
    train = make_train(config)
    return compile_and_time(
        lambda key: train(key, hparams),
        lambda result: result[1]["episode/return"][..., -10:],
        workload["num_seeds"],
    )


if __name__ == "__main__":
    serve(build)
