"""Learning curves of several runs in one figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from ppo_jax.errors import ConfigError, require_known, require_positive_integer
from ppo_jax.runs.directory import RunDirectory
from ppo_jax.runs.plots import add_legend, draw_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RETURN = "episode/return"
EVALUATED_RETURN = "eval/return"
SECONDS = "time/seconds"
AXES = ("environment steps of a seed", "seconds of training")
_LABELS = {
    RETURN: "return of training episodes",
    EVALUATED_RETURN: "return of greedy evaluations",
}


class Curves(NamedTuple):
    """The tables of a run."""

    name: str
    """Name of the run's directory."""
    env: str
    """Name of the environment."""
    metrics: pd.DataFrame
    """A row per logged update and seed."""
    evaluations: pd.DataFrame
    """A row per evaluation while the run trained and seed; empty if there was none."""


def read_curves(run_dir: str | Path) -> Curves:
    """Reads the tables of a run.

    Raises:
      ConfigError: there is no run, or it has no metrics yet.
    """
    directory = RunDirectory.open(run_dir)
    metrics = pd.DataFrame(directory.metrics.read())
    if metrics.empty:
        raise ConfigError(f"a plot needs metrics; {run_dir} has none yet. Let it train longer.")
    evaluations = pd.DataFrame(directory.evaluations.read())
    env = directory.read_settings()["config"]["env"]
    return Curves(directory.path.resolve().name, env, metrics, evaluations)


def plot_runs(runs: Sequence[Curves], metric: str = RETURN, *, smooth: int = 1) -> "Figure":
    """Plots a metric of runs over environment steps and over seconds of training.

    Returns of the evaluations while the runs trained have a row of axes of their own, if there are
    any. A line is the interquartile mean over the seeds of a run, with its 95 % interval.

    Args:
      runs: one or more.
      metric: a column of their metrics.
      smooth: width of the moving average over logged rows of training; 1 for none.

    Raises:
      ConfigError: a run has no such metric.
    """
    require_positive_integer("smooth", smooth)
    from matplotlib.figure import Figure

    for run in runs:
        known = [name for name in run.metrics if "/" in name]
        require_known(f"metric of {run.name}", metric, known)
    tables = {metric: [run.metrics for run in runs]}
    if metric == RETURN and any(len(run.evaluations) for run in runs):
        tables[EVALUATED_RETURN] = [run.evaluations for run in runs]
    # Runs of earlier versions have no seconds.
    has_seconds = all(SECONDS in run.metrics for run in runs)
    columns = 1 + has_seconds
    figure = Figure(figsize=(6.2 * columns, 4 * len(tables) + 0.6), layout="constrained")
    # A column shares the steps or seconds, and a row the values of a metric.
    grid = figure.subplots(len(tables), columns, squeeze=False, sharex="col", sharey="row")
    for (name, frames), row in zip(tables.items(), grid, strict=True):
        # Evaluations are few, and each is a mean over episodes already.
        width = 1 if name == EVALUATED_RETURN else smooth
        for run, frame in zip(runs, frames, strict=True):
            if len(frame):
                _draw(row, frame, name, _text(run), smooth=width)
        row[0].set_ylabel(_LABELS.get(name, name))
    for axes in grid[0]:
        axes.set_xlim(left=0)
    several = any(run.metrics["seed"].nunique() > 1 for run in runs)
    note = " (line and band: interquartile mean over seeds and its 95 % interval)" * several
    figure.suptitle(", ".join(dict.fromkeys(run.env for run in runs)) + note, fontsize="medium")
    for axes, text in zip(grid[-1], AXES, strict=False):
        axes.set_xlabel(text)
    add_legend(grid[0][0])
    return figure


def table_of(frame: pd.DataFrame, metric: str) -> tuple[pd.DataFrame, pd.Series | None]:
    """Returns values of a metric `[points, seeds]`, and the seconds of training at each point.

    Seeds train together, so that the seconds of a row are those of all of them. None instead of
    seconds stands for a table of an earlier version.
    """
    table = frame.pivot_table(index="timesteps", columns="seed", values=metric)
    if SECONDS not in frame:
        return table, None
    return table, frame.groupby("timesteps")[SECONDS].mean().reindex(table.index)


def _draw(
    row: "Sequence[Axes]", frame: pd.DataFrame, metric: str, text: str, *, smooth: int
) -> None:
    """Draws a metric over steps and, in the second axes if there are any, over seconds."""
    from matplotlib.ticker import EngFormatter

    table, seconds = table_of(frame, metric)
    table = table.rolling(smooth, min_periods=1).mean()
    draw_curve(row[0], table, text)
    row[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    if len(row) > 1:
        draw_curve(row[1], table, text, x=seconds)


def _text(run: Curves) -> str:
    num_seeds = run.metrics["seed"].nunique()
    return run.name if num_seeds == 1 else f"{run.name} ({num_seeds} seeds)"
