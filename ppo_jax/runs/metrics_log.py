"""Metrics of many updates as rows for a file: means over windows of updates."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


class MetricsLog:
    """Collects metrics `[updates, seeds]` and gives out a row per seed for each full window.

    A row holds the means over its window; those of episodes are weighted by how many ended,
    and their number is the sum.
    """

    def __init__(self, seeds: Sequence[int], batch_size: int, log_every: int) -> None:
        self._seeds = seeds
        self._batch_size = batch_size
        self._log_every = log_every
        self._pending: dict[str, np.ndarray] = {}
        self._updates = 0

    def add(self, metrics: Mapping[str, np.ndarray], *, flush: bool) -> list[dict[str, Any]]:
        """Takes the metrics of the next updates; returns the rows that they complete.

        With `flush`, the updates of an unfinished window make a row too.
        """
        pending = {
            key: np.concatenate([self._pending[key], value]) if self._pending else value
            for key, value in metrics.items()
        }
        available = len(next(iter(pending.values())))
        rows: list[dict[str, Any]] = []
        start = 0
        while start < available and (flush or start + self._log_every <= available):
            stop = min(start + self._log_every, available)
            self._updates += stop - start
            rows += self._rows({key: value[start:stop] for key, value in pending.items()})
            start = stop
        self._pending = {key: value[start:] for key, value in pending.items()}
        return rows

    def _rows(self, window: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
        means = window_means(window)
        return [
            {
                "update": self._updates,
                "timesteps": self._updates * self._batch_size,
                "seed": seed,
                **{key: value[i] for key, value in means.items()},
            }
            for i, seed in enumerate(self._seeds)
        ]


def window_means(window: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Metrics `[updates, seeds]` as one number per seed, `[seeds]`."""
    count = window["episode/count"]
    episodes = count.sum(axis=0)
    means = {}
    for key, value in window.items():
        if key == "episode/count":
            means[key] = episodes
        elif key.startswith("episode/"):
            total = np.where(count > 0, value * count, 0.0).sum(axis=0)
            means[key] = np.where(episodes > 0, total / np.maximum(episodes, 1), np.nan)
        else:
            means[key] = value.mean(axis=0)
    return means
