"""Metrics of many updates as rows for a file, one for each seed and window of updates."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ppo_jax.stages.metrics import Metrics


class LogState(NamedTuple):
    """A log between two pieces of a training."""

    updates: int
    """Updates that are in finished windows."""
    pending: Metrics | None
    """Metrics of the later updates, `[k, seeds]`; None if there are none."""


EMPTY_LOG = LogState(0, None)


class MetricsLog:
    """Collects metrics `[updates, seeds]` and returns a row per seed for each full window."""

    def __init__(
        self,
        seeds: Sequence[int],
        batch_size: int,
        log_every: int,
        state: LogState = EMPTY_LOG,
    ) -> None:
        """Starts a log, or continues one.

        Args:
          seeds: of the training.
          batch_size: environment steps of an update, for each seed.
          log_every: updates in a window.
          state: of the log that is continued; it may have had other windows.
        """
        self._seeds = seeds
        self._batch_size = batch_size
        self._log_every = log_every
        self.state = state

    def add(self, metrics: Metrics, failed_at: Any = None) -> list[dict[str, Any]]:
        """Takes the metrics of the next updates and returns the rows of the windows they complete.

        Args:
          metrics: `[updates, seeds]`, in NumPy.
          failed_at: `[seeds]`, index of the update with which a seed failed, −1 where none did. A
            seed has no rows of later windows.
        """
        first, pending = self.state
        if pending is not None:
            metrics = jax.tree.map(lambda *x: np.concatenate(x), pending, metrics)
        available = len(metrics.num_updates)
        stops = range(self._log_every, available + 1, self._log_every)
        rows = [row for stop in stops for row in self._rows(metrics, stop, failed_at)]
        done = available - available % self._log_every
        # Single updates, not their sum: a continued log adds them up in the same order.
        rest = jax.tree.map(lambda x: x[done:], metrics) if done < available else None
        self.state = LogState(first + done, rest)
        return rows

    def unfinished(self, failed_at: Any = None) -> list[dict[str, Any]]:
        """Returns the rows of the unfinished window; the log goes on as if nothing was returned."""
        pending = self.state.pending
        return [] if pending is None else self._rows(pending, len(pending.num_updates), failed_at)

    def _rows(self, metrics: Metrics, stop: int, failed_at: Any) -> list[dict[str, Any]]:
        """Returns the rows of the window that ends at `stop`."""
        start = (stop - 1) // self._log_every * self._log_every
        averages = dict(average(jax.tree.map(lambda x: x[start:stop], metrics)))
        first, end = self.state.updates + start, self.state.updates + stop
        return [
            {
                "update": end,
                "timesteps": end * self._batch_size,
                "seed": seed,
                **{name: float(values[i]) for name, values in averages.items()},
            }
            for i, seed in enumerate(self._seeds)
            if failed_at is None or not 0 <= failed_at[i] < first
        ]


def average(metrics: Metrics) -> Metrics:
    """Returns the metrics of a window, `[seeds]`, from those of its updates, `[updates, seeds]`."""
    return jax.tree.map(lambda x: x.sum(axis=0), metrics)
