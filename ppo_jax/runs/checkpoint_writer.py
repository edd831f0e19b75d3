"""Periodic checkpoints, written in a background thread while the training continues."""

import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ppo_jax.errors import ConfigError
from ppo_jax.runs import checkpoint, files, provenance

_KEPT = 2  # checkpoints; the older one is a fallback in case the newest is damaged
_SHARE = 0.02  # largest share of the time that a training waits for copies of its state


def require_checkpoint_every(seconds: float) -> None:
    """Checks the time between two checkpoints."""
    if not 0 <= seconds < float("inf"):
        raise ConfigError(
            f"checkpoint_every must be a number of seconds, or 0 for no checkpoints; got {seconds}."
        )


class CheckpointWriter:
    """Writes states of a training to `folder/NUMBER`, and keeps the newest two."""

    def __init__(
        self, folder: Path, every: float, before_write: Callable[[], None] = lambda: None
    ) -> None:
        """Prepares a writer; nothing is written yet.

        Args:
          folder: directory of the checkpoints.
          every: seconds between two checkpoints; 0 writes none.
          before_write: called before each checkpoint is written; syncs the files of earlier
            updates, such as the metrics.
        """
        self.folder = folder
        self._every = every
        self._before_write = before_write
        self._last = time.monotonic()
        self._waited = 0.0
        self._thread: threading.Thread | None = None
        self.error: str | None = None
        """The reason why the last checkpoint could not be written; None if it was."""

    @property
    def is_due(self) -> bool:
        """True if it is time for a checkpoint, and the one before is written."""
        # A state that takes long to copy is saved less often.
        pause = max(self._every, self._waited / _SHARE)
        is_idle = self._thread is None or not self._thread.is_alive()
        return self._every > 0 and is_idle and time.monotonic() - self._last >= pause

    def save(self, number: int, tree: Any, record: Mapping[str, Any]) -> None:
        """Copies a state to the host, and starts to write it.

        Args:
          number: name of the checkpoint, which must increase, such as environment steps.
          tree: pytree of arrays.
          record: JSON-serialisable entries; the implementations of random keys are added.
        """
        if not self._every:
            return
        started = time.monotonic()
        self.wait()
        arrays, keys = checkpoint.flatten(tree)
        # Copied, because the training goes on in the same buffers.
        arrays = {name: np.array(x) for name, x in arrays.items()}
        path = self.folder / f"{number:012d}"
        # A daemon, so that a second Ctrl-C does not wait for it: an unfinished checkpoint is
        # removed by the next start.
        self._thread = threading.Thread(
            target=self._write, args=(path, arrays, {**record, "keys": keys}), daemon=True
        )
        self._thread.start()
        self._last = time.monotonic()
        self._waited = self._last - started

    def wait(self) -> None:
        """Waits until the last write has succeeded or failed."""
        if self._thread is not None:
            self._thread.join()

    def _write(
        self, path: Path, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]
    ) -> None:
        try:
            self._before_write()
            # The old ones are removed after the new one is in place, never before.
            checkpoint.write(path, arrays, record)
            for old in list_checkpoints(self.folder)[:-_KEPT]:
                files.remove_directory(old)
            self.error = None
        # In a thread, an uncaught error such as a full disk or a lack of memory goes unnoticed.
        except Exception as error:
            reason = getattr(error, "strerror", None) or f"{type(error).__name__} {error}".strip()
            self.error = f"{path} could not be written: {reason}"
            # A partial checkpoint must not keep a disk full.
            shutil.rmtree(files.unfinished(path), ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the complete checkpoints of a folder, the oldest first."""
    if not folder.is_dir():
        return []
    # Names have leading zeros, so they sort by number. This package makes no symbolic links.
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.isdigit() and path.is_dir() and not path.is_symlink()
    )


class Found(NamedTuple):
    """A checkpoint that is whole."""

    path: Path
    arrays: dict[str, np.ndarray]
    record: dict[str, Any]


def find_newest(folder: Path) -> Found | None:
    """Reads the newest checkpoint that is whole; a damaged one is named in a warning.

    Returns None if there is none. Warns as well if the device or versions are not those that wrote
    it.

    Raises:
      ConfigError: all are damaged.
    """
    damages = []
    # From the newest to the oldest.
    for path in reversed(list_checkpoints(folder)):
        try:
            arrays, record = checkpoint.read(path)
        except checkpoint.DamagedError as error:
            damages.append(str(error))
            continue
        except OSError as error:
            damages.append(f"{path} cannot be read: {error.strerror}.")
            continue
        for damage in damages:
            _warn(f"{damage} Training continues from {path}.")
        _warn_of_changes(path, record["made_with"])
        return Found(path, arrays, record)
    if damages:
        raise ConfigError(f"a run continues from a checkpoint that is whole. {' '.join(damages)}")
    return None


def _warn_of_changes(path: Path, made_with: Mapping[str, Any]) -> None:
    """Warns where the device or the versions are not those that wrote a checkpoint."""
    before, now = (_flat(record) for record in (made_with, provenance.describe()))
    changes = [
        f"{name} {before[name]}, now {value}"
        for name, value in now.items()
        if name in before and before[name] != value
    ]
    if changes:
        _warn(
            f"{path} was made with {'; '.join(changes)}. The training continues, but its numbers "
            "may round differently."
        )


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of a provenance record that can change how results are rounded."""
    versions = record.get("versions")
    names = ("platform", "device", "device_count", "x64", "xla_flags")
    return {
        **{name: record[name] for name in names if name in record},
        **(versions if isinstance(versions, dict) else {}),
    }


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
