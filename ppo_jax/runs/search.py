"""Adaptive searches as runs: successive halving and population-based training, with tables."""

import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ppo_jax.config import Config
from ppo_jax.devices import member_sharding, over_members, population_mesh
from ppo_jax.errors import ConfigError, require_known, require_positive_integers, require_seed
from ppo_jax.evaluation import evaluate, evaluation_key
from ppo_jax.hparams import HParams
from ppo_jax.policy.policy import Policy
from ppo_jax.population.halving import make_halving
from ppo_jax.population.pbt import make_pbt
from ppo_jax.population.plan import Member
from ppo_jax.population.rounds import Search, SearchState
from ppo_jax.population.search_space import ENV_PARAMS, Choice, Distribution, extremes, rows
from ppo_jax.resolve import complete_hparams
from ppo_jax.runs import device_memory, processes
from ppo_jax.runs.checkpoint_writer import require_checkpoint_every
from ppo_jax.runs.chunk_checkpoints import ChunkCheckpoints
from ppo_jax.runs.compiled_population import best_of
from ppo_jax.runs.interrupt import deferred_interrupt, how_to_go_on
from ppo_jax.runs.pieces import next_size
from ppo_jax.runs.progress import TrainingProgress
from ppo_jax.runs.search_tables import SearchRecord, make_search_tables, member_numbers
from ppo_jax.runs.sink import RunInfo
from ppo_jax.runs.sinks import make_sinks, member_rows
from ppo_jax.runs.sweep import Sweep
from ppo_jax.runs.sweep_store import SweepStore
from ppo_jax.runs.training import output_shapes
from ppo_jax.trainer import Trainer, make_trainer
from ppo_jax.types import TrainState

Method = Literal["halving", "pbt"]


def search(
    config: Config,
    space: Mapping[str, Sequence[float] | Distribution],
    *,
    method: Method,
    num_members: int = 16,
    num_rounds: int = 10,
    factor: float | None = None,
    replaced: float | None = None,
    hparams: HParams | None = None,
    seed: int = 0,
    run_dir: str | Path | None = None,
    checkpoint_every: float = 60.0,
    eval_episodes: int = 64,
    log: Sequence[str] = (),
    say: Callable[[str], None] | None = None,
    progress: bool = True,
) -> Sweep:
    """Searches hyperparameters with a population whose members are stopped or replaced.

    "halving" is `population.halving`: members are trials of random draws. At the rungs one trial
    in `factor` goes on, and new draws take the places of the others. "pbt" is `population.pbt`:
    after every round the worst members continue from copies of the best, with perturbed
    hyperparameters. Both score members by complete episodes after every round. The population is
    one vmapped program, whose members are divided among the devices.

    Args:
      config: the training of a member. Its updates are divided into rounds: `total_timesteps` is
        rounded down to whole rounds.
      space: hyperparameters to search, by name: distributions, or lists of values.
      method: "halving" or "pbt".
      num_members: members that train at the same time.
      num_rounds: rounds; after each of them members are compared.
      factor: of "halving", one trial in this many goes on at a rung (default 3). Of "pbt", a
        hyperparameter is multiplied or divided by it (default 1.25).
      replaced: share of the members that "pbt" replaces after a round (default 0.25).
      hparams: hyperparameters that are not searched.
      seed: member i starts from `jax.random.key(seed + i)`.
      run_dir: directory for the tables and the best policy; a search that was stopped in it goes
        on. None keeps nothing.
      checkpoint_every: seconds between two checkpoints in `run_dir`; 0 for none.
      eval_episodes: episodes of each member's final greedy evaluation.
      log: trackers, as in `train`. Each member is a run of its own, which is logged when the search
        is complete. They need `run_dir`.
      say: called with each line of text about the plan; None prints nothing.
      progress: show a progress bar on standard error.

    Returns:
      A `Sweep`. `members` has a row per trial ("halving") or member ("pbt") with its last score,
      and the final evaluation of those that were trained to the end. `curves` has a row per member
      and round: its hyperparameters, score and training metrics, and where it was stopped or whose
      copy it goes on with.

    Raises:
      ConfigError: a setting breaks a rule, `run_dir` holds something else, or the population does
        not fit the memory of the devices.
    """
    require_positive_integers(
        {"num_members": num_members, "num_rounds": num_rounds, "eval_episodes": eval_episodes}
    )
    require_seed(seed)
    require_seed(seed + num_members - 1)
    require_checkpoint_every(checkpoint_every)
    processes.require_one("a search", "Use the devices of one machine.")
    sinks = make_sinks(log, run_dir=run_dir, is_sweep=True)
    config = _whole_rounds(config, num_rounds)
    hparams = complete_hparams(hparams, config)
    drawn = _distributions(space, config)
    options = _options(method, factor, replaced)
    plan = _make_plan(
        config,
        hparams,
        drawn,
        method=method,
        options=options,
        num_members=num_members,
        num_rounds=num_rounds,
        seed=seed,
    )
    # Errors of a method come before anything is written.
    jax.eval_shape(plan.search.init, plan.keys, plan.hparams)
    # Everything that tells one search from another.
    description = {
        "search": method,
        "config": {name: str(value) for name, value in vars(config).items()},
        "hparams": hparams.given(),
        "space": {name: str(entry) for name, entry in drawn.items()},
        **options,
        "members": num_members,
        "rounds": num_rounds,
        "seed": seed,
        "eval_episodes": eval_episodes,
    }
    with (
        SweepStore.opened(run_dir, description, checkpoint_every=checkpoint_every) as store,
        deferred_interrupt() as interrupt,
    ):
        if store.finished():  # the same search again
            result = _result(store, store.collect(), drawn)
        else:
            if say is not None:
                say(
                    f"{num_members} members, {num_rounds} rounds of {plan.updates_per_round} "
                    f"updates: {config.total_timesteps * num_members:,} steps"
                )
            with TrainingProgress(visible=progress) as bar:
                result = _search(
                    plan,
                    store,
                    config,
                    drawn,
                    bar,
                    seed=seed,
                    eval_episodes=eval_episodes,
                    is_stopped=lambda: interrupt.requested,
                )
                result = result._replace(signal=interrupt.signal)
            if result.is_complete:
                with sinks.running(RunInfo(store.path, (seed,), description, uuid.uuid4().hex)):
                    sinks.on_rows(member_rows((result.members, result.curves), result.run_seconds))
    # The last checkpoint is written when the store is left.
    result = result._replace(unwritten=tuple(store.unwritten.values()))
    return interrupt.deliver(result, how_to_go_on(store.path))


