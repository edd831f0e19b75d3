"""The command `launch`."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from ppo_jax import envs
from ppo_jax.commands.common import say
from ppo_jax.commands.sweeping import MergeCommand, SweepCommand
from ppo_jax.errors import ConfigError
from ppo_jax.runs.launchers import LauncherName, Run, launch, shard_jobs


@dataclasses.dataclass(frozen=True)
class LaunchCommand:
    """Train the shards of a sweep on SLURM, on Ray, or in processes of this machine, and merge
    them. The arguments of the sweep follow after --. Run the same command again to continue.
    """

    launcher: tyro.conf.Positional[LauncherName]
    """Launcher that trains the shards. local and slurm need submitit, ray needs Ray."""
    shards: Annotated[int, tyro.conf.arg(aliases=("-n",))]
    """Number of shards, each of which is one job."""
    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """Directory of the merged sweep. OUTPUT-shards holds the shards' directories and the logs."""
    options: str = ""
    """Options of submitit for slurm and local, such as timeout_min=60,slurm_partition=gpu, and of
    ray.remote for ray, such as num_gpus=1,max_retries=5."""

    def run(self, sweep: SweepCommand | None, words: Sequence[str], run: Run) -> int:
        """Runs the command; returns its exit status.

        Args:
          sweep: the command of the sweep, parsed; None if there is none.
          words: its arguments.
          run: the command `ppo-jax`, for the jobs.
        """
        if sweep is None:
            raise ConfigError(
                "launch needs the arguments of a sweep after --, such as -- CartPole-v1 "
                "--learning-rate 1e-4,1e-3; got none."
            )
        for name in ("shard", "run_dir", "search", "storage"):
            if getattr(sweep, name) is not None:
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} is not for a sweep that is launched. Leave it out.")
        if sweep.sampler == "tpe":
            raise ConfigError(
                "--sampler tpe draws from the results of all members, and has no shards; start its "
                "workers with --storage instead."
            )
        envs.check_name(sweep.env)
        options = _parse_options(self.options)
        folder = self.output.absolute().with_name(f"{self.output.name}-shards")
        jobs = shard_jobs(words, self.shards, folder)
        say(f"{len(jobs)} jobs: ppo-jax {shlex.join(jobs[0].words)}, and so on")
        num_failed = 0
        try:
            for ended in launch(self.launcher, jobs, run, folder / "logs", options):
                where = f"shard {ended.number} of {len(jobs)}"
                if ended.error is None:
                    say(f"{where} is complete")
                else:
                    num_failed += 1
                    say(f"ppo-jax: error: {where} failed: {ended.error}")
        except KeyboardInterrupt:
            say(
                "stopped waiting. SLURM jobs keep running; scancel ends them. Once they have "
                "ended, run the same command again to continue"
            )
            return 130
        if num_failed:
            say(f"{num_failed} shards failed; the same command again continues them")
            return 1
        return MergeCommand(tuple(job.run_dir for job in jobs), self.output).run()


def _parse_options(text: str) -> dict[str, Any]:
    """Returns options as a mapping, with the types that YAML gives their values."""
    import yaml

    options = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not (equals and name.isidentifier()):
            raise ConfigError(
                f"--options must be names and values, such as num_gpus=1,max_retries=5; got {text}."
            )
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--options must have values of YAML; got {part}.") from error
    return options
