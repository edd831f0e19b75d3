"""Checkpoints of a run: a snapshot between two pieces, and how it is written and read."""

import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy

from ppo_jax.errors import ConfigError
from ppo_jax.population.member import Guard
from ppo_jax.runs import checkpoint, processes
from ppo_jax.runs.checkpoint import OF_RUN
from ppo_jax.runs.checkpoint_writer import CheckpointWriter, Found, find_newest
from ppo_jax.runs.failure import Failure
from ppo_jax.runs.metrics_log import LogState
from ppo_jax.runs.training import Training
from ppo_jax.types import TrainState


class Snapshot(NamedTuple):
    """Everything that is needed to continue a run, taken between two pieces."""

    state: TrainState
    guard: Guard  # [seeds], in NumPy
    log: LogState
    updates: int
    failures: tuple[Failure, ...]
    seconds: float = 0.0
    """Seconds of training alone, over all processes that continued the run."""


def save_snapshot(
    writer: CheckpointWriter, snapshot: Snapshot, settings: Mapping[str, Any], batch_size: int
) -> None:
    """Starts to write a snapshot.

    Args:
      writer: of the run's checkpoints.
      snapshot: between two pieces.
      settings: of the training, as `settings_to_plain` returns them.
      batch_size: environment steps of an update.
    """
    record = {
        **settings,
        "updates": snapshot.updates,
        "logged_updates": snapshot.log.updates,
        "failures": [failure._asdict() for failure in snapshot.failures],
        "seconds": snapshot.seconds,
    }
    writer.save(snapshot.updates * batch_size, _tree(snapshot), record)


def read_newest(folder: Path | None, training: Training) -> Snapshot | None:
    """Reads the newest checkpoint that is whole; None if there is none.

    The first process reads it, and sends it to the others.

    Args:
      folder: of the checkpoints; None in other processes.
      training: the compiled training, which the checkpoint has to fit.

    Raises:
      ConfigError: all are damaged, or the newest does not fit the training.
    """
    if processes.count() == 1:
        assert folder is not None
        found = find_newest(folder)
    else:
        found = _decode(processes.from_first(lambda: _encode(folder)))
    return None if found is None else _restored(training, found.arrays, found.record, found.path)


def _encode(folder: Path | None) -> bytes:
    """Reads a checkpoint as bytes for other processes; empty if there is none."""
    assert folder is not None, "the first process has the run directory"
    found = find_newest(folder)
    if found is None:
        return b""
    record = json.dumps([found.record, str(found.path)]).encode()
    payload = safetensors.numpy.save(
        {name: np.asarray(x, order="C") for name, x in found.arrays.items()}
    )
    return len(record).to_bytes(8, "little") + record + payload


def _decode(content: bytes) -> Found | None:
    """Returns the checkpoint that `_encode` read."""
    if not content:
        return None
    end = 8 + int.from_bytes(content[:8], "little")
    record, path = json.loads(content[8:end])
    return Found(Path(path), safetensors.numpy.load(content[end:]), record)


def _restored(
    training: Training, arrays: dict[str, np.ndarray], record: dict[str, Any], path: Path
) -> Snapshot:
    """Returns a checkpoint's snapshot, placed on the devices as the training has it."""
    updates, logged, failures, seconds = _counters(record, path)
    guard_shape: Any = jax.ShapeDtypeStruct(training.metric_shapes.num_updates.shape, np.int32)
    snapshot = Snapshot(
        state=training.state_shapes,
        guard=Guard(guard_shape, guard_shape),
        log=LogState(
            logged,
            jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((updates - logged, *x.shape), x.dtype),
                training.metric_shapes,
            )
            if updates > logged
            else None,
        ),
        updates=updates,
        failures=failures,
        seconds=seconds,
    )
    found = checkpoint.unflatten(_tree(snapshot), arrays, record["keys"], path)
    if found["key"].dtype != training.state_shapes.key.dtype:
        implementation = record["keys"]["key"]
        raise ConfigError(
            f"a run continues with its implementation of random keys; {path} has {implementation}. "
            f"Call jax.config.update('jax_default_prng_impl', '{implementation}') first."
        )
    # The host's part; `unflatten` put it on a device.
    on_host = jax.tree.map(np.array, found[OF_RUN])
    state = jax.tree.map(
        lambda x, like: processes.place(x, like.sharding),
        TrainState(**{name: x for name, x in found.items() if name != OF_RUN}),
        training.state_shapes,
    )
    return snapshot._replace(
        state=state,
        guard=on_host["guard"],
        log=snapshot.log._replace(pending=on_host["log"]),
    )


def _counters(record: Mapping[str, Any], path: Path) -> tuple[int, int, tuple[Failure, ...], float]:
    """Checks and returns the updates done, the updates logged, the failures and the seconds."""
    try:
        updates, logged = (operator.index(record[name]) for name in ("updates", "logged_updates"))
        failures = tuple(Failure(**failure) for failure in record["failures"])
        seconds = float(record.get("seconds", 0.0))  # checkpoints of version 0.1 may lack it
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"a run continues from a checkpoint of a run; {path} is not one. Remove it."
        ) from error
    return updates, logged, failures, seconds


def _tree(snapshot: Snapshot) -> dict[str, Any]:
    """Returns the arrays of a snapshot: those of the state have the names of `save_state`."""
    return {**vars(snapshot.state), OF_RUN: {"guard": snapshot.guard, "log": snapshot.log.pending}}
