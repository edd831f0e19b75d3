"""Sweeps: every configuration of a space, trained with every seed in few compilations."""

import functools
import itertools
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ppo_jax.config import Config
from ppo_jax.errors import ConfigError, require_positive_integers, require_seed
from ppo_jax.hparams import HParams
from ppo_jax.policy.policy import Policy
from ppo_jax.population.plan import make_plan, shard_of
from ppo_jax.population.proposals import Proposals, make_proposals
from ppo_jax.population.search_space import Row, Sampler, Space
from ppo_jax.resolve import hparams_of
from ppo_jax.runs import processes
from ppo_jax.runs.checkpoint_writer import require_checkpoint_every
from ppo_jax.runs.interrupt import deferred_interrupt, how_to_go_on
from ppo_jax.runs.progress import TrainingProgress
from ppo_jax.runs.sink import RunInfo
from ppo_jax.runs.sinks import make_sinks
from ppo_jax.runs.sweep_runner import PlannedGroup, SweepRunner, plan_group
from ppo_jax.runs.sweep_store import SweepStore, to_json
from ppo_jax.runs.sweep_tables import to_cell


class Sweep(NamedTuple):
    """The results of a sweep, as tidy tables."""

    members: pd.DataFrame
    """One row per member: its values, seed and final evaluation, and the update where it failed."""
    curves: pd.DataFrame
    """One row per member and logged update."""
    names: tuple[str, ...]
    """The columns that were varied."""
    run_dir: Path | None
    compile_seconds: float
    run_seconds: float
    """Wall time of training in this call, and of earlier calls up to a restored checkpoint."""
    is_complete: bool
    """False after Ctrl-C or SIGTERM."""
    best_policy: Policy | None
    """The policy of the member with the highest final return. With a run directory it is also the
    run `best` in it."""
    unwritten: tuple[str, ...] = ()
    """Files that could not be written, with the reasons."""
    signal: int | None = None
    """Number of the signal that stopped the sweep; None if none did."""

    def __repr__(self) -> str:
        state = "complete" if self.is_complete else "not complete"
        where = f", run_dir={str(self.run_dir)!r}" if self.run_dir is not None else ""
        return f"Sweep({len(self.members)} members, {', '.join(self.names)} varied, {state}{where})"


def sweep(
    config: Config,
    space: Space,
    *,
    seeds: int | Sequence[int] = 8,
    hparams: HParams | Mapping[str, Any] | None = None,
    num_draws: int | None = None,
    sampler: Sampler = "random",
    batch: int | None = None,
    storage: str | None = None,
    shard: tuple[int, int] | None = None,
    run_dir: str | Path | None = None,
    chunk: int | None = None,
    member_devices: int | None = None,
    checkpoint_every: float = 60.0,
    eval_episodes: int = 64,
    num_rows: int = 50,
    log: Sequence[str] = (),
    say: Callable[[str], None] | None = None,
    progress: bool = True,
) -> Sweep:
    """Trains every configuration of a space with every seed, in as few compilations as possible.

    Members that differ in traced values only (hyperparameters, environment parameters, seeds) are
    one vmapped population. It is compiled once, and runs in chunks that fit the device's memory.
    The members of a chunk are divided among the devices. With `num_devices`, the environments of
    each member are divided as well. On one platform, the results of a member are bit-identical in
    chunks of the same size, whatever the other members are. Chunks of different sizes are different
    programs, whose results agree up to rounding. A member whose parameters become NaN is frozen.

    Args:
      config: settings that the space does not vary.
      space: see `ppo_jax.population.search_space.rows`.
      seeds: a number n, for the seeds 0 to n − 1, or a list.
      hparams: hyperparameters that the space does not vary.
      num_draws: draws of the space's distributions.
      sampler: "random", "sobol", or "tpe", which needs optuna and draws each batch near the best
        results so far.
      batch: configurations that "tpe" proposes before it sees new results.
      storage: a file or the URL of a database (Optuna's `JournalStorage` or `RDBStorage`), in which
        several workers share the study of "tpe": the same call on each, with a `run_dir` of its
        own. Together they train `num_draws` configurations; `merge` joins their directories.
      shard: `(i, n)` trains the i-th of n shards of the members, 1 ≤ i ≤ n, such as on one of n
        machines; `merge` joins their directories. None trains all.
      run_dir: directory for finished members; one with the same sweep is continued. None keeps
        nothing.
      chunk: members that are trained together; by default as many as fit, at most 1024.
      member_devices: devices among which members are divided, each with `num_devices` for its
        environments; None for all devices.
      checkpoint_every: seconds between two checkpoints of the members that are training, in
        `run_dir`; 0 for none.
      eval_episodes: episodes of each member's final greedy evaluation.
      num_rows: rows of each member's curve; each is the mean over a window of updates.
      log: trackers, as in `train`. Each member is a run of its own, which is logged when it is
        finished. They need `run_dir`.
      say: called with each line of text about the plan; None prints nothing.
      progress: show a progress bar on standard error.

    Returns:
      A `Sweep`.

    Raises:
      ConfigError: a setting breaks a rule, or `run_dir` holds files of something else.
    """
    require_positive_integers(
        {"chunk": chunk, "eval_episodes": eval_episodes, "num_rows": num_rows}
    )
    require_checkpoint_every(checkpoint_every)
    processes.require_one("a sweep", "Give each process a shard of it instead (--shard).")
    sinks = make_sinks(log, run_dir=run_dir, is_sweep=True)
    hparams = hparams_of(hparams, config)
    seeds = _listed(seeds)
    proposals = make_proposals(
        space, num_draws=num_draws, sampler=sampler, batch=batch, storage=storage
    )
    planned = functools.partial(
        _planned, config, hparams, seeds=seeds, member_devices=member_devices
    )
    _require_shard(shard, sampler, proposals.total * len(seeds))
    plan = planned(proposals.checked, shard=shard)  # errors come before anything is written
    num_members = proposals.total * len(seeds) if shard is None else _num_members(plan)
    names = tuple(dict.fromkeys(itertools.chain.from_iterable(proposals.checked)))
    description = {
        **_description(config, hparams, proposals, seeds),
        "eval_episodes": eval_episodes,
        "num_rows": num_rows,
        **({} if shard is None else {"shard": shard}),
    }
    study = proposals.start(to_json(description))
    if study is not None:  # not the storage, whose URL may have a password
        description["study"] = study
    say = say or _silent
    with (
        SweepStore.opened(run_dir, description, checkpoint_every=checkpoint_every) as store,
        TrainingProgress(visible=progress) as bar,
        deferred_interrupt() as interrupt,
        sinks.running(RunInfo(store.path, seeds, description, identity=uuid.uuid4().hex)),
    ):
        runner = SweepRunner(
            num_rows=num_rows,
            num_episodes=eval_episodes,
            chunk=chunk,
            # An adaptive sampler must see bit-identical scores when a sweep resumes.
            same_bits=proposals.is_adaptive,
            say=say,
            bar=bar,
            is_stopped=lambda: interrupt.requested,
            on_rows=sinks.on_rows,
        )
        # A grid comes in one batch; an adaptive sampler proposes the next one from the scores.
        worker = "" if storage is None else store.worker()
        while asked := proposals.ask(worker):
            if len(asked) < proposals.total:
                say(f"configurations {_ranges(asked)} of {proposals.total}:")
            if proposals.is_adaptive:
                plan = planned(list(asked.values()), numbers=list(asked))
            # The sampler is told the scores on disk, so they must be of these configurations.
            store.require(asked)
            runner.run(plan, store)
            if interrupt.requested:
                break
            if shard is None:  # a shard has no score of every configuration
                proposals.tell(store.scores(asked))
        members, curves = store.collect()
    # A worker of a shared study has some of the members.
    is_worker_done = storage is not None and not interrupt.requested
    result = Sweep(
        members,
        curves,
        names,
        store.path,
        runner.compile_seconds,
        runner.run_seconds,
        is_complete=is_worker_done or len(members) == num_members,
        best_policy=store.best_policy,
        unwritten=tuple(store.unwritten.values()),
        signal=interrupt.signal,
    )
    return interrupt.deliver(result, how_to_go_on(store.path))


