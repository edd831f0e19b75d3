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

from ppo_jax.envs import spaces
from ppo_jax.envs.environment import Environment
from ppo_jax.envs.host import HostError, HostSource, HostStep, make_host_environment
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
        raise ConfigError(
            f"{name} needs a package that cannot be imported: {_first_line(error)}. Install it; "
            "pip install 'gymnasium[mujoco,box2d]' has those of Gymnasium's own environments."
        ) from error
    except (gymnasium.error.Error, ValueError) as error:
        raise ConfigError(
            f"gymnasium:NAME needs a name that Gymnasium has registered; got {task!r}: "
            f"{_first_line(error)}. Write gymnasium:MODULE:NAME for a package that registers its "
            "environments."
        ) from error
    with contextlib.closing(env):
        observation_space, action_space = _space(env.observation_space), _actions(env.action_space)
        spec = env.spec
    assert spec is not None, "gymnasium.make gives every environment its spec"

    def make_envs(num_envs: int) -> _GymnasiumEnvs:
        return _GymnasiumEnvs(spec, vectorization, timeout or _TIMEOUT, num_envs)

    return make_host_environment(
        name,
        HostSource(make_envs, steps_in_background=vectorization == "async"),
        observation_space=observation_space,
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
        self._space = _space(self._envs.single_observation_space)
        actions = self._envs.single_action_space
        self._dtype = actions.dtype
        self._start = getattr(actions, "start", 0)
        self._bounds = (actions.low, actions.high) if hasattr(actions, "low") else None
        self._actions: np.ndarray | None = None

    def reset(self, seed: int) -> Any:
        """Starts an episode in each environment; their seeds are consecutive."""
        with self._explained("failed in a reset"):
            if self._is_async:
                self._envs.reset_async(seed=seed)
                obs, _ = self._envs.reset_wait(timeout=self._timeout)
            else:
                obs, _ = self._envs.reset(seed=seed)
        return _cast(self._space, obs)

    def send(self, actions: np.ndarray) -> None:
        """Starts a step; without processes it runs in `recv`."""
        if self._bounds is not None:
            actions = np.clip(actions, *self._bounds)
        self._actions = (actions + self._start).astype(self._dtype)
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
        """Closes the environments and ends their processes, also those that hang."""
        if not self._is_async:
            self._envs.close()
            return
        # Not by Gymnasium's own `close`, which waits for as long as a process needs. A process that
        # is asked closes its environment, which may have started something itself.
        for pipe in filter(None, self._envs.parent_pipes):  # of one that failed there is none
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
        try:
            with contextlib.ExitStack() as stack:
                if self._is_async:
                    # Gymnasium warns of the process that failed, before it raises the error.
                    # Warnings of the environments themselves are those of other processes.
                    stack.enter_context(warnings.catch_warnings())
                    warnings.simplefilter("ignore")
                yield
        except multiprocessing.TimeoutError as error:
            self._is_healthy = False
            raise HostError(
                f"an environment must answer in {self._timeout:g} seconds; one took longer, and "
                "may hang. Raise timeout in env_kwargs if it is that slow."
            ) from error
        except (EOFError, ConnectionError) as error:
            self._is_healthy = False
            raise HostError(
                "the process of an environment ended: it was killed, or ran out of memory."
            ) from error
        except Exception as error:  # of any package
            self._is_healthy = False
            raise HostError(
                f"an environment {failed}: {type(error).__name__}: {_first_line(error)}"
            ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def _actions(space: Any) -> spaces.Leaf:
    """Converts a space of actions."""
    from gymnasium import spaces as theirs

    if isinstance(space, theirs.Discrete):
        return spaces.Discrete(int(space.n))
    if isinstance(space, theirs.MultiDiscrete) and space.nvec.ndim == 1:
        return spaces.MultiDiscrete(tuple(map(int, space.nvec)))
    if isinstance(space, theirs.MultiBinary) and len(space.shape) == 1:
        return spaces.MultiDiscrete((2,) * space.shape[0])
    if isinstance(space, theirs.Box) and np.issubdtype(space.dtype, np.floating):
        if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
            return spaces.Box(tuple(space.shape))
        low, high = (tuple(map(float, x.ravel())) for x in (space.low, space.high))
        return spaces.Box(tuple(space.shape), low=low, high=high)
    raise ConfigError(
        "actions must be integers or floating-point numbers, as a single array (Discrete, "
        f"MultiDiscrete, MultiBinary, Box); got {space}. Wrap the environment."
    )


def _space(space: Any) -> spaces.Space:
    """Converts a space of observations."""
    from gymnasium import spaces as theirs

    if isinstance(space, theirs.Dict):
        return spaces.Dict.of({name: _space(entry) for name, entry in space.spaces.items()})
    if isinstance(space, theirs.Tuple):
        return spaces.Tuple(tuple(map(_space, space.spaces)))
    if isinstance(space, theirs.Discrete) and space.start == 0:
        return spaces.Discrete(int(space.n))
    if isinstance(space, theirs.MultiDiscrete) and space.nvec.ndim == 1 and not space.start.any():
        return spaces.MultiDiscrete(tuple(map(int, space.nvec)))
    if isinstance(space, theirs.MultiBinary):
        return spaces.Box(tuple(space.shape), "bool")
    if isinstance(space, theirs.Box):
        is_floating = np.issubdtype(space.dtype, np.floating)
        return spaces.Box(tuple(space.shape), "float32" if is_floating else str(space.dtype))
    raise ConfigError(
        "observations must be of Box, Discrete, MultiDiscrete, MultiBinary, Dict and Tuple, with "
        f"integers from 0; got {space}. Wrap the environment."
    )


def _cast(space: spaces.Space, obs: Any) -> Any:
    """Returns an observation, or a batch of them, as plain dicts, tuples and arrays."""
    if isinstance(space, spaces.Dict):
        return {name: _cast(entry, obs[name]) for name, entry in space.spaces}
    if isinstance(space, spaces.Tuple):
        return tuple(map(_cast, space.spaces, obs))
    return np.asarray(obs, spaces.dtype_of(space))
