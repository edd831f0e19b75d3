"""Adapter for environments of Gymnasium, which are stepped on the host."""

import contextlib
import copy
import multiprocessing
import signal
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ppo_jax.envs import gymnasium_spaces
from ppo_jax.envs.environment import Environment
from ppo_jax.envs.host import (
    HostError,
    HostSource,
    HostStep,
    explained,
    first_line,
    make_host_environment,
    with_rows,
)
from ppo_jax.errors import ConfigError, require_known

_TIMEOUT = 60.0  # seconds
_CLOSING = 5.0  # seconds that processes get to close their environments


def make(
    task: str, *, vectorization: str = "sync", timeout: float | None = None, **kwargs: Any
) -> Environment:
    """Builds an environment that Gymnasium has registered.

    Args:
      task: the name that `gymnasium.make` takes; `module:name` imports a module that registers it.
      vectorization: "sync" steps the environments one after the other, which suits those that take
        microseconds; "async" gives each a process of its own.
      timeout: seconds that a step or a reset of "async" may take; None for 60.
      **kwargs: arguments of `gymnasium.make`, such as `max_episode_steps`.
    """
    import gymnasium

    name = f"gymnasium:{task}"
    require_known("vectorization", vectorization, ("sync", "async"))
    if timeout is not None and (vectorization == "sync" or timeout <= 0):
        raise ConfigError(
            "timeout must be positive, and needs processes; got "
            f"{timeout} and vectorization={vectorization!r}. Leave it out, or use async."
        )
    try:
        env = gymnasium.make(task, **kwargs)
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        module, colon, _ = task.partition(":")
        missing = getattr(error.__cause__, "name", None)  # Gymnasium's own error has no name
        if colon and missing is not None and f"{module}.".startswith(f"{missing}."):
            raise ConfigError(
                f"gymnasium:MODULE:NAME needs a module that can be imported; there is no {module}. "
                f"Install it, or pass --import {module} for one in the current directory."
            ) from error
        raise ConfigError(
            f"{name} needs a package that cannot be imported: {first_line(error)}. Install it; "
            "pip install 'gymnasium[mujoco,box2d]' has those of Gymnasium's own environments."
        ) from error
    except (gymnasium.error.Error, ValueError) as error:
        raise ConfigError(
            f"gymnasium:NAME needs a name that Gymnasium has registered; got {task!r}: "
            f"{first_line(error)}. Write gymnasium:MODULE:NAME for a package that registers its "
            "environments."
        ) from error
    with contextlib.closing(env):
        observation_space = gymnasium_spaces.observation_space(env.observation_space)
        action_space = gymnasium_spaces.action_space(env.action_space)
        spec = env.spec
    assert spec is not None, "gymnasium.make gives every environment its spec"

    def make_envs(num_envs: int) -> _GymnasiumEnvs:
        return _GymnasiumEnvs(spec, vectorization, timeout or _TIMEOUT, num_envs)

    return make_host_environment(
        name,
        HostSource(make_envs, steps_in_background=vectorization == "async"),
        observation_space=gymnasium_spaces.channels_last(observation_space),
        action_space=action_space,
        longest_episode=spec.max_episode_steps,
    )


def tasks() -> tuple[str, ...]:
    """Returns the names that Gymnasium has registered."""
    import gymnasium

    return tuple(sorted(gymnasium.registry))


class _Maker:
    """Makes one environment, in this process or in one of its own."""

    def __init__(self, spec: Any) -> None:
        # The spec and not the name, which a new process may not have registered.
        self.spec = spec

    def __call__(self) -> Any:
        import gymnasium

        if multiprocessing.parent_process() is not None:
            # Signals reach every process of a terminal or of a job. The training stops between two
            # updates, for which it needs its environments.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)

        class CopiesLast(gymnasium.Wrapper):
            """Copies the last observation: an environment may reuse its buffer in `reset`."""

            def step(self, action: Any) -> Any:
                obs, reward, terminated, truncated, info = self.env.step(action)
                if terminated or truncated:
                    obs = copy.deepcopy(obs)
                return obs, reward, terminated, truncated, info

        return CopiesLast(gymnasium.make(self.spec))


