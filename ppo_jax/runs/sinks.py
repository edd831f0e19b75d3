"""All sinks of a run. Trackers run in threads, so that an accelerator does not wait for them."""

import contextlib
import itertools
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from ppo_jax.errors import ConfigError, require_known
from ppo_jax.runs.report import varied
from ppo_jax.runs.sink import OnRows, Rows, RunInfo, Sink
from ppo_jax.runs.trackers import TRACKERS


class Callback(Sink):
    """Passes rows to a function."""

    def __init__(self, on_rows: OnRows) -> None:
        self._on_rows = on_rows

    def on_rows(self, rows: Rows) -> bool:
        """Returns True if the function returns True, and not another value such as a number."""
        answer = self._on_rows(rows)
        return isinstance(answer, (bool, np.bool_)) and bool(answer)


class _Members(Sink):
    """Gives each member of a sweep a run of its own in a tracker.

    Rows are those of `member_rows`.
    """

    def __init__(self, make: Callable[[], Sink]) -> None:
        self._make = make
        make()  # an error of a package that is missing

    def start(self, run: RunInfo) -> None:
        """Keeps the description of the sweep."""
        self._sweep = run

    def on_rows(self, rows: Rows) -> None:
        """Logs all rows of finished members."""
        for number, of_member in itertools.groupby(rows, operator.itemgetter("member")):
            own = list(of_member)
            # Opened and closed at once: a sweep may have more members than files may be open.
            sink = self._make()
            try:
                sink.start(
                    self._sweep._replace(
                        seeds=(own[0]["seed"],),
                        settings={**self._sweep.settings, "values": own[0]["values"]},
                        prefix=f"member_{number}_",
                    )
                )
                sink.on_rows(
                    [{k: x for k, x in row.items() if k not in ("member", "values")} for row in own]
                )
            finally:
                sink.finish()


def member_rows(tables: tuple[pd.DataFrame, pd.DataFrame], seconds: float) -> Rows:
    """Returns the rows of members, one member after another.

    Args:
      tables: a table of finished members and one of their curves, of a sweep or a search.
      seconds: wall time of the program that trained all of them. They advance together, so the
        time of an update is its share of it.

    Returns:
      Rows with `member`, `values` (the settings that the sweep gave it), and what rows of a run
      have. The last row of each member is its final evaluation.
    """
    members, curves = tables
    last_update = curves["update"].max()
    # Tables have a column for each metric of any member; a member has some of them.
    rows: Rows = []
    for summary in members.to_dict("records"):
        label = {
            "member": summary["member"],
            "seed": summary["seed"],
            # A search has results among the columns.
            "values": {
                name: summary[name] for name in varied(members) if name not in ("round", "score")
            },
        }
        own = curves[curves["member"] == summary["member"]].to_dict("records")
        for row in [*own, {**summary, "update": own[-1]["update"]}]:
            row["eval/score"] = row.get("score", np.nan)  # of a search, after each round
            metrics = {name: x for name, x in row.items() if "/" in name and not pd.isna(x)}
            steps = {"update": row["update"], "timesteps": row["timesteps"]}
            time = {"time/seconds": seconds * row["update"] / last_update}
            rows.append({**label, **steps, **time, **metrics})
    return rows


