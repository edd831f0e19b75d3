"""The command `ppo-jax`. Nothing slow is imported before the command line is understood."""

import contextlib
import dataclasses
import datetime
import functools
import importlib
import itertools
import math
import operator
import os
import re
import secrets
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import ppo_jax
from ppo_jax import envs, flags, presets
from ppo_jax.config import Config
from ppo_jax.errors import ConfigError, require_positive_integer, unknown_name
from ppo_jax.hparams import HParams
from ppo_jax.runs.directory import CHECKPOINTS, RunDirectory


@dataclasses.dataclass(frozen=True)
class TrainCommand:
    """Train a policy, evaluate it, and keep both in a run directory.

    A known environment and algorithm start from their tuned preset, others from the algorithm's
    defaults; flags override either.
    """

    config: tyro.conf.OmitArgPrefixes[Any]
    hparams: tyro.conf.OmitArgPrefixes[Any]
    seed: int = 0
    """Random seed."""
    seeds: int | None = None
    """Train this many seeds together, starting from --seed. A seed that is trained with others
    rounds differently than alone, and so may take another path: compare seeds of the same run."""
    run_dir: Path | None = None
    """Directory of the run; runs/ENV_ALGORITHM_SEED_TIME by default."""
    overwrite: bool = False
    """Replace a run that is there already."""
    resume: bool = False
    """Continue the run in --run-dir, if there is one; for jobs that a scheduler starts again."""
    checkpoint_every: float = 60.0
    """Seconds between two checkpoints, from which `ppo-jax resume` continues; 0 for none."""
    eval_episodes: int = 128
    """Episodes of the evaluation at the end, for each seed."""
    eval_every: int | None = None
    """Updates between two evaluations while it trains, of which the best policy is kept."""
    log_every: int | None = None
    """Updates per row of metrics.jsonl; by default about 1000 rows in all."""
    log: str = ""
    """Trackers that get the rows besides the run's files, separated by commas: tensorboard, wandb,
    mlflow, trackio."""
    stop_at_return: float | None = None
    """Stop once the mean return of an evaluation reaches this; needs --eval-every."""
    debug_nans: bool = False
    """Stop at the first update with a NaN, and name the operation that made it. Slower."""
    dry_run: bool = False
    """Compile the training and say what it would take and do; run nothing and write nothing."""
    deterministic: bool = False
    """On a GPU, use only operations that give the same bits in every run, which may be slower. On a
    CPU every run does so in any case."""
    quiet: bool = False
    """Show no progress."""
    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """YAML with a mapping of settings to values, applied to the preset; flags override it."""

    def run(self) -> int:
        """Runs the command; returns its exit status."""
        if self.resume and self.run_dir is None:
            raise ConfigError(
                "--resume continues the run in a directory; got no --run-dir. Name it, so that "
                "the next start finds the same directory."
            )
        config = self.config.config
        hparams = flags.hparams_type(config.algorithm)(**vars(self.hparams))
        envs.check_name(config.env)
        _say_rounded(config)
        if self.deterministic:
            _use_deterministic_operations()
        if self.dry_run:
            return self._print_dry_run(config, hparams)
        run_dir = self.run_dir or _new_run_dir(config.env, f"{config.algorithm}_seed{self.seed}")
        if not (self.resume and RunDirectory.holds_run(run_dir)):
            RunDirectory.check(run_dir, overwrite=self.overwrite)
        _prepare_devices(config, self.seeds)

        from ppo_jax.runs.run import train

        return _run_training(
            lambda: train(
                config,
                hparams,
                seed=self.seed,
                num_seeds=self.seeds,
                run_dir=run_dir,
                overwrite=self.overwrite,
                resume=self.resume,
                checkpoint_every=self.checkpoint_every,
                eval_episodes=self.eval_episodes,
                eval_every=self.eval_every,
                log_every=self.log_every,
                log=_names(self.log),
                stop_at_return=self.stop_at_return,
                debug_nans=self.debug_nans,
                progress=not self.quiet,
            ),
            config,
        )

    def _print_dry_run(self, config: Config, hparams: Any) -> int:
        """Prints what the training would do and take."""
        _prepare_devices(config, self.seeds)
        from ppo_jax.runs.run import dry_run

        found = dry_run(config, hparams, num_seeds=self.seeds)
        seeds = f", for each of {self.seeds} seeds" if self.seeds is not None else ""
        available = "" if found.limit is None else f" of {found.limit / 2**20:,.0f} MiB"
        print(f"steps    {found.timesteps:,} in {found.num_updates:,} updates{seeds}")
        print(f"memory   {found.num_bytes / 2**20:,.1f} MiB{available} a device")
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
    """Environment steps in all, over all environments. A schedule of the learning rate is that of
    the new total."""
    num_devices: int | None = None
    """Devices that share the environments from now on."""
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
    deterministic: bool = False
    """On a GPU, use only operations that give the same bits in every run, as in `train`."""
    quiet: bool = False
    """Show no progress."""

    def run(self) -> int:
        """Runs the command; returns its exit status."""
        directory = RunDirectory.open(self.run_dir)
        config, seeds = directory.read_config()[0], directory.read_seeds()
        if self.num_devices is not None:
            config = config.replace(num_devices=self.num_devices)
        if self.total_timesteps is not None:
            _say_rounded(config.replace(total_timesteps=self.total_timesteps))
        if self.deterministic:
            _use_deterministic_operations()
        _prepare_devices(config, None if isinstance(seeds, int) else len(seeds))

        from ppo_jax.runs.run import resume

        return _run_training(
            lambda: resume(
                self.run_dir,
                total_timesteps=self.total_timesteps,
                num_devices=self.num_devices,
                checkpoint_every=self.checkpoint_every,
                eval_episodes=self.eval_episodes,
                eval_every=self.eval_every,
                log_every=self.log_every,
                log=None if self.log is None else _names(self.log),
                stop_at_return=self.stop_at_return,
                progress=not self.quiet,
            ),
            config,
        )


