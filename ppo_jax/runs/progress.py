"""The progress bar of a training."""

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


class TrainingProgress:
    """A progress bar with steps per second, return and time left; silent unless `visible`.

    Written to standard error, so that standard output holds results alone.
    """

    def __init__(self, *, visible: bool) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[episode_return]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not visible,
        )
        self._task = self._progress.add_task("compiling", total=None, rate="", episode_return="")

    def __enter__(self) -> "TrainingProgress":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, total: int) -> None:
        """Shows that compilation is done and `total` environment steps follow."""
        self._progress.reset(self._task, description="training", total=total)

    def advance(self, timesteps: int, *, steps_per_second: float, episode_return: float) -> None:
        """Shows that more environment steps were done."""
        self._progress.update(
            self._task,
            advance=timesteps,
            rate=f"{steps_per_second:,.0f} steps/s",
            episode_return=f"return {episode_return:.1f}",
        )
