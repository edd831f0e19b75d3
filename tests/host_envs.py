"""Environments of Gymnasium that the tests of host trainings register: `tests.host_envs:NAME`."""

import os
import time
from pathlib import Path

import gymnasium
import numpy as np


class Counting(gymnasium.Env):
    """Observations are the seed, the number of the episode, and the steps in it.

    Episodes of odd numbers end after three steps, and those of even numbers after four, by a limit.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64)

    def __init__(self, action_space=None):
        self.action_space = action_space or gymnasium.spaces.Discrete(2, start=5)
        self.seed, self.episode, self.time = 0, 0, 0
        self.received = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        if seed is not None:
            self.seed, self.episode = seed % 1000, 0
        self.episode, self.time = self.episode + 1, 0
        return self._obs(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.time += 1
        is_odd = self.episode % 2 == 1
        terminated = is_odd and self.time == 3
        truncated = not is_odd and self.time == 4
        return self._obs(), float(np.sum(action)), terminated, truncated, {}

    def _obs(self):
        return np.array([self.seed, self.episode, self.time], np.float64)


class Failing(Counting):
    """Fails, hangs or kills its process at step `at` since it was made, or in the reset after it.

    With the file `fixed` it does not.
    """

    def __init__(self, how, at, fixed, in_reset=False):
        super().__init__()
        self.how, self.at, self.fixed, self.in_reset = how, at, Path(fixed), in_reset
        self.steps = 0

    def step(self, action):
        self.steps += 1
        if self.steps == self.at and not self.in_reset:
            self._fail()
        return super().step(action)

    def reset(self, *, seed=None, options=None):
        if self.steps >= self.at and self.in_reset:
            self._fail()
        return super().reset(seed=seed, options=options)

    def _fail(self):
        if self.fixed.exists():
            return
        if self.how == "hang":
            time.sleep(600)
        if self.how == "kill":
            os._exit(1)
        raise ValueError("the motor is hot\nand the room is cold")


class Reusing(Counting):
    """Returns the same array again and again, as some simulators do."""

    buffer = None

    def _obs(self):
        if self.buffer is None:
            self.buffer = np.zeros(3)
        self.buffer[:] = super()._obs()
        return self.buffer


class BySeed(Counting):
    """Episodes of an environment with seed s have 2 + s % 5 steps and a return of as much."""

    def step(self, action):
        del action
        self.time += 1
        return self._obs(), 1.0, self.time >= 2 + self.seed % 5, False, {}


class Endless(Counting):
    """Never ends an episode."""

    def step(self, action):
        del action
        self.time += 1
        return self._obs(), 1.0, False, False, {}


class NotANumber(Counting):
    """Gives rewards that are NaN."""

    def step(self, action):
        del action
        return self._obs(), float("nan"), False, False, {}


class WithChild(Counting):
    """Starts a process, which it ends when it is closed, and notes both in a folder."""

    def __init__(self, folder):
        super().__init__()
        self.note = Path(folder) / f"{os.getpid()}-{id(self)}"
        self.note.write_text("started")

    def close(self):
        self.note.write_text("closed")


class Entries(gymnasium.Env):
    """Observations are a dict with a tuple inside; actions are continuous or several integers."""

    observation_space = gymnasium.spaces.Dict(
        {
            "image": gymnasium.spaces.Box(0, 255, (4, 4, 1), np.uint8),
            "rest": gymnasium.spaces.Tuple(
                (gymnasium.spaces.Discrete(3), gymnasium.spaces.MultiBinary(2))
            ),
        }
    )

    def __init__(self, actions="integers"):
        self.action_space = {
            "integers": gymnasium.spaces.MultiDiscrete([2, 3]),
            "flags": gymnasium.spaces.MultiBinary(3),
            "continuous": gymnasium.spaces.Box(-0.1, 0.1, (2,), np.float32),
            "half": gymnasium.spaces.Box(
                np.array([0, -np.inf], np.float32), np.array([0.1, np.inf], np.float32)
            ),
            "bytes": gymnasium.spaces.Box(0, 255, (2,), np.uint8),
        }[actions]
        self.time = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        if seed is not None:
            self.observation_space.seed(seed)
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.time += 1
        return self.observation_space.sample(), 1.0, False, self.time == 7, {}


class Frames(gymnasium.Env):
    """Images of two stacked frames, channels first, whose last column counts the steps."""

    observation_space = gymnasium.spaces.Box(0, 255, (2, 6, 5), np.uint8)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        self.time = 0
        return self._obs(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.time += 1
        return self._obs(), 1.0, False, self.time == 3, {}

    def _obs(self):
        obs = np.zeros((2, 6, 5), np.uint8)
        obs[1, :, 4] = self.time
        return obs


for env in (Frames, Counting, Failing, Reusing, BySeed, Endless, NotANumber, WithChild, Entries):
    gymnasium.register(
        f"{env.__name__}-v0", entry_point=env, disable_env_checker=True, order_enforce=False
    )
