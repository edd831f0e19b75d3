"""Adapter for tasks of MuJoCo Playground. The only module that imports mujoco_playground."""

from typing import Any

from ppo_jax.envs.environment import Environment
from ppo_jax.envs.suites import brax
from ppo_jax.envs.wrappers import action_repeat
from ppo_jax.errors import require_known


def make(task: str, *, impl: str | None = None, **kwargs: Any) -> Environment:
    """Builds a task, with actions repeated as its config says.

    Args:
      task: name in Playground's registry.
      impl: engine of MJX: "jax", the default, which runs anywhere, or "warp", which needs an
        NVIDIA GPU.
      **kwargs: changes of the task's config, such as `ctrl_dt` or "reward_config.scales.energy".

    Raises:
      ConfigError: the task's config has no such entry.
    """
    from mujoco_playground import registry

    # Robots of locomotion and manipulation are downloaded (MuJoCo Menagerie) when they are loaded.
    config = registry.get_default_config(task)
    changes = dict(kwargs) if impl is None else {"impl": impl, **kwargs}
    known = [*config, *(f"{name}.{key}" for name in config for key in _entries(config[name]))]
    for name in changes:
        require_known(f"entry of the config of {task}", ".".join(name.split(".")[:2]), known)
    if "impl" in config:
        changes.setdefault("impl", "jax")
    inner = registry.load(task, config, config_overrides=changes)
    # Its wrappers for training cut episodes and repeat actions; its tasks do neither.
    env = brax.adapt(task, inner)._replace(
        params=brax.Params(int(config.episode_length)), renderer=None
    )
    return env if config.action_repeat == 1 else action_repeat(env, config.action_repeat)


def _entries(value: Any) -> tuple[str, ...]:
    """Returns the names in a group of a config; none of a plain value."""
    return tuple(value) if hasattr(value, "items") else ()
