"""Commands that make pictures of runs: `plot` and `render`."""

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Annotated

import tyro

from ppo_jax.commands.common import enable_compilation_cache, say, show_warning
from ppo_jax.errors import ConfigError
from ppo_jax.runs.directory import PLOTS, RunDirectory
from ppo_jax.runs.outputs import kind_of, require_output

RETURN = "episode/return"


@dataclasses.dataclass(frozen=True)
class PlotCommand:
    """Plot learning curves of one or more runs over environment steps and over time."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories that `ppo-jax train` wrote."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=("-o",))] = None
    """File that ends in .png, .svg or .pdf; by default curves.png and curves.svg in the directory
    of a single run."""
    metric: str = RETURN
    """Metric of training, such as train/entropy."""
    smooth: int = 1
    """Width of the moving average over logged rows of training; 1 for none."""
    overwrite: bool = False
    """Replace --output if it exists. The files in the run's directory are always replaced."""

    def run(self) -> int:
        """Runs the command; returns its exit status."""
        if self.overwrite and self.output is None:
            raise ConfigError("--overwrite is for --output; got none. Leave it out.")
        if not self.run_dirs:
            raise ConfigError("plot needs one run or more; got none. Name their directories.")
        if self.output is None and len(self.run_dirs) > 1:
            raise ConfigError(
                f"a plot of several runs needs a file; got {len(self.run_dirs)} runs and no "
                "output. Name one, as in -o curves.png."
            )
        # Files that the command itself makes in a run are replaced; a file of a user is not.
        if self.output is None:
            if self.metric != RETURN:
                raise ConfigError(
                    f"a plot of another metric needs a file; got {self.metric} and no output. "
                    "Name one, as in -o curves.png."
                )
            outputs = [self.run_dirs[0] / name for name in PLOTS]
        else:
            kinds = ("png", "svg", "pdf")
            outputs = [require_output(self.output, kinds, overwrite=self.overwrite)]
        from ppo_jax.results.curves import plot_runs, read_curves
        from ppo_jax.runs import files
        from ppo_jax.runs.lock import writable

        runs = [read_curves(path) for path in self.run_dirs]
        if len({run.env for run in runs}) > 1:
            say("these runs are of different environments, whose returns cannot be compared.")
        figure = plot_runs(runs, self.metric, smooth=self.smooth)
        for path in outputs:
            save = functools.partial(figure.savefig, dpi=150, format=kind_of(path))
            with writable(path.parent, "the folder of the output"):
                files.write_file(path, save)
        print(f"plot: {', '.join(map(str, outputs))}")
        return 0


@dataclasses.dataclass(frozen=True)
class RenderCommand:
    """Draw episodes of a run's policy, by the environment's own renderer."""

    run_dir: tyro.conf.Positional[Path]
    """A directory that `ppo-jax train` wrote."""
    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """File that ends in .gif, .mp4, or .html for tasks of brax."""
    episodes: int = 1
    """Episodes, one after another."""
    seed: int = 0
    """Random seed of the episodes."""
    run_seed: int | None = None
    """Seed whose policy is drawn, for a run of several seeds; the first by default."""
    best: bool = False
    """Draw the best policy of a run that was trained with --eval-every, not the last one."""
    sample: bool = False
    """Sample actions instead of taking the most likely ones."""
    max_steps: int | None = None
    """Bound on the steps of an episode; by default that of the environment, or 1000."""
    overwrite: bool = False
    """Replace the output if it exists."""

    def run(self) -> int:
        """Runs the command; returns its exit status."""
        RunDirectory.open(self.run_dir)
        enable_compilation_cache()
        from ppo_jax.results.render import render_run

        with warnings.catch_warnings():
            warnings.showwarning = show_warning  # type: ignore[assignment]
            returns = render_run(
                self.run_dir,
                self.output,
                num_episodes=self.episodes,
                seed=self.seed,
                run_seed=self.run_seed,
                greedy=not self.sample,
                best=self.best,
                max_steps=self.max_steps,
                overwrite=self.overwrite,
            )
        print(f"returns {', '.join(f'{x:.1f}' for x in returns)}: {self.output}")
        return 0