def _search(
    plan: "_Plan",
    store: SweepStore,
    config: Config,
    drawn: Mapping[str, Distribution],
    bar: TrainingProgress,
    *,
    seed: int,
    eval_episodes: int,
    is_stopped: Callable[[], bool],
) -> Sweep:
    """Runs a search until it is complete or stopped, and keeps its results in the store."""
    started = time.perf_counter()
    programs = _compile(plan)
    compiled = time.perf_counter()
    state, records, run_seconds = _run(
        programs, plan, bar, store.checkpoints, is_stopped=is_stopped
    )
    is_complete = len(records) == plan.num_rounds
    returns = None
    # A search that was stopped has no final evaluation: its members are not comparable yet.
    if is_complete:
        returns, policies = _evaluate(plan, state.states, eval_episodes)
        common: dict[str, Any] = {"returns": returns, "policies": policies, "seed": seed}
        _keep_best(store, config, state, records[-1], **common)
    tables = make_search_tables(
        records,
        list(drawn),
        config,
        updates_per_round=plan.updates_per_round,
        seed=seed,
        returns=returns,
    )
    if is_complete:
        store.add(tables)
        tables = store.collect()
    return _result(store, tables, drawn)._replace(
        compile_seconds=compiled - started, run_seconds=run_seconds, is_complete=is_complete
    )


def _result(
    store: SweepStore,
    tables: tuple[pd.DataFrame, pd.DataFrame],
    names: Mapping[str, Any],
) -> Sweep:
    """Returns the result of a complete search that took no time in this call."""
    return Sweep(
        *tables,
        names=tuple(names),
        run_dir=store.path,
        compile_seconds=0.0,
        run_seconds=0.0,
        is_complete=True,
        best_policy=store.best_policy,
    )


class _Plan(NamedTuple):
    """Everything that a search consists of, before anything is compiled."""

    search: Search
    trainer: Trainer
    keys: jax.Array  # [S]
    hparams: HParams
    """The values that `search.init` takes."""
    num_rounds: int
    updates_per_round: int
    round_timesteps: int
    """Environment steps of all members in a round."""
    mesh: Mesh