class _GymnasiumEnvs:
    """Environments of Gymnasium in its own vector classes."""

    def __init__(self, spec: Any, vectorization: str, timeout: float, num_envs: int) -> None:
        from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

        self._is_async = vectorization == "async"
        self._timeout = timeout
        self._is_healthy = True
        # In this mode a step returns the new episode, and the true successor in `infos`. In the
        # default mode the step after an end would ignore its action, and be no sample.
        mode = AutoresetMode.SAME_STEP
        makers = [_Maker(spec)] * num_envs
        with self._explained("could not be made"):
            if self._is_async:
                # A child of a process with JAX's threads must not be forked.
                self._envs: Any = AsyncVectorEnv(makers, autoreset_mode=mode, context="spawn")
            else:
                self._envs = SyncVectorEnv(makers, autoreset_mode=mode)
        self._space = gymnasium_spaces.observation_space(self._envs.single_observation_space)
        self._converted = gymnasium_spaces.action_converter(self._envs.single_action_space)
        self._actions: np.ndarray | None = None

    def reset(self, seed: int) -> Any:
        """Starts an episode in each environment; their seeds are consecutive."""
        with self._explained("failed in a reset"):
            if self._is_async:
                self._envs.reset_async(seed=seed)
                obs, _ = self._envs.reset_wait(timeout=self._timeout)
            else:
                obs, _ = self._envs.reset(seed=seed)
        return self._observed(obs)

    def send(self, actions: np.ndarray) -> None:
        """Starts a step; without processes it runs in `recv`."""
        self._actions = self._converted(actions)
        if self._is_async:
            with self._explained("failed in a step"):
                self._envs.step_async(self._actions)

    def recv(self) -> HostStep:
        """Waits for the step."""
        with self._explained("failed in a step"):
            if self._is_async:
                result = self._envs.step_wait(timeout=self._timeout)
            else:
                result = self._envs.step(self._actions)
        obs, reward, terminated, truncated, infos = result
        obs = final_obs = self._observed(obs)
        ended = np.flatnonzero(terminated | truncated)
        if ended.size:
            # Cast first: a list of numbers is one array of the space, and not a tree.
            last = [gymnasium_spaces.cast(self._space, infos["final_obs"][i]) for i in ended]
            stacked = jax.tree.map(lambda *x: np.stack(x), *last)
            final_obs = with_rows(obs, ended, self._observed(stacked))
        return HostStep(obs, reward.astype(np.float32), terminated, truncated, final_obs)

    def _observed(self, obs: Any) -> Any:
        return gymnasium_spaces.to_observations(self._space, obs)

    def close(self) -> None:
        """Closes the environments and ends their processes, also those that hang."""
        if not self._is_async:
            self._envs.close()
            return
        # Not by Gymnasium's own `close`, which waits for as long as a process needs. A process that
        # is asked closes its environment, which may have started something itself.
        for pipe in filter(None, self._envs.parent_pipes):  # None for a process that failed
            with contextlib.suppress(OSError):
                pipe.send(("close", None))
        until = time.monotonic() + (_CLOSING if self._is_healthy else 0.0)
        for process in self._envs.processes:
            process.join(max(0.0, until - time.monotonic()))
            process.kill()
            process.join()
        self._envs.closed = True  # or its `__del__` would wait for the processes

    @contextlib.contextmanager
    def _explained(self, failed: str) -> Iterator[None]:
        """Turns every error of an environment into a `HostError`."""
        self._is_healthy = False
        with explained(failed), contextlib.ExitStack() as stack:
            if self._is_async:
                # Gymnasium warns of the process that failed, before it raises the error. Warnings
                # of the environments themselves are those of other processes.
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            try:
                yield
            except multiprocessing.TimeoutError as error:
                raise HostError(
                    f"an environment must answer in {self._timeout:g} seconds; one took longer, "
                    "and may hang. Raise timeout in env_kwargs if it is that slow."
                ) from error
            except (EOFError, ConnectionError) as error:
                raise HostError(
                    "the process of an environment ended: it was killed, or ran out of memory."
                ) from error
        self._is_healthy = True
