"""Destinations of a run's rows besides its files: TensorBoard, Weights & Biases, and callbacks."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ppo_jax.errors import ConfigError, require_known

Rows = list[dict[str, Any]]
OnRows = Callable[[Rows], bool | None]
"""`rows -> stop`: takes rows, one for each seed and window of updates. True stops the training."""


class RunInfo(NamedTuple):
    """Description of a run, which its sinks get before the first rows."""

    run_dir: Path | None
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]
    """Settings and hyperparameters of the run, as JSON has them."""
    timesteps_before: int
    """Environment steps of each seed that were done before the run was resumed."""

    @property
    def name(self) -> str:
        """Name of the run's directory."""
        return "run" if self.run_dir is None else self.run_dir.resolve().name

    def id_of(self, seed: int) -> str:
        """Returns a name of one seed of the run that no other run has, and a resumed run keeps."""
        what = json.dumps([self.name, self.settings, seed], sort_keys=True)
        return hashlib.sha256(what.encode()).hexdigest()[:16]


class Sink:
    """Receives the rows of a run, between compiled pieces of its training.

    Rows of metrics and of evaluations have `update`, `timesteps` (environment steps of the seed),
    `seed`, `time/seconds` (of training), and metrics by their names. A method that raises an error
    ends the sink and not the training.
    """

    def start(self, run: RunInfo) -> None:
        """Is called once, before the first rows."""

    def on_rows(self, rows: Rows) -> bool | None:
        """Takes new rows. Returns True to ask the training to stop."""

    def finish(self) -> None:
        """Is called once, after the last rows."""


class Callback(Sink):
    """Passes rows to a function."""

    def __init__(self, on_rows: OnRows) -> None:
        self._on_rows = on_rows

    def on_rows(self, rows: Rows) -> bool | None:
        """Returns what the function returns."""
        return self._on_rows(rows)


class TensorBoard(Sink):
    """Event files in `RUN/tensorboard/seed_N`; the step is the number of environment steps."""

    def __init__(self) -> None:
        import tensorboardX

        self._writer_of = tensorboardX.SummaryWriter
        self._writers: dict[int, Any] = {}

    def start(self, run: RunInfo) -> None:
        """Opens a file for each seed. Points after the state that is continued are hidden."""
        assert run.run_dir is not None, "train checks it"
        for seed in run.seeds:
            folder = run.run_dir / TENSORBOARD / f"seed_{seed}"
            writer = self._writer_of(
                str(folder), purge_step=run.timesteps_before + 1 if run.timesteps_before else None
            )
            text = json.dumps(run.settings, indent=2)
            writer.add_text("settings", f"```json\n{text}\n```", run.timesteps_before)
            self._writers[seed] = writer

    def on_rows(self, rows: Rows) -> None:
        """Writes an event with all metrics of a row."""
        from tensorboardX.proto.summary_pb2 import Summary

        for row in rows:
            metrics = metrics_of(row).items()
            values = [Summary.Value(tag=name, simple_value=x) for name, x in metrics]
            writer = self._writers[row["seed"]]
            writer.file_writer.add_summary(Summary(value=values), row["timesteps"])

    def finish(self) -> None:
        """Closes the files."""
        for writer in self._writers.values():
            writer.close()


class WeightsAndBiases(Sink):
    """A run of Weights & Biases for each seed, in a group; `WANDB_MODE=offline` needs no account.

    The project is `WANDB_PROJECT`, or ppo_jax.
    """

    def __init__(self) -> None:
        import wandb

        self._wandb = wandb
        self._runs: dict[int, Any] = {}

    def start(self, run: RunInfo) -> None:
        """Starts a run for each seed, or continues it."""
        for seed in run.seeds:
            self._runs[seed] = self._wandb.init(
                project=None if "WANDB_PROJECT" in os.environ else "ppo_jax",
                dir=run.run_dir,
                group=run.name,
                name=f"{run.name}/seed_{seed}",
                id=run.id_of(seed),
                resume="allow",
                config={**run.settings, "seed": seed},
                reinit="create_new",
                settings=self._wandb.Settings(console="off", silent=True),
            )
            self._runs[seed].define_metric("*", step_metric="timesteps")

    def on_rows(self, rows: Rows) -> None:
        """Logs a row as one point."""
        for row in rows:
            point = {"timesteps": row["timesteps"], **metrics_of(row)}
            self._runs[row["seed"]].log(point)

    def finish(self) -> None:
        """Finishes the runs."""
        for run in self._runs.values():
            run.finish()


TENSORBOARD = "tensorboard"
WANDB = "wandb"
SINKS: Mapping[str, Callable[[], Sink]] = {TENSORBOARD: TensorBoard, WANDB: WeightsAndBiases}
"""Sinks by their names in `train(log=…)`; each name is that of an extra and of a folder."""


def make_sinks(log: Sequence[str], on_rows: OnRows | None, stop_at_return: float | None) -> "Sinks":
    """Makes the sinks of a run. They open nothing yet.

    Args:
      log: names in `SINKS`.
      on_rows: a callback; None for none.
      stop_at_return: asks to stop at this mean return of an evaluation; None for none.

    Raises:
      ConfigError: a name is not known, or its package is not installed.
    """
    sinks: dict[str, Sink] = {}
    for name in log:
        require_known("sink", name, SINKS)
        try:
            sinks[name] = SINKS[name]()
        except ImportError as error:
            raise ConfigError(
                f"log={name!r} needs a package that is not installed ({error}). Install it by "
                f"pip install 'ppo-jax[{name}]'."
            ) from error
    if on_rows is not None:
        sinks["on_rows"] = Callback(on_rows)
    if stop_at_return is not None:
        sinks["stop_at_return"] = Callback(partial(_reaches, stop_at_return))
    return Sinks(sinks)


class Sinks:
    """Passes rows to all sinks of a run, and drops those that fail."""

    def __init__(self, sinks: dict[str, Sink]) -> None:
        self._sinks = sinks
        self.ask_to_stop = False
        """True once a sink has asked the training to stop."""

    def start(self, run: RunInfo) -> None:
        """Starts the sinks."""
        self._each(lambda sink: sink.start(run))

    def on_rows(self, rows: Rows) -> None:
        """Passes rows on, if there are any."""
        if rows:
            # A copy for each, which may change it.
            answers = self._each(lambda sink: sink.on_rows([dict(row) for row in rows]))
            self.ask_to_stop |= any(answers)

    def finish(self) -> None:
        """Finishes the sinks."""
        self._each(lambda sink: sink.finish())

    def _each(self, call: Callable[[Sink], bool | None]) -> list[bool | None]:
        answers = []
        for name, sink in list(self._sinks.items()):
            try:
                answers.append(call(sink))
            except Exception as error:  # of any library, or of a user's function
                del self._sinks[name]
                warnings.warn(
                    f"{name} failed and gets no more rows: {type(error).__name__}: {error}. The "
                    "training goes on.",
                    RuntimeWarning,
                    stacklevel=4,
                )
        return answers


def metrics_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of a row, without what says which row it is."""
    return {name: x for name, x in row.items() if name not in ("update", "timesteps", "seed")}


def _reaches(threshold: float, rows: Rows) -> bool:
    """Returns whether the mean over seeds of an evaluation's return is at least the threshold."""
    returns = [row["eval/return"] for row in rows if "eval/return" in row]
    return bool(returns) and sum(returns) / len(returns) >= threshold
