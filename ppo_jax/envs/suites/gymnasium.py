"""Adapter for environments of Gymnasium, which are stepped on the host."""

import contextlib
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from ppo_jax.envs import spaces
from ppo_jax.envs.environment import Environment
from ppo_jax.envs.host import HostError, HostStep, make_host_environment
from ppo_jax.errors import ConfigError, require_known

_TIMEOUT = 60.0  # seconds that a step may take


def make(
    task: str, *, vectorization: str = "sync", timeout: float = _TIMEOUT, **kwargs: Any
) -> Environment:
    """Builds an environment that Gymnasium has registered.

    Args:
      task: the name that `gymnasium.make` takes; `module:name` imports a module that registers it.
      vectorization: "sync" steps the environments one after the other, which suits those that take
        microseconds; "async" gives each a process of its own.
      timeout: seconds that a step of "async" may take.
      **kwargs: arguments of `gymnasium.make`, such as `max_episode_steps`.
    """
    import gymnasium

    require_known("vectorization", vectorization, ("sync", "async"))
    try:
        env = gymnasium.make(task, **kwargs)
    except gymnasium.error.Error as error:
        raise ConfigError(
            f"gymnasium:NAME needs a name that Gymnasium has registered; got {task!r}: {error} "
            "Write gymnasium:MODULE:NAME for a package that registers its environments."
        ) from error
    observation_space = _space(env.observation_space)
    action_space = _space(env.action_space, is_action=True)
    if not isinstance(action_space, spaces.Leaf):
        raise ConfigError(f"actions must be a single array; {task} has {env.action_space}.")
    limit = None if env.spec is None else env.spec.max_episode_steps
    env.close()
    return make_host_environment(
        task,
        partial(_GymnasiumEnvs, partial(_make_one, task, kwargs), vectorization, timeout),
        observation_space=observation_space,
        action_space=action_space,
        longest_episode=limit,
    )


def _make_one(task: str, kwargs: dict[str, Any], *, in_process: bool) -> Any:
    import gymnasium

    if in_process:
        # Ctrl-C reaches every process of a terminal; the training stops between two updates.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return gymnasium.make(task, **kwargs)


class _GymnasiumEnvs:
    """Environments of Gymnasium in its own vector classes."""

    def __init__(
        self, make_one: Callable[..., Any], vectorization: str, timeout: float, num_envs: int
    ) -> None:
        from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

        self._timeout = timeout
        self._is_async = vectorization == "async"
        makers = [partial(make_one, in_process=self._is_async)] * num_envs
        # In this mode a step returns the new episode, and the true successor in `infos`. In the
        # default mode the step after an end would ignore its action, and be no sample.
        mode = AutoresetMode.SAME_STEP
        if self._is_async:
            # A child of a process with JAX's threads must not be forked.
            self._envs: Any = AsyncVectorEnv(makers, autoreset_mode=mode, context="spawn")
        else:
            self._envs = SyncVectorEnv(makers, autoreset_mode=mode)
        self._space = _space(self._envs.single_observation_space)
        actions = self._envs.single_action_space
        self._offset = getattr(actions, "start", 0)
        self._bounds = (
            (actions.low, actions.high)
            if hasattr(actions, "low") and hasattr(actions, "high")
            else None
        )
        self._actions: np.ndarray | None = None

    def reset(self, seed: int) -> Any:
        """Starts an episode in each environment; their seeds are consecutive."""
        return _cast(self._space, self._envs.reset(seed=seed)[0])

    def send(self, actions: np.ndarray) -> None:
        """Starts a step; without processes it runs in `recv`."""
        if self._bounds is not None:
            actions = np.clip(actions, *self._bounds)
        self._actions = actions + self._offset
        if self._is_async:
            with _explained():
                self._envs.step_async(self._actions)

    def recv(self) -> HostStep:
        """Waits for the step."""
        with _explained():
            if self._is_async:
                result = self._envs.step_wait(timeout=self._timeout)
            else:
                result = self._envs.step(self._actions)
        obs, reward, terminated, truncated, infos = result
        obs = _cast(self._space, obs)
        final_obs = obs
        ended = np.flatnonzero(terminated | truncated)
        if ended.size:
            final_obs = jax.tree.map(np.copy, obs)
            last = [_cast(self._space, infos["final_obs"][i]) for i in ended]
            for x, *rows in zip(*map(jax.tree.leaves, (final_obs, *last)), strict=True):
                x[ended] = rows
        return HostStep(obs, reward.astype(np.float32), terminated, truncated, final_obs)

    def close(self) -> None:
        """Ends the processes of the environments, whatever they are doing."""
        if not self._is_async:
            self._envs.close()
            return
        # Its own `close` waits for a step that hangs, and fails if a process is gone.
        for process in self._envs.processes:
            process.terminate()
        for process in self._envs.processes:
            process.join()
        self._envs.closed = True


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turns every error of an environment into a `HostError`."""
    try:
        with warnings.catch_warnings():
            # Gymnasium warns of the process that failed, before it raises the error.
            warnings.simplefilter("ignore")
            yield
    except multiprocessing.TimeoutError as error:
        raise HostError(
            "an environment must answer in time; one took longer than its timeout, and may hang. "
            "Raise timeout in env_kwargs if its steps are that slow."
        ) from error
    except Exception as error:  # of any package
        raise HostError(
            f"an environment failed in a step: {type(error).__name__}: {error}"
        ) from error


def _space(space: Any, *, is_action: bool = False) -> Any:
    """Converts a space of Gymnasium; only actions have bounds, and integers that start elsewhere
    than at 0.
    """
    from gymnasium import spaces as theirs

    if isinstance(space, theirs.Dict):
        return spaces.Dict.of({name: _space(entry) for name, entry in space.spaces.items()})
    if isinstance(space, theirs.Tuple):
        return spaces.Tuple(tuple(map(_space, space.spaces)))
    if isinstance(space, theirs.Discrete) and (is_action or space.start == 0):
        return spaces.Discrete(int(space.n))
    if isinstance(space, theirs.MultiDiscrete) and space.nvec.ndim == 1 and not np.any(space.start):
        return spaces.MultiDiscrete(tuple(map(int, space.nvec)))
    if isinstance(space, theirs.MultiBinary):
        return spaces.Box(tuple(space.shape), "bool")
    if isinstance(space, theirs.Box):
        dtype = "float32" if np.issubdtype(space.dtype, np.floating) else str(space.dtype)
        bounds = {}
        if is_action and np.isfinite(space.low).all() and np.isfinite(space.high).all():
            bounds = {
                "low": tuple(map(float, space.low.ravel())),
                "high": tuple(map(float, space.high.ravel())),
            }
        return spaces.Box(tuple(space.shape), dtype, **bounds)
    raise ConfigError(
        "spaces must be of Box, Discrete, MultiDiscrete, MultiBinary, Dict and Tuple, with "
        f"integers from 0; got {space}. Wrap the environment."
    )


def _cast(space: spaces.Space, obs: Any) -> Any:
    """Returns an observation, or a batch of them, as plain dicts, tuples and arrays."""
    if isinstance(space, spaces.Dict):
        return {name: _cast(entry, obs[name]) for name, entry in space.spaces}
    if isinstance(space, spaces.Tuple):
        return tuple(map(_cast, space.spaces, obs))
    return np.asarray(obs, spaces.dtype_of(space))