def _make_plan(
    config: Config,
    hparams: HParams,
    space: Mapping[str, Distribution],
    *,
    method: Method,
    options: Mapping[str, Any],
    num_members: int,
    num_rounds: int,
    seed: int,
) -> _Plan:
    """Returns the plan of a search; raises a `ConfigError` if an argument does not fit."""
    if config.num_devices > 1:
        raise ConfigError(
            "num_devices must be 1 in a search, whose devices share its members; got "
            f"{config.num_devices}. Leave it out, or use a sweep without a search."
        )
    trainer = make_trainer(config)
    mesh = population_mesh(num_members)
    updates_per_round = config.num_updates // num_rounds
    common = {
        "num_rounds": num_rounds,
        "updates_per_round": updates_per_round,
        "member_map": over_members(mesh),
        **options,
    }
    if method == "halving":
        search = make_halving(trainer, space, **common)
    else:
        search = make_pbt(trainer, list(space), **common)
        # Halving draws on the device, for every new trial; PBT draws once.
        drawn = rows(space, num_draws=num_members, seed=seed)
        first = {name: np.array([row[name] for row in drawn], np.float32) for name in space}
        hparams = hparams.replace(**first)
    numbers = jnp.arange(seed, seed + num_members, dtype=jnp.uint32)
    return _Plan(
        search=search,
        trainer=trainer,
        keys=jax.vmap(jax.random.key)(numbers),
        hparams=jax.tree.map(jnp.float32, hparams),
        num_rounds=num_rounds,
        updates_per_round=updates_per_round,
        round_timesteps=updates_per_round * config.batch_size * num_members,
        mesh=mesh,
    )


def _distributions(
    space: Mapping[str, Sequence[float] | Distribution], config: Config
) -> dict[str, Distribution]:
    """Returns a space in which each list is a `Choice`; raises a `ConfigError` for a bad entry."""
    if not space:
        raise ConfigError(
            "a search needs a hyperparameter with several values; the space is empty. Give one, "
            "such as learning_rate: loguniform(1e-5,1e-2)."
        )
    settings = [name for name in space if name in vars(config) or name.startswith(ENV_PARAMS)]
    if settings:
        raise ConfigError(
            f"a search varies hyperparameters; got {', '.join(settings)}, which are the same for "
            "all members. Set one value, or use a sweep without a search."
        )
    found = {}
    for name, entry in space.items():
        found[name] = entry if isinstance(entry, Distribution) else Choice(tuple(entry))
        values = extremes(found[name])
        if None in values:
            raise ConfigError(
                f"a search varies numbers; {name} has the values {values}. Leave None out, or "
                "write inf, which switches a bound off."
            )
        for value in values:
            complete_hparams({name: value}, config)  # raises if unused or out of range
    return found


def _whole_rounds(config: Config, num_rounds: int) -> Config:
    """Returns the config with its updates rounded down to a whole number of rounds."""
    updates_per_round = config.num_updates // num_rounds
    if updates_per_round < 1:
        raise ConfigError(
            f"a round must be at least one update; got {num_rounds} rounds and "
            f"{config.num_updates} updates. Use fewer rounds, or raise total_timesteps."
        )
    return config.replace(total_timesteps=num_rounds * updates_per_round * config.batch_size)


def _options(method: Method, factor: float | None, replaced: float | None) -> dict[str, Any]:
    """Returns the options of a method, with their defaults; its module checks their ranges."""
    require_known("search", method, get_args(Method))
    if method == "pbt":
        return {
            "factor": 1.25 if factor is None else factor,
            "replaced": 0.25 if replaced is None else replaced,
        }
    if replaced is not None:
        raise ConfigError(f"replaced belongs to pbt; got {replaced} and halving. Leave it out.")
    if factor is not None and not float(factor).is_integer():
        raise ConfigError(f"the factor of halving must be a whole number; got {factor}.")
    return {"factor": 3 if factor is None else int(factor)}


class _Programs(NamedTuple):
    """The three parts of a search, compiled."""

    init: Any
    advance: Any
    finish_round: Any


def _compile(plan: _Plan) -> _Programs:
    """Compiles a search for its devices, and checks that it fits their memory."""
    split: Any = member_sharding(plan.mesh)
    whole: Any = NamedSharding(split.mesh, PartitionSpec())
    # Decisions need the scores of all members, so what they remember is on every device.
    placed = SearchState(
        states=split, hparams=split, sums=split, memory=whole, round_keys=whole, rounds_done=whole
    )
    init = jax.jit(plan.search.init, out_shardings=placed).lower(plan.keys, plan.hparams).compile()
    state = output_shapes(init)
    # The number of updates is traced: pieces of any length are one program.
    advance = jax.jit(plan.search.advance, donate_argnums=0, out_shardings=placed)
    finish = jax.jit(plan.search.finish_round, donate_argnums=0, out_shardings=(placed, whole))
    programs = _Programs(
        init, advance.lower(state, np.int32(1)).compile(), finish.lower(state).compile()
    )
    num_bytes = max(map(device_memory.num_bytes, programs))
    limit = device_memory.limit(jax.devices()[0])
    if limit is not None and num_bytes > limit:
        num_members = len(plan.keys)
        raise ConfigError(
            f"a population must fit the memory of its devices; {num_members} members need "
            f"{num_bytes / 2**20:,.0f} MiB per device, and have {limit / 2**20:,.0f} MiB. "
            f"Use {max(1, int(num_members * limit / num_bytes))} members, or fewer environments."
        )
    return programs