def _names(text: str) -> tuple[str, ...]:
    """Returns the names in a list that is separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _say_rounded(config: Config) -> None:
    """Says before a run, instead of rounding silently, how many steps will run."""
    timesteps = config.num_updates * config.batch_size
    if timesteps != config.total_timesteps:
        _say(
            f"{config.total_timesteps:,} steps are not a whole number of updates of "
            f"{config.batch_size:,}: {timesteps:,} will run."
        )


def _run_training(run: Callable[[], Any], config: Config) -> int:
    """Trains, and says what came of it; returns the exit status."""
    from ppo_jax.runs.interrupt import exit_at_second_signal
    from ppo_jax.runs.run import summarize

    with warnings.catch_warnings(), exit_at_second_signal():
        # Failures are printed below, as errors.
        warnings.filterwarnings("ignore", category=RuntimeWarning, message="seed .* failed with")
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        result = run()
    total = (result.timesteps - result.timesteps_before) * len(result.seeds)
    print(
        f"trained {config.env} with {config.algorithm}: {total:,} steps in "
        f"{result.run_seconds:.1f} s ({total / max(result.run_seconds, 1e-9):,.0f} steps/s), "
        f"compiled in {result.compile_seconds:.1f} s"
    )
    if len(result.evaluations):
        share = result.evaluation_seconds / (result.run_seconds + result.evaluation_seconds)
        print(f"evaluations took {result.evaluation_seconds:.1f} s, {share:.0%} of the run")
    for problem in (*result.failures, *result.unwritten):
        _say(f"ppo-jax: error: {problem}")
    # A training whose seeds have all failed is not one to continue.
    if result.evaluation is None and len(result.failures) < len(result.seeds):
        has_checkpoint = (result.run_dir / CHECKPOINTS).is_dir()
        what = f"ppo-jax resume {result.run_dir} continues the run"
        print(
            f"stopped after {result.timesteps:,} steps{' of each seed' * (len(result.seeds) > 1)}; "
            f"{what if has_checkpoint else f'the policy so far is in {result.run_dir}'}"
        )
        return 128 + (result.signal or signal.SIGINT)
    if result.is_stopped:
        print(f"stopped after {result.timesteps:,} steps, as asked")
    if result.evaluation is not None:
        _print_evaluation(summarize(result.evaluation, result.seeds, greedy=True))
    print(f"run: {result.run_dir}")
    return 1 if result.failures or result.unwritten else 0


@dataclasses.dataclass(frozen=True)
class SweepCommand:
    """Train every combination of some settings with many seeds, compiled together.

    Starts from the preset, as `train` does, unless the algorithm is varied. A sweep that was
    interrupted is continued from its directory. With --search, one population searches
    hyperparameters while it trains.
    """

    space: tyro.conf.OmitArgPrefixes[Any]
    env: tyro.conf.Positional[str] = "CartPole-v1"
    """Name of the environment (`ppo-jax envs` lists them)."""
    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """YAML with a mapping of settings to a value, a list or a distribution; flags override it."""
    seeds: int | None = None
    """Number of seeds of every configuration; 8 by default."""
    draws: int | None = None
    """Number of draws of the distributions."""
    sampler: Literal["random", "sobol", "tpe"] = "random"
    """Sampler of the draws; tpe, which needs optuna, draws in batches that follow the results."""
    batch: int | None = None
    """Number of configurations in a batch of tpe."""
    run_dir: Path | None = None
    """Directory of the results; runs/ENV_sweep_TIME by default."""
    chunk: int | None = None
    """Number of members that train together; by default as many as fit."""
    quiet: bool = False
    """Show no progress."""
    checkpoint_every: float = 60.0
    """Seconds between two checkpoints of the members that are training; 0 for none."""
    deterministic: bool = False
    """On a GPU, use only operations that give the same bits in every run, as in `train`."""
    eval_episodes: int = 64
    """Number of episodes of each member's final evaluation."""
    log: str = ""
    """Trackers of the members, each of which is a run of its own, as in `train`."""
    search: Literal["halving", "pbt"] | None = None
    """Search: successive halving stops the worst trials and draws new ones; population-based
    training (pbt) replaces the worst members by perturbed copies of the best."""
    members: int | None = None
    """With --search: number of members that train together; 16 by default."""
    rounds: int | None = None
    """With --search: number of rounds, after each of which members are compared; 10 by default."""
    factor: float | None = None
    """With --search: of halving, one trial in this many goes on (3 by default); of pbt, values are
    multiplied or divided by it (1.25 by default)."""
    replaced: float | None = None
    """With --search pbt: share of the members that are replaced after a round; 0.25 by default."""
    seed: int | None = None
    """With --search: random seed; 0 by default."""

    def run(self) -> int:
        """Runs the command; returns its exit status."""
        self._require_fitting_options()
        envs.check_name(self.env)
        from ppo_jax.population import search_space

        given = {} if self.config_file is None else search_space.read(self.config_file)
        if "env" in given:
            raise ConfigError("env is the command's own argument; the file must not hold it.")
        given |= {name: text for name, text in vars(self.space).items() if text is not None}
        space = {name: search_space.parse(entry) for name, entry in given.items()}
        fixed = {name: v[0] for name, v in space.items() if isinstance(v, list) and len(v) == 1}
        varied = {name: entry for name, entry in space.items() if name not in fixed}
        settings = {name: fixed.pop(name) for name in vars(Config()) if name in fixed}
        values = {name: fixed.pop(name) for name in flags.hparam_names() if name in fixed}
        if "algorithm" in varied:  # a preset belongs to a single algorithm
            config, hparams = Config(env=self.env, **settings), HParams()
        else:
            algorithm = settings.pop("algorithm", "ppo")
            config, hparams = presets.preset(self.env, algorithm, **settings)
            hparams = flags.hparams_type(algorithm)(**hparams.given())
        hparams = hparams.replace(**values)
        # The remaining names with a single value are parameters of the environment.
        varied |= {name: [value] for name, value in fixed.items()}
        run_dir = self.run_dir or _new_run_dir(self.env, self.search or "sweep")
        if self.deterministic:
            _use_deterministic_operations()
        _enable_compilation_cache()
        _make_cpu_devices(_num_cores())
        common: dict[str, Any] = {
            "hparams": hparams,
            "run_dir": run_dir,
            "checkpoint_every": self.checkpoint_every,
            "eval_episodes": self.eval_episodes,
            "log": _names(self.log),
            "say": _say,
            "progress": not self.quiet,
        }
        from ppo_jax.runs.interrupt import exit_at_second_signal

        with warnings.catch_warnings(), exit_at_second_signal():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            result = self._train(config, varied, common)
        print(
            f"trained {len(result.members)} members in {result.run_seconds:.1f} s, compiled in "
            f"{result.compile_seconds:.1f} s"
        )
        for problem in result.unwritten:
            _say(f"ppo-jax: error: {problem}")
        if not result.is_complete:
            print(f"stopped; the same command with --run-dir {run_dir} continues it")
            return 128 + (result.signal or signal.SIGINT)
        if result.unwritten:  # a report needs all tables
            return 1
        _print_report(run_dir)
        return 0

    def _train(self, config: Config, space: dict[str, Any], common: dict[str, Any]) -> Any:
        """Runs the sweep or the search."""
        if self.search is None:
            from ppo_jax.runs.sweep import sweep

            return sweep(
                config,
                space,
                seeds=8 if self.seeds is None else self.seeds,
                num_draws=self.draws,
                sampler=self.sampler,
                batch=self.batch,
                chunk=self.chunk,
                **common,
            )
        from ppo_jax.runs.search import search

        given = {"num_members": self.members, "num_rounds": self.rounds, "seed": self.seed}
        given = {name: value for name, value in given.items() if value is not None}
        options: dict[str, Any] = {"factor": self.factor, "replaced": self.replaced, **given}
        return search(config, space, method=self.search, **options, **common)

    def _require_fitting_options(self) -> None:
        """Checks that options of a search come with one, and those of a sweep without."""
        of_search = ("members", "rounds", "factor", "replaced", "seed")
        of_sweep = ("seeds", "draws", "batch", "chunk")
        for name in of_search if self.search is None else of_sweep:
            if getattr(self, name) is not None:
                rule = "needs" if self.search is None else "does not go with"
                raise ConfigError(
                    f"--{name} {rule} --search; got {getattr(self, name)}. Leave it out."
                )
        if self.search is not None and self.sampler != "random":
            raise ConfigError(
                f"--sampler does not go with --search; got {self.sampler}. Leave it out."
            )


