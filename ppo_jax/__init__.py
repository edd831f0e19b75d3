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

from ppo_jax.lazy import submodules_of

if TYPE_CHECKING:
    from ppo_jax.algorithms import register_algorithm
    from ppo_jax.config import Config
    from ppo_jax.devices import make_mesh
    from ppo_jax.envs import make_env
    from ppo_jax.errors import ConfigError
    from ppo_jax.evaluation import Evaluation, evaluate
    from ppo_jax.hparams import HParams, hyperparameter
    from ppo_jax.policy.policy import Policy
    from ppo_jax.policy.spec import register_action_distribution, register_network
    from ppo_jax.presets import preset
    from ppo_jax.runs.checkpoint import load_state, save_state
    from ppo_jax.runs.run import resume, train
    from ppo_jax.runs.search import search
    from ppo_jax.runs.sweep import sweep
    from ppo_jax.runs.trained import load, load_config
    from ppo_jax.stages.algorithm import Algorithm
    from ppo_jax.stages.metrics import Metrics
    from ppo_jax.stages.optimizers import register_lr_schedule, register_optimizer
    from ppo_jax.trainer import Trainer, make_train, make_trainer

__version__ = "0.1.0"

# Names are imported when first used: `ppo-jax --help` and a misspelt flag need neither JAX
# nor the environments, whose packages take seconds to import.
_MODULES = {
    "Algorithm": "stages.algorithm",
    "Config": "config",
    "ConfigError": "errors",
    "Evaluation": "evaluation",
    "HParams": "hparams",
    "Metrics": "stages.metrics",
    "Policy": "policy.policy",
    "Trainer": "trainer",
    "evaluate": "evaluation",
    "hyperparameter": "hparams",
    "load": "runs.trained",
    "load_config": "runs.trained",
    "load_state": "runs.checkpoint",
    "make_env": "envs",
    "make_mesh": "devices",
    "make_train": "trainer",
    "make_trainer": "trainer",
    "preset": "presets",
    "register_action_distribution": "policy.spec",
    "register_algorithm": "algorithms",
    "register_lr_schedule": "stages.optimizers",
    "register_network": "policy.spec",
    "register_optimizer": "stages.optimizers",
    "resume": "runs.run",
    "save_state": "runs.checkpoint",
    "search": "runs.search",
    "sweep": "runs.sweep",
    "train": "runs.run",
}

__all__ = [
    "Algorithm",
    "Config",
    "ConfigError",
    "Evaluation",
    "HParams",
    "Metrics",
    "Policy",
    "Trainer",
    "evaluate",
    "hyperparameter",
    "load",
    "load_config",
    "load_state",
    "make_env",
    "make_mesh",
    "make_train",
    "make_trainer",
    "preset",
    "register_action_distribution",
    "register_algorithm",
    "register_lr_schedule",
    "register_network",
    "register_optimizer",
    "resume",
    "save_state",
    "search",
    "sweep",
    "train",
]


_submodule = submodules_of(__name__)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        return _submodule(name)
    # `HParams` becomes a pytree when one is made after JAX was imported; see `hparams`.
    importlib.import_module("jax")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