class _InThread(Sink):
    """Runs the methods of a sink in a thread, one after another.

    An error of a method is raised by the next call, and ends the sink.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._thread = ThreadPoolExecutor(1, "ppo_jax-sink")
        self._error: Exception | None = None
        self._is_finished = False

    def start(self, run: RunInfo) -> None:
        """Starts the sink."""
        self._submit(partial(self._sink.start, run))

    def on_rows(self, rows: Rows) -> None:
        """Passes rows on."""
        self._submit(partial(self._sink.on_rows, rows))

    def finish(self) -> None:
        """Finishes the sink once it has taken all rows, also after an error."""
        if not self._is_finished:
            self._is_finished = True
            self._thread.submit(self._finish)
        # Waits: rows that are still in the queue would be lost when the process ends.
        self._thread.shutdown()
        self._raise_error()

    def _submit(self, call: Callable[[], object]) -> None:
        self._raise_error()
        self._thread.submit(self._run, call)

    def _run(self, call: Callable[[], object]) -> None:
        if self._error is None:
            try:
                call()
            except Exception as error:  # of any library
                self._error = error

    def _finish(self) -> None:
        try:
            self._sink.finish()
        except Exception as error:  # of any library
            self._error = self._error or error

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


def make_sinks(
    log: Sequence[str],
    on_rows: OnRows | None = None,
    stop_at_return: float | None = None,
    *,
    run_dir: str | Path | None,
    eval_every: int | None = None,
    is_sweep: bool = False,
) -> "Sinks":
    """Makes the sinks of a run. They open nothing yet.

    Args:
      log: names in `trackers.TRACKERS`.
      on_rows: a callback; None for none.
      stop_at_return: asks to stop at this mean return of an evaluation; None for none.
      run_dir: directory of the run, which trackers need; None without one.
      eval_every: updates between two evaluations, which `stop_at_return` needs; None for none.
      is_sweep: give each member of a sweep a run of its own; rows are those of `member_rows`.

    Raises:
      ConfigError: a name is not known, its package is not installed, or the run lacks what a sink
        needs.
    """
    if isinstance(log, str):
        raise ConfigError(f"log must be a sequence of names; got {log!r}. Pass ({log!r},).")
    if log and run_dir is None:
        raise ConfigError(f"log needs the run_dir of the run; got log={tuple(log)} and None.")
    if stop_at_return is not None and eval_every is None:
        raise ConfigError(
            f"stop_at_return needs evaluations; got {stop_at_return} and no eval_every. Set "
            "eval_every (--eval-every)."
        )
    if stop_at_return is not None and math.isnan(stop_at_return):
        raise ConfigError("stop_at_return must be a number; got nan. inf never stops.")
    sinks: dict[str, Sink] = {}
    for name in log:
        require_known("tracker", name, TRACKERS)
        try:
            make = TRACKERS[name]
            sinks[name] = _InThread(_Members(make) if is_sweep else make())
        except ImportError as error:
            raise ConfigError(
                f"log={name!r} needs a package that is not installed ({error}). Install it by "
                f"pip install 'ppo-jax[{name}]'."
            ) from error
    # In the training's thread: they decide how it goes on.
    if on_rows is not None:
        sinks["on_rows"] = Callback(on_rows)
    if stop_at_return is not None:
        sinks["stop_at_return"] = Callback(partial(_reaches, stop_at_return))
    return Sinks(sinks)


class Sinks:
    """Passes rows to all sinks of a run, and drops trackers that fail."""

    def __init__(self, sinks: dict[str, Sink]) -> None:
        self._sinks = sinks
        self.ask_to_stop = False
        """True once a sink has asked the training to stop."""

    @contextlib.contextmanager
    def running(self, run: RunInfo) -> Iterator[None]:
        """Starts the sinks, and finishes them at the end, even if the training fails."""
        self._each(lambda sink: sink.start(run))
        try:
            yield
        finally:
            self._each(lambda sink: sink.finish())

    def on_rows(self, rows: Rows) -> None:
        """Passes rows on, if there are any."""
        if rows:
            # Each sink gets a copy, because it may change its rows.
            answers = self._each(lambda sink: sink.on_rows([dict(row) for row in rows]))
            self.ask_to_stop |= any(answers)

    def _each(self, call: Callable[[Sink], bool | None]) -> list[bool | None]:
        answers = []
        for name, sink in list(self._sinks.items()):
            try:
                answers.append(call(sink))
            except Exception as error:  # of any library
                # A callback is the caller's own code, which may end a training by an error.
                if isinstance(sink, Callback):
                    raise
                del self._sinks[name]
                # Closes its files, and marks its runs as finished.
                with contextlib.suppress(Exception):
                    sink.finish()
                warnings.warn(
                    f"{name} failed and gets no more rows: {type(error).__name__}: {error}. The "
                    "training goes on.",
                    RuntimeWarning,
                    stacklevel=4,
                )
        return answers


def _reaches(threshold: float, rows: Rows) -> bool:
    """Returns whether the mean over seeds of an evaluation's return is at least the threshold."""
    returns = [row["eval/return"] for row in rows if "eval/return" in row]
    return bool(returns) and sum(returns) / len(returns) >= threshold
