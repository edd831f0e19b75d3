"""Training with a progress bar and files: compiled updates in pieces, all else between them."""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from ppo_jax.config import Config
from ppo_jax.devices import member_sharding
from ppo_jax.envs import make_env
from ppo_jax.envs.environment import Environment
from ppo_jax.errors import ConfigError, require_positive_integers, require_seed
from ppo_jax.evaluation import Evaluation, evaluate, evaluation_key
from ppo_jax.hparams import HParams
from ppo_jax.policy.policy import Policy
from ppo_jax.policy.saving import to_bytes
from ppo_jax.population.member import guarded_step
from ppo_jax.resolve import complete_hparams
from ppo_jax.runs import device_memory
from ppo_jax.runs.directory import RunDirectory
from ppo_jax.runs.interrupt import Interrupt, deferred_interrupt
from ppo_jax.runs.metrics_log import MetricsLog, average
from ppo_jax.runs.pieces import next_size
from ppo_jax.runs.progress import TrainingProgress
from ppo_jax.stages.metrics import Metrics
from ppo_jax.trainer import Trainer, make_trainer
from ppo_jax.types import TrainState

_LARGEST_PIECE = 1024  # updates; bounds the buffer of metrics on the device
_LOGGED_ROWS = 1000  # at most about this many rows per seed, unless log_every is given


class Failure(NamedTuple):
    """An update that would have made a parameter NaN or infinite."""

    seed: int
    update: int
    """Number of the update, from 1."""
    timesteps: int
    """Environment steps of the seed up to and including the update."""
    quantities: tuple[str, ...]
    """Names of the metrics that were not finite in that update."""

    def __str__(self) -> str:
        also = f" ({', '.join(self.quantities)} as well)" if self.quantities else ""
        return (
            f"seed {self.seed} diverged: update {self.update}, after {self.timesteps:,} steps, "
            f"would have made parameters NaN or infinite{also}. The policy from before that update "
            "is kept. Try a lower learning_rate, or max_grad_norm."
        )


