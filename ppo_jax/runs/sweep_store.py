"""A sweep that a person starts: groups, chunks that fit, devices, and results on disk."""

import dataclasses
import functools
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from ppo_jax.config import Config, ConfigError, HParams
from ppo_jax.envs import override_params
from ppo_jax.envs.environment import Environment
from ppo_jax.population.member import Outcome, train_member
from ppo_jax.population.plan import Group, Member, make_plan
from ppo_jax.population.proposals import Proposals, make_proposals
from ppo_jax.population.space import Row, Sampler, Space
from ppo_jax.runs.interrupt import deferred_interrupt
from ppo_jax.runs.members import member_sharding
from ppo_jax.runs.progress import TrainingProgress
from ppo_jax.runs.report import iqm
from ppo_jax.trainer import Trainer, make_trainer

_LARGEST_CHUNK = 1024
_MEMORY_SHARE = 0.8  # of a device's memory; what is left is for the runtime


class Sweep(NamedTuple):
    """What a sweep leaves, as tidy tables."""

    members: pd.DataFrame
    """One row per member: its values, its seed, its final evaluation, where it failed if it did."""
    curves: pd.DataFrame
    """One row per member and logged update."""
    names: tuple[str, ...]
    """The columns that were varied."""
    run_dir: Path | None
    compile_seconds: float
    run_seconds: float
    is_complete: bool
    """False after Ctrl-C."""


