"""Plots of a sweep: learning curves, the search space, and performance profiles.

matplotlib is imported when something is plotted.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ppo_jax.runs.plots import (
    add_legend,
    draw_curve,
    is_logarithmic,
    label,
    save,
    scale_axis,
    shown,
)
from ppo_jax.runs.report import Report, drawn_names, varied

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN = 5  # configurations in a plot of curves; more lines cannot be told apart


def write_plots(
    members: pd.DataFrame, curves: pd.DataFrame, report: Report, folder: Path
) -> list[Path]:
    """Plots learning curves, the search space, and performance profiles, each as PNG and SVG.

    Args:
      members: table of the sweep's members.
      curves: table of their curves.
      report: statistics of both.
      folder: existing directory for the files.

    Returns:
      The paths of the files.
    """
    # Figure instead of pyplot: no window, no global state, and it works in any thread.
    from matplotlib.figure import Figure

    plots: dict[str, Callable[[Axes], None]] = {
        "curves": lambda axes: _draw_curves(axes, curves, report),
        "space": lambda axes: _draw_space(axes, report, varied(members)),
        "profiles": lambda axes: _draw_profiles(axes, members, report),
    }
    figures = {}
    for name, draw in plots.items():
        figures[name] = Figure(figsize=(7.5, 4.8), layout="constrained")
        draw(figures[name].add_subplot())
    return save(figures, folder)


def _names_of(report: Report) -> list[str]:
    return list(report.sensitivity["name"]) if len(report.sensitivity) else []


def _title(report: Report) -> str:
    """Returns how many of the configurations are shown, and of how many seeds."""
    total, seeds = len(report.configurations), report.configurations["seeds"]
    if total > _SHOWN:
        which = f"the best {_SHOWN} of {total} configurations"
    else:
        which = f"{total} configuration{'s' * (total > 1)}"
    counts = sorted({int(seeds.min()), int(seeds.max())})
    return f"{which}, {' to '.join(map(str, counts))} seed{'s' * (counts[-1] > 1)} each"


def _draw_curves(axes: "Axes", curves: pd.DataFrame, report: Report) -> None:
    from matplotlib.ticker import EngFormatter

    for _, row in report.configurations.head(_SHOWN).iterrows():
        rows = curves[curves["configuration"] == row["configuration"]]
        table = rows.pivot_table(index="timesteps", columns="seed", values="episode/return")
        draw_curve(axes, table, label(row, _names_of(report)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(
        title=_title(report),
        xlabel="environment steps",
        ylabel="return of training episodes\n(interquartile mean over seeds, 95 % interval)",
    )
    if axes.lines:
        add_legend(axes)


def _draw_space(axes: "Axes", report: Report, names: list[str]) -> None:
    """Draws points for one setting, a heat map or scatter plot for two, parallel axes for more."""
    table = report.configurations
    axes.set_title("final greedy evaluation: interquartile mean over seeds")
    if len(names) < 2:
        _draw_points(axes, table, names)
    elif len(names) > 2:
        _draw_parallel(axes, table, names)
    elif drawn_names(table, names) or table.duplicated(names).any():
        _draw_scatter(axes, table, names)
    else:
        _draw_heat_map(axes, table, names)


def _draw_points(axes: "Axes", table: pd.DataFrame, names: list[str]) -> None:
    """Draws the return over one name, or of the only configuration, with 95 % intervals."""
    table = table.sort_values(names) if names else table
    error = np.nan_to_num(np.abs(table[["low", "high"]].to_numpy().T - table["iqm"].to_numpy()))
    if names and pd.api.types.is_numeric_dtype(table[names[0]]):
        axes.errorbar(table[names[0]], table["iqm"], error, fmt="o", capsize=3)
        scale_axis(axes, "x", table[names[0]])
        axes.set(xlabel=names[0])
    else:
        labels = [label(row, names) for _, row in table.iterrows()]
        axes.errorbar(labels, table["iqm"], error, fmt="o", capsize=3)
        axes.tick_params(axis="x", rotation=30)
    axes.set(ylabel="return, 95 % interval")


def _draw_scatter(axes: "Axes", table: pd.DataFrame, names: list[str]) -> None:
    """Draws the configurations in the plane of two names, coloured by return."""
    x, y = (
        table[name] if pd.api.types.is_numeric_dtype(table[name]) else table[name].astype(str)
        for name in names
    )
    points = axes.scatter(x, y, c=table["iqm"], cmap="viridis")
    for side, values in (("x", x), ("y", y)):
        if pd.api.types.is_numeric_dtype(values):
            scale_axis(axes, side, values)
    axes.set(xlabel=names[0], ylabel=names[1])
    axes.figure.colorbar(points, label="return")


def _draw_heat_map(axes: "Axes", table: pd.DataFrame, names: list[str]) -> None:
    grid = table.pivot_table(index=names[0], columns=names[1], values="iqm", sort=True)
    image = axes.imshow(grid.to_numpy(), aspect="auto", origin="lower")
    middle = np.nanmean(image.get_clim())
    for (i, j), value in np.ndenumerate(grid.to_numpy()):
        if np.isfinite(value):
            color = "black" if value > middle else "white"
            axes.text(j, i, f"{value:.4g}", ha="center", va="center", color=color)
    axes.set(xlabel=names[1], ylabel=names[0])
    axes.set_xticks(range(grid.shape[1]), [shown(x) for x in grid.columns])
    axes.set_yticks(range(grid.shape[0]), [shown(x) for x in grid.index])
    axes.figure.colorbar(image, label="return")


def _draw_parallel(axes: "Axes", table: pd.DataFrame, names: list[str]) -> None:
    """Draws a line per configuration through its values, each axis from lowest to highest."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    columns = [*names, "iqm"]
    drawn = drawn_names(table, names)
    positions = pd.DataFrame({name: _positions(table[name]) for name in columns})
    norm = Normalize(table["iqm"].min(), table["iqm"].max())
    colors = colormaps["viridis"]
    for (_, line), value in zip(positions[::-1].iterrows(), table["iqm"][::-1], strict=True):
        axes.plot(range(len(columns)), line, color=colors(norm(value)), alpha=0.8)
    for i, name in enumerate(columns):
        axes.axvline(i, color="black", lw=0.8)
        marks = dict(zip(positions[name], table[name].map(shown), strict=True))
        # A list shows all its values, a range its ends.
        if name == "iqm" or name in drawn:
            marks = {end: marks[end] for end in (0.0, 1.0) if end in marks}
        for position, text in marks.items():
            axes.annotate(
                text, (i, position), fontsize="small", xytext=(4, 2), textcoords="offset points"
            )
    axes.set_xticks(range(len(columns)), [*names, "return"])
    axes.set_yticks([])
    axes.figure.colorbar(ScalarMappable(norm, colors), ax=axes, label="return")


