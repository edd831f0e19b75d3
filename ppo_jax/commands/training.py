"""The commands `train` and `resume`."""

import contextlib
import dataclasses
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from ppo_jax import envs, flags, presets
from ppo_jax.commands.common import (
    enable_compilation_cache,
    make_cpu_devices,
    names,
    new_run_dir,
    parse_fraction,
    parse_mesh,
    prepare_devices,
    print_evaluation,
    say,
    show_warning,
    use_deterministic_operations,
    with_mesh,
)
from ppo_jax.config import Config
from ppo_jax.errors import ConfigError
from ppo_jax.runs.directory import CHECKPOINTS, RunDirectory


@dataclasses.dataclass(frozen=True)
class ProcessOptions:
    """Options of a training that several processes share."""

    distributed: bool = False
    """Train together with other processes, which are started by the same command. JAX finds them in
    SLURM, Open MPI, Kubernetes and TPU pods."""
    coordinator: str | None = None
    """With --distributed: host:port of the first process, where JAX does not find it."""
    process: str | None = None
    """With --distributed: number of this process, such as 3/4, where JAX does not find it."""
    connect_timeout: float | None = None
    """With --distributed: seconds to wait for the other processes; 300 by default."""

    def require_unused(self, reason: str) -> None:
        """Raises a `ConfigError` if an option of several processes is given."""
        for name, value in vars(self).items():
            if value is not None and value is not False:
                option = name.replace("_", "-")
                raise ConfigError(f"{reason}; got --{option} {value}. Leave it out.")

    def prepare(self, config: Config, seeds: int | None, member_devices: int | None) -> None:
        """Prepares the devices, and connects this process with the others if there are others."""
        if not self.distributed:
            self.require_unused("this option needs --distributed")
            prepare_devices(config, seeds, member_devices)
            return
        from ppo_jax.runs import processes

        enable_compilation_cache()
        process = parse_fraction("process", self.process)
        if process is not None and process[1] > 0:
            # Each process has its share of the mesh. Only the number of CPU devices can be set.
            make_cpu_devices(max(1, config.num_devices * (member_devices or 1) // process[1]))
        timeout = self.connect_timeout
        timeout = processes.CONNECT_TIMEOUT if timeout is None else timeout
        processes.connect(self.coordinator, process, timeout=timeout)

    @property
    def is_first(self) -> bool:
        """True in the process that prints, once all are connected."""
        if not self.distributed:
            return True
        from ppo_jax.runs import processes

        return processes.is_first()

    def ended_together(self) -> contextlib.AbstractContextManager[None]:
        """Ends this process at once if it fails, so that no other waits for it."""
        if not self.distributed:
            return contextlib.nullcontext()
        from ppo_jax.runs import processes

        return processes.ended_together()


@dataclasses.dataclass(frozen=True)
class TrainCommand:
    """Train a policy, evaluate it, and keep both in a run directory.

    A known environment and algorithm start from their preset, others from the algorithm's defaults;
    flags override either.
    """

    config: tyro.conf.OmitArgPrefixes[Any]
    hparams: tyro.conf.OmitArgPrefixes[Any]
    seed: int = 0
    """Random seed."""
    seeds: int | None = None
    """Train this many seeds together, starting from --seed. A seed that is trained with others
    rounds differently than alone, and so may take another path: compare seeds of the same run."""
    start_from: Path | None = None
    """Start from the policy of this run, which may be of another environment with the same spaces,
    instead of new parameters."""
    run_dir: Path | None = None
    """Directory of the run; runs/ENV_ALGORITHM_SEED_TIME by default."""
    overwrite: bool = False
    """Replace a run that --run-dir already holds."""
    resume: bool = False
    """Continue the run in --run-dir, if there is one; for jobs that a scheduler starts again."""
    checkpoint_every: float = 60.0
    """Seconds between two checkpoints, from which `ppo-jax resume` continues; 0 for none."""
    eval_episodes: int = 128
    """Episodes of the evaluation at the end, for each seed."""
    eval_every: int | None = None
    """Updates between two evaluations during training; the best policy is kept."""
    log_every: int | None = None
    """Updates per row of metrics.jsonl; by default about 1000 rows in all."""
    log: str = ""
    """Trackers that get the rows besides the run's files, separated by commas: tensorboard, wandb,
    mlflow, trackio."""
    stop_at_return: float | None = None
    """Stop once the mean return of an evaluation reaches this; needs --eval-every."""
    mesh: str | None = None
    """Numbers of devices: env=4,member=2 divides the environments of each seed among four devices,
    and the seeds among two such groups, eight devices in all. By default there
    are as many groups as the devices can form with equally many seeds each."""
    processes: tyro.conf.OmitArgPrefixes[ProcessOptions] = ProcessOptions()
    debug_nans: bool = False
    """Stop at the first update with a NaN, and name the operation that made it. Slower."""
    dry_run: bool = False
    """Compile the training and print its steps, memory and compile time; run and write nothing."""
    deterministic: bool = False
    """On a GPU, use only operations that give the same bits in every run, which may be slower. On a
    CPU every run does so in any case."""
    quiet: bool = False
    """Show no progress."""
    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """YAML with a mapping of settings to values, applied to the preset, or the directory of a run
    whose settings are used again; flags override it."""

    def run(self) -> int:
        """Runs the command; returns its exit status."""
        if self.resume and self.run_dir is None:
            raise ConfigError(
                "--resume continues the run in a directory; got no --run-dir. Name it, so that "
                "the next start finds the same directory."
            )
        mesh = parse_mesh(self.mesh)
        config = with_mesh(self.config.config, mesh)
        hparams = flags.hparams_type(config.algorithm)(**vars(self.hparams))
        envs.check_name(config.env)
        if self.deterministic:
            use_deterministic_operations()
        if self.dry_run:
            self.processes.require_unused("--dry-run compiles in a single process")
            _say_rounded(config)
            return self._print_dry_run(config, hparams, mesh.member)
        run_dir = self.run_dir or new_run_dir(config.env, f"{config.algorithm}_seed{self.seed}")
        # Of several processes, the first one checks its directory when all are connected.
        if not self.processes.distributed and not (self.resume and RunDirectory.holds_run(run_dir)):
            RunDirectory.check(run_dir, overwrite=self.overwrite)
        self.processes.prepare(config, self.seeds, mesh.member)

        from ppo_jax.runs.run import train

        return _run_training(
            lambda: train(
                config,
                hparams,
                seed=self.seed,
                num_seeds=self.seeds,
                member_devices=mesh.member,
                start_from=self.start_from,
                run_dir=run_dir,
                overwrite=self.overwrite,
                resume=self.resume,
                checkpoint_every=self.checkpoint_every,
                eval_episodes=self.eval_episodes,
                eval_every=self.eval_every,
                log_every=self.log_every,
                log=names(self.log),
                stop_at_return=self.stop_at_return,
                debug_nans=self.debug_nans,
                progress=not self.quiet,
            ),
            config,
            self.processes,
            rounded=config,
        )

    def _print_dry_run(self, config: Config, hparams: Any, member_devices: int | None) -> int:
        """Prints steps, memory and compile time of the training; returns the exit status."""
        prepare_devices(config, self.seeds, member_devices)
        from ppo_jax.runs.run import dry_run

        found = dry_run(config, hparams, num_seeds=self.seeds, member_devices=member_devices)
        seeds = f", for each of {self.seeds} seeds" if self.seeds is not None else ""
        available = "" if found.limit is None else f" of {found.limit / 2**20:,.0f} MiB"
        print(f"steps    {found.timesteps:,} in {found.num_updates:,} updates{seeds}")
        print(f"memory   {found.num_bytes / 2**20:,.1f} MiB{available} per device")
        print(f"compile  {found.compile_seconds:.1f} s")
        print("nothing was run, and no file was written")
        return 0


@dataclasses.dataclass(frozen=True)
class ResumeCommand:
    """Continue a run that was stopped or killed, or extend one that has finished.

    Options that are left out keep the values of the run.
    """

    run_dir: tyro.conf.Positional[Path]
    """A directory that `ppo-jax train` wrote."""
    total_timesteps: int | None = None
    """Environment steps in all, over all environments. A learning-rate schedule follows the new
    total."""
    num_devices: int | None = None
    """Devices that share the environments from now on."""
    mesh: str | None = None
    """Devices of both axes from now on, as in `train`."""
    checkpoint_every: float | None = None
    """Seconds between two checkpoints."""
    eval_episodes: int | None = None
    """Episodes of the evaluation at the end, for each seed."""
    eval_every: int | None = None
    """Updates between two evaluations while it trains."""
    log_every: int | None = None
    """Updates per row of metrics.jsonl."""
    log: str | None = None
    """Trackers that get the rows besides the run's files, as in `train`."""
    stop_at_return: float | None = None
    """Stop once the mean return of an evaluation reaches this."""
    processes: tyro.conf.OmitArgPrefixes[ProcessOptions] = ProcessOptions()
    deterministic: bool = False
    """On a GPU, use only operations that give the same bits in every run, as in `train`."""
    quiet: bool = False
    """Show no progress."""

    def run(self) -> int:
        """Runs the command; returns its exit status."""
        directory = RunDirectory.open(self.run_dir)
        config, seeds = directory.read_config()[0], directory.read_seeds()
        mesh = parse_mesh(self.mesh)
        if self.num_devices is not None or mesh.env is not None:
            num_devices = 1 if self.num_devices is None else self.num_devices
            config = with_mesh(config.replace(num_devices=num_devices), mesh)
        if self.deterministic:
            use_deterministic_operations()
        num_seeds = None if isinstance(seeds, int) else len(seeds)
        member_devices = mesh.member or directory.read_options().get("member_devices")
        self.processes.prepare(config, num_seeds, member_devices)
        rounded = None
        if self.total_timesteps is not None:
            rounded = config.replace(total_timesteps=self.total_timesteps)

        from ppo_jax.runs.run import resume

        return _run_training(
            lambda: resume(
                self.run_dir,
                total_timesteps=self.total_timesteps,
                num_devices=config.num_devices,
                member_devices=mesh.member,
                checkpoint_every=self.checkpoint_every,
                eval_episodes=self.eval_episodes,
                eval_every=self.eval_every,
                log_every=self.log_every,
                log=None if self.log is None else names(self.log),
                stop_at_return=self.stop_at_return,
                progress=not self.quiet,
            ),
            config,
            self.processes,
            rounded=rounded,
        )


def _say_rounded(config: Config) -> None:
    """Says before a run, instead of rounding silently, how many steps will run in all."""
    timesteps = config.num_updates * config.batch_size
    # The totals of presets and defaults are round numbers that nobody chose.
    usual = presets.preset(config.env, config.algorithm)[0].total_timesteps
    if config.total_timesteps not in (timesteps, usual):
        say(
            f"{config.total_timesteps:,} steps are not a whole number of updates of "
            f"{config.batch_size:,}: training takes {timesteps:,} in all."
        )


def _run_training(
    run: Callable[[], Any],
    config: Config,
    options: ProcessOptions,
    *,
    rounded: Config | None = None,
) -> int:
    """Runs a training, prints its result in the first process, and returns the exit status.

    Args:
      run: calls `train` or `resume`, and returns the result.
      config: config of the training.
      options: options of its processes.
      rounded: config whose `total_timesteps` is reported if it is rounded; None for no report.
    """
    from ppo_jax.runs.interrupt import exit_at_second_signal

    with exit_at_second_signal(), options.ended_together(), warnings.catch_warnings():
        # Failures are printed below, as errors.
        warnings.filterwarnings("ignore", category=RuntimeWarning, message="seed .* failed with")
        warnings.showwarning = show_warning  # type: ignore[assignment]
        if not options.is_first:
            warnings.simplefilter("ignore")
        elif rounded is not None:
            _say_rounded(rounded)
        result = run()
    if options.is_first:
        _print_result(result, config)
    if _is_interrupted(result):
        return 128 + (result.signal or signal.SIGINT)
    return 1 if result.failures or result.unwritten else 0


def _is_interrupted(result: Any) -> bool:
    """Returns whether a signal stopped a training before it was evaluated."""
    # A training whose seeds have all failed is not one to continue.
    return result.evaluation is None and len(result.failures) < len(result.seeds)


def _print_result(result: Any, config: Config) -> None:
    """Prints what came of a training."""
    from ppo_jax.runs.trained import summarize

    total = (result.timesteps - result.timesteps_before) * len(result.seeds)
    if total == 0 and result.evaluation is not None and not result.is_stopped:
        print(
            f"the run was complete after {result.timesteps:,} steps and is evaluated again; "
            "--total-timesteps extends it"
        )
        print_evaluation(summarize(result.evaluation, result.seeds, greedy=True))
        print(f"run: {result.run_dir}")
        return
    print(
        f"trained {config.env} with {config.algorithm}: {total:,} steps in "
        f"{result.run_seconds:.1f} s ({total / max(result.run_seconds, 1e-9):,.0f} steps/s), "
        f"compiled in {result.compile_seconds:.1f} s"
    )
    if len(result.evaluations):
        share = result.evaluation_seconds / (result.run_seconds + result.evaluation_seconds)
        print(f"evaluations took {result.evaluation_seconds:.1f} s, {share:.0%} of the run")
    for problem in (*result.failures, *result.unwritten):
        say(f"ppo-jax: error: {problem}")
    if _is_interrupted(result):
        has_checkpoint = (result.run_dir / CHECKPOINTS).is_dir()
        what = f"ppo-jax resume {result.run_dir} continues the run"
        print(
            f"stopped after {result.timesteps:,} steps{' of each seed' * (len(result.seeds) > 1)}; "
            f"{what if has_checkpoint else f'the policy so far is in {result.run_dir}'}"
        )
        return
    if result.is_stopped:
        print(f"stopped after {result.timesteps:,} steps, as asked")
    if result.evaluation is not None:
        print_evaluation(summarize(result.evaluation, result.seeds, greedy=True))
    print(f"run: {result.run_dir}")
