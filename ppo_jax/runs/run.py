"""Training in compiled pieces, with a progress bar and files that are written between them."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax.sharding import Mesh

from ppo_jax.config import Config, require_config
from ppo_jax.devices import make_mesh, population_mesh
from ppo_jax.envs.host import HostError
from ppo_jax.errors import ConfigError, require_positive_integers, require_seed
from ppo_jax.evaluation import Evaluation
from ppo_jax.hparams import HParams
from ppo_jax.policy.policy import Policy
from ppo_jax.population.member import initial_guard
from ppo_jax.resolve import complete_hparams
from ppo_jax.runs import device_memory, processes
from ppo_jax.runs.checkpoint import DamagedError
from ppo_jax.runs.checkpoint_writer import list_checkpoints, require_checkpoint_every
from ppo_jax.runs.directory import BEST, OPTIONS, RunDirectory
from ppo_jax.runs.failure import Failure, fail_at_first_skip, failure_finder
from ppo_jax.runs.host_training import compile_host_training
from ppo_jax.runs.interrupt import Interrupt, deferred_interrupt
from ppo_jax.runs.kept import trainer_of
from ppo_jax.runs.lock import writable
from ppo_jax.runs.metrics_log import EMPTY_LOG, MetricsLog, average
from ppo_jax.runs.periodic_evaluation import PeriodicEvaluation, evaluation_rows, make_evaluate
from ppo_jax.runs.pieces import next_size
from ppo_jax.runs.policy_files import encode_policy
from ppo_jax.runs.progress import TrainingProgress
from ppo_jax.runs.run_checkpoints import Snapshot, read_newest
from ppo_jax.runs.run_writer import RunWriter
from ppo_jax.runs.settings import settings_to_plain
from ppo_jax.runs.sink import OnRows, RunInfo
from ppo_jax.runs.sinks import Sinks, make_sinks
from ppo_jax.runs.trained import load, summarize
from ppo_jax.runs.training import LARGEST_PIECE, Training, compile_training
from ppo_jax.stages.metrics import Metrics
from ppo_jax.trainer import Trainer
from ppo_jax.types import TrainState

_LOGGED_ROWS = 1000  # at most about this many rows per seed, unless log_every is given


@dataclasses.dataclass(frozen=True, repr=False)
class Run:
    """The results of a training. With `num_seeds`, every array has a leading axis of seeds."""

    state: TrainState
    policy: Policy
    evaluation: Evaluation | None
    """None if a signal such as Ctrl-C stopped the training, or if all seeds failed."""
    metrics: pd.DataFrame
    """The learning curve: a row per logged update and seed, as in `metrics.jsonl`."""
    seeds: tuple[int, ...]
    timesteps: int
    """Environment steps of each seed."""
    timesteps_before: int
    """Environment steps of each seed that were done before the run was resumed."""
    compile_seconds: float
    run_seconds: float
    """Seconds of training and its files, without compilation and evaluations."""
    evaluation_seconds: float
    """Seconds of all evaluations, with the compilation of the first."""
    run_dir: Path | None
    evaluations: pd.DataFrame
    """A row for each evaluation while it trained and each seed; empty without `eval_every`."""
    failures: tuple[Failure, ...]
    """Seeds whose training failed; each keeps its last finite policy."""
    unwritten: tuple[str, ...] = ()
    """Files that could not be written, with the reasons."""
    signal: int | None = None
    """Number of the signal that stopped the training; None if none did."""
    is_stopped: bool = False
    """True if `on_rows` or `stop_at_return` stopped the training."""

    def __repr__(self) -> str:
        returns = "not evaluated"
        if self.evaluation is not None:
            returns = f"mean return {np.mean(self.evaluation.returns):.1f}"
        failed = f", {len(self.failures)} failed" if self.failures else ""
        return (
            f"Run({len(self.seeds)} seed{'s' * (len(self.seeds) > 1)}{failed}, "
            f"{self.timesteps:,} steps each in {self.run_seconds:.1f} s, {returns}, "
            f"run_dir={None if self.run_dir is None else str(self.run_dir)!r})"
        )

    def plot(self, axes: Any = None) -> Any:
        """Plots returns over environment steps: a line per seed, and their interquartile mean.

        Args:
          axes: of matplotlib; None makes a new figure.

        Returns:
          The axes.
        """
        from ppo_jax.runs.plots import plot_returns

        return plot_returns(self.metrics, axes)


def train(
    config: Config,
    hparams: HParams | None = None,
    *,
    seed: int = 0,
    num_seeds: int | None = None,
    member_devices: int | None = None,
    start_from: Policy | str | Path | None = None,
    run_dir: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    checkpoint_every: float = 60.0,
    eval_episodes: int = 128,
    eval_every: int | None = None,
    log_every: int | None = None,
    log: Sequence[str] = (),
    on_rows: OnRows | None = None,
    stop_at_return: float | None = None,
    debug_nans: bool = False,
    progress: bool = True,
) -> Run:
    """Trains with a progress bar, writes the run to disk if asked, and evaluates the result.

    The numbers are bit-identical to those of `jax.jit(trainer.run)(jax.random.key(seed), hparams)`;
    only the pieces in which updates are dispatched differ. A run that was stopped or killed and is
    resumed has the same numbers, too, on the same device and with the same versions. An environment
    on the host has no `trainer.run`, and starts new episodes where a run is resumed.

    After Ctrl-C or SIGTERM the training stops after the current piece or compilation, and writes a
    checkpoint. The signal is then raised again: Ctrl-C becomes a `KeyboardInterrupt`, whose
    attribute `result` is the `Run` so far, and SIGTERM ends the process unless it has a handler.

    An update with a gradient that is NaN or infinite is skipped. A seed whose updates are all
    skipped keeps its last finite policy. It is listed in `Run.failures`, with a warning, and the
    training stops once no seed is left.

    Args:
      config: describes the training.
      hparams: hyperparameters, scalars; None for the algorithm's defaults.
      seed: training starts from `jax.random.key(seed)`.
      num_seeds: train this many consecutive seeds together, under `vmap`, divided among devices.
      member_devices: number of groups of devices among which the seeds are divided. A group is one
        device, or `num_devices` devices if the environments are divided as well. None for as
        many groups as the devices can form with equally many seeds each.
      start_from: policy of one seed, or the directory of a run whose policy is loaded. All seeds
        start from its parameters and its statistics of observations, with a new optimiser, in this
        environment and with these hyperparameters; `initial_log_std` replaces the policy's own. A
        run that is resumed keeps the policy that it started from. None draws new parameters.
      run_dir: directory for `config.json`, `metrics.jsonl`, `policy`, `evaluation.json` and
        `checkpoints`; None writes nothing.
      overwrite: replace a run that is there already.
      resume: continue the run in `run_dir` from its newest checkpoint; start it if there is none.
        Only `total_timesteps` and `num_devices` may differ from the run's settings. A learning-rate
        schedule follows the new total.
      checkpoint_every: seconds between two checkpoints; 0 for none. The last state of a training
        is a checkpoint as well, so that a finished run can be extended.
      eval_episodes: episodes of the greedy evaluation at the end, for each seed.
      eval_every: updates between two evaluations while it trains, each of the same episodes. The
        best policy of each seed is kept: `load(run_dir, best=True)`. None for none.
      log_every: updates per row of `metrics.jsonl`; by default about 1000 rows in all.
      log: trackers that get the rows besides the files: "tensorboard", "wandb", "mlflow",
        "trackio". They need `run_dir`.
      on_rows: is called between compiled pieces, about once a second, with the new rows of metrics
        and of evaluations: dicts with `update`, `timesteps`, `seed` and metrics. If it returns
        True, the training stops and is evaluated. If it raises an error, a checkpoint is written
        and the training ends with this error.
      stop_at_return: stop once the mean return of an evaluation, over all seeds, is at least this.
        It needs `eval_every`. A resumed run keeps it; infinity never stops.
      debug_nans: stop at the first update with a NaN, repeat it, and name the operation in
        `Run.failures`. Updates run one by one, which is slower.
      progress: show a progress bar on standard error.

    Returns:
      A `Run`.

    Raises:
      ConfigError: a setting breaks a rule, or `run_dir` holds files or is in use; raised before
        anything is traced. The training does not fit the device's memory; raised before anything is
        allocated.
    """
    require_config(config)
    require_positive_integers(
        {
            "num_seeds": num_seeds,
            "eval_episodes": eval_episodes,
            "eval_every": eval_every,
            "log_every": log_every,
            "member_devices": member_devices,
        }
    )
    if not resume:  # a run that goes on may have few updates left
        _check_eval_every(eval_every, config)
    require_seed(seed)
    require_seed(seed + (num_seeds or 1) - 1)
    _check_files(run_dir, checkpoint_every, resume=resume, overwrite=overwrite)
    sinks = make_sinks(log, on_rows, stop_at_return, run_dir=run_dir, eval_every=eval_every)
    hparams = complete_hparams(hparams, config)
    others = {
        "seed": seed,
        "num_seeds": num_seeds,
        "member_devices": member_devices,
        "eval_every": eval_every,
        "debug_nans": debug_nans,
        # These change the compiled program, whose collectives must match in all processes.
        "the version of jax": jax.__version__,
        "jax_enable_x64": jax.config.values["jax_enable_x64"],
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }
    with processes.loss_explained():
        settings = settings_to_plain(config, hparams)
        processes.require_same({**settings["config"], **settings["hparams"], **others})
    trainer, mesh = _on_devices(config, num_seeds, member_devices)
    policy = _policy_of(start_from, trainer, config)
    # Trackers would have each row once for every process.
    if not processes.is_first():
        sinks = Sinks({})
    # `num_seeds=1` keeps an axis of seeds; None has none.
    seeds = tuple(range(seed, seed + (num_seeds or 1)))
    # All arguments are checked by now; no file is written before this.
    plan = _Plan(
        trainer,
        mesh,
        config,
        hparams,
        seeds=seeds,
        has_seed_axis=num_seeds is not None,
        member_devices=member_devices,
        checkpoint_every=checkpoint_every,
        eval_episodes=eval_episodes,
        eval_every=eval_every,
        log_every=log_every or math.ceil(config.num_updates / _LOGGED_ROWS),
        log=tuple(log),
        stop_at_return=stop_at_return,
        debug_nans=debug_nans,
        sinks=sinks,
        policy=policy,
    )
    with deferred_interrupt() as interrupt, processes.loss_explained():
        processes.require_whole_mesh(mesh)
        with _opened(plan, run_dir, resume=resume, overwrite=overwrite) as (directory, is_resumed):
            if is_resumed and directory is not None:
                directory.warn_of_other_devices(config)
            run = _train(plan, directory, interrupt, is_resumed=is_resumed, progress=progress)
    return interrupt.deliver(
        run, "" if run_dir is None else f"ppo_jax.resume({str(run_dir)!r}) continues the run."
    )


@contextlib.contextmanager
def _opened(
    plan: "_Plan", run_dir: str | Path | None, *, resume: bool, overwrite: bool
) -> Iterator[tuple[RunDirectory | None, bool]]:
    """Opens the directory of a run in the first process.

    Yields the directory, None in other processes, and in all of them whether the run is resumed.

    Args:
      plan: plan of the run.
      run_dir: path of the directory; None writes nothing.
      resume: continue a run that is in it.
      overwrite: replace a run that is in it.
    """
    with contextlib.ExitStack() as stack:
        directory = None

        def open_it() -> bool:
            nonlocal directory
            if run_dir is None:
                return False
            is_resumed = resume and RunDirectory.holds_run(run_dir)
            if is_resumed:
                directory = RunDirectory.open(run_dir)
                directory.require_same_run(plan.config, plan.hparams, plan.seeds_on_disk)
            else:
                _check_eval_every(plan.eval_every, plan.config)
                directory = RunDirectory.create(run_dir, overwrite=overwrite)
            stack.enter_context(directory.owned())
            return is_resumed

        is_resumed = processes.plain_from_first(open_it)  # it sets the directory
        yield directory, is_resumed


class DryRun(NamedTuple):
    """Steps, memory and time to compile of a training that was not run."""

    num_updates: int
    timesteps: int
    """Environment steps of each seed."""
    num_bytes: int
    """Memory of the training on one device, by the compiler's count."""
    limit: float | None
    """Bytes that a training may take on a device; None where that is not known."""
    compile_seconds: float


