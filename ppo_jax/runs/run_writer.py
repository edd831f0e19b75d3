"""The files of a run while it trains. A file that cannot be written does not stop the training."""

import errno
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ppo_jax.config import Config
from ppo_jax.hparams import HParams
from ppo_jax.policy.policy import Policy
from ppo_jax.runs.checkpoint_writer import CheckpointWriter
from ppo_jax.runs.directory import RunDirectory
from ppo_jax.runs.periodic_evaluation import Best
from ppo_jax.runs.run_checkpoints import Snapshot, save_snapshot
from ppo_jax.runs.settings import settings_to_plain


class RunWriter:
    """Writes metrics, checkpoints and results, and warns once of each that cannot be written."""

    def __init__(
        self, directory: RunDirectory, config: Config, hparams: HParams, checkpoint_every: float
    ) -> None:
        """Prepares the files.

        Args:
          directory: of the run.
          config: of the training.
          hparams: complete.
          checkpoint_every: seconds between two checkpoints; 0 for none.
        """
        self.metrics, self.evaluations = directory.metrics, directory.evaluations
        self._checkpoints = CheckpointWriter(
            directory.checkpoints, checkpoint_every, before_write=self._sync
        )
        self._best: Best | None = None  # that could not be written
        self._settings = settings_to_plain(config, hparams)
        self._batch_size = config.batch_size
        self._directory = directory
        self._errors: dict[str, str | None] = {}

    @property
    def unwritten(self) -> list[str]:
        """The files whose last version could not be written, with the reasons."""
        return [error for error in self._errors.values() if error is not None]

    def append_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows of metrics."""
        self._attempt("metrics", lambda: self.metrics.append(rows))
        self._note("checkpoint", self._checkpoints.error)

    def append_evaluations(self, rows: Iterable[Mapping[str, Any]], best: Best) -> None:
        """Appends rows of evaluations, and writes the best policies if one is new."""
        rows = list(rows)
        self._attempt("evaluations", lambda: self.evaluations.append(rows))
        if any(row["update"] in best.updates for row in rows):
            self._write_best(best)

    def _write_best(self, best: Best) -> None:
        """Writes the best policies, or keeps them for the next time."""
        is_written = self._attempt("best policy", lambda: self._directory.write_best(best))
        self._best = None if is_written else best

    def _sync(self) -> None:
        """Syncs the rows of earlier updates; an `OSError` keeps a checkpoint from being written."""
        if self._best is not None:
            raise OSError(errno.EIO, "the best policy is not written yet")
        self.metrics.sync()
        self.evaluations.sync()

    @property
    def is_checkpoint_due(self) -> bool:
        """True if it is time for a checkpoint."""
        return self._checkpoints.is_due

    def save(self, snapshot: Snapshot) -> None:
        """Starts to write a checkpoint."""
        if self._best is not None:
            self._write_best(self._best)
        save_snapshot(self._checkpoints, snapshot, self._settings, self._batch_size)

    def finish(self, snapshot: Snapshot, policy: Policy) -> None:
        """Writes the last checkpoint, the policy and tables, and waits until the disk has them."""
        # Rows that could not be written before are tried once more.
        self._attempt("metrics", lambda: self.metrics.append([]))
        self._attempt("evaluations", lambda: self.evaluations.append([]))
        self.save(snapshot)
        self._checkpoints.wait()
        self._note("checkpoint", self._checkpoints.error)
        self._attempt("policy", lambda: self._directory.write_policy(policy))
        self._attempt("table", lambda: self._directory.write_table(self.metrics.read()))

    def write_evaluation(self, evaluation: Mapping[str, Any]) -> None:
        """Writes the evaluation of the trained policy."""
        self._attempt("evaluation", lambda: self._directory.write_evaluation(evaluation))

    def wait(self) -> None:
        """Waits until the last checkpoint is on the disk, or could not be written."""
        self._checkpoints.wait()

    def _attempt(self, name: str, write: Callable[[], Any]) -> bool:
        """Calls `write`; returns whether it succeeded, and otherwise records the reason."""
        try:
            write()
        except OSError as error:
            reason = error.strerror or str(error)
            self._note(name, f"the {name} in {self._directory.path} could not be written: {reason}")
            return False
        self._note(name, None)
        return True

    def _note(self, name: str, error: str | None) -> None:
        # Said once, although each piece may fail again.
        if error is not None and name not in self._errors:
            warnings.warn(f"{error}. The training goes on.", RuntimeWarning, stacklevel=4)
        if error is not None or name in self._errors:
            self._errors[name] = error
