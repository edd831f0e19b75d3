"""Report of a sweep: configurations with intervals, and sensitivities.

Statistics are those of Agarwal et al. 2021 (arXiv:2108.13264): interquartile means over seeds with
bootstrap intervals, performance profiles, and probabilities of improvement.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ppo_jax.errors import ConfigError

_RESAMPLES = 2000
MIN_SEEDS = 5
"""Seeds of each configuration below which no probability of improvement is given."""
_MIN_DRAWS = 10  # for a rank correlation
_LISTED_VALUES = 8  # a column with more distinct numbers counts as drawn, not listed
_FIXED = ("member", "configuration", "seed", "timesteps", "update", "failed_at")


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
    from scipy.stats import trim_mean  # takes 0.4 s of every start of a training to import

    return trim_mean(x, 0.25, axis=axis)


def interval(x: np.ndarray, statistic: Callable[..., Any] = iqm) -> Interval:
    """Returns a statistic of `[seeds]` with its percentile bootstrap interval over seeds.

    The bounds are NaN for a single seed, or where a value is NaN.
    """
    x = np.asarray(x, float)
    if len(x) < 2 or np.isnan(x).any():
        return Interval(float(statistic(x)), np.nan, np.nan)
    from scipy.stats import bootstrap

    bounds = bootstrap(
        (x,),
        statistic,
        n_resamples=_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),  # fixed, so that the same sweep gives the same report
    ).confidence_interval
    return Interval(float(statistic(x)), float(bounds.low), float(bounds.high))


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
    """One row per varied name, the most influential first. `effect` is between 0 and 1. For listed
    values it is the difference of the mean `iqm` at the best and at the worst value, as a share of
    the range of all configurations. For drawn numbers it is the absolute rank correlation with
    `iqm`, which detects monotonic effects only; NaN if there are too few draws."""
    improvement: Interval | None
    """Probability that the best configuration improves on the second; None if there is only one, or
    if one of them has fewer than `MIN_SEEDS` seeds."""


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
        if min(len(best), len(second)) >= MIN_SEEDS:
            improvement = probability_of_improvement(best, second)
    return Report(table, _sensitivity(table, names), improvement)


def drawn_names(table: pd.DataFrame, names: list[str]) -> set[str]:
    """Returns those of the varied names whose values were drawn from a range, not from a list.

    Drawn numbers hardly ever repeat. Numbers from a list do, unless nothing else varies or the list
    is long.
    """
    several = sum(table[name].nunique() > 1 for name in names) > 1
    return {
        name
        for name in names
        if pd.api.types.is_float_dtype(table[name])
        and (table[name].nunique() > _LISTED_VALUES or (several and table[name].is_unique))
    }


def _sensitivity(table: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    from scipy.stats import spearmanr

    whole_range = table["iqm"].max() - table["iqm"].min()
    drawn = drawn_names(table, names)
    rows = []
    for name in names:
        row: dict[str, Any] = {"name": name}
        if name in drawn:
            correlation = spearmanr(table[name], table["iqm"]).statistic
            known = len(table) >= _MIN_DRAWS
            row |= {"effect": abs(correlation) if known else np.nan}
            row |= {"rank_correlation": correlation if known else np.nan}
        else:
            values = table[name].map(lambda x: f"{x:.6g}" if isinstance(x, float) else str(x))
            means = table.groupby(values)["iqm"].mean().dropna()
            difference = means.max() - means.min()
            row |= {"effect": difference / whole_range if whole_range > 0 else 0.0}
            if len(means):  # every return can be NaN
                row |= {
                    "best": means.idxmax(),
                    "iqm_at_best": means.max(),
                    "worst": means.idxmin(),
                    "iqm_at_worst": means.min(),
                    "difference": difference,
                }
        rows.append(row)
    result = pd.DataFrame(rows)
    return result.sort_values("effect", ascending=False, ignore_index=True) if rows else result
