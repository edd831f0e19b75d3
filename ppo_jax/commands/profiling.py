"""The command `profile`."""

import dataclasses
import os
from pathlib import Path

import tyro

from ppo_jax import envs, flags, presets
from ppo_jax.commands.common import enable_compilation_cache, say
from ppo_jax.errors import ConfigError, require_positive_integer
from ppo_jax.runs.directory import RunDirectory


@dataclasses.dataclass(frozen=True)
class ProfileCommand:
    """Measure where the time of an update goes."""

    target: tyro.conf.Positional[str]
    """A directory that `ppo-jax train` wrote, or an environment, whose preset is measured."""
    algorithm: str | None = None
    """Algorithm, for an environment; ppo by default."""
    repeats: int = 10
    """Number of measurements of each stage, of which the minimum counts."""
    trace: Path | None = None
    """Folder for a trace of jax.profiler, which Perfetto and XProf show; none by default."""

    def run(self) -> int:
        """Runs the command; returns its exit status."""
        require_positive_integer("repeats", self.repeats)
        # A directory may have the name of an environment: the directory is meant.
        if Path(self.target).is_dir():
            if self.algorithm is not None:
                raise ConfigError(
                    f"--algorithm is for an environment; got {self.algorithm} and the run "
                    f"{self.target}. Leave it out."
                )
            directory = RunDirectory.open(self.target)
            config, hparams = directory.read_config()
            if not isinstance(directory.read_seeds(), int):
                say("a run of several seeds: the update of one of them is measured.")
        elif os.sep in self.target and not envs.is_name(self.target):
            RunDirectory.open(self.target)  # raises: there is no such directory
        else:
            envs.check_name(self.target)
            algorithm = self.algorithm or "ppo"
            config, hparams = presets.preset(self.target, algorithm)
            hparams = flags.hparams_type(algorithm)(**hparams.given())
        enable_compilation_cache()
        from ppo_jax.profiling import profile

        found = profile(config, hparams, repeats=self.repeats, trace_dir=self.trace)
        print(
            f"an update of {config.env} with {config.algorithm}: {found.timesteps:,} steps in "
            f"{found.seconds * 1e3:.2f} ms ({found.timesteps / found.seconds:,.0f} steps/s), "
            f"compiled in {found.compile_seconds:.1f} s"
        )
        for name, seconds in found.stages.items():
            print(f"  {name:12} {seconds * 1e3:9.2f} ms {seconds / found.seconds:6.0%}")
        if self.trace is not None:
            print(f"trace: {self.trace} (ui.perfetto.dev opens its files that end in .json.gz)")
        return 0
