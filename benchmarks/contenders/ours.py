"""ppo_jax."""

import math
from typing import Any

import jax
from jax_timing import compile_and_time
from serving import serve

from ppo_jax import Config, HParams, evaluate, make_mesh, make_trainer


def build(workload: dict[str, Any]) -> Any:
    """Compiles `Trainer.run`."""
    names = ("env", "num_envs", "num_steps", "total_timesteps", "num_epochs", "num_minibatches")
    # The settings of rejax: its max_grad_norm clips the entries of a gradient, its Adam has the eps
    # of optax, and its weights have gains of 1.
    config = Config(
        env_kwargs=workload["env_kwargs"],
        **{name: workload[name] for name in (*names, "num_devices", "memory", "shared_torso")},
        hidden_sizes=(64, 64),
        lr_schedule="constant",
        optimizer_kwargs={"eps": 1e-8},
    )
    hparams = HParams(
        **{
            **workload["hparams"],
            "max_grad_norm": math.inf,
            "max_grad_value": workload["hparams"]["max_grad_norm"],
            "hidden_gain": 1.0,
            "actor_gain": 1.0,
        }
    )
    devices = workload.get("devices")
    mesh = None if devices is None else make_mesh(env=config.num_devices, devices=devices)
    trainer = make_trainer(config, mesh)

    def returns_of(result: Any) -> jax.Array:
        state, _ = result
        key, params = jax.random.key(0), state.env_params
        policy = trainer.policy(state)
        return evaluate(policy, trainer.env, params, key, 64, greedy=False).returns

    evaluated = jax.jit(returns_of if workload["num_seeds"] is None else jax.vmap(returns_of))
    return compile_and_time(lambda key: trainer.run(key, hparams), evaluated, workload["num_seeds"])


if __name__ == "__main__":
    serve(build)