def sweep(
    config: Config,
    space: Space,
    *,
    seeds: int | Sequence[int] = 8,
    hparams: HParams | None = None,
    num_draws: int | None = None,
    sampler: Sampler = "random",
    batch: int | None = None,
    run_dir: str | Path | None = None,
    chunk: int | None = None,
    eval_episodes: int = 64,
    num_rows: int = 50,
    say: Callable[[str], None] | None = None,
    progress: bool = True,
) -> Sweep:
    """Trains every configuration of a space with every seed, in as few compilations as can be.

    Members that differ in traced values only (hyperparameters, environment parameters, seeds)
    are one vmapped population, compiled once, and run in chunks that fit the device's memory.
    With several devices, a chunk's members are divided among them. A member's numbers do not
    depend on its chunk or its neighbours: in every bit for chunks of two and more a device on one
    platform, to rounding otherwise. A member whose parameters become NaN is frozen.

    Args:
      config: what the space does not say.
      space: see `ppo_jax.population.space.rows`.
      seeds: a number, for 0 to that, or a list.
      hparams: what the space does not say.
      num_draws: draws of the space's distributions.
      sampler: how they are drawn: "random", "sobol", or "tpe", which needs optuna and draws again
        after every batch, near what did well so far.
      batch: configurations in a batch of "tpe".
      run_dir: where finished members are kept; a directory with the same sweep is continued.
        None keeps nothing.
      chunk: members at once; by default as many as fit, at most 1024.
      eval_episodes: episodes of each member's final greedy evaluation.
      num_rows: rows of each member's curve; each is the mean over a window of updates.
      say: takes lines about what will be done; None is silent.
      progress: show a progress bar on standard error.

    Raises:
      ConfigError: a setting breaks a rule, or `run_dir` holds something else.
    """
    for name, count in {"chunk": chunk, "eval_episodes": eval_episodes, "rows": num_rows}.items():
        if count is not None and count < 1:
            raise ConfigError(f"{name} must be at least 1; got {count}.")
    hparams = HParams() if hparams is None else hparams
    seeds = tuple(range(seeds) if isinstance(seeds, int) else seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds must be one or more different numbers; got {seeds}.")
    proposals = make_proposals(space, num_draws=num_draws, sampler=sampler, batch=batch)

    def planned(asked: Sequence[Row], first: int) -> list[tuple[Group, Trainer]]:
        plan = make_plan(config, hparams, asked, seeds, first=first)
        if any(group.config.num_devices > 1 for group in plan):
            raise ConfigError(
                "num_devices must be 1 in a sweep: its devices share members, not environments. "
                "Leave num_devices out."
            )
        return [(group, _trainer_of(group)) for group in plan]

    planned(proposals.extremes, 0)  # errors come before anything is written
    asked, first = proposals.ask(), 0
    plan = planned(asked, first)
    names = tuple(dict.fromkeys(itertools.chain.from_iterable(asked)))
    store = _Store.open(
        run_dir,
        _description(
            config, hparams, proposals, seeds, eval_episodes=eval_episodes, num_rows=num_rows
        ),
    )
    say = say or _silent
    with TrainingProgress(visible=progress) as bar, deferred_interrupt() as interrupt:
        runner = _Runner(
            num_rows,
            eval_episodes,
            chunk,
            say,
            bar,
            is_stopped=lambda: interrupt.requested,
            # Where what comes next follows from results, in every bit of them.
            least=2 * jax.device_count() if proposals.extremes else 1,
        )
        while asked:
            if len(asked) < proposals.total:
                say(f"configurations {first} to {first + len(asked) - 1} of {proposals.total}:")
            store.require(asked, first)
            runner.run(plan, store)
            if interrupt.requested:
                break
            proposals.tell(store.scores(range(first, first + len(asked))))
            first += len(asked)
            asked = proposals.ask()
            plan = planned(asked, first)
    members, curves = store.collect()
    return Sweep(
        members,
        curves,
        names,
        store.path,
        runner.compile_seconds,
        runner.run_seconds,
        is_complete=len(members) == proposals.total * len(seeds),
    )


class _Runner:
    """Runs plans, one after another; what was compiled for one serves the next."""

    def __init__(
        self,
        num_rows: int,
        num_episodes: int,
        chunk: int | None,
        say: Callable[[str], None],
        bar: TrainingProgress,
        is_stopped: Callable[[], bool],
        least: int,
    ) -> None:
        self._num_rows, self._num_episodes, self._chunk = num_rows, num_episodes, chunk
        self._say, self._bar, self._is_stopped = say, bar, is_stopped
        # Members at once unless a chunk is given: two a device have the same bits in any chunk,
        # whether a sweep was cut off or not.
        self._least = least
        self._populations: dict[Any, _Population] = {}
        self.run_seconds = 0.0

    @property
    def compile_seconds(self) -> float:
        return sum(population.compile_seconds for population in self._populations.values())

    def run(self, plan: Sequence[tuple[Group, Trainer]], store: "_Store") -> None:
        """Runs the members that the store does not have, until it is stopped."""
        done = store.finished()
        todo = [
            (group, trainer, [m for m in group.members if m.number not in done])
            for group, trainer in plan
        ]
        new = {group.program for group, _, left in todo if left} - set(self._populations)
        self._bar.start(sum(_timesteps_of(group) * len(left) for group, _, left in todo))
        self._say(_announcement(todo, num_compilations=len(new)))
        for group, trainer, left in todo:
            if not left:
                continue
            if group.program not in self._populations:
                self._populations[group.program] = self._population(group, trainer)
            population = self._populations[group.program]
            for members, outcome, seconds in population.run(left, self._is_stopped):
                store.add(_tables(group, members, outcome, self._num_rows))
                self.run_seconds += seconds
                steps = _timesteps_of(group) * len(members)
                self._bar.advance(
                    steps,
                    steps_per_second=steps / seconds,
                    episode_return=float(np.mean(outcome.returns)),
                )

    def _population(self, group: Group, trainer: Trainer) -> "_Population":
        num_updates = group.config.num_updates
        train = functools.partial(
            train_member,
            trainer,
            num_updates,
            num_rows=min(self._num_rows, num_updates),
            num_episodes=self._num_episodes,
        )
        chunk = min(self._chunk or _LARGEST_CHUNK, max(len(group.members), self._least))
        return _Population(train, trainer.env, chunk, self._chunk is not None, self._say)


def _timesteps_of(group: Group) -> int:
    """Of one member."""
    return group.config.num_updates * group.config.batch_size


def _trainer_of(group: Group) -> Trainer:
    """Made for the longest episodes of its members: some algorithms need whole ones."""
    config, name = group.config, "max_steps_in_episode"
    swept = [m.env_params[name] for m in group.members if name in m.env_params]
    if swept:
        config = config.replace(env_params={**dict(config.env_params), name: max(swept)})
    return make_trainer(config)


class _Population:
    """Members that share a program, compiled once and run in chunks."""

    def __init__(
        self,
        train: Callable[..., Outcome],
        env: Environment,
        chunk: int,
        is_given: bool,
        say: Callable[[str], None],
    ) -> None:
        self._env = env
        self._say = say
        self._devices = jax.devices()
        self.compile_seconds = 0.0
        by_member = member_sharding(len(self._devices))
        # Each device has loops of its own: vmapped alone, evaluation would ask all of them at every
        # step whether the last episode has ended.
        spread = jax.shard_map(
            jax.vmap(train),
            mesh=by_member.mesh,
            in_specs=by_member.spec,
            out_specs=by_member.spec,
            check_vma=False,
        )
        self._program = jax.jit(spread, in_shardings=by_member, out_shardings=by_member)
        self._compiled: dict[int, Any] = {}
        self._chunk = self._rounded(chunk)
        self._is_given = is_given

    def run(
        self, waiting: Sequence[Member], is_stopped: Callable[[], bool]
    ) -> Iterator[tuple[Sequence[Member], Outcome, float]]:
        """Chunk by chunk: members, what became of them, and the seconds it took."""
        while waiting and not is_stopped():
            members = waiting[: self._chunk]
            try:
                program = self._compile(members)
                if program is None or len(members) > self._chunk:  # it was found not to fit
                    continue
                start = time.perf_counter()
                outcome = jax.device_get(program(*self._arguments(members)))
                seconds = time.perf_counter() - start
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or self._chunk <= len(self._devices):
                    raise
                self._shrink(self._chunk // 2)
                continue
            waiting = waiting[len(members) :]
            yield members, _first(len(members), outcome), seconds

    def _compile(self, members: Sequence[Member]) -> Any:
        if self._chunk not in self._compiled:
            start = time.perf_counter()
            compiled = self._program.lower(*self._arguments(members)).compile()
            self.compile_seconds += time.perf_counter() - start
            self._compiled[self._chunk] = compiled
            memory = _bytes_of(compiled)
            self._say(f"{self._chunk} members at once take {memory / 2**20:,.0f} MiB a device")
            limit = _memory_limit(self._devices[0])
            if limit is not None and memory > limit and not self._is_given and self._chunk > 1:
                self._shrink(int(self._chunk * limit / memory))
        return self._compiled.get(self._chunk)

    def _shrink(self, chunk: int) -> None:
        self._chunk = self._rounded(max(1, chunk), down=True)
        self._say(f"that does not fit; going on with {self._chunk} members at once")

    def _rounded(self, chunk: int, *, down: bool = False) -> int:
        """A whole number of members for each device."""
        count = len(self._devices)
        shares = chunk // count if down else math.ceil(chunk / count)
        return max(1, shares) * count

    def _arguments(self, members: Sequence[Member]) -> tuple[jax.Array, HParams, Any]:
        """Stacked, and filled up with the last member where a chunk has more lanes."""
        padded = [*members, *[members[-1]] * (self._chunk - len(members))]
        keys = jax.vmap(jax.random.key)(np.array([member.seed for member in padded]))
        hparams = _stacked([jax.tree.map(np.float32, member.hparams) for member in padded])
        # Stacked in the defaults' own dtypes: 9 and 9.8 are not two programs.
        dtypes = jax.tree.map(jnp.result_type, self._env.params)
        env_params = _stacked(
            [
                jax.tree.map(
                    np.asarray,
                    override_params(self._env.name, self._env.params, member.env_params),
                    dtypes,
                )
                for member in padded
            ]
        )
        return keys, hparams, env_params


def _first(count: int, outcome: Outcome) -> Outcome:
    """Of the members, without the lanes that fill up a chunk."""
    return jax.tree.map(lambda x: x[:count], outcome)


def _stacked(trees: Sequence[Any]) -> Any:
    def stack(*leaves: Any) -> np.ndarray:
        return np.stack([np.asarray(leaf, jnp.result_type(leaf)) for leaf in leaves])

    return jax.tree.map(stack, *trees)


def _bytes_of(compiled: Any) -> int:
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes


def _memory_limit(device: jax.Device) -> float | None:
    """Bytes that a program may take; None where nobody knows."""
    stats = device.memory_stats()
    if stats is not None and "bytes_limit" in stats:
        return _MEMORY_SHARE * stats["bytes_limit"]
    if device.platform == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return _MEMORY_SHARE * total / len(jax.devices())
    return None


def _tables(
    group: Group, members: Sequence[Member], outcome: Outcome, num_rows: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of the members and of their curves."""
    config = group.config
    num_rows = min(num_rows, config.num_updates)
    # Update i belongs to window i * num_rows // num_updates: the last one of window r.
    ends = [math.ceil((row + 1) * config.num_updates / num_rows) for row in range(num_rows)]
    summaries, curves = [], []
    for i, member in enumerate(members):
        label = {
            "member": member.number,
            "configuration": member.configuration,
            "seed": member.seed,
            **{name: _written(value) for name, value in member.row.items()},
        }
        returns = np.asarray(outcome.returns[i])
        failed_at = int(outcome.failed_at[i])
        summaries.append(
            {
                **label,
                "timesteps": config.num_updates * config.batch_size,
                "eval/return": float(returns.mean()),
                "eval/return_std": float(returns.std()),
                "failed_at": failed_at if failed_at >= 0 else None,
            }
        )
        curves.append(
            pd.DataFrame(
                {
                    **label,
                    "update": ends,
                    "timesteps": [end * config.batch_size for end in ends],
                    **{name: values[i] for name, values in sorted(outcome.curves.items())},
                }
            )
        )
    table = pd.DataFrame(summaries).astype({"failed_at": "Int64"})
    return table, pd.concat(curves, ignore_index=True)


def _written(value: Any) -> Any:
    """A value in a table's cell, or in JSON: numbers and words as they are, the rest as text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "item") and np.ndim(value) == 0:
        return value.item()
    if isinstance(value, tuple) and all(isinstance(x, int) for x in value):
        return "x".join(map(str, value))
    return repr(value)


_SWEEP = "sweep.json"
_PARTS = "parts"
RESULTS = ("members", "curves")


@dataclasses.dataclass
class _Store:
    """Finished members, in memory and, with a path, on disk.

    Each chunk is two files, renamed into place when they are whole, the members' last: what is
    there is complete, whatever moment a process was killed in.
    """

    path: Path | None
    parts: list[tuple[pd.DataFrame, pd.DataFrame]] = dataclasses.field(default_factory=list)

    @classmethod
    def open(cls, path: str | Path | None, description: dict[str, Any]) -> "_Store":
        """A new store, or the one of the same sweep that is there already."""
        if path is None:
            return cls(None)
        path = Path(path)
        wanted = json.loads(json.dumps(description))
        if (path / _SWEEP).is_file():
            found = json.loads((path / _SWEEP).read_text())
            if found != wanted:
                changed = [name for name in wanted if found.get(name) != wanted[name]]
                raise ConfigError(
                    f"run_dir must be new or hold this very sweep; {path} holds another "
                    f"({', '.join(changed)} differ). Choose another directory."
                )
        elif path.exists() and not (path.is_dir() and cls._is_unused(path)):
            raise ConfigError(
                f"run_dir must be new, empty or a sweep; {path} is something else. Choose another."
            )
        else:
            path.mkdir(parents=True, exist_ok=True)
            _write(path / _SWEEP, lambda file: file.write_text(json.dumps(wanted, indent=2)))
        (path / _PARTS).mkdir(exist_ok=True)
        store = cls(path)
        for file in sorted((path / _PARTS).glob("members-*.parquet")):
            curves = file.with_name(file.name.replace("members-", "curves-"))
            store.parts.append((pd.read_parquet(file), pd.read_parquet(curves)))
        return store

    @staticmethod
    def _is_unused(path: Path) -> bool:
        """Nothing is there, or what a sweep left that was killed as it began."""
        return all(file.name == _unfinished(path / _SWEEP).name for file in path.iterdir())

    def finished(self) -> set[int]:
        """Indices of the members that are there."""
        return {int(index) for members, _ in self.parts for index in members["member"]}

    def require(self, configurations: Sequence[Row], first: int) -> None:
        """Raises a `ConfigError` if members that are there have other values than these."""
        records = (r for members, _ in self.parts for r in members.to_dict("records"))
        for record in records:
            place = record["configuration"] - first
            if not 0 <= place < len(configurations):
                continue
            for name, value in configurations[place].items():
                found, asked = record[name], _written(value)
                if found != asked and not (asked is None and pd.isna(found)):
                    raise ConfigError(
                        f"run_dir must hold what the sampler asks for again; {self.path} has "
                        f"{name} = {found} in configuration {place + first}, and now it is "
                        f"{asked}: another version of the sampler? Choose another directory."
                    )

    def scores(self, configurations: Iterable[int]) -> list[float]:
        """Interquartile means over the seeds of finished configurations."""
        members = pd.concat([members for members, _ in self.parts])
        returns = members.groupby("configuration")["eval/return"]
        return [float(iqm(returns.get_group(number))) for number in configurations]

    def add(self, tables: tuple[pd.DataFrame, pd.DataFrame]) -> None:
        """Keeps a chunk."""
        self.parts.append(tables)
        if self.path is not None:
            first = int(tables[0]["member"].iloc[0])
            for name, table in reversed(list(zip(RESULTS, tables, strict=True))):
                _write(self.path / _PARTS / f"{name}-{first:06d}.parquet", table.to_parquet)

    def collect(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """All tables in the sweep's order; with a path, also written there as Parquet and CSV."""
        if not self.parts:
            return pd.DataFrame(), pd.DataFrame()
        order = {"members": ["member"], "curves": ["member", "update"]}
        tables = []
        for i, name in enumerate(RESULTS):
            table = pd.concat([part[i] for part in self.parts], ignore_index=True)
            table = table.sort_values(order[name], ignore_index=True)
            for column in table.columns:  # Parquet's columns are of one type
                kinds = {type(value) for value in table[column] if value is not None}
                if str in kinds and len(kinds) > 1:
                    table[column] = table[column].map(str)
            tables.append(table)
            if self.path is not None:
                _write(self.path / f"{name}.parquet", table.to_parquet)
                _write(self.path / f"{name}.csv", functools.partial(table.to_csv, index=False))
        return tables[0], tables[1]


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.unfinished")


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Whole or not at all."""
    unfinished = _unfinished(path)
    write(unfinished)
    os.replace(unfinished, path)


def _description(
    config: Config,
    hparams: HParams,
    proposals: Proposals,
    seeds: Sequence[int],
    **measured: int,
) -> dict[str, Any]:
    """What makes a sweep this very one."""

    def written(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _written(value) for name, value in values.items()}

    description = proposals.description
    if "configurations" in description:
        description = {"configurations": [written(row) for row in description["configurations"]]}
    return {
        "config": written(vars(config)),
        "hparams": written(vars(hparams)),
        **description,
        "seeds": list(seeds),
        **measured,
    }


def _announcement(
    todo: Sequence[tuple[Group, Trainer, Sequence[Member]]], *, num_compilations: int
) -> str:
    members = sum(len(group.members) for group, _, _ in todo)
    done = members - sum(len(left) for _, _, left in todo)
    steps = sum(_timesteps_of(group) * len(left) for group, _, left in todo)
    return (
        f"{members} members in {len(todo)} group{'s' * (len(todo) > 1)}"
        f"{f', {done} of them done already' if done else ''}: "
        f"{num_compilations} compilation{'s' * (num_compilations != 1)}, {steps:,} steps to go"
    )


def _silent(line: str) -> None:
    del line
