"""A run as one self-contained page."""

import base64
import html
import json
import string
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ppo_jax.algorithms import ALGORITHMS
from ppo_jax.config import Config
from ppo_jax.envs import make_env
from ppo_jax.errors import ConfigError
from ppo_jax.results.curves import (
    AXES,
    EVALUATED_RETURN,
    RETURN,
    SECONDS,
    Curves,
    read_curves,
    table_of,
)
from ppo_jax.results.render import render_run
from ppo_jax.runs import files
from ppo_jax.runs.directory import EVALUATION, PAGE, RunDirectory
from ppo_jax.runs.lock import writable
from ppo_jax.runs.outputs import require_output
from ppo_jax.runs.plots import curve
from ppo_jax.runs.settings import to_plain

_COLORS = ("#1f77b4", "#d62728")
_LAYOUT = {
    "template": "plotly_white",
    "margin": {"l": 60, "r": 20, "t": 40, "b": 50},
    "legend": {"orientation": "h", "y": -0.2},  # above it are the buttons of plotly
    "xaxis": {"rangemode": "tozero"},
    "yaxis": {"exponentformat": "power"},
}


def write_page(
    run_dir: str | Path,
    output: str | Path | None = None,
    *,
    network: Any = None,
    overwrite: bool = False,
) -> Path:
    """Writes a page with curves, evaluation, an episode, settings and versions of a run.

    The page needs no other file and no internet.

    Args:
      run_dir: directory that `train` wrote.
      output: file that ends in .html; by default `report.html` in the run, which is replaced.
      network: the module that was `Config.network`, unless that was a name.
      overwrite: replace the output if it exists.

    Returns:
      The path of the page.

    Raises:
      ConfigError: there is no run, it has no metrics yet, or plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigError(
            "a page needs plotly, which is not installed: pip install 'ppo-jax[html]'."
        ) from error
    directory = RunDirectory.open(run_dir)
    path = directory.path / PAGE
    if output is not None:
        path = require_output(Path(output), ("html",), overwrite=overwrite)
    curves, record = read_curves(run_dir), directory.read_settings()
    config = record["config"]
    last = curves.metrics.iloc[-1]
    template = resources.files("ppo_jax.results").joinpath("page.html").read_text("utf-8")
    page = string.Template(template).substitute(
        title=html.escape(f"{config['env']}, {config['algorithm']}"),
        subtitle=html.escape(f"{directory.path.resolve()}, {record['made_with']['time']}"),
        plotly=get_plotlyjs(),
        tiles=_tiles(
            {
                "steps of each seed": f"{int(last['timesteps']):,}",
                "seeds": str(curves.metrics["seed"].nunique()),
                "seconds of training": f"{last.get('time/seconds', float('nan')):,.1f}",
                "steps/s": _speed(curves.metrics),
                **_evaluated_return(directory),
            }
        ),
        curves=_return_figures(curves),
        evaluation=_evaluation(directory),
        episode=_episode(run_dir, network),
        metrics=_metric_figures(curves.metrics),
        configuration=_configuration(record),
        versions=_versions(record),
    )
    with writable(path.parent, "the folder of the output"):
        files.write_text(path, page)
    return path


def _tiles(values: Mapping[str, str]) -> str:
    """Returns the tiles with the key numbers of the run, as HTML."""
    return "".join(
        f'<div class="tile"><b>{html.escape(value)}</b>{html.escape(name)}</div>'
        for name, value in values.items()
    )


def _speed(metrics: pd.DataFrame) -> str:
    """Returns the steps of all seeds in a second of training, as text."""
    if SECONDS not in metrics:
        return f"{metrics['time/steps_per_second'].median():,.0f}"
    last = metrics.groupby("seed").last()
    return f"{last['timesteps'].sum() / last[SECONDS].max():,.0f}"


def _read_evaluation(directory: RunDirectory) -> dict[str, Any] | None:
    """Returns the final evaluation of a run; None while there is none."""
    path = directory.path / EVALUATION
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def _evaluated_return(directory: RunDirectory) -> dict[str, str]:
    found = _read_evaluation(directory)
    return {} if found is None else {"mean return, evaluated": f"{found['eval/return']:,.1f}"}


def _evaluation(directory: RunDirectory) -> str:
    """Returns the table of the final evaluation."""
    found = _read_evaluation(directory)
    if found is None:
        return '<p class="note">The run has not been evaluated yet.</p>'
    rows = []
    for seed in found["seeds"]:
        row = {
            "seed": seed["seed"],
            "mean": seed["eval/return"],
            "standard deviation": seed["eval/return_std"],
            "minimum": seed["eval/return_min"],
        }
        if "eval/return_max" in seed:
            row["maximum"] = seed["eval/return_max"]
        # Runs of earlier versions have neither interval nor quantiles.
        low, high = seed.get("eval/return_interval", (None, None))
        if low is not None:
            row["95 % interval of the mean"] = f"{low:.1f} to {high:.1f}"
        quantiles = seed.get("eval/return_quantiles", {})
        row |= {f"{float(share):.0%}": value for share, value in quantiles.items()}
        rows.append({**row, "length": seed["eval/length"]})
    acting = "greedy" if found["greedy"] else "sampled"
    note = f'<p class="note">{found["episodes"]} {acting} episodes of each seed.</p>'
    table = pd.DataFrame(rows).to_html(index=False, border=0, float_format="{:.1f}".format)
    return f'{note}<div class="wide">{table}</div>'


def _episode(run_dir: str | Path, network: Any) -> str:
    """Returns an episode of the policy as a picture, or the reason why there is none."""
    renderer = make_env(RunDirectory.open(run_dir).read_config(network)[0]).renderer
    if renderer is not None and renderer.frames is None:
        return '<p class="note">ppo-jax render RUN -o episode.html draws an episode.</p>'
    # A picture is part of the page, not a file beside it.
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "episode.gif"
        try:
            (total,) = render_run(run_dir, picture, network=network)
        except ConfigError as error:
            return f'<p class="note">{html.escape(str(error))}</p>'
        content = base64.b64encode(picture.read_bytes()).decode()
    return (
        f'<img alt="An episode of the policy" src="data:image/gif;base64,{content}">'
        f'<p class="note">A greedy episode with the return {total:.1f}.</p>'
    )


def _return_figures(curves: Curves) -> str:
    """Returns figures of the return over steps and over seconds, in training and evaluations."""
    frames = {"training episodes": (curves.metrics, RETURN)}
    if len(curves.evaluations):
        frames["greedy evaluations"] = (curves.evaluations, EVALUATED_RETURN)
    axes = AXES if SECONDS in curves.metrics else AXES[:1]
    return _columns([_figure(frames, title, "return") for title in axes])


def _metric_figures(metrics: pd.DataFrame) -> str:
    """Returns a small figure for each metric of training."""
    names = [name for name in metrics if name.startswith("train/")]
    names += [name for name in ("episode/length", "time/steps_per_second") if name in metrics]
    return _columns(
        [_figure({name: (metrics, name)}, AXES[0], name, height=240) for name in names],
        "columns small",
    )


def _columns(figures: Sequence[str], style: str = "columns") -> str:
    return f'<div class="{style}">{"".join(figures)}</div>'


def _figure(
    frames: Mapping[str, tuple[pd.DataFrame, str]],
    x_title: str,
    y_title: str,
    *,
    height: int = 380,
) -> str:
    """Returns a figure as HTML: a line with its interval for each table and metric.

    Args:
      frames: tables of a run and names of their metrics, by the text of the legend.
      x_title: title of the horizontal axis, one of `AXES`.
      y_title: title of the vertical axis.
      height: in pixels.
    """
    from plotly import graph_objects

    figure = graph_objects.Figure()
    for (text, (frame, metric)), color in zip(frames.items(), _COLORS, strict=False):
        table, seconds = table_of(frame, metric)
        found = curve(table, seconds if x_title == AXES[1] else None)
        if found is None:
            continue
        # The bounds are NaN where a single seed has a value, which would end the polygon.
        inside = np.isfinite(found.low)
        if inside.any():
            x, low, high = (values[inside] for values in (found.x, found.low, found.high))
            figure.add_scatter(
                x=[*x, *x[::-1]],
                y=[*high, *low[::-1]],
                fill="toself",
                fillcolor=color,
                opacity=0.2,
                mode="lines",
                line={"width": 0, "color": color},
                hoverinfo="skip",
                showlegend=False,
            )
        figure.add_scatter(
            x=found.x, y=found.estimate, name=text, mode="lines", line={"color": color}
        )
    figure.update_layout(
        **_LAYOUT,
        height=height,
        xaxis_title=x_title,
        yaxis_title=y_title,
        showlegend=len(frames) > 1,
    )
    return figure.to_html(
        full_html=False,
        include_plotlyjs=False,  # once for all figures, in the head of the page
        config={"responsive": True, "displaylogo": False},
    )


def _configuration(record: Mapping[str, Any]) -> str:
    """Returns the settings as tables, those that differ from the defaults marked."""
    defaults = to_plain(vars(Config()))
    # Settings that were left to the algorithm have the values that it used.
    settings = {**record["config"], **record.get("resolved", {})}
    # A reader looks for the differences among forty settings.
    changed = {name for name, value in record["config"].items() if defaults.get(name) != value}
    algorithm = record["config"]["algorithm"]
    usual = ALGORITHMS[algorithm].hparams if algorithm in ALGORITHMS else {}
    given = record["hparams"]
    other = {name for name, value in given.items() if name in usual and usual[name] != value}
    return _table("setting", settings, changed) + _table("hyperparameter", given, other)


def _versions(record: Mapping[str, Any]) -> str:
    """Returns the device and the versions of the run, as tables."""
    made_with = dict(record["made_with"])
    versions = made_with.pop("versions")
    return _table("environment", made_with, frozenset()) + _table("package", versions, frozenset())


def _in_words(value: Any) -> str:
    """Returns a value of JSON as text for a reader.

    >>> _in_words("ppo"), _in_words(None), _in_words([64, 64]), _in_words(2**0.5), _in_words({})
    ('ppo', 'none', '64, 64', '1.41421', 'none')
    """
    if value is None or value == [] or value == {}:
        return "none"
    if isinstance(value, list):
        return ", ".join(map(_in_words, value))
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def _table(title: str, values: Mapping[str, Any], changed: frozenset[str] | set[str]) -> str:
    """Returns names and values as a table; some rows are marked as changed."""
    # Values may hold any text, such as the name of a user's environment.
    rows = "".join(
        f"<tr{' class=changed' if name in changed else ''}><td>{html.escape(str(name))}</td>"
        f"<td>{html.escape(_in_words(value))}</td></tr>"
        for name, value in values.items()
    )
    return f"<table><tr><th>{title}</th><th>value</th></tr>{rows}</table>"