@dataclasses.dataclass(frozen=True, repr=False)
class Run:
    """The results of a training. With `num_seeds`, every array has a leading axis of seeds."""

    state: TrainState
    policy: Policy
    evaluation: Evaluation | None
    """None if the training was stopped, by Ctrl-C or because all seeds failed."""
    metrics: pd.DataFrame
    """The learning curve: a row per logged update and seed, as in `metrics.jsonl`."""
    seeds: tuple[int, ...]
    timesteps: int
    """Environment steps of each seed."""
    compile_seconds: float
    run_seconds: float
    """Seconds of training alone, without compilation and evaluation."""
    run_dir: Path | None
    failures: tuple[Failure, ...]
    """Seeds whose training diverged; each keeps its last finite policy."""

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
        """Plots the return over environment steps, a line per seed and their mean.

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
    run_dir: str | Path | None = None,
    overwrite: bool = False,
    eval_episodes: int = 128,
    log_every: int | None = None,
    progress: bool = True,
) -> Run:
    """Trains with a progress bar, writes the run to disk if asked, and evaluates the result.

    The numbers are bit-identical to those of `jax.jit(trainer.run)(jax.random.key(seed), hparams)`;
    only the pieces in which updates are dispatched differ. Ctrl-C stops between two pieces and
    keeps the policy so far.

    A seed whose parameters would become NaN or infinite keeps its last finite policy. It is listed
    in `Run.failures`, with a warning, and the training stops once no seed is left.

    Args:
      config: describes the training.
      hparams: hyperparameters, scalars; None for the algorithm's defaults.
      seed: training starts from `jax.random.key(seed)`.
      num_seeds: train this many consecutive seeds together, under `vmap`, divided among as many
        devices as divide them.
      run_dir: directory for `config.json`, `metrics.jsonl`, `policy.msgpack` and
        `evaluation.json`; None writes nothing.
      overwrite: replace a run that is there already.
      eval_episodes: episodes of the greedy evaluation at the end, for each seed.
      log_every: updates per row of `metrics.jsonl`; by default about 1000 rows in all.
      progress: show a progress bar on standard error.

    Raises:
      ConfigError: a setting breaks a rule, or `run_dir` holds files; before anything is traced. Or
        the training does not fit the device's memory; before anything is allocated.
    """
    require_positive_integers(
        {"num_seeds": num_seeds, "eval_episodes": eval_episodes, "log_every": log_every}
    )
    require_seed(seed)
    hparams = complete_hparams(hparams, config)
    trainer = make_trainer(config)
    # `num_seeds=1` keeps an axis of seeds; None has none.
    seeds = tuple(range(seed, seed + (num_seeds or 1)))
    directory = None
    if run_dir is not None:
        directory = RunDirectory.create(run_dir, overwrite=overwrite)
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    if num_seeds is None:
        keys = keys[0]
    log_every = log_every or max(1, config.num_updates // _LOGGED_ROWS)

    with TrainingProgress(visible=progress) as bar, deferred_interrupt() as interrupt:
        started = time.perf_counter()
        state, advance = _compile(trainer, config, keys, hparams)
        if directory is not None:
            directory.write_config(config, hparams, seeds=seed if num_seeds is None else seeds)
            # A policy that cannot be saved is an error now, and not after hours of training.
            to_bytes(trainer.policy(state))
        compiled = time.perf_counter()
        trained = _train(
            state,
            advance,
            config=config,
            log=MetricsLog(seeds, config.batch_size, log_every),
            seeds=seeds,
            directory=directory,
            bar=bar,
            interrupt=interrupt,
        )
        finished = time.perf_counter()

    for failure in trained.failures:
        warnings.warn(str(failure), RuntimeWarning, stacklevel=2)
    policy = trainer.policy(trained.state)
    if directory is not None:
        directory.write_policy(policy)
    evaluation = None
    if trained.updates == config.num_updates:
        evaluation = evaluate_seeds(policy, trainer.env, _evaluation_keys(keys), eval_episodes)
        if directory is not None:
            directory.write_evaluation(summarize(evaluation, seeds, greedy=True))
    return Run(
        state=trained.state,
        policy=policy,
        evaluation=evaluation,
        metrics=pd.DataFrame(trained.rows),
        seeds=seeds,
        timesteps=trained.updates * config.batch_size,
        compile_seconds=compiled - started,
        run_seconds=finished - compiled,
        run_dir=None if directory is None else directory.path,
        failures=tuple(trained.failures),
    )


class _Piece(NamedTuple):
    """Some updates on the device."""

    state: TrainState
    failed_at: np.ndarray  # [seeds], index of the first update that failed; −1 where none did
    metrics: Metrics  # [count, seeds], in NumPy


Advance = Callable[[TrainState, np.ndarray, int, int], _Piece]
"""`(state, failed_at, first, count) -> piece`: runs the updates `first` to `first + count − 1`."""


class _Trained(NamedTuple):
    """A training after its last piece."""

    state: TrainState
    updates: int
    rows: list[dict[str, Any]]
    failures: list[Failure]


def _train(
    state: TrainState,
    advance: Advance,
    *,
    config: Config,
    log: MetricsLog,
    seeds: Sequence[int],
    directory: RunDirectory | None,
    bar: TrainingProgress,
    interrupt: Interrupt,
) -> _Trained:
    """Runs the updates of a training in pieces of about a second, until something stops it.

    It stops after Ctrl-C, and once all seeds have failed.
    """
    update_timesteps = config.batch_size * len(seeds)
    bar.start(config.num_updates * update_timesteps)
    failed_at = np.full(len(seeds), -1, np.int32)
    rows: list[dict[str, Any]] = []
    failures: list[Failure] = []
    updates, count, is_last = 0, 1, False
    while not is_last:
        count = min(count, config.num_updates - updates)
        piece_started = time.perf_counter()
        before = failed_at
        state, failed_at, metrics = advance(state, failed_at, updates, count)
        seconds = time.perf_counter() - piece_started
        for i in np.flatnonzero((before < 0) & (failed_at >= 0)).tolist():
            update = int(failed_at[i]) + 1
            quantities = _not_finite(metrics, update - 1 - updates, i)
            timesteps = update * config.batch_size
            failures.append(Failure(seeds[i], update, timesteps, quantities))
        updates += count
        rate = count * update_timesteps / seconds
        is_last = (
            updates == config.num_updates or interrupt.requested or bool((failed_at >= 0).all())
        )
        logged = log.add(metrics, failed_at=failed_at, flush=is_last)
        logged = [{**row, "time/steps_per_second": rate} for row in logged]
        rows += logged
        if directory is not None:
            directory.append_metrics(logged)
        bar.advance(
            count * update_timesteps, steps_per_second=rate, episode_return=_mean_return(metrics)
        )
        count = min(next_size(count, seconds), _LARGEST_PIECE)
    return _Trained(state, updates, rows, failures)


def _not_finite(metrics: Metrics, row: int, seed_index: int) -> tuple[str, ...]:
    """Returns the names of the training metrics that were not finite in an update of a seed."""
    return tuple(
        sorted(
            name
            for name, values in metrics.items()
            if name.startswith("train/") and not np.isfinite(values[row, seed_index])
        )
    )


def load(run_dir: str | Path, *, seed: int | None = None, network: Any = None) -> Policy:
    """Returns the policy of a run, as a value that acts.

    Args:
      run_dir: directory that `train` wrote.
      seed: of a run of several seeds; None is the only seed or the first.
      network: the module that was `Config.network`, unless that was the name of one of ours.

    Raises:
      ConfigError: there is no run, or it has no policy yet, or not that seed.
    """
    directory = RunDirectory.open(run_dir)
    seeds = directory.read_seeds()
    policy = directory.read_policy(network)
    if isinstance(seeds, int):
        if seed not in (None, seeds):
            raise ConfigError(f"seed must be one of the run's; got {seed}. It has {seeds}.")
        return policy
    if seed is not None and seed not in seeds:
        raise ConfigError(f"seed must be one of the run's; got {seed}. It has {seeds}.")
    index = 0 if seed is None else seeds.index(seed)
    # Policies of all seeds are stacked along the first axis.
    return jax.tree.map(lambda x: x[index], policy)


def evaluate_run(
    run_dir: str | Path,
    *,
    seed: int = 0,
    num_episodes: int = 128,
    greedy: bool = True,
    network: Any = None,
) -> dict[str, Any]:
    """Evaluates every policy of a run again; returns a summary as `summarize` does.

    Args:
      run_dir: directory that `train` wrote.
      seed: random seed of the evaluation.
      num_episodes: episodes for each seed of the run.
      greedy: take the most likely actions instead of sampling.
      network: the module that was `Config.network`, unless that was the name of one of ours.

    Raises:
      ConfigError: there is no run, or it has no policy yet.
    """
    directory = RunDirectory.open(run_dir)
    config, _ = directory.read_config(network)
    seeds = directory.read_seeds()
    policy = directory.read_policy(network)
    env = make_env(config)
    require_seed(seed)
    for name in ("observation_space", "action_space"):
        ours, theirs = getattr(policy.spec, name), getattr(env, name)
        if ours != theirs:
            raise ConfigError(
                f"a policy must be evaluated in an environment with its spaces; that of {run_dir} "
                f"has the {name} {ours}, and {env.name} has {theirs}."
            )
    key = jax.random.key(seed)
    keys = key if isinstance(seeds, int) else jax.random.split(key, len(seeds))
    evaluation = evaluate_seeds(policy, env, _evaluation_keys(keys), num_episodes, greedy=greedy)
    return summarize(evaluation, [seeds] if isinstance(seeds, int) else seeds, greedy=greedy)


def evaluate_seeds(
    policy: Policy, env: Environment, keys: jax.Array, num_episodes: int, *, greedy: bool = True
) -> Evaluation:
    """Evaluates one policy, or a stack of policies if there is a stack of keys.

    Args:
      policy: of one seed, or of all with a leading axis.
      env: the environment, with its parameters.
      keys: a random key, or one for each seed.
      num_episodes: episodes for each seed.
      greedy: take the most likely actions instead of sampling.
    """

    def one(policy: Policy, key: jax.Array) -> Evaluation:
        return evaluate(policy, env, env.params, key, num_episodes, greedy=greedy)

    return jax.jit(jax.vmap(one) if keys.ndim else one)(policy, keys)


def summarize(evaluation: Evaluation, seeds: Sequence[int], *, greedy: bool) -> dict[str, Any]:
    """Returns means and spreads of an evaluation, for each seed and over all, as JSON."""
    returns = np.atleast_2d(evaluation.returns)
    lengths = np.atleast_2d(evaluation.lengths)
    finished = np.atleast_2d(evaluation.finished)
    return {
        "eval/return": returns.mean(),
        "episodes": returns.shape[1],
        "greedy": greedy,
        "seeds": [
            {
                "seed": seed,
                "eval/return": returns[i].mean(),
                "eval/return_std": returns[i].std(),
                "eval/return_min": returns[i].min(),
                "eval/length": lengths[i].mean(),
                "eval/finished": finished[i].mean(),
            }
            for i, seed in enumerate(seeds)
        ],
    }


def _compile(
    trainer: Trainer, config: Config, keys: jax.Array, hparams: HParams
) -> tuple[TrainState, Advance]:
    """Returns the first state and the compiled function that advances it.

    The number of updates is traced, so that pieces of any length share one compilation.
    """
    hparams = jax.tree.map(jnp.float32, hparams)
    capacity = min(config.num_updates, _LARGEST_PIECE)
    init, step = trainer.init, guarded_step(trainer)
    sharding = None  # of a single seed: the trainer places its state
    if keys.ndim:
        init = jax.vmap(init, in_axes=(0, None))
        step = jax.vmap(step, in_axes=(0, 0, None, None))
        if config.num_devices == 1:
            sharding = member_sharding(math.gcd(len(keys), jax.device_count()))

    def advance(
        state: TrainState,
        failed_at: jax.Array,
        hparams: HParams,
        first: jax.Array,
        count: jax.Array,
    ) -> tuple[TrainState, jax.Array, Metrics]:
        def one_update(i: jax.Array, carry: tuple) -> tuple:
            state, failed_at, rows = carry
            state, failed_at, metrics = step(state, failed_at, first + i, hparams)
            return state, failed_at, jax.tree.map(lambda x, y: x.at[i].set(y), rows, metrics)

        # The buffer is as long as the longest piece; only the first `count` rows are read.
        *_, shapes = jax.eval_shape(step, state, failed_at, first, hparams)
        rows = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), shapes)
        return jax.lax.fori_loop(0, count, one_update, (state, failed_at, rows))

    # The hyperparameters are arguments of both programs, so that they round alike.
    start = jax.jit(init, out_shardings=sharding).lower(keys, hparams).compile()
    placed = jax.jit(advance, donate_argnums=0, out_shardings=(sharding, None, None))
    state_shapes = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=where, weak_type=x.weak_type
        ),
        start.out_info,
        start.output_shardings,
    )
    none_failed = np.full(keys.shape, -1, np.int32)
    program = placed.lower(state_shapes, none_failed, hparams, np.int32(0), np.int32(1)).compile()
    # Nothing has been allocated so far.
    _require_memory(max(map(device_memory.num_bytes, (start, program))), config)

    def advance_on_host(state: TrainState, failed_at: np.ndarray, first: int, count: int) -> _Piece:
        state, failed, metrics = program(
            state, failed_at.reshape(keys.shape), hparams, np.int32(first), np.int32(count)
        )
        # The transfer of the metrics waits for the device; there is no other synchronisation.
        rows = jax.tree.map(lambda x: np.asarray(x)[:count].reshape(count, -1), metrics)
        return _Piece(state, np.asarray(failed).reshape(-1), rows)

    return start(keys, hparams), advance_on_host


def _require_memory(num_bytes: int, config: Config) -> None:
    """Checks that a training fits its devices, by the compiler's own count."""
    limit = device_memory.limit(jax.devices()[0])
    if limit is None or num_bytes <= limit:
        return
    # In proportion, which is a little too few: networks do not grow with the environments.
    share = int(config.num_envs * limit / num_bytes)
    fitting = max(share - share % (config.num_devices * 8), config.num_devices)
    raise ConfigError(
        f"a training must fit the memory of its device; {config.num_envs} environments with "
        f"{config.num_steps} steps need {num_bytes / 2**20:,.0f} MiB of {limit / 2**20:,.0f}. "
        f"About {fitting} environments fit: lower num_envs, or num_steps."
    )


def _evaluation_keys(keys: jax.Array) -> jax.Array:
    return jax.vmap(evaluation_key)(keys) if keys.ndim else evaluation_key(keys)


def _mean_return(metrics: Metrics) -> float:
    """Returns the mean over seeds of the return in a piece; NaN where no episode ended."""
    returns = average(metrics)["episode/return"]
    return float(np.nanmean(returns)) if np.isfinite(returns).any() else float("nan")