def _positions(column: pd.Series) -> np.ndarray:
    """Returns the place of each value on an axis from 0 to 1, on a logarithmic one if that fits."""
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        values = column.to_numpy(float)
        values = np.log(values) if is_logarithmic(column) else values
    else:
        values = column.astype(str).astype("category").cat.codes.to_numpy(float)
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread > 0 else np.full(len(values), 0.5)


def _draw_profiles(axes: "Axes", members: pd.DataFrame, report: Report) -> None:
    """Draws the share of seeds that reach each return: a step at the return of each seed."""
    ends = members["eval/return"].min(), members["eval/return"].max()
    thresholds = np.linspace(*ends, 201)
    for _, row in report.configurations.head(_SHOWN).iterrows():
        returns = members.loc[members["configuration"] == row["configuration"], "eval/return"]
        reached = returns.to_numpy()[:, None] >= thresholds
        name = label(row, _names_of(report))
        (line,) = axes.step(thresholds, reached.mean(axis=0), where="pre", label=name)
        if len(returns) > 1:
            picked = np.random.default_rng(0).integers(len(returns), size=(500, len(returns)))
            low, high = np.percentile(reached[picked].mean(axis=1), [2.5, 97.5], axis=0)
            axes.fill_between(
                thresholds, low, high, step="pre", color=line.get_color(), alpha=0.15, lw=0
            )
    axes.set(
        title=_title(report),
        xlabel="return τ of the final greedy evaluation",
        ylabel="share of seeds that reach τ, 95 % interval",
        ylim=(-0.02, 1.02),
    )
    add_legend(axes)