@dataclasses.dataclass(frozen=True)
class ReportCommand:
    """Compare the configurations of a sweep in tables and plots."""

    run_dir: tyro.conf.Positional[Path]
    """A directory that `ppo-jax sweep` wrote."""

    def run(self) -> int:
        """Runs the command; returns its exit status."""
        _print_report(self.run_dir)
        return 0


@dataclasses.dataclass(frozen=True)
class EvalCommand:
    """Evaluate the policy of a run over complete episodes."""

    run_dir: tyro.conf.Positional[Path]
    """A directory that `ppo-jax train` wrote."""
    episodes: int = 128
    """Episodes, for each of the run's seeds."""
    seed: int = 0
    """Random seed of the evaluation."""
    best: bool = False
    """Evaluate the best policy of a run that was trained with --eval-every, not the last one."""
    sample: bool = False
    """Sample actions instead of taking the most likely ones."""

    def run(self) -> int:
        """Runs the command; returns its exit status."""
        require_positive_integer("episodes", self.episodes)
        RunDirectory.open(self.run_dir)
        _enable_compilation_cache()
        from ppo_jax.runs.run import evaluate_run

        result = evaluate_run(
            self.run_dir,
            seed=self.seed,
            num_episodes=self.episodes,
            greedy=not self.sample,
            best=self.best,
        )
        _print_evaluation(result)
        return 0