def dry_run(
    config: Config,
    hparams: HParams | None = None,
    *,
    num_seeds: int | None = None,
    member_devices: int | None = None,
) -> DryRun:
    """Compiles a training without running it.

    Args:
      config: describes the training.
      hparams: hyperparameters, scalars; None for the algorithm's defaults.
      num_seeds: seeds that would be trained together; None for one without an axis of seeds.
      member_devices: see `train`.

    Raises:
      ConfigError: as `train` does.
    """
    require_positive_integers({"num_seeds": num_seeds, "member_devices": member_devices})
    keys = (
        jax.random.key(0) if num_seeds is None else jax.random.split(jax.random.key(0), num_seeds)
    )
    started = time.perf_counter()
    trainer, mesh = _on_devices(config, num_seeds, member_devices)
    training = _compile(trainer, config, keys, complete_hparams(hparams, config), mesh)
    return DryRun(
        config.num_updates,
        config.num_updates * config.batch_size,
        training.num_bytes,
        device_memory.limit(jax.local_devices()[0]),
        time.perf_counter() - started,
    )


def resume(
    run_dir: str | Path,
    *,
    total_timesteps: int | None = None,
    num_devices: int | None = None,
    member_devices: int | None = None,
    checkpoint_every: float | None = None,
    eval_episodes: int | None = None,
    eval_every: int | None = None,
    log_every: int | None = None,
    log: Sequence[str] | None = None,
    on_rows: OnRows | None = None,
    stop_at_return: float | None = None,
    network: Any = None,
    progress: bool = True,
) -> Run:
    """Continues a run from its newest checkpoint, with the settings in its directory.

    Args:
      run_dir: directory that `train` wrote.
      total_timesteps: new number of steps of the run; None keeps the old one. A learning-rate
        schedule follows the new number.
      num_devices: devices that share the environments from now on, with a warning if their number
        changes; None keeps it.
      member_devices: see `train`; None, here and below, is the value of the run.
      checkpoint_every: see `train`.
      eval_episodes: see `train`.
      eval_every: see `train`.
      log_every: see `train`.
      log: see `train`.
      on_rows: see `train`; None is no callback.
      stop_at_return: see `train`.
      network: the module that was `Config.network`, unless that was a name.
      progress: show a progress bar on standard error.

    Returns:
      A `Run`.

    Raises:
      ConfigError: there is no run, it has no checkpoint that is whole, or another process uses it.
    """
    directory = RunDirectory.open(run_dir)
    config, hparams = directory.read_config(network)
    seeds, options = directory.read_seeds(), directory.read_options()
    changes = {"total_timesteps": total_timesteps, "num_devices": num_devices}
    config = config.replace(**{name: x for name, x in changes.items() if x is not None})
    asked = {
        "member_devices": member_devices,
        "checkpoint_every": checkpoint_every,
        "eval_episodes": eval_episodes,
        "eval_every": eval_every,
        "log_every": log_every,
        "log": log,
        "stop_at_return": stop_at_return,
    }
    options |= {name: value for name, value in asked.items() if value is not None}
    # A number on disk is a run without an axis of seeds.
    seed, num_seeds = (seeds, None) if isinstance(seeds, int) else (seeds[0], len(seeds))
    return train(
        config,
        hparams,
        seed=seed,
        num_seeds=num_seeds,
        run_dir=run_dir,
        resume=True,
        on_rows=on_rows,
        progress=progress,
        **options,
    )


