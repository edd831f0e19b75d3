"""Adapter for tasks of MuJoCo Playground. The only module that imports mujoco_playground."""

from typing import Any

from ppo_jax.envs.environment import Environment
from ppo_jax.envs.suites import brax


def make(task: str, *, impl: str = "jax", **kwargs: Any) -> Environment:
    """Builds a task.

    Args:
      task: name in Playground's registry.
      impl: engine of MJX: "jax", which runs anywhere, or "warp", which needs an NVIDIA GPU.
      **kwargs: changes of the task's config, such as `ctrl_dt` or "reward_config.scales.energy".
    """
    from mujoco_playground import registry

    # Robots of locomotion and manipulation are downloaded (MuJoCo Menagerie) when they are loaded.
    config = registry.get_default_config(task)
    changes = {"impl": impl, **kwargs} if "impl" in config else kwargs
    inner = registry.load(task, config, config_overrides=changes)
    env = brax.adapt(task, inner)
    # Its wrappers for training cut episodes; its tasks do not.
    return env._replace(params=brax.Params(int(config.episode_length)), renderer=None)