@dataclasses.dataclass(frozen=True)
class EnvsCommand:
    """List the environments that can be trained."""

    def run(self) -> int:
        """Runs the command; returns its exit status."""
        from rich.console import Console
        from rich.table import Table

        table = Table("environment", "preset", box=None)
        for name in envs.names():
            table.add_row(name, _preset_summary(name))
        Console().print(table)
        return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 2 for a setting that breaks a rule."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--version" in argv:
        print(f"ppo-jax {ppo_jax.__version__}")
        return 0
    try:
        _import_modules(argv)
        argv = _spell_out(argv)
        command = tyro.cli(
            _commands(argv),
            prog="ppo-jax",
            description=(
                "Policy-gradient training, compiled end to end with JAX. --import MODULE imports a "
                "Python module first, which can register environments, algorithms and other parts."
            ),
            args=argv or ["--help"],
        )
        return command.run()
    except ConfigError as error:
        _say(f"ppo-jax: error: {error}")
        return 2
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has seen enough. Python would write to the pipe once
        # more when it exits, unless standard output goes elsewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _import_modules(argv: list[str]) -> None:
    """Imports the modules that `--import` names, from the current directory or the environment.

    The words are removed from `argv`. Modules are imported before the command line is parsed,
    because environments that they register have to be known then.
    """
    names: list[str] = []
    while "--import" in argv:
        position = argv.index("--import")
        if position + 1 == len(argv):
            raise ConfigError(
                "--import needs the name of a Python module, as in --import my_module."
            )
        names.append(argv[position + 1])
        del argv[position : position + 2]
    if names and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0] and error.name != name:
                raise
            raise ConfigError(
                f"--import must name a Python module; there is no {name} in {os.getcwd()} or in "
                "the environment. Leave out the .py."
            ) from error


