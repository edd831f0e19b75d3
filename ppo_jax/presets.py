"""Tuned settings for known environments: what `ppo-jax train ENV` starts from.

`python benchmarks/presets.py` measures what each reaches.
"""

from typing import Any

from ppo_jax.config import Config, HParams

_CONFIGS: dict[str, dict[str, Any]] = {
    "CartPole-v1": {"num_envs": 8, "num_steps": 128, "total_timesteps": 500_000},
    "Acrobot-v1": {"num_envs": 16, "num_steps": 128, "total_timesteps": 500_000},
    "Pendulum-v1": {
        "num_envs": 8,
        "num_steps": 128,
        "num_epochs": 10,
        "num_minibatches": 16,
        "total_timesteps": 800_000,
    },
    "MountainCar-v0": {
        "num_envs": 128,
        "num_steps": 128,
        "num_minibatches": 8,
        "total_timesteps": 3_000_000,
    },
}

_HPARAMS: dict[str, dict[str, float]] = {
    # Clipping the value keeps its gradient from crowding the actor's out of the joint norm.
    "CartPole-v1": {"value_clip_eps": 0.2},
    "Acrobot-v1": {"learning_rate": 3e-3, "gae_lambda": 0.9, "ent_coef": 0.0},
    "Pendulum-v1": {
        "learning_rate": 1e-3,
        "gamma": 0.95,
        "ent_coef": 0.0,
        "max_grad_norm": 10.0,
    },
    "MountainCar-v0": {"learning_rate": 3e-3, "gae_lambda": 0.98, "ent_coef": 0.03},
}


def preset(env: str, **changes: Any) -> tuple[Config, HParams]:
    """The tuned settings for `env`, or the defaults where there are none.

    Args:
      env: an environment's name.
      **changes: fields of `Config` that replace the preset's.

    Returns:
      `(config, hparams)`, as `ppo_jax.train` and `trainer.run` take them.

    >>> config, hparams = preset("CartPole-v1", num_envs=16)
    >>> config.num_envs
    16
    """
    config = Config(env=env).replace(**{**_CONFIGS.get(env, {}), **changes})
    return config, HParams(**_HPARAMS.get(env, {}))


def names() -> tuple[str, ...]:
    """The environments that have a preset."""
    return tuple(_CONFIGS)
