"""Environments that are stepped on the host, outside of compiled programs."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from ppo_jax.envs.environment import Environment
from ppo_jax.envs.spaces import Leaf, Space
from ppo_jax.errors import ConfigError


class HostStep(NamedTuple):
    """The result of one step of N environments, as arrays of NumPy."""

    obs: Any  # [N, ...], to act on next: of a new episode where one ended
    reward: np.ndarray  # [N], float32
    terminated: np.ndarray  # [N], bool
    truncated: np.ndarray  # [N], bool
    final_obs: Any  # [N, ...], the true successor, before any reset


class HostEnvs(Protocol):
    """N environments of one kind, which step together and start new episodes by themselves."""

    def reset(self, seed: int) -> Any:
        """Starts an episode in each environment, and returns observations `[N, ...]`."""

    def send(self, actions: np.ndarray) -> None:
        """Starts a step with actions `[N, ...]`; it may run while the host does something else."""

    def recv(self) -> HostStep:
        """Waits for the step that `send` started."""

    def close(self) -> None:
        """Ends the processes of the environments."""


class HostSource(NamedTuple):
    """Makes environments on the host."""

    make_envs: Callable[[int], HostEnvs]
    """Makes this many environments."""
    steps_in_background: bool
    """A step runs between `send` and `recv`; otherwise it runs in `recv`."""


class HostError(ConfigError):
    """Raised when an environment on the host fails or does not answer."""


def make_host_environment(
    name: str,
    source: HostSource,
    *,
    observation_space: Space,
    action_space: Leaf,
    longest_episode: int | None = None,
) -> Environment:
    """Returns the description of an environment on the host, as `ppo_jax.train` takes it.

    Args:
      name: of the environment.
      source: makes environments.
      observation_space: of one environment.
      action_space: of one environment.
      longest_episode: the largest number of steps of an episode; None if there is no bound.
    """

    def refuse(*_: Any) -> Any:
        raise ConfigError(
            f"{name} is stepped on the host, which a compiled program cannot do. Train it by "
            "ppo_jax.train or `ppo-jax train`, and evaluate it by `ppo-jax eval`; anything else "
            "needs an environment in JAX."
        )

    return Environment(
        name=name,
        reset=refuse,
        step=refuse,
        params=(),
        observation_space=observation_space,
        action_space=action_space,
        longest_episode=lambda _: longest_episode,
        host=source,
    )