def _commands(argv: list[str]) -> Any:
    """Returns the union of all commands, with the options that `argv` gives `train` and `sweep`."""
    # Read before parsing: the preset and the file decide the defaults that `--help` shows.
    words = [part for word in argv for part in word.split("=", 1)]
    named = dict(itertools.pairwise(words))
    is_train = argv[:1] == ["train"]
    given = _read_settings(Path(named["--config"])) if is_train and "--config" in named else {}
    env = given.pop("env", "CartPole-v1")
    env = next((word for word in words if word in envs.names()), env)
    algorithm = named.get("--algorithm", given.pop("algorithm", "ppo"))
    # A sweep may name several algorithms, and is told of a misspelt one when its space is read.
    has_several = not is_train and algorithm not in flags.algorithms()
    algorithm = "ppo" if has_several else algorithm
    kind = flags.hparams_type(algorithm)
    values = {name: given.pop(name) for name in flags.hparam_names() if name in given}
    config, preset_hparams = presets.preset(env, algorithm, **given)
    hparams = kind(**preset_hparams.given()).replace(**values)
    train = _with_options(
        TrainCommand,
        config=flags.config_flags(config, hparams),
        hparams=flags.hparams_flags(config, hparams),
    )
    space = flags.space_flags(config, hparams, has_several_algorithms=has_several)
    sweep = _with_options(SweepCommand, space=space)
    subcommand = tyro.conf.subcommand
    commands: list[Any] = [
        Annotated[type(train), subcommand("train", default=train)],
        Annotated[ResumeCommand, subcommand("resume")],
        Annotated[EvalCommand, subcommand("eval")],
        Annotated[SweepCommand, subcommand("sweep", default=sweep)],
        Annotated[ReportCommand, subcommand("report")],
        Annotated[EnvsCommand, subcommand("envs")],
    ]
    return functools.reduce(operator.or_, commands)


def _with_options(command: type, **groups: Any) -> Any:
    """Returns a command with groups of options, each of its own type, without a prefix."""
    fields = [
        (name, Annotated[type(group), tyro.conf.OmitArgPrefixes], group)
        for name, group in groups.items()
    ]
    made = dataclasses.make_dataclass(command.__name__, fields, bases=(command,), frozen=True)
    return made(**groups)


def _read_settings(path: Path) -> dict[str, Any]:
    """Reads the settings of a training from a file. The values are those of a sweep's file."""
    from ppo_jax.population import search_space

    settings = search_space.read(path)
    known = [*vars(Config()), *flags.hparam_names()]
    for name, value in settings.items():
        if name not in known:
            raise unknown_name("setting", name, known)
        if isinstance(value, str):
            entry = search_space.parse(value)
            if not isinstance(entry, list) or len(entry) != 1:
                raise ConfigError(
                    f"a training takes a single value of every setting; {path} gives {name} as "
                    f"{value}. Sweep it, or choose one value."
                )
            settings[name] = entry[0]
    return settings


def _spell_out(argv: list[str]) -> list[str]:
    """Returns `argv` as tyro reads it: 1e6 as 1000000, and for `train` 64x64 as two words."""
    words: list[str] = []
    for word in argv:
        flag, equals, value = word.rpartition("=")
        if re.fullmatch(r"\d+(\.\d+)?[eE]\d+", value) and float(value).is_integer():
            words.append(f"{flag}{equals}{int(float(value))}")
        elif argv[0] == "train" and re.fullmatch(r"\d+(x\d+)+", word):
            words += word.split("x")
        else:
            words.append(word)
    return words


def _enable_compilation_cache() -> None:
    """Keeps compiled programs between commands, in the user's cache directory."""
    import jax

    # A cache that the user has chosen stays in effect.
    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = Path.home() / ".cache" / "ppo_jax" / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(cache))