class _Plan(NamedTuple):
    """The checked arguments of a training."""

    trainer: Trainer
    mesh: Mesh | None
    config: Config
    hparams: HParams
    seeds: tuple[int, ...]
    has_seed_axis: bool
    member_devices: int | None
    checkpoint_every: float
    eval_episodes: int
    eval_every: int | None
    log_every: int
    log: tuple[str, ...]
    stop_at_return: float | None
    debug_nans: bool
    sinks: Sinks
    policy: Policy | None
    """Policy that the training starts from; None draws new parameters."""

    @property
    def seeds_on_disk(self) -> int | list[int]:
        """The seed, or the list of seeds if there is an axis of them."""
        return list(self.seeds) if self.has_seed_axis else self.seeds[0]

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `train` that do not change the training."""
        return {name: getattr(self, name) for name in OPTIONS}

    def keys(self) -> jax.Array:
        """Returns the key of the training, or those of its seeds."""
        keys = jax.vmap(jax.random.key)(np.array(self.seeds, np.uint32))
        return keys if self.has_seed_axis else keys[0]


def _policy_of(
    start_from: Policy | str | Path | None, trainer: Trainer, config: Config
) -> Policy | None:
    """Returns the policy that a training starts from, checked; None for new parameters."""
    if start_from is None:
        return None
    # Only the first process reads and writes the directory in which the policy is kept.
    processes.require_one("start_from", "Start from new parameters.")
    if isinstance(start_from, (str, Path)):
        start_from = load(start_from, network=_module_of(config))
    if trainer.env.host is None:  # others are checked when they are compiled
        jax.eval_shape(functools.partial(trainer.init, policy=start_from), jax.random.key(0))
    # On the host: the devices of the other training need not be those of this one.
    return jax.device_get(start_from)


def _start_of(plan: _Plan, resumed: RunDirectory | None) -> Policy | None:
    """Returns the policy that a run starts from; None for new parameters, or a checkpoint."""
    if resumed is None:
        return plan.policy
    if plan.policy is not None and not resumed.has_start():
        raise ConfigError(
            f"a resumed run keeps its start; {resumed.path} started from new parameters, and "
            "start_from is given. Leave one of resume and start_from out."
        )
    if list_checkpoints(resumed.checkpoints) or not resumed.has_start():
        return None
    # A run that was killed before its first checkpoint starts from the same policy again. Only the
    # first process has its directory.
    processes.require_one("a run that starts again from a policy", "Resume it in one process.")
    return resumed.read_start(_module_of(plan.config))


def _module_of(config: Config) -> Any:
    """Returns the user's module, which files do not hold; None for a network with a name."""
    return None if isinstance(config.network, str) else config.network


