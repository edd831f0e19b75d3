"""Report of a sweep: configurations with intervals, sensitivities, and plots.

Statistics are those of Agarwal et al. 2021 (arXiv:2108.13264): interquartile means over seeds with
bootstrap intervals, performance profiles, and probabilities of improvement.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.stats

from ppo_jax.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RESAMPLES = 2000
_FIXED = ("member", "configuration", "seed", "timesteps", "update", "failed_at")
_SHOWN = 5  # configurations in a plot of curves


class Interval(NamedTuple):
    """An estimate with its 95 % bootstrap interval."""

    estimate: float
    low: float
    high: float


def iqm(x: Any, axis: int | None = None) -> Any:
    """Returns the interquartile mean, the mean of the middle half.

    >>> float(iqm([0.0, 1.0, 3.0, 100.0]))
    2.0
    """
    return scipy.stats.trim_mean(x, 0.25, axis=axis)


def interval(x: np.ndarray, statistic: Callable[..., Any] = iqm) -> Interval:
    """Returns a statistic of `[seeds]` with its percentile bootstrap interval over seeds.

    The bounds are NaN for a single seed.
    """
    x = np.asarray(x, float)
    if len(x) < 2:
        return Interval(float(statistic(x)), np.nan, np.nan)
    # A fixed seed, so that the same sweep gives the same report.
    picked = np.random.default_rng(0).integers(len(x), size=(_RESAMPLES, len(x)))
    low, high = np.percentile(statistic(x[picked], axis=1), [2.5, 97.5])
    return Interval(float(statistic(x)), float(low), float(high))


def probability_of_improvement(x: np.ndarray, y: np.ndarray) -> Interval:
    """Returns P(X > Y) + P(X = Y) / 2 for runs `[seeds]` of two configurations.

    >>> probability_of_improvement(np.array([2.0, 3.0]), np.array([1.0, 2.0])).estimate
    0.875
    """
    rng = np.random.default_rng(0)
    won = np.greater.outer(x, y) + 0.5 * np.equal.outer(x, y)
    rows = rng.integers(len(x), size=(_RESAMPLES, len(x)))
    columns = rng.integers(len(y), size=(_RESAMPLES, len(y)))
    means = [won[np.ix_(row, column)].mean() for row, column in zip(rows, columns, strict=True)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(won.mean()), float(low), float(high))


class Report(NamedTuple):
    """Statistics of a sweep, as tables."""

    configurations: pd.DataFrame
    """One row per configuration, the best first: its values, `iqm`, `low`, `high`, `mean`, `area`
    (mean return over the whole training), `seeds`, `failed`."""
    sensitivity: pd.DataFrame
    """One row per varied name: the mean of `iqm` at its best and its worst value."""
    improvement: Interval | None
    """Probability that the best configuration improves on the second; None if there is only one."""


def load_tables(run_dir: str | Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Reads the tables of a sweep's members and curves.

    Raises:
      ConfigError: there is no finished sweep.
    """
    path = Path(run_dir)
    if not (path / "members.parquet").is_file():
        raise ConfigError(
            f"a sweep's directory must hold members.parquet; {path} does not. "
            "Start the sweep again to finish it."
        )
    return pd.read_parquet(path / "members.parquet"), pd.read_parquet(path / "curves.parquet")


def varied(members: pd.DataFrame) -> list[str]:
    """Returns the names of the columns that the space varied."""
    return [c for c in members.columns if c not in _FIXED and not c.startswith("eval/")]


def make_report(members: pd.DataFrame, curves: pd.DataFrame) -> Report:
    """Computes the statistics of a sweep's tables."""
    names = varied(members)
    areas = curves.groupby("member")["episode/return"].mean()
    rows = []
    for configuration, of_seeds in members.groupby("configuration"):
        returns = of_seeds["eval/return"].to_numpy()
        estimate = interval(returns)
        rows.append(
            {
                "configuration": configuration,
                **{name: of_seeds[name].iloc[0] for name in names},
                "iqm": estimate.estimate,
                "low": estimate.low,
                "high": estimate.high,
                "mean": float(returns.mean()),
                "area": float(areas.loc[of_seeds["member"]].mean()),
                "seeds": len(returns),
                "failed": int(of_seeds["failed_at"].notna().sum()),
            }
        )
    table = pd.DataFrame(rows).sort_values("iqm", ascending=False, ignore_index=True)
    improvement = None
    if len(table) > 1:
        best, second = (
            members.loc[members["configuration"] == c, "eval/return"].to_numpy()
            for c in table["configuration"][:2]
        )
        improvement = probability_of_improvement(best, second)
    return Report(table, _sensitivity(table, names), improvement)


