"""The commands `sweep` and `report`."""

import dataclasses
import signal
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ppo_jax import envs, flags, presets
from ppo_jax.commands.common import (
    enable_compilation_cache,
    make_cpu_devices,
    names,
    new_run_dir,
    num_cores,
    parse_fraction,
    parse_mesh,
    print_table,
    say,
    show_warning,
    use_deterministic_operations,
    with_mesh,
)
from ppo_jax.config import Config
from ppo_jax.errors import ConfigError
from ppo_jax.hparams import HParams
from ppo_jax.runs.directory import RunDirectory


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
    storage: str | None = None
    """With --sampler tpe: file, or URL of a database (URL#name), that several workers share; each
    has the same command with a --run-dir of its own, and `ppo-jax merge` joins the directories."""
    shard: str | None = None
    """Train a shard of the members, such as 3/16 on the third of 16 machines; `ppo-jax merge` joins
    the directories."""
    run_dir: Path | None = None
    """Directory of the results; runs/ENV_sweep_TIME by default."""
    chunk: int | None = None
    """Number of members that train together; by default as many as fit."""
    mesh: str | None = None
    """Numbers of devices: env=4,member=2 divides the environments of each member among four
    devices, and the members among two such groups, eight devices in all. By default there are as
    many groups as the devices can form."""
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
    """With --search halving, one trial in this many goes on (3 by default). With --search pbt,
    values are multiplied or divided by this factor (1.25 by default)."""
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
        mesh = parse_mesh(self.mesh)
        config = with_mesh(config, mesh)
        if mesh.env is not None and "num_devices" in varied:
            raise ConfigError(
                "num_devices and the axis env of --mesh are the same setting; got "
                f"{varied['num_devices']} and {mesh.env}. Leave one out."
            )
        # The remaining names with a single value are parameters of the environment.
        varied |= {name: [value] for name, value in fixed.items()}
        run_dir = self.run_dir or new_run_dir(self.env, self.search or "sweep")
        if self.deterministic:
            use_deterministic_operations()
        enable_compilation_cache()
        member_devices = mesh.member or max(1, num_cores() // config.num_devices)
        make_cpu_devices(config.num_devices * member_devices)
        common: dict[str, Any] = {
            "hparams": hparams,
            "run_dir": run_dir,
            "checkpoint_every": self.checkpoint_every,
            "eval_episodes": self.eval_episodes,
            "log": names(self.log),
            "say": say,
            "progress": not self.quiet,
        }
        from ppo_jax.runs.interrupt import exit_at_second_signal

        with warnings.catch_warnings(), exit_at_second_signal():
            warnings.showwarning = show_warning  # type: ignore[assignment]
            result = self._train(config, varied, mesh.member, common)
        finished = f"{len(result.members)} members"
        if result.is_complete:
            finished += f" in {result.run_seconds:.1f} s"
        print(f"trained {finished}, compiled in {result.compile_seconds:.1f} s")
        for problem in result.unwritten:
            say(f"ppo-jax: error: {problem}")
        if not result.is_complete:
            print(f"stopped; the same command with --run-dir {run_dir} continues it")
            return 128 + (result.signal or signal.SIGINT)
        if result.unwritten:  # a report needs all tables
            return 1
        if self.shard is not None or self.storage is not None:
            what = "worker" if self.shard is None else f"shard {self.shard}"
            print(f"{what}: {run_dir}; ppo-jax merge joins all {what.split()[0]}s")
            return 0
        _print_report(run_dir)
        return 0

    def _train(
        self,
        config: Config,
        space: dict[str, Any],
        member_devices: int | None,
        common: dict[str, Any],
    ) -> Any:
        """Runs the sweep or the search.

        Args:
          config: settings that the space does not vary.
          space: what is varied.
          member_devices: groups of devices that share the members; None for as many as there are.
          common: arguments that a sweep and a search share.
        """
        if self.search is None:
            from ppo_jax.runs.sweep import sweep

            return sweep(
                config,
                space,
                seeds=8 if self.seeds is None else self.seeds,
                num_draws=self.draws,
                sampler=self.sampler,
                batch=self.batch,
                storage=self.storage,
                shard=parse_fraction("shard", self.shard),
                chunk=self.chunk,
                member_devices=member_devices,
                **common,
            )
        from ppo_jax.runs.search import search

        given = {"num_members": self.members, "num_rounds": self.rounds, "seed": self.seed}
        given = {name: value for name, value in given.items() if value is not None}
        options: dict[str, Any] = {"factor": self.factor, "replaced": self.replaced, **given}
        return search(config, space, method=self.search, **options, **common)

    def _require_fitting_options(self) -> None:
        """Raises a `ConfigError` for search options without --search, or sweep options with it."""
        of_search = ("members", "rounds", "factor", "replaced", "seed")
        of_sweep = ("seeds", "draws", "batch", "chunk", "shard", "mesh", "storage")
        for name in of_search if self.search is None else of_sweep:
            if getattr(self, name) is not None:
                rule = "needs" if self.search is None else "does not go with"
                # Not the value, which may be a URL with a password.
                raise ConfigError(f"--{name} {rule} --search. Leave it out.")
        if self.search is not None and self.sampler != "random":
            raise ConfigError(
                f"--sampler does not go with --search; got {self.sampler}. Leave it out."
            )


@dataclasses.dataclass(frozen=True)
class MergeCommand:
    """Join the shards of a sweep that were trained with --shard, or its workers with --storage."""

    shards: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of the shards or workers."""
    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """Directory of the sweep, which is new or holds the same sweep."""

    def run(self) -> int:
        """Runs the command; returns its exit status."""
        from ppo_jax.runs.sweep_merge import merge

        with warnings.catch_warnings():
            warnings.showwarning = show_warning  # type: ignore[assignment]
            merged = merge(self.shards, self.output)
        print(
            f"merged {merged.num_members} members of {len(self.shards)} directories: {self.output}"
        )
        for problem in merged.unwritten:
            say(f"ppo-jax: error: {problem}")
        if merged.unwritten:  # a report needs all tables
            return 1
        if merged.num_missing:
            how = f"run the sweep without --shard and with --run-dir {self.output} to train them"
            if merged.is_shared:
                how = "run the command of each worker again to finish them"
            print(f"{merged.num_missing} members are missing; {how}")
            return 1
        _print_report(self.output)
        return 0


@dataclasses.dataclass(frozen=True)
class ReportCommand:
    """Compare the configurations of a sweep in tables and plots, or show a run as a page."""

    run_dir: tyro.conf.Positional[Path]
    """A directory that `ppo-jax sweep` wrote, or with --html one that `ppo-jax train` wrote."""
    html: bool = False
    """Write a page with the curves, the evaluation, an episode and the settings of a run."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=("-o",))] = None
    """File of the page; RUN/report.html by default."""
    overwrite: bool = False
    """Replace the output if it exists."""

    def run(self) -> int:
        """Runs the command; returns its exit status."""
        if self.overwrite and self.output is None:
            raise ConfigError("--overwrite is for --output; got none. Leave it out.")
        if self.html:
            RunDirectory.open(self.run_dir)
            enable_compilation_cache()
            from ppo_jax.results.page import write_page

            print(f"page: {write_page(self.run_dir, self.output, overwrite=self.overwrite)}")
            return 0
        if self.output is not None:
            raise ConfigError(f"--output is the file of --html; got {self.output}. Leave it out.")
        if RunDirectory.holds_run(self.run_dir):
            raise ConfigError(f"the report of a run is a page; add --html for {self.run_dir}.")
        _print_report(self.run_dir)
        return 0


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
        print_table(console, best.head(20), title)
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
    title = (
        "configurations, the best first: interquartile mean and 95 % interval of the return of the "
        "greedy evaluation at the end; area is the mean return of training episodes"
    )
    print_table(console, shown, title)
    print_table(console, report.sensitivity, "sensitivity of the return to each setting")
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