def _check_eval_every(eval_every: int | None, config: Config) -> None:
    """Checks that a training that starts will be evaluated."""
    if eval_every is not None and eval_every > config.num_updates:
        raise ConfigError(
            f"eval_every must be at most the updates of the training; got {eval_every:,} and "
            f"{config.num_updates:,}. Try {max(1, config.num_updates // 10)}."
        )


def _check_files(
    run_dir: str | Path | None, checkpoint_every: float, *, resume: bool, overwrite: bool
) -> None:
    """Checks the arguments of `train` that are about files."""
    require_checkpoint_every(checkpoint_every)
    if resume and run_dir is None:
        raise ConfigError("resume needs the run_dir of the run; got None.")
    if resume and overwrite:
        raise ConfigError(
            "resume continues a run and overwrite replaces it; got both. Leave one out."
        )


def _train(
    plan: _Plan,
    directory: RunDirectory | None,
    interrupt: Interrupt,
    *,
    is_resumed: bool,
    progress: bool,
) -> Run:
    """Compiles a training, runs its updates, and evaluates the result.

    Args:
      plan: plan of the run.
      directory: directory of the run; None in other processes, and if nothing is written.
      interrupt: asks the training to stop.
      is_resumed: continue from the newest checkpoint.
      progress: show a progress bar.
    """
    config, keys = plan.config, plan.keys()
    if plan.debug_nans and plan.trainer.env.host is not None:
        raise ConfigError(
            f"debug_nans repeats an update, for which it needs an environment in JAX; {config.env} "
            "is stepped on the host. Leave debug_nans out."
        )
    progress &= processes.is_first()
    with TrainingProgress(visible=progress) as bar:
        started = time.perf_counter()
        policy = _start_of(plan, directory if is_resumed else None)
        training = _compile(plan.trainer, config, keys, plan.hparams, plan.mesh, policy=policy)
        evaluate = make_evaluate(plan.trainer.env, keys, plan.eval_episodes)
        periodic = PeriodicEvaluation(evaluate, plan.seeds, config.batch_size, plan.eval_every)
        with (
            contextlib.ExitStack() as stack,
            device_memory.exhaustion_explained(training.num_bytes, config.num_envs),
        ):
            stack.callback(training.close)
            # If False, different evaluations will replace those after the checkpoint.
            is_repeated = directory is None or not is_resumed or directory.is_repeated_by(config)
            start = _start(plan, training, directory, is_resumed=is_resumed)
            policy = processes.fetch(plan.trainer.policy(start.state))
            if is_resumed and directory is not None:
                _continue_best(periodic, directory, config.network)
                if not is_repeated:
                    periodic.best = periodic.best.until(start.updates)
            sinks = plan.sinks
            with (
                _writer(plan, directory, policy) as writer,
                sinks.running(_info(plan, directory, start, is_resumed=is_resumed)),
            ):
                compiled = time.perf_counter()
                end, rows, evaluations = _run_updates(
                    plan, training, start, periodic, writer=writer, bar=bar, interrupt=interrupt
                )
                run_seconds = time.perf_counter() - compiled - periodic.seconds
                saved = processes.fetch(end)
                policy = plan.trainer.policy(saved.state)
                if writer is not None:
                    writer.finish(saved, policy)
                    rows, evaluations = writer.metrics.read(), writer.evaluations.read()
                evaluation = None
                # After a signal there is no evaluation; it follows when the run is resumed.
                is_done = end.updates == config.num_updates or sinks.ask_to_stop
                if is_done and not interrupt.requested:
                    evaluation = periodic.evaluate(end.updates, policy)
                    if writer is not None:
                        writer.write_evaluation(summarize(evaluation, plan.seeds, greedy=True))
                    if not periodic.is_due(end.updates):
                        new = evaluation_rows(
                            evaluation, plan.seeds, end.updates, config.batch_size
                        )
                        sinks.on_rows([{**row, "time/seconds": end.seconds} for row in new])
    for failure in end.failures:
        warnings.warn(str(failure), RuntimeWarning, stacklevel=3)
    return Run(
        state=saved.state,
        policy=policy,
        evaluation=evaluation,
        metrics=pd.DataFrame(rows),
        seeds=plan.seeds,
        timesteps=end.updates * config.batch_size,
        timesteps_before=start.updates * config.batch_size,
        compile_seconds=compiled - started,
        run_seconds=run_seconds,
        evaluation_seconds=periodic.seconds,
        run_dir=None if directory is None else directory.path,
        evaluations=pd.DataFrame(evaluations),
        failures=end.failures,
        unwritten=() if writer is None else tuple(writer.unwritten),
        signal=interrupt.signal,
        is_stopped=plan.sinks.ask_to_stop and end.updates < config.num_updates,
    )


