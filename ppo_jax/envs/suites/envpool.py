"""Adapter for environments of EnvPool, which are stepped on the host by threads in C++."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ppo_jax.envs import gymnasium_spaces, spaces
from ppo_jax.envs.environment import Environment
from ppo_jax.envs.host import (
    HostSource,
    HostStep,
    consecutive_seeds,
    explained,
    first_line,
    make_host_environment,
    refuse_arguments,
    with_rows,
)
from ppo_jax.errors import ConfigError, unknown_name

# Arguments that the training sets, and others that would have no effect.
_REFUSED = (
    "num_envs",
    "batch_size",
    "seed",
    "env_seed",
    "max_num_players",
    "gym_reset_return_info",
    "render_mode",
    "render_env_id",
    "zero_discount_on_life_loss",
)
# Options of Atari games that evaluations turn off.
_WHOLE_GAMES = {"reward_clip": False, "episodic_life": False}
_NO_LIMIT = 2**31 - 1  # EnvPool's max_episode_steps of tasks without one


def make(task: str, **kwargs: Any) -> Environment:
    """Builds an environment of EnvPool.

    Images are transposed to channels-last where EnvPool has channels first. Evaluations of Atari
    games play whole games with unclipped rewards.

    Args:
      task: the name that `envpool.make` takes, such as "Pong-v5".
      **kwargs: arguments of `envpool.make`. In Atari games `episodic_life=True` ends an episode
        where a life is lost, and `reward_clip=True` clips rewards to [-1, 1].
    """
    import envpool

    refuse_arguments(kwargs, _REFUSED)
    if task not in tasks():
        raise unknown_name(
            "task of envpool", task, tasks(), listed_by="ppo-jax envs --suite envpool"
        )
    with _quietly(), _as_config_errors(kwargs):
        spec = envpool.make_spec(task, **kwargs)
        their_observations, their_actions = spec.observation_space, spec.action_space
    observation_space = gymnasium_spaces.observation_space(their_observations)
    action_space = gymnasium_spaces.action_space(their_actions)
    convert = gymnasium_spaces.action_converter(their_actions)
    config = spec.config
    if config.max_num_players > 1:
        raise ConfigError(
            f"an environment of envpool must have one player; {task} has up to "
            f"{config.max_num_players}. Choose another task."
        )
    whole = {name: value for name, value in _WHOLE_GAMES.items() if hasattr(config, name)}

    def make_envs(num_envs: int, **changes: bool) -> _EnvPoolEnvs:
        arguments = {**kwargs, **changes, "num_envs": num_envs}
        return _EnvPoolEnvs(task, arguments, observation_space, convert)

    limit = config.max_episode_steps
    return make_host_environment(
        f"envpool:{task}",
        HostSource(
            make_envs,
            steps_in_background=True,
            uses_all_cores=True,
            make_evaluation_envs=lambda num_envs: make_envs(num_envs, **whole),
        ),
        observation_space=gymnasium_spaces.channels_last(observation_space),
        action_space=action_space,
        longest_episode=None if limit == _NO_LIMIT else limit,
    )


def tasks() -> tuple[str, ...]:
    """Returns the names that EnvPool has registered."""
    import envpool

    return tuple(envpool.list_all_envs())


class _EnvPoolEnvs:
    """Environments of EnvPool, whose threads step them in the background.

    A reset makes them again, because EnvPool takes seeds only then: half a second for Atari games.
    """

    def __init__(
        self,
        task: str,
        arguments: dict[str, Any],
        space: spaces.Space,
        convert: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        """Prepares environments, which the first reset makes.

        Args:
          task: the name that `envpool.make` takes.
          arguments: of `envpool.make`, without seeds.
          space: of observations, with images as EnvPool has them.
          convert: turns actions of a policy into those of EnvPool.
        """
        self._task, self._arguments = task, arguments
        self._space, self._converted = space, convert
        self._envs: Any = None

    def reset(self, seed: int) -> Any:
        """Starts an episode in each environment; their seeds are consecutive."""
        import envpool

        self._envs = None  # before there are twice as many threads
        seeds = consecutive_seeds(seed, self._arguments["num_envs"]).tolist()
        with explained("failed in a reset"), _quietly():
            self._envs = envpool.make_gymnasium(self._task, seed=seeds, **self._arguments)
            obs, _ = self._envs.reset()
        return self._cast(obs)

    def send(self, actions: np.ndarray) -> None:
        """Starts a step."""
        with explained("failed in a step"):
            self._actions = self._converted(actions)
            self._envs.send(self._actions)

    def recv(self) -> HostStep:
        """Waits for the step, and for the resets of episodes that it ended.

        EnvPool resets an environment in the step after its last one, which ignores the action. That
        step is taken here, so that every step that is returned is a sample. A call of `reset` would
        start a new game where a life was lost.
        """
        with explained("failed in a step"):
            obs, reward, terminated, truncated, _ = self._envs.recv()
            obs = final_obs = self._cast(obs)
            ended = np.flatnonzero(terminated | truncated)
            if ended.size:
                first, *_ = self._envs.step(self._actions[ended], ended.astype(np.int32))
                obs = with_rows(obs, ended, self._cast(first))
        return HostStep(obs, reward.astype(np.float32), terminated, truncated, final_obs)

    def close(self) -> None:
        """Ends the threads, which belong to an object in C++."""
        self._envs = None

    def _cast(self, obs: Any) -> Any:
        return gymnasium_spaces.to_observations(self._space, obs)


@contextlib.contextmanager
def _as_config_errors(kwargs: dict[str, Any]) -> Iterator[None]:
    """Turns every error, as EnvPool's assertions and those of C++, into a `ConfigError`."""
    try:
        yield
    except Exception as error:
        raise ConfigError(
            f"env_kwargs must be what EnvPool takes; got {kwargs}: {first_line(error)}. Change or "
            "leave out env_kwargs."
        ) from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Hides the warnings of Gymnasium that EnvPool's bounds lose precision in its spaces."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
