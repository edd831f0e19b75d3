"""Plots of runs, and what all plots share. matplotlib is imported when something is plotted."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ppo_jax.runs.report import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DRAWN_POINTS = 250  # more cannot be told apart
_LOG_RATIO = 50  # from this ratio of the largest to the smallest value on, an axis is logarithmic


def plot_returns(metrics: pd.DataFrame, axes: Any = None) -> Any:
    """Plots returns over environment steps: a line per seed, and their interquartile mean.

    Args:
      metrics: a learning curve, as `Run.metrics`.
      axes: of matplotlib; None makes a new figure.

    Returns:
      The axes.
    """
    if axes is None:
        import matplotlib.pyplot as plt

        _, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    table = metrics.pivot_table(index="timesteps", columns="seed", values="episode/return")
    num_seeds = table.shape[1]
    if num_seeds > 1:
        axes.plot(table.index, table, color="grey", alpha=0.5, lw=0.7)
    text = f"seed {table.columns[0]}"
    if num_seeds > 1:
        text = f"interquartile mean of {num_seeds} seeds, 95 % interval"
    draw_curve(axes, table, text)
    axes.set(xlabel="environment steps", ylabel="return of training episodes")
    axes.legend(loc="lower right")
    return axes


def draw_curve(axes: "Axes", table: pd.DataFrame, text: str, x: Any = None) -> None:
    """Draws the interquartile mean over seeds, and its 95 % interval if there are several.

    Long curves are averaged over consecutive points, so that about 250 points are drawn.

    Args:
      axes: of matplotlib.
      table: values `[points, seeds]`; NaN where a seed has none.
      text: label of the line.
      x: horizontal position of each point; by default the index of the table.
    """
    table = table.set_axis(np.asarray(table.index if x is None else x, float))
    table = table[table.notna().any(axis=1)]
    if table.empty:  # no episode ended
        return
    # A window of points is averaged as the rows of a curve are: over its updates.
    width = math.ceil(len(table) / _DRAWN_POINTS)
    windows = table.groupby(np.arange(len(table)) // width).mean()
    x = pd.Series(table.index).groupby(np.arange(len(table)) // width).last()
    estimates = [interval(values[~np.isnan(values)]) for values in windows.to_numpy()]
    estimate, low, high = np.array(estimates).T
    (line,) = axes.plot(x, estimate, label=text)
    if table.shape[1] > 1:
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, lw=0)


def label(row: pd.Series, names: list[str]) -> str:
    """Returns the values of a configuration as text."""
    return ", ".join(f"{name}={shown(row[name])}" for name in names) or "as configured"


def shown(value: Any) -> str:
    """Returns a value as text, of a number three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def is_logarithmic(values: pd.Series) -> bool:
    """Returns whether positive values spread so far that they want a logarithmic axis."""
    return bool(values.min() > 0 and values.max() / values.min() >= _LOG_RATIO)


def scale_axis(axes: "Axes", side: str, values: pd.Series) -> None:
    """Makes the axis at a side, "x" or "y", logarithmic if that fits the values."""
    if is_logarithmic(values):
        getattr(axes, f"set_{side}scale")("log")


def add_legend(axes: "Axes") -> None:
    """Adds a legend of the lines of some axes below all of them, where it hides no line."""
    columns = 1 if any(len(str(line.get_label())) > 30 for line in axes.lines) else 3
    handles = axes.get_legend_handles_labels()
    axes.figure.legend(*handles, loc="outside lower center", fontsize="small", ncols=columns)


def save(figures: Mapping[str, "Figure"], folder: Path) -> list[Path]:
    """Writes each figure as PNG and SVG under its name; returns the paths."""
    written = []
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            written.append(folder / f"{name}.{kind}")
            figure.savefig(written[-1], dpi=150)
    return written