def _on_devices(
    config: Config, num_seeds: int | None, member_devices: int | None
) -> tuple[Trainer, Mesh | None]:
    """Returns the trainer and the mesh of a training; see `_mesh_of`."""
    if config.num_devices == 1:
        # The trainer comes first, so that its errors are raised before a backend starts.
        return trainer_of(config), _mesh_of(config, num_seeds, member_devices)
    mesh = _mesh_of(config, num_seeds, member_devices)
    return trainer_of(config, mesh), mesh


def _mesh_of(config: Config, num_seeds: int | None, member_devices: int | None) -> Mesh | None:
    """Returns the mesh of a training; None for one device without an axis of seeds."""
    if num_seeds is None:
        if member_devices is not None:
            raise ConfigError(
                "member_devices (the mesh axis member) divides seeds; got "
                f"{member_devices} and no num_seeds. Give num_seeds (--seeds), or leave it out."
            )
        return make_mesh(env=config.num_devices) if config.num_devices > 1 else None
    return population_mesh(num_seeds, env=config.num_devices, member=member_devices)


def _compile(
    trainer: Trainer,
    config: Config,
    keys: jax.Array,
    hparams: HParams,
    mesh: Mesh | None,
    *,
    policy: Policy | None = None,
) -> Training:
    """Compiles a training for the kind of its environment; arguments as of `compile_training`."""
    if trainer.env.host is not None:
        return compile_host_training(trainer, config, keys, hparams, policy)
    return compile_training(trainer, config, keys, hparams, mesh=mesh, policy=policy)