def _ranges(numbers: Iterable[int]) -> str:
    """Returns increasing numbers as text, consecutive ones as a range.

    >>> _ranges([0, 1, 2, 5])
    '0 to 2, 5 to 5'
    """
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(f"{first} to {last}" for first, last in ranges)


def _listed(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """Returns the seeds of every configuration, checked."""
    seeds = tuple(range(seeds) if isinstance(seeds, (int, np.integer)) else seeds)
    for seed in seeds:
        require_seed(seed)
    seeds = tuple(map(int, seeds))
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds must be one or more different numbers; got {seeds}.")
    return seeds


def _planned(
    config: Config,
    hparams: HParams,
    configurations: Sequence[Row],
    *,
    seeds: Sequence[int],
    member_devices: int | None,
    numbers: Sequence[int] | None = None,
    shard: tuple[int, int] | None = None,
) -> list[PlannedGroup]:
    """Returns groups of members with their trainers, or raises the error of a configuration.

    Args:
      config: settings that the space does not vary.
      hparams: hyperparameters that the space does not vary.
      configurations: rows of the space.
      seeds: of every configuration.
      member_devices: see `sweep`.
      numbers: see `make_plan`.
      shard: the shard of the members; None for all.
    """
    plan = make_plan(config, hparams, configurations, seeds, numbers=numbers)
    if shard is not None:
        plan = shard_of(plan, *shard)
    return [plan_group(group, member_devices) for group in plan]


def _num_members(plan: Sequence[PlannedGroup]) -> int:
    return sum(len(planned.group.members) for planned in plan)


def _require_shard(shard: tuple[int, int] | None, sampler: Sampler, num_members: int) -> None:
    """Checks a shard of a sweep."""
    if shard is None:
        return
    index, count = shard
    require_positive_integers({"the number of a shard": index, "the number of shards": count})
    if index > count or count > num_members:
        raise ConfigError(
            "shard must be i/n with i from 1 to n, and n at most the number of members; got "
            f"{index}/{count} and {num_members} members. Choose other numbers."
        )
    if sampler == "tpe":
        raise ConfigError(
            "shard needs configurations that are known beforehand; sampler tpe draws them from "
            "the results of all. Use random or sobol, or leave shard out."
        )


def _description(
    config: Config, hparams: HParams, proposals: Proposals, seeds: Sequence[int]
) -> dict[str, Any]:
    """Returns everything that tells one sweep from another, as JSON."""

    def cells(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: to_cell(value) for name, value in values.items()}

    description = proposals.description
    if "configurations" in description:
        description = {"configurations": [cells(row) for row in description["configurations"]]}
    return {
        "config": cells(vars(config)),
        "hparams": cells(vars(hparams)),
        **description,
        "seeds": list(seeds),
    }


def _silent(line: str) -> None:
    del line