def _run(
    programs: _Programs,
    plan: _Plan,
    bar: TrainingProgress,
    checkpoints: ChunkCheckpoints | None,
    *,
    is_stopped: Callable[[], bool],
) -> tuple[SearchState, list[SearchRecord], float]:
    """Runs the rounds in pieces of about a second, until the last or until it is stopped.

    Returns:
      The state, a record of each finished round, and the seconds that they took, with those of
      processes that were killed.
    """
    begin = time.perf_counter()
    state, records, done, earlier = _start(programs, plan, checkpoints)
    begin -= earlier
    update_timesteps = plan.round_timesteps // plan.updates_per_round
    updates = len(records) * plan.updates_per_round + done
    bar.start(plan.num_rounds * plan.round_timesteps, done=updates * update_timesteps)
    count, best = 1, math.nan
    while len(records) < plan.num_rounds:
        while done < plan.updates_per_round:
            started = time.perf_counter()
            count = min(count, plan.updates_per_round - done)
            # Nothing is read from the device here, so the clock has to wait for it.
            state = jax.block_until_ready(programs.advance(state, np.int32(count)))
            seconds = time.perf_counter() - started
            done += count
            updates += count
            steps = count * update_timesteps
            bar.advance(steps, steps_per_second=steps / seconds, episode_return=best)
            stopped = is_stopped()
            if checkpoints is not None and (stopped or checkpoints.is_due):
                tree = {"state": state, "records": dict(enumerate(records))}
                record = {"rounds": len(records), "done": done}
                checkpoints.save(updates, tree, {**record, "seconds": time.perf_counter() - begin})
            if stopped:
                return state, records, time.perf_counter() - begin
            count = next_size(count, seconds)
        state, record = programs.finish_round(state)
        records.append(jax.device_get(record))
        best, done = float(np.max(records[-1].scores)), 0
    return state, records, time.perf_counter() - begin


def _start(
    programs: _Programs, plan: _Plan, checkpoints: ChunkCheckpoints | None
) -> tuple[SearchState, list[SearchRecord], int, float]:
    """Starts or restores a search.

    Returns:
      The state, the records of the finished rounds, the updates that are done in the current round,
      and the seconds so far.
    """

    def shapes(record: Mapping[str, Any]) -> Any:
        _, one_round = output_shapes(programs.finish_round)
        rounds = dict.fromkeys(range(record["rounds"]), one_round)
        return {"state": output_shapes(programs.init), "records": rounds}

    found = None if checkpoints is None else checkpoints.restore({}, shapes)
    if found is None:
        return programs.init(plan.keys, plan.hparams), [], 0, 0.0
    tree, record = found
    records = [jax.device_get(tree["records"][i]) for i in range(record["rounds"])]
    seconds = record.get("seconds", 0.0)  # checkpoints of version 0.1 lack it
    return tree["state"], records, record["done"], seconds


def _evaluate(plan: _Plan, states: TrainState, num_episodes: int) -> tuple[np.ndarray, Policy]:
    """Returns the returns of greedy episodes of each member, `[S, episodes]`, and the policies."""
    trainer = plan.trainer

    def one(state: TrainState, key: jax.Array) -> tuple[jax.Array, Policy]:
        policy, env_params = trainer.policy(state), state.env_params
        key = evaluation_key(key)
        return evaluate(policy, trainer.env, env_params, key, num_episodes).returns, policy

    evaluate_all = jax.jit(over_members(plan.mesh)(one, in_axes=(0, 0)))
    returns, policies = evaluate_all(states, plan.keys)
    return np.asarray(returns), policies


def _keep_best(
    store: SweepStore,
    config: Config,
    state: SearchState,
    record: SearchRecord,
    *,
    returns: np.ndarray,
    policies: Policy,
    seed: int,
) -> None:
    """Keeps the policy with the highest mean return of the final evaluation."""
    means = returns.mean(axis=1)
    # A member that is not healthy may act, and score, by chance.
    scores = np.asarray(record.scores)
    # Equal returns, such as 500 of CartPole, are ordered by the last score, as in the report.
    best = best_of(np.where(np.isneginf(scores), -np.inf, means), ties=scores)
    number = int(member_numbers(record)[best])
    values = jax.tree.map(lambda x: float(x[best]), state.hparams)
    store.offer_policy(
        jax.device_get(jax.tree.map(lambda x: x[best], policies)),
        float(means[best]),
        member=Member(number, number, seed, {}, values, {}),
        config=config,
    )