def _info(
    plan: _Plan, directory: RunDirectory | None, start: Snapshot, *, is_resumed: bool
) -> RunInfo:
    """Returns the description of a run for its sinks."""
    if directory is None:
        settings: Mapping[str, Any] = settings_to_plain(plan.config, plan.hparams)
        name = ""
    else:
        settings, name = directory.read_settings(), directory.path.resolve().name
    return RunInfo(
        run_dir=None if directory is None else directory.path,
        seeds=plan.seeds,
        settings=settings,
        # `made_with` has the time of the first start; settings may change when a run is extended.
        identity=json.dumps([name, settings.get("made_with")]),
        is_resumed=is_resumed,
        timesteps_before=start.updates * plan.config.batch_size,
    )


@contextlib.contextmanager
def _writer(
    plan: _Plan, directory: RunDirectory | None, policy: Policy
) -> Iterator[RunWriter | None]:
    """Yields the writer of a run's files, or None without a directory.

    If the policy could not be saved, the error comes now, and not after hours of training.
    """
    processes.on_first(lambda: directory and encode_policy(policy))
    if directory is None:
        yield None
        return
    writer = RunWriter(directory, plan.config, plan.hparams, plan.checkpoint_every)
    try:
        yield writer
    finally:
        # The directory belongs to this process until the last checkpoint is written.
        writer.wait()


def _continue_best(periodic: PeriodicEvaluation, directory: RunDirectory, network: Any) -> None:
    """Reads the best policies so far; without them the evaluations start again."""
    if not (directory.path / BEST).is_dir():
        return
    try:
        periodic.best = directory.read_best(network)
    except DamagedError as error:
        warnings.warn(f"{error} The best policies start again.", RuntimeWarning, stacklevel=3)


