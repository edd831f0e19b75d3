"""The progress of a training on standard error: a bar in a terminal, lines elsewhere.

Standard output is left to results.
"""

import datetime
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

_SECONDS_BETWEEN_LINES = 5.0


class TrainingProgress:
    """Shows steps done, steps per second, the return, elapsed time and time left.

    In a terminal or a notebook it is a bar. Elsewhere, as in the log of a batch job, it is a line
    every few seconds. Silent unless `visible`.
    """

    def __init__(self, *, visible: bool) -> None:
        console = Console(stderr=True)
        has_bar = visible and (console.is_terminal or console.is_jupyter)
        self._console = console
        self._prints_lines = visible and not has_bar
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not has_bar,
        )
        self._task = self._bar.add_task("compiling", total=None, status="")
        self._total = 0
        self._done = 0
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, total: int, done: int = 0) -> None:
        """Starts the display after compilation, at `done` of `total` environment steps."""
        self._total, self._done = total, done
        self._started = self._last_line = time.monotonic()
        self._bar.reset(self._task, description="training", total=total, status="")

    def advance(self, timesteps: int, *, steps_per_second: float, episode_return: float) -> None:
        """Shows that more environment steps were done."""
        self._done += timesteps
        now = time.monotonic()
        elapsed = now - self._started
        # By the current speed: the elapsed time has compilations of later groups in it.
        left = (self._total - self._done) / max(steps_per_second, 1e-9)
        # Fits in a terminal of 80 columns, beside the bar.
        short = (
            f"{_short(self._done)}/{_short(self._total)} steps, {_short(steps_per_second)}/s, "
            f"return {episode_return:.1f}, {_clock(left)} left"
        )
        self._bar.update(self._task, completed=self._done, status=short)
        status = (
            f"{self._done:,} of {self._total:,} steps, {steps_per_second:,.0f} steps/s, "
            f"return {episode_return:.1f}, {_clock(elapsed)} elapsed, {_clock(left)} left"
        )
        if self._prints_lines and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            # Whole lines, for logs: rich would wrap them at 80 columns.
            self._console.print(status, soft_wrap=True, highlight=False)


def _short(number: float) -> str:
    """Returns a count with at most four digits.

    >>> _short(950), _short(598_016), _short(80_000_000)
    ('950', '598k', '80.0M')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            scaled = number / size
            return f"{scaled:.0f}{unit}" if scaled >= 100 else f"{scaled:.1f}{unit}"
    return f"{number:.0f}"


def _clock(seconds: float) -> str:
    """Returns a duration as text.

    >>> _clock(3725.4)
    '1:02:05'
    """
    return str(datetime.timedelta(seconds=int(seconds)))
