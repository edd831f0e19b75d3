"""Environments that are stepped on the host, outside of compiled programs."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
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
        """Ends the processes or threads of the environments."""


class HostSource(NamedTuple):
    """Makes environments on the host."""

    make_envs: Callable[[int], HostEnvs]
    """Makes this many environments."""
    steps_in_background: bool
    """A step runs between `send` and `recv`; otherwise it runs in `recv`."""
    uses_all_cores: bool = False
    """A step runs on as many cores as there are."""
    make_evaluation_envs: Callable[[int], HostEnvs] | None = None
    """Makes environments for evaluations, where these differ from those of the training."""
    time_limit: str = "max_episode_steps"
    """The argument, one of `Config.env_kwargs`, that bounds an episode."""


class HostError(ConfigError):
    """Raised when an environment on the host fails or does not answer."""


@contextlib.contextmanager
def explained(failed: str) -> Iterator[None]:
    """Turns every error of an environment into a `HostError` that says what failed."""
    try:
        yield
    except HostError:
        raise
    except Exception as error:  # of any package
        raise HostError(
            f"an environment {failed}: {type(error).__name__}: {first_line(error)}"
        ) from error


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, without its full stop."""
    return str(error).strip().partition("\n")[0].rstrip(".")


def refuse_arguments(kwargs: dict[str, Any], names: Sequence[str]) -> None:
    """Raises a `ConfigError` for arguments that the training sets, or that have no effect in it."""
    if given := [name for name in names if name in kwargs]:
        raise ConfigError(
            f"env_kwargs must not have {' or '.join(given)}, which the training sets or does not "
            "use. Leave it out."
        )


def consecutive_seeds(seed: int, num_envs: int) -> np.ndarray:
    """Returns consecutive seeds of N environments, int64 `[N]`, in the range of an int of C++.

    >>> consecutive_seeds(7, 3).tolist()
    [7, 8, 9]
    """
    return (seed + np.arange(num_envs)) % 2**31


def with_rows(batch: Any, indices: np.ndarray, rows: Any) -> Any:
    """Returns a copy of observations `[N, ...]` with `rows` at `indices` of the first axis.

    >>> with_rows(np.zeros(3), np.array([1]), np.ones(1)).tolist()
    [0.0, 1.0, 0.0]
    """
    result = jax.tree.map(np.copy, batch)
    for x, new in zip(*map(jax.tree.leaves, (result, rows)), strict=True):
        x[indices] = new
    return result


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