def _num_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare_devices(config: Config, seeds: int | None) -> None:
    """Prepares JAX for a training: its cache of programs, and the cores of a CPU as devices."""
    _enable_compilation_cache()
    if config.num_devices > 1:
        _make_cpu_devices(config.num_devices)
    # Seeds need no communication, so that each core trains some of them.
    elif seeds is not None:
        _make_cpu_devices(math.gcd(seeds, _num_cores()))


def _use_deterministic_operations() -> None:
    """Makes XLA use only deterministic operations on a GPU; before a backend starts."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".lstrip()


def _make_cpu_devices(number: int) -> None:
    """Makes devices out of the cores of a CPU; other platforms have a fixed number of devices."""
    import jax

    # JAX refuses once it has started, as in a program that calls `main` itself.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", number)


def _print_evaluation(result: dict[str, Any]) -> None:
    per_seed = result["seeds"]
    acting = "greedy" if result["greedy"] else "sampled"
    for row in per_seed:
        print(
            f"evaluation of seed {row['seed']}: return {row['eval/return']:.1f} "
            f"± {row['eval/return_std']:.1f} (minimum {row['eval/return_min']:.1f}), "
            f"length {row['eval/length']:.1f}, over {result['episodes']} {acting} episodes"
        )
    if len(per_seed) > 1:
        print(f"mean return over {len(per_seed)} seeds: {result['eval/return']:.1f}")


def _print_report(run_dir: Path) -> None:
    from rich.console import Console

    from ppo_jax.runs import report as reports
    from ppo_jax.runs import search_plots, sweep_plots

    members, curves = reports.load_tables(run_dir)
    # A search has rounds, and no repetitions from which a sweep's statistics could be computed.
    is_search = "round" in members
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a table in a file is not cut at 80 columns
    if is_search:
        best = search_plots.best_first(members).drop(columns=["configuration", "seed"])
        title = "members, the best first"
        if members["eval/return"].isna().any():
            title += "; those without an evaluation were stopped"
        _print_table(console, best.head(20), title)
        written = search_plots.write_plots(members, curves, run_dir)
    else:
        report = reports.make_report(members, curves)
        _print_statistics(console, report)
        written = sweep_plots.write_plots(members, curves, report, run_dir)
    console.print(
        f"tables and plots ({', '.join(path.name for path in written)}): {run_dir}", soft_wrap=True
    )


def _print_statistics(console: Any, report: Any) -> None:
    from ppo_jax.runs.report import MIN_SEEDS

    shown = report.configurations.drop(columns="configuration").head(20)
    title = "configurations, the best first (interquartile mean and 95 % interval)"
    _print_table(console, shown, title)
    _print_table(console, report.sensitivity, "sensitivity of the return to each setting")
    if report.improvement is not None:
        console.print(
            "probability that the best improves on the second: {:.2f} ({:.2f} to {:.2f})".format(
                *report.improvement
            )
        )
    elif len(report.configurations) > 1:
        console.print(
            "a probability that the best improves on the second needs at least "
            f"{MIN_SEEDS} seeds of each"
        )


def _print_table(console: Any, frame: Any, title: str) -> None:
    import pandas as pd
    from rich.table import Table

    table = Table(*frame.columns, title=title, box=None)
    for row in frame.itertuples(index=False):
        cells = ("" if pd.isna(x) else f"{x:.4g}" if isinstance(x, float) else str(x) for x in row)
        table.add_row(*cells)
    if len(frame):
        console.print(table)


def _preset_summary(name: str) -> str:
    if name not in presets.names():
        return "-"
    config, _ = presets.preset(name)
    others = len(presets.algorithms(name)) - 1
    return (
        f"{config.total_timesteps:,} steps, {config.num_envs} environments"
        f"{f'; {others} more algorithms' if others else ''}"
    )


def _new_run_dir(env: str, what: str) -> Path:
    """Returns a directory named after the environment, the command and the time.

    Commands that start in the same second have different directories by a random suffix.
    """
    time = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    # Not every file system takes the colon of `brax:hopper`.
    return Path("runs") / f"{env.replace(':', '-')}_{what}_{time}-{secrets.token_hex(3)}"


def _show_warning(message: Any, category: type[Warning], *_: Any) -> None:
    """Shows a warning of this package as a sentence, without the line of code that warns."""
    _say(f"ppo-jax: warning: {message}" if category is RuntimeWarning else f"{message}")


def _say(message: str) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