def _start(
    plan: _Plan, training: Training, directory: RunDirectory | None, *, is_resumed: bool
) -> Snapshot:
    """Returns the snapshot from which a training goes on, and prepares the files for it."""
    guard = jax.tree.map(np.asarray, initial_guard((len(plan.seeds),)))
    beginning = functools.partial(Snapshot, guard=guard, log=EMPTY_LOG, updates=0, failures=())
    config = plan.config
    if not is_resumed:
        processes.on_first(lambda: _write_settings(plan, directory))
        return beginning(training.start())
    start = read_newest(None if directory is None else directory.checkpoints, training)
    if start is None:
        processes.on_first(lambda: _require_checkpoints(directory))
        start = beginning(training.start())
    if start.updates > config.num_updates:
        raise ConfigError(
            "total_timesteps must be at least the steps that a run has done; got "
            f"{config.total_timesteps:,}, and {start.updates * config.batch_size:,} are done. "
            "Raise it."
        )
    processes.on_first(lambda: _write_settings(plan, directory, start))
    return start


def _require_checkpoints(directory: RunDirectory | None) -> None:
    """Raises a `ConfigError` for a run without a checkpoint that never writes one."""
    if directory is None:
        return
    options = directory.read_options()
    if "checkpoint_every" not in options:
        raise ConfigError(
            f"a run continues from a checkpoint; {directory.path} holds the policy of a member of "
            "a sweep, and no checkpoint. Train with its settings in another run_dir."
        )
    # Starting such a run from scratch would silently discard its hours of training.
    if not options["checkpoint_every"]:
        raise ConfigError(
            f"a run continues from a checkpoint; {directory.path} was made with "
            "checkpoint_every=0 and has none. Train again, with overwrite (--overwrite)."
        )


def _write_settings(
    plan: _Plan, directory: RunDirectory | None, start: Snapshot | None = None
) -> None:
    """Writes the settings of a run that starts, or continues from a snapshot."""
    if directory is None:
        return
    config, hparams, options = plan.config, plan.hparams, plan.options
    with writable(directory.path):
        if start is None:
            directory.write_config(
                config,
                hparams,
                seeds=plan.seeds_on_disk,
                options=options,
                start_from=plan.policy,
            )
        else:
            directory.continue_config(config, hparams, options=options, updates=start.updates)
            directory.metrics.cut_back(start.log.updates)
            directory.evaluations.cut_back(start.updates)


def _run_updates(
    plan: _Plan,
    training: Training,
    start: Snapshot,
    periodic: PeriodicEvaluation,
    *,
    writer: RunWriter | None,
    bar: TrainingProgress,
    interrupt: Interrupt,
) -> tuple[Snapshot, list[dict[str, Any]], list[dict[str, Any]]]:
    """Runs the updates of a training in pieces of about a second.

    It stops after the last update, after a signal, if a sink asks for it, or once all seeds have
    failed. Returns the last snapshot, the rows of metrics and the rows of evaluations. Both lists
    are empty if a writer has written the rows.
    """
    config, seeds = plan.config, plan.seeds
    update_timesteps = config.batch_size * len(seeds)
    log = MetricsLog(seeds, config.batch_size, plan.log_every, start.log)
    find_failures = failure_finder(config, plan.hparams, seeds, debug_nans=plan.debug_nans)
    state, guard, _, updates, failures, total_seconds = start
    bar.start(config.num_updates * update_timesteps, done=updates * update_timesteps)
    rows: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    # The first piece is a single update, because its time is not known.
    rate, count = math.nan, 1

    def record(new: list[dict[str, Any]]) -> list[dict[str, Any]]:
        # Windows that end within a piece share its speed, and are timed by it.
        new = [
            {
                **row,
                "time/steps_per_second": rate,
                # Without a new piece, as when a finished run is resumed, there is no speed.
                "time/seconds": total_seconds
                if row["update"] == updates
                else total_seconds - (updates - row["update"]) * update_timesteps / rate,
            }
            for row in new
        ]
        # With a file, memory does not grow with the length of the run.
        if writer is None:
            rows.extend(new)
        else:
            writer.append_metrics(new)
        return new

    def snapshot() -> Snapshot:
        return Snapshot(state, guard, log.state, updates, failures, total_seconds)

    while True:
        is_due = writer is not None and writer.is_checkpoint_due and updates > start.updates
        decisions = {"is_interrupted": interrupt.requested, "is_due": is_due}
        count, is_stopped, is_due = _agreed(count, plan.sinks, **decisions)
        if is_due:
            _save(writer, snapshot())
        has_seeds = bool((guard.failed_at < 0).any())
        if updates >= config.num_updates or is_stopped or not has_seeds:
            break
        # A piece ends where an evaluation is due, whatever its length would be.
        until_evaluation = periodic.updates_left(updates)
        count = min(count, config.num_updates - updates, until_evaluation or count)
        piece_started = time.perf_counter()
        had_failed = guard.failed_at >= 0
        # A diagnosis repeats the update from the state before it, which `advance` donates.
        before = jax.tree.map(jnp.copy, state) if plan.debug_nans else None
        # If an environment fails, the updates of this piece are lost.
        with _saved_on_failure(plan, writer, snapshot):
            state, guard, metrics = training.advance(state, guard, updates, count)
        seconds = time.perf_counter() - piece_started
        if plan.debug_nans:
            guard = fail_at_first_skip(guard, metrics, updates)
        failures += tuple(find_failures(state if before is None else before, had_failed, guard))
        updates += count
        total_seconds += seconds
        rate = count * update_timesteps / seconds
        new = record(log.add(metrics, guard.failed_at))
        if count == until_evaluation:
            with _saved_on_failure(plan, writer, snapshot):
                evaluated = periodic.after(updates, processes.fetch(plan.trainer.policy(state)))
            evaluated = [{**row, "time/seconds": total_seconds} for row in evaluated]
            if writer is None:
                evaluations += evaluated
            else:
                writer.append_evaluations(evaluated, periodic.best)
            new += evaluated
        _pass_on(new, plan, writer, snapshot)
        bar.advance(
            count * update_timesteps, steps_per_second=rate, episode_return=_mean_return(metrics)
        )
        count = 1 if plan.debug_nans else min(next_size(count, seconds), LARGEST_PIECE)
    # An unfinished window is a row, too; a run that goes on cuts it off again.
    _pass_on(record(log.unfinished(guard.failed_at)), plan, writer, snapshot)
    return snapshot(), rows, evaluations


