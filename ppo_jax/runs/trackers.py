"""Trackers of experiments as sinks. Their packages are imported when a run asks for them."""

import contextvars
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ppo_jax.runs.sink import Rows, RunInfo, Sink, metrics_of

PROJECT = "ppo_jax"
TENSORBOARD = "tensorboard"
WANDB = "wandb"


class TensorBoard(Sink):
    """Event files in `RUN/tensorboard/SEED`; the step is the number of environment steps."""

    def __init__(self) -> None:
        import tensorboardX

        self._writer_of = tensorboardX.SummaryWriter
        self._hparams = tensorboardX.summary.hparams
        self._writers: dict[int, Any] = {}

    def start(self, run: RunInfo) -> None:
        """Opens a file for each seed. A resumed run hides the points after its checkpoint."""
        assert run.run_dir is not None, "train checks it"
        for seed in run.seeds:
            folder = run.run_dir / TENSORBOARD / run.label_of(seed)
            writer = self._writer_of(
                str(folder), purge_step=run.timesteps_before + 1 if run.is_resumed else None
            )
            text = json.dumps(run.settings, indent=2)
            writer.add_text("settings", f"```json\n{text}\n```", run.timesteps_before)
            for summary in self._hparams(_scalars(run.settings), {"eval/return": None}):
                writer.file_writer.add_summary(summary)
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


def _scalars(settings: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """Returns what TensorBoard compares runs by: hyperparameters, and what a sweep varied."""
    values = {**settings.get("hparams", {}), **settings.get("values", {})}
    return {name: x for name, x in values.items() if isinstance(x, (bool, int, float, str))}


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
                project=None if "WANDB_PROJECT" in os.environ else PROJECT,
                dir=run.run_dir,
                group=run.name,
                name=f"{run.name}/{run.label_of(seed)}",
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


class MLflow(Sink):
    """A run of MLflow for each seed; `MLFLOW_TRACKING_URI` says where.

    The experiment is `MLFLOW_EXPERIMENT_NAME`, or ppo_jax. The step is the number of environment
    steps.
    """

    def __init__(self) -> None:
        from mlflow import MlflowClient, entities

        self._client_of, self._entities = MlflowClient, entities
        self._ids: dict[int, str] = {}

    def start(self, run: RunInfo) -> None:
        """Starts a run for each seed, or continues it."""
        self._client = self._client_of()
        # Unlike `mlflow.start_run`, the client does not read this variable.
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        for seed in run.seeds:
            # The service numbers runs itself; a tag finds the one to continue.
            tag = run.id_of(seed)
            runs = self._client.search_runs([experiment], f"tags.ppo_jax_id = '{tag}'")
            if runs:
                self._ids[seed] = runs[0].info.run_id
                self._client.update_run(self._ids[seed], status="RUNNING")
                continue
            created = self._client.create_run(
                experiment,
                tags={"ppo_jax_id": tag, "group": run.name},
                run_name=f"{run.name}/{run.label_of(seed)}",
            )
            self._ids[seed] = created.info.run_id
            # Values of any type are text for the service.
            params = [
                self._entities.Param(f"{group}.{name}", str(value))
                for group, values in run.settings.items()
                for name, value in (values.items() if isinstance(values, Mapping) else [])
            ]
            for batch in _batches(params, 100):  # the service takes no more
                self._client.log_batch(self._ids[seed], params=batch)

    def on_rows(self, rows: Rows) -> None:
        """Logs the metrics of all rows of a seed together."""
        now = int(time.time() * 1000)
        for seed, run_id in self._ids.items():
            metrics = [
                self._entities.Metric(name, value, now, row["timesteps"])
                for row in rows
                if row["seed"] == seed
                for name, value in metrics_of(row).items()
            ]
            for batch in _batches(metrics, 1000):  # the service takes no more
                self._client.log_batch(run_id, metrics=batch)

    def finish(self) -> None:
        """Marks the runs as finished."""
        for run_id in self._ids.values():
            self._client.set_terminated(run_id)


class Trackio(Sink):
    """A run of Trackio for each seed, in a group; `TRACKIO_DIR` or `TRACKIO_SPACE_ID` says where.

    The step is the number of environment steps.
    """

    def __init__(self) -> None:
        import trackio

        self._trackio = trackio
        self._runs: dict[int, Any] = {}

    def start(self, run: RunInfo) -> None:
        """Starts a run for each seed, or continues it."""
        for seed in run.seeds:
            # In a context of its own: `init` finishes the run that it finds in the present one.
            self._runs[seed] = contextvars.Context().run(
                self._trackio.init,
                project=PROJECT,
                name=f"{run.name}/{run.label_of(seed)}",
                group=run.name,
                config={**run.settings, "seed": seed},
                # Runs are found by name, and an earlier run may have had the same directory.
                resume="allow" if run.is_resumed else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def on_rows(self, rows: Rows) -> None:
        """Logs a row as one point."""
        for row in rows:
            # The x axis is always the step; unlike W&B, Trackio has no setting for another one.
            self._runs[row["seed"]].log(metrics_of(row), step=row["timesteps"])

    def finish(self) -> None:
        """Finishes the runs."""
        for run in self._runs.values():
            run.finish()


TRACKERS: Mapping[str, Callable[[], Sink]] = {
    TENSORBOARD: TensorBoard,
    WANDB: WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}
"""Trackers by their names in `train(log=…)`; the pip extra of a tracker has the same name."""


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yields items in batches of at most `size`."""
    for first in range(0, len(items), size):
        yield items[first : first + size]