def _sensitivity(table: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    rows = []
    for name in names:
        column = table[name]
        # Random draws hardly ever repeat, so that quarters of their range are compared.
        is_drawn = pd.api.types.is_float_dtype(column) and column.nunique() > 8
        values = column.map(lambda x: f"{x:.6g}" if isinstance(x, float) else str(x))
        groups = pd.qcut(column, 4, duplicates="drop").astype(str) if is_drawn else values
        means = table.groupby(groups)["iqm"].mean()
        rows.append(
            {
                "name": name,
                "best": means.idxmax(),
                "iqm_at_best": means.max(),
                "worst": means.idxmin(),
                "iqm_at_worst": means.min(),
                "difference": means.max() - means.min(),
            }
        )
    table = pd.DataFrame(rows)
    return table.sort_values("difference", ascending=False, ignore_index=True) if rows else table


def write_plots(
    members: pd.DataFrame, curves: pd.DataFrame, report: Report, folder: Path
) -> list[Path]:
    """Plots learning curves, the space, and performance profiles, each as PNG and SVG.

    Args:
      members: table of the sweep's members.
      curves: table of their curves.
      report: statistics of both.
      folder: existing directory for the files.

    Returns:
      The paths of the files.
    """
    # Figure instead of pyplot: no window, no global state, and it works in any thread.
    from matplotlib.figure import Figure  # no window, no global state

    plots: dict[str, Callable[[Axes], None]] = {
        "curves": lambda axes: _draw_curves(axes, curves, report),
        "space": lambda axes: _draw_space(axes, report, varied(members)),
        "profiles": lambda axes: _draw_profiles(axes, members, report),
    }
    written = []
    for name, draw in plots.items():
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        draw(figure.add_subplot())
        for kind in ("png", "svg"):
            written.append(folder / f"{name}.{kind}")
            figure.savefig(written[-1], dpi=150)
    return written


def _label(row: pd.Series, names: list[str]) -> str:
    return ", ".join(f"{name}={_shown(row[name])}" for name in names) or "as configured"


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _names_of(report: Report) -> list[str]:
    return list(report.sensitivity["name"]) if len(report.sensitivity) else []


def _draw_curves(axes: "Axes", curves: pd.DataFrame, report: Report) -> None:
    for _, row in report.configurations.head(_SHOWN).iterrows():
        rows = curves[curves["configuration"] == row["configuration"]]
        table = rows.pivot_table(index="timesteps", columns="seed", values="episode/return")
        # No episode ended in any update.
        if table.empty:  # no episode ended
            continue
        estimates = [interval(values[~np.isnan(values)]) for values in table.to_numpy()]
        estimate, low, high = np.array(estimates).T
        (line,) = axes.plot(table.index, estimate, label=_label(row, _names_of(report)))
        axes.fill_between(table.index, low, high, color=line.get_color(), alpha=0.2, lw=0)
    axes.set(xlabel="environment steps", ylabel="return: interquartile mean, 95 % interval")
    if axes.lines:
        axes.legend(fontsize="small")


def _draw_space(axes: "Axes", report: Report, names: list[str]) -> None:
    """Draws a heat map of two names, parallel coordinates of more, or bars of one."""
    table = report.configurations
    if len(names) == 2 and not table.duplicated(names).any():
        grid = table.pivot_table(index=names[0], columns=names[1], values="iqm", sort=True)
        image = axes.imshow(grid.to_numpy(), aspect="auto", origin="lower")
        middle = np.nanmean(image.get_clim())
        for (i, j), value in np.ndenumerate(grid.to_numpy()):
            color = "black" if value > middle else "white"
            axes.text(j, i, f"{value:.4g}", ha="center", va="center", color=color)
        axes.set(xlabel=names[1], ylabel=names[0])
        axes.set_xticks(range(grid.shape[1]), [_shown(x) for x in grid.columns])
        axes.set_yticks(range(grid.shape[0]), [_shown(x) for x in grid.index])
        axes.figure.colorbar(image, label="return (interquartile mean)")
        return
    if len(names) < 2:
        labels = [_label(row, names) for _, row in table.iterrows()]
        error = np.abs(table[["low", "high"]].to_numpy().T - table["iqm"].to_numpy())
        axes.barh(labels, table["iqm"], xerr=np.nan_to_num(error))
        axes.set(xlabel="return: interquartile mean, 95 % interval")
        return
    scores = table["iqm"].rank(pct=True)
    ranks = pd.DataFrame(
        {
            name: table[name].astype("category").cat.codes.rank(method="dense", pct=True)
            for name in names
        }
    ).assign(iqm=scores)
    from matplotlib import colormaps

    for index, row in ranks[::-1].iterrows():
        axes.plot(range(len(row)), row, color=colormaps["viridis"](scores[index]), alpha=0.7)
    axes.set_xticks(range(len(names) + 1), [*names, "return"])
    axes.set(ylabel="rank of the value, lowest to highest")


def _draw_profiles(axes: "Axes", members: pd.DataFrame, report: Report) -> None:
    thresholds = np.linspace(members["eval/return"].min(), members["eval/return"].max(), 101)
    for _, row in report.configurations.head(_SHOWN).iterrows():
        returns = members.loc[members["configuration"] == row["configuration"], "eval/return"]
        share = (returns.to_numpy()[:, None] > thresholds).mean(axis=0)
        axes.plot(thresholds, share, label=_label(row, _names_of(report)))
    axes.set(xlabel="return τ", ylabel="share of seeds above τ", ylim=(-0.02, 1.02))
    axes.legend(fontsize="small")