def _agreed(
    count: int, sinks: Sinks, *, is_interrupted: bool, is_due: bool
) -> tuple[int, bool, bool]:
    """Returns `(count, is_stopped, is_due)`, on which all processes agree.

    Clocks, signals and files differ between processes, so all exchange their values.

    Args:
      count: updates of the next piece; the value of the first process is used.
      sinks: sinks, of which those of the first process can ask to stop.
      is_interrupted: True if this process has received a signal.
      is_due: True if it is time for a checkpoint; the value of the first process is used.
    """
    every = processes.agree([count, sinks.ask_to_stop, is_interrupted, is_due])
    sinks.ask_to_stop = bool(every[0, 1])
    is_stopped = sinks.ask_to_stop or bool(every[:, 2].any())
    return int(every[0, 0]), is_stopped, bool(every[0, 3])


def _save(writer: RunWriter | None, snapshot: Snapshot) -> None:
    """Writes a checkpoint in the first process; all processes exchange their parts of the state."""
    snapshot = processes.fetch(snapshot)
    if writer is not None:
        writer.save(snapshot)


@contextlib.contextmanager
def _saved_on_failure(
    plan: _Plan, writer: RunWriter | None, snapshot: Callable[[], Snapshot]
) -> Iterator[None]:
    """Writes a checkpoint if an environment on the host fails, and says so in its error."""
    try:
        yield
    except HostError as error:
        if writer is None:
            raise
        last = snapshot()
        writer.finish(last, plan.trainer.policy(last.state))
        raise HostError(
            f"{str(error).rstrip('.')}. The training ended after "
            f"{last.updates * plan.config.batch_size:,} steps; resume continues it from there."
        ) from error


def _pass_on(
    rows: list[dict[str, Any]],
    plan: _Plan,
    writer: RunWriter | None,
    snapshot: Callable[[], Snapshot],
) -> None:
    """Passes rows to the sinks. An error of a callback ends the training, after a checkpoint.

    Args:
      rows: rows of metrics and evaluations.
      plan: plan of the run, which has the sinks.
      writer: writes the checkpoint; None writes none.
      snapshot: returns the state of the run.
    """
    try:
        plan.sinks.on_rows(rows)
    except Exception:
        # Several processes write a checkpoint together, and only the first one is here.
        if writer is not None and processes.count() == 1:
            last = snapshot()
            writer.finish(last, plan.trainer.policy(last.state))
        raise


def _mean_return(metrics: Metrics) -> float:
    """Returns the mean over seeds of the return in a piece; NaN where no episode ended."""
    returns = average(metrics)["episode/return"]
    return float(np.nanmean(returns)) if np.isfinite(returns).any() else float("nan")
