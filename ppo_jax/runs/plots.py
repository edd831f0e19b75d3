"""Plots of runs, and what all plots share. matplotlib is imported when something is plotted."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOG_RATIO = 50  # from this ratio of the largest to the smallest value on, an axis is logarithmic


def plot_returns(metrics: pd.DataFrame, axes: Any = None) -> Any:
    """Plots returns over environment steps: a line per seed, and their mean.

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
    is_single = table.shape[1] == 1
    for seed in table.columns:
        curve = table[seed].dropna()
        style = (
            {"label": f"seed {seed}"} if is_single else {"color": "grey", "alpha": 0.5, "lw": 0.7}
        )
        axes.plot(curve.index, curve, **style)
    if not is_single:
        mean = table.mean(axis=1)
        axes.plot(mean.index, mean, lw=2, label=f"mean of {table.shape[1]} seeds")
    axes.set(xlabel="environment steps", ylabel="return of training episodes")
    axes.legend(loc="lower right")
    return axes


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
    """Adds a legend below the axes, where it hides no line."""
    columns = 1 if any(len(str(line.get_label())) > 30 for line in axes.lines) else 3
    axes.figure.legend(loc="outside lower center", fontsize="small", ncols=columns)


def save(figures: Mapping[str, "Figure"], folder: Path) -> list[Path]:
    """Writes each figure as PNG and SVG under its name; returns the paths."""
    written = []
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            written.append(folder / f"{name}.{kind}")
            figure.savefig(written[-1], dpi=150)
    return written
