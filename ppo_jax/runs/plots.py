"""Plots of runs. matplotlib is imported when something is plotted."""

from typing import Any

import pandas as pd


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
