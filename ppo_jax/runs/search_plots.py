"""Plots of an adaptive search: its scores, and the rungs of trials or the lineage of members.

matplotlib is imported when something is plotted.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ppo_jax.runs.plots import add_legend, label, save, scale_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHOWN = 5  # members with a colour of their own


def write_plots(members: pd.DataFrame, curves: pd.DataFrame, folder: Path) -> list[Path]:
    """Plots the scores over steps, and rungs ("halving") or lineage ("pbt"), as PNG and SVG.

    Args:
      members: table of the search's members.
      curves: table of their rounds.
      folder: existing directory for the files.

    Returns:
      The paths of the files.
    """
    # Figure instead of pyplot: no window, no global state, and it works in any thread.
    from matplotlib.figure import Figure

    names = search_names(members)
    scores = Figure(figsize=(7.5, 4.8), layout="constrained")
    _draw_scores(scores.add_subplot(), members, curves, names)
    figures = {"curves": scores}
    if "parent" in curves:
        lineage = Figure(figsize=(7.5, 1.2 + 2.6 * len(names)), layout="constrained")
        best = int(best_first(members)["member"].iloc[0])
        _draw_lineage(lineage, curves, names, best=best)
        figures["lineage"] = lineage
    else:
        rungs = Figure(figsize=(7.5, 4.8), layout="constrained")
        _draw_rungs(rungs.add_subplot(), members, curves, names)
        figures["rungs"] = rungs
    return save(figures, folder)


def search_names(members: pd.DataFrame) -> list[str]:
    """Returns the names of the hyperparameters that were searched."""
    columns = list(members.columns)
    return columns[columns.index("seed") + 1 : columns.index("round")]


def best_first(members: pd.DataFrame) -> pd.DataFrame:
    """Returns the members sorted by final evaluation; those without one by their last score."""
    return members.sort_values(
        ["eval/return", "score"], ascending=False, na_position="last", ignore_index=True
    )


def _draw_scores(
    axes: "Axes", members: pd.DataFrame, curves: pd.DataFrame, names: list[str]
) -> None:
    """Draws the score of every member over the environment steps of the whole search."""
    from matplotlib.ticker import EngFormatter

    # On a common axis, because the question is what the search costs as a whole.
    # All members train in every round, so that a round is the same number of steps for each.
    steps = curves.groupby("round")["member"].count().cumsum()
    steps = steps * _round_timesteps(curves)
    top = best_first(members).head(_SHOWN)
    for _, rows in curves[~curves["member"].isin(top["member"])].groupby("member"):
        axes.plot(steps[rows["round"]], _finite(rows["score"]), ".-", color="0.8", lw=0.8, ms=3)
    for _, row in top.iterrows():
        rows = curves[curves["member"] == row["member"]]
        axes.plot(steps[rows["round"]], _finite(rows["score"]), ".-", label=label(row, names))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    noun = "trials" if "stopped" in curves else "members"
    axes.set(
        title=f"{len(members)} {noun}, the best {len(top)} in colour",
        xlabel="environment steps of all members",
        ylabel="score: mean return of complete episodes,\nsampled actions",
    )
    add_legend(axes)


def _draw_rungs(
    axes: "Axes", members: pd.DataFrame, curves: pd.DataFrame, names: list[str]
) -> None:
    """Draws the score of every trial over its own steps; crosses where trials were stopped."""
    from matplotlib.ticker import EngFormatter

    top = best_first(members).head(_SHOWN)
    for _, rows in curves[~curves["member"].isin(top["member"])].groupby("member"):
        axes.plot(rows["timesteps"], _finite(rows["score"]), color="0.8", lw=0.8)
    for _, row in top.iterrows():
        rows = curves[curves["member"] == row["member"]]
        axes.plot(rows["timesteps"], _finite(rows["score"]), ".-", label=label(row, names))
    # Trials are stopped at a rung, except unhealthy ones, which are stopped after any round.
    ends = curves[curves["stopped"]]
    axes.plot(ends["timesteps"], _finite(ends["score"]), "x", color="0.4", ms=5, label="stopped")
    for rung in sorted(ends["timesteps"].unique()):
        at_rung = curves[curves["timesteps"] == rung]
        axes.axvline(rung, color="black", lw=0.6, ls=":")
        axes.annotate(
            f"{len(at_rung)} trials,\n{int(at_rung['stopped'].sum())} stopped",
            (rung, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3, -3),
            textcoords="offset points",
            va="top",
            fontsize="x-small",
        )
    scale_axis(axes, "x", curves["timesteps"])
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(
        title=f"successive halving: {len(members)} trials, the best {len(top)} in colour",
        xlabel="environment steps of a trial",
        ylabel="score: mean return of complete episodes,\nsampled actions",
    )
    add_legend(axes)


def _draw_lineage(figure: "Figure", curves: pd.DataFrame, names: list[str], *, best: int) -> None:
    """Draws every hyperparameter of every member over the rounds, coloured by score.

    A dotted line leads from a parent to the member that continues from its copy. The thick line is
    the ancestry of the member `best`.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scores = curves["score"].replace(-np.inf, np.nan)
    norm = Normalize(scores.min(), scores.max())
    colors = colormaps["viridis"]
    ancestry = _ancestry(curves, best)
    axes: Any = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for one, name in zip(axes, names, strict=True):
        # Rows are rounds and columns members, so that a parent is a column of the row above.
        values = curves.pivot_table(index="round", columns="member", values=name)
        parents = curves.pivot_table(index="round", columns="member", values="parent")
        for number in values.index[:-1]:
            for member in values.columns:
                parent = int(parents.loc[number, member])
                ends = [values.loc[number, parent], values.loc[number + 1, member]]
                style = {"color": "0.75", "lw": 0.8, "ls": "-" if parent == member else ":"}
                one.plot([number, number + 1], ends, zorder=1, **style)
        path = [values.loc[number, member] for number, member in ancestry]
        one.plot([number for number, _ in ancestry], path, color="black", lw=2.5, zorder=2)
        one.scatter(curves["round"], curves[name], c=scores, cmap=colors, norm=norm, s=18, zorder=3)
        scale_axis(one, "y", curves[name])
        one.set(ylabel=name)
    axes[0].set_title(
        f"population-based training: {curves['member'].nunique()} members; "
        "thick: ancestry of the best"
    )
    axes[-1].set_xlabel("round")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(
        ScalarMappable(norm, colors), ax=list(axes), label="score: mean return, sampled actions"
    )


def _ancestry(curves: pd.DataFrame, member: int) -> list[tuple[int, int]]:
    """Returns `(round, member)` of a member's line of parents, from the first round."""
    last = int(curves["round"].max())
    parents = curves.set_index(["round", "member"])["parent"]
    path = [(last, member)]
    for number in range(last - 1, 0, -1):
        member = int(parents[number, member])
        path.append((number, member))
    return path[::-1]


def _round_timesteps(curves: pd.DataFrame) -> int:
    return int(curves["timesteps"].min())


def _finite(values: pd.Series) -> pd.Series:
    """Returns the scores; that of a member that is not healthy leaves a gap."""
    return values.replace(-np.inf, np.nan)
