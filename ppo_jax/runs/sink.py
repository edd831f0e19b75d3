"""The interface of a sink: a destination of a run's rows besides its files."""

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Rows = list[dict[str, Any]]
OnRows = Callable[[Rows], bool | None]
"""`rows -> stop`: takes rows, one for each seed and window of updates. True stops the training."""


class RunInfo(NamedTuple):
    """Description of a run, which its sinks get before the first rows."""

    run_dir: Path | None
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]
    """Settings and hyperparameters of the run, as JSON has them."""
    identity: str
    """Text that no other run has, and that a run keeps when it is resumed."""
    is_resumed: bool = False
    timesteps_before: int = 0
    """Environment steps of each seed that were done before the run was resumed."""
    prefix: str = ""
    """Distinguishes the members of a sweep in the names of their seeds."""

    @property
    def name(self) -> str:
        """Name of the run's directory."""
        return "run" if self.run_dir is None else self.run_dir.resolve().name

    def label_of(self, seed: int) -> str:
        """Returns the name of a seed within the run."""
        return f"{self.prefix}seed_{seed}"

    def id_of(self, seed: int) -> str:
        """Returns an identifier of a seed of the run, which stays when the run is resumed."""
        what = f"{self.identity}/{self.label_of(seed)}"
        return hashlib.sha256(what.encode()).hexdigest()[:16]


class Sink:
    """Receives the rows of a run, between compiled pieces of its training.

    Rows of metrics and of evaluations have `update`, `timesteps` (environment steps of the seed),
    `seed`, and metrics by their names; rows of a run have `time/seconds` of training as well. After
    an error in a method a tracker is finished and gets no more rows, and the training continues.
    """

    def start(self, run: RunInfo) -> None:
        """Prepares the sink; called once, before the first rows."""

    def on_rows(self, rows: Rows) -> bool | None:
        """Takes new rows. Returns True to ask the training to stop."""

    def finish(self) -> None:
        """Closes the sink; called once, after the last rows or an error in another method."""


def metrics_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of a row, without its update, its steps and its seed.

    Those of episodes are left out where none ended; trackers would show NaN as a point.
    """
    return {
        name: x
        for name, x in row.items()
        if name not in ("update", "timesteps", "seed")
        and not (name.startswith("episode/") and math.isnan(x))
    }
