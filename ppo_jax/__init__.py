"""JAX-accelerated policy-gradient training, compiled end to end.

>>> import jax
>>> import ppo_jax
>>> config = ppo_jax.Config(env="CartPole-v1", num_envs=4, num_steps=16, total_timesteps=128)
>>> keys = jax.random.split(jax.random.key(0), 3)
>>> states, metrics = jax.jit(jax.vmap(ppo_jax.make_train(config)))(keys)
>>> metrics["episode/return"].shape  # [seeds, updates]
(3, 2)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppo_jax.config import Config, ConfigError
    from ppo_jax.evaluation import Evaluation, evaluate
    from ppo_jax.policy.policy import Policy
    from ppo_jax.presets import preset
    from ppo_jax.runs.run import load, train
    from ppo_jax.runs.sweep import sweep
    from ppo_jax.trainer import Trainer, make_train, make_trainer
    from ppo_jax.types import HParams

__version__ = "0.1.0"

# Names are imported when first used: `ppo-jax --help` and a misspelt flag need neither JAX
# nor the environments, whose packages take seconds to import.
_HOMES = {
    "Config": "config",
    "ConfigError": "config",
    "Evaluation": "evaluation",
    "HParams": "types",  # where it becomes a pytree
    "Policy": "policy.policy",
    "Trainer": "trainer",
    "evaluate": "evaluation",
    "load": "runs.run",
    "make_train": "trainer",
    "make_trainer": "trainer",
    "preset": "presets",
    "sweep": "runs.sweep",
    "train": "runs.run",
}

__all__ = [
    "Config",
    "ConfigError",
    "Evaluation",
    "HParams",
    "Policy",
    "Trainer",
    "evaluate",
    "load",
    "make_train",
    "make_trainer",
    "preset",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
