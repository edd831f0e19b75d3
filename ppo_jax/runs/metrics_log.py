"""Metrics of many updates as rows for a file, one for each seed and window of updates."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ppo_jax.stages.metrics import Metrics


class MetricsLog:
    """Collects metrics `[updates, seeds]` and returns a row per seed for each full window."""

    def __init__(self, seeds: Sequence[int], batch_size: int, log_every: int) -> None:
        """Starts an empty log.

        Args:
          seeds: of the training.
          batch_size: environment steps of an update, for each seed.
          log_every: updates in a window.
        """
        self._seeds = seeds
        self._batch_size = batch_size
        self._log_every = log_every
        self._pending: Metrics | None = None
        self._updates = 0

    def add(
        self, metrics: Metrics, *, flush: bool, failed_at: np.ndarray | None = None
    ) -> list[dict[str, Any]]:
        """Takes the metrics of the next updates and returns the rows that they complete.

        Args:
          metrics: `[updates, seeds]`, in NumPy.
          flush: make a row of the updates of an unfinished window as well.
          failed_at: `[seeds]`, index of the update at which a seed failed, −1 where none did. A
            seed has no rows of later windows.
        """
        if self._pending is not None:
            metrics = jax.tree.map(lambda *x: np.concatenate(x), self._pending, metrics)
        available = len(metrics.num_updates)
        rows: list[dict[str, Any]] = []
        start = 0
        while start < available and (flush or start + self._log_every <= available):
            stop = min(start + self._log_every, available)
            first = self._updates
            self._updates += stop - start
            for row, seed_failed_at in zip(
                self._rows(_window(metrics, start, stop)),
                [-1] * len(self._seeds) if failed_at is None else failed_at,
                strict=True,
            ):
                if not 0 <= seed_failed_at < first:
                    rows.append(row)
            start = stop
        # Kept as sums and counts: the window may go on in the next piece.
        self._pending = _window(metrics, start, available)
        return rows

    def _rows(self, window: Metrics) -> list[dict[str, Any]]:
        averages = dict(average(window))
        return [
            {
                "update": self._updates,
                "timesteps": self._updates * self._batch_size,
                "seed": seed,
                **{name: values[i] for name, values in averages.items()},
            }
            for i, seed in enumerate(self._seeds)
        ]


def average(metrics: Metrics) -> Metrics:
    """Returns the metrics of a window, `[seeds]`, from those of its updates, `[updates, seeds]`."""
    return jax.tree.map(lambda x: x.sum(axis=0), metrics)


def _window(metrics: Metrics, start: int, stop: int) -> Metrics:
    return jax.tree.map(lambda x: x[start:stop], metrics)
