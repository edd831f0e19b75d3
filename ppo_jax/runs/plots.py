"""Plots of runs, and what all plots share. matplotlib is imported when something is plotted."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from ppo_jax.runs.report import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DRAWN_POINTS = 250  # more cannot be told apart
_LOG_RATIO = 50  # axes are logarithmic from this ratio of the largest to the smallest value


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
    if num_seeds == 1:
        draw_curve(axes, table, f"seed {table.columns[0]}")
    elif num_seeds > 1:
        for seed in table:
            episodes = table[seed].dropna()
            axes.plot(episodes.index, episodes, color="grey", alpha=0.5, lw=0.7)
        draw_curve(axes, table, f"interquartile mean of {num_seeds} seeds, 95 % interval")
    axes.set(xlabel="environment steps", ylabel="return of training episodes")
    if num_seeds:  # 0 if no episode ended
        axes.legend(loc="lower right")
    return axes


class Curve(NamedTuple):
    """The interquartile mean over seeds at some points, with its 95 % bootstrap interval."""

    x: np.ndarray  # [points]
    estimate: np.ndarray  # [points]
    low: np.ndarray  # [points], NaN for a single seed
    high: np.ndarray  # [points], NaN for a single seed


def curve(table: pd.DataFrame, x: Any = None) -> Curve | None:
    """Returns the curve of a table of values `[points, seeds]`; None if there are no values.

    Long curves are averaged over consecutive points, to about 250.

    Args:
      table: values, NaN where a seed has none.
      x: horizontal position of each point; by default the index of the table.
    """
    table = table.set_axis(np.asarray(table.index if x is None else x, float))
    table = table[table.notna().any(axis=1)]
    if table.empty:  # no episode ended
        return None
    # A window of points is averaged as the rows of a curve are: over its updates.
    windows = np.arange(len(table)) // math.ceil(len(table) / _DRAWN_POINTS)
    values = table.groupby(windows).mean().to_numpy()
    ends = pd.Series(table.index).groupby(windows).last().to_numpy()
    return Curve(ends, *np.array([interval(row[~np.isnan(row)]) for row in values]).T)


def draw_curve(axes: "Axes", table: pd.DataFrame, text: str, x: Any = None) -> None:
    """Draws the curve of a table, and its interval if there are several seeds.

    Args:
      axes: of matplotlib.
      table: see `curve`.
      text: label of the line.
      x: see `curve`.
    """
    found = curve(table, x)
    if found is None:
        return
    (line,) = axes.plot(found.x, found.estimate, label=text)
    if table.shape[1] > 1:
        color = line.get_color()
        axes.fill_between(found.x, found.low, found.high, color=color, alpha=0.2, lw=0)


def label(row: pd.Series, names: list[str]) -> str:
    """Returns the values of a configuration as text."""
    return ", ".join(f"{name}={shown(row[name])}" for name in names) or "as configured"


def shown(value: Any) -> str:
    """Returns a value as text; a float has three significant digits."""
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
