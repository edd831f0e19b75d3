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
    """Fails, hangs or kills its process at step `at`, unless the file `fixed` exists."""

    def __init__(self, how, at, fixed):
        super().__init__()
        self.how, self.at, self.fixed, self.steps = how, at, Path(fixed), 0

    def step(self, action):
        self.steps += 1
        if self.steps == self.at and not self.fixed.exists():
            if self.how == "hang":
                time.sleep(600)
            if self.how == "kill":
                os._exit(1)
            raise ValueError("the motor is hot")
        return super().step(action)


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

    def __init__(self, continuous=False):
        self.action_space = gymnasium.spaces.MultiDiscrete([2, 3])
        if continuous:
            self.action_space = gymnasium.spaces.Box(-0.1, 0.1, (2,), np.float32)
        self.time = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.time += 1
        return self.observation_space.sample(), 1.0, False, self.time == 7, {}


for name, env in {"Counting": Counting, "Failing": Failing, "Entries": Entries}.items():
    gymnasium.register(f"{name}-v0", entry_point=env, disable_env_checker=True, order_enforce=False)
