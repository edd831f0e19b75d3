"""Checkpoints of members that train together, in a sweep that may be killed in the middle."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from ppo_jax.errors import ConfigError
from ppo_jax.runs import checkpoint, files
from ppo_jax.runs.checkpoint_writer import CheckpointWriter, find_newest, list_checkpoints


class ChunkCheckpoints:
    """Checkpoints of the members that are training; removed once the members have finished."""

    def __init__(self, folder: Path, every: float) -> None:
        """Prepares a folder; nothing is written yet.

        Args:
          folder: of the checkpoints.
          every: seconds between two checkpoints; 0 writes none.
        """
        self._writer = CheckpointWriter(folder, every)
        self._was_told = False

    @property
    def is_due(self) -> bool:
        """True if it is time for a checkpoint."""
        return self._writer.is_due

    def save(self, number: int, tree: Any, record: Mapping[str, Any]) -> None:
        """Starts to write a state; see `CheckpointWriter.save`."""
        self._writer.wait()
        if self._writer.error is not None and not self._was_told:
            self._was_told = True
            warnings.warn(f"{self._writer.error}. The sweep goes on.", RuntimeWarning, stacklevel=2)
        self._writer.save(number, tree, record)

    def restore(
        self, label: Mapping[str, Any], shapes: Callable[[Mapping[str, Any]], Any]
    ) -> tuple[Any, Mapping[str, Any]] | None:
        """Returns the newest state and its record; None if no usable checkpoint has the label.

        Args:
          label: entries that the record must have; otherwise all checkpoints are removed.
          shapes: returns the shapes, dtypes and placements of the state with that record.
        """
        try:
            found = find_newest(self._writer.folder)
            if found is None or any(found.record.get(k) != v for k, v in label.items()):
                # Left in place, checkpoints of other members could later look like the newest.
                self.clear()
                return None
            template = shapes(found.record)
            keys = found.record["keys"]
            tree = checkpoint.unflatten(template, found.arrays, keys, found.path)
        except ConfigError as error:
            # A warning and not an error, as for a run: members can be trained again.
            warnings.warn(f"{error} The members start again.", RuntimeWarning, stacklevel=2)
            self.clear()
            return None
        # On the devices on which the programs expect it.
        placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), tree, template)
        return placed, found.record

    def clear(self) -> None:
        """Removes the checkpoints, once the results of the chunk are written."""
        self._writer.wait()
        self._writer.error = None
        for path in list_checkpoints(self._writer.folder):
            files.remove_directory(path)

    def finish(self) -> str | None:
        """Waits for the last checkpoint; returns the reason if it could not be written."""
        self._writer.wait()
        return self._writer.error
