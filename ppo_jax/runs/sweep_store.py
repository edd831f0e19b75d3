"""Finished members of a sweep, in memory and on disk."""

import contextlib
import dataclasses
import functools
import json
import math
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ppo_jax.config import Config
from ppo_jax.errors import ConfigError
from ppo_jax.population.plan import Member
from ppo_jax.population.search_space import Row
from ppo_jax.runs import files
from ppo_jax.runs.directory import CHECKPOINTS, EVALUATION, RunDirectory
from ppo_jax.runs.lock import LOCK, owned, writable
from ppo_jax.runs.report import iqm
from ppo_jax.runs.settings import from_plain
from ppo_jax.runs.sweep_tables import to_cell

if TYPE_CHECKING:
    from ppo_jax.policy.policy import Policy
    from ppo_jax.runs.chunk_checkpoints import ChunkCheckpoints

SWEEP = "sweep.json"
_PARTS = "parts"
_BEST = "best"
_WORKER = "worker"
_FOLDERS = (_PARTS, CHECKPOINTS)
RESULTS = ("members", "curves")


@dataclasses.dataclass
class SweepStore:
    """Finished members of a sweep, in memory and, with a path, on disk.

    Each chunk is two files, which are renamed into place once they are complete; the file of the
    members is renamed last. So the files in place are complete, whenever a process was killed.
    """

    path: Path | None
    parts: list[tuple[pd.DataFrame, pd.DataFrame]] = dataclasses.field(default_factory=list)
    best_policy: "Policy | None" = None
    best_score: float = -math.inf
    checkpoints: "ChunkCheckpoints | None" = None
    """States of the members that are training; None without a path."""
    unwritten: dict[str, str] = dataclasses.field(default_factory=dict)
    """Reasons why files could not be written, by name."""
    _waiting: list[tuple[pd.DataFrame, pd.DataFrame]] = dataclasses.field(default_factory=list)

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls, path: str | Path | None, description: dict[str, Any], *, checkpoint_every: float = 0.0
    ) -> "Iterator[SweepStore]":
        """Opens a new store, or the existing one of the same sweep, and owns its directory.

        Args:
          path: directory of the sweep; None keeps everything in memory alone.
          description: everything that tells one sweep from another, as JSON.
          checkpoint_every: seconds between two checkpoints of the members that are training.

        Raises:
          ConfigError: the directory holds something else, cannot be written, or belongs to another
            process.
        """
        if path is None:
            yield cls(None)
            return
        path = Path(path)
        # Checked before it is locked, because locking removes temporary files from the directory.
        if path.exists() and not cls._is_usable(path):
            raise ConfigError(
                f"run_dir must be new, empty or a sweep; {path} is something else. Choose another."
            )
        with writable(path):
            path.mkdir(parents=True, exist_ok=True)
        # Owned before anything is read: another process may be writing it.
        with owned(path, _FOLDERS):
            store = cls._read(path, description, checkpoint_every)
            assert store.checkpoints is not None, "there is a path"
            try:
                yield store
            finally:
                # Waits, because the thread that writes the last checkpoint ends with the process.
                error = store.checkpoints.finish()
                if error is not None:
                    store.unwritten[CHECKPOINTS] = error

    @staticmethod
    def describe(path: Path) -> dict[str, Any]:
        """Returns the description of the sweep in a directory.

        Raises:
          ConfigError: there is none.
        """
        if not (path / SWEEP).is_file():
            raise ConfigError(f"there must be a sweep in {path}; found none. Name its directory.")
        try:
            description = json.loads((path / SWEEP).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path / SWEEP} cannot be read: {error}.") from error
        if not isinstance(description, dict):
            raise ConfigError(f"{path / SWEEP} must hold a mapping; it is damaged.")
        return description

    @staticmethod
    def _is_usable(path: Path) -> bool:
        """Returns whether a path is a sweep, an empty directory, or left by a killed process."""
        if not path.is_dir():
            return False
        unused = (files.unfinished(path / SWEEP).name, LOCK)
        return (path / SWEEP).is_file() or all(file.name in unused for file in path.iterdir())

    @classmethod
    def _read(
        cls, path: Path, description: dict[str, Any], checkpoint_every: float
    ) -> "SweepStore":
        """Reads the store in a directory, or makes it there."""
        from ppo_jax.runs.chunk_checkpoints import ChunkCheckpoints

        wanted = to_json(description)
        if (path / SWEEP).is_file():
            found = cls.describe(path)
            if found != wanted:
                # A name that is in one of them alone differs, such as `shard`.
                names = sorted(wanted.keys() | found.keys())
                changed = [name for name in names if found.get(name) != wanted.get(name)]
                raise ConfigError(
                    f"run_dir must be new or hold the same sweep; {path} holds another "
                    f"({', '.join(changed)} differ). Choose another directory."
                )
        with writable(path):
            if not (path / SWEEP).is_file():
                files.write_text(path / SWEEP, json.dumps(wanted, indent=2))
            (path / _PARTS).mkdir(exist_ok=True)
        store = cls(path, checkpoints=ChunkCheckpoints(path / CHECKPOINTS, checkpoint_every))
        for file in sorted((path / _PARTS).glob("members-*.parquet")):
            curves = file.with_name(file.name.replace("members-", "curves-"))
            store.parts.append((pd.read_parquet(file), pd.read_parquet(curves)))
        store._read_best()
        return store

    def finished(self) -> set[int]:
        """Returns the numbers of the finished members."""
        return {int(index) for members, _ in self.parts for index in members["member"]}

    def worker(self) -> str:
        """Returns the unique name of this store's worker, which the directory keeps."""
        if self.path is None:
            return uuid.uuid4().hex
        file = self.path / _WORKER
        if not file.is_file():
            with writable(self.path):
                files.write_text(file, uuid.uuid4().hex)
        return file.read_text()

    def require(self, configurations: Mapping[int, Row]) -> None:
        """Raises a `ConfigError` if finished members have other values than these."""
        records = (r for members, _ in self.parts for r in members.to_dict("records"))
        for record in records:
            number = record["configuration"]
            for name, value in configurations.get(number, {}).items():
                found, asked = record[name], to_cell(value)
                if found != asked and not (asked is None and pd.isna(found)):
                    raise ConfigError(
                        "run_dir must hold the configurations that the sampler asks for; "
                        f"{self.path} has {name} = {found} in configuration {number}, and "
                        f"now it is {asked}: another version of the sampler? Choose another "
                        "directory."
                    )

    def scores(self, configurations: Iterable[int]) -> list[float]:
        """Returns interquartile means over the seeds of finished configurations."""
        members = pd.concat([members for members, _ in self.parts])
        returns = members.groupby("configuration")["eval/return"]
        return [float(iqm(returns.get_group(number))) for number in configurations]

    def adopt(self, other: "SweepStore") -> None:
        """Adds the members of another store that this one does not have, and a better policy."""
        known = self.finished()
        for tables in other.parts:
            new = [table[~table["member"].isin(known)] for table in tables]
            if len(new[0]):
                self.add((new[0], new[1]))
        if other.best_score > self.best_score:
            self.best_policy, self.best_score = other.best_policy, other.best_score
            self._attempt(_BEST, lambda: self._copy_best(other))

    def _copy_best(self, other: "SweepStore") -> None:
        assert self.path is not None, "it is on disk"
        assert other.path is not None, "it is on disk"
        unfinished = files.unfinished(self.path / _BEST)
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(other.path / _BEST, unfinished)
        files.replace_directory(unfinished, self.path / _BEST)

    def add(self, tables: tuple[pd.DataFrame, pd.DataFrame]) -> None:
        """Keeps the tables of a chunk."""
        self.parts.append(tables)
        if self.path is not None:
            self._waiting.append(tables)
            self._write_waiting()
            # Only once the tables are on disk: until then the checkpoint restores the members.
            if self.checkpoints is not None and not self._waiting:
                self.checkpoints.clear()

    def _write_waiting(self) -> None:
        """Writes the tables that are not on disk; a full disk leaves them for the next time."""
        assert self.path is not None
        folder = self.path / _PARTS
        # The first failure ends the loop; the rest is tried again with the next chunk.
        while self._waiting and self._attempt(
            _PARTS, lambda: _write_part(folder, self._waiting[0])
        ):
            self._waiting.pop(0)

    def _attempt(self, name: str, write: Callable[[], Any]) -> bool:
        """Writes a file; returns whether it could be, and keeps the reason if not."""
        try:
            write()
        except OSError as error:
            reason = error.strerror or str(error)
            message = f"{name} in {self.path} could not be written: {reason}"
            if name not in self.unwritten:
                warnings.warn(f"{message}. The sweep goes on.", RuntimeWarning, stacklevel=4)
            self.unwritten[name] = message
            return False
        self.unwritten.pop(name, None)
        return True

    def offer_policy(
        self, policy: "Policy", score: float, *, member: Member, config: Config
    ) -> None:
        """Keeps a policy if it is better than the best so far.

        On disk it is a run of its own, in the folder `best`, so that everything that reads runs
        reads it: `ppo_jax.load(run_dir / "best")`.

        Args:
          policy: the trained policy.
          score: its mean return.
          member: of the sweep.
          config: of the member's group.
        """
        if not score > self.best_score:  # a NaN is no score
            return
        self.best_policy, self.best_score = policy, score
        if self.path is None:
            return
        config = config.replace(env_params={**dict(config.env_params), **member.env_params})
        self._attempt(_BEST, lambda: self._write_best(policy, score, member, config))

    def _write_best(self, policy: "Policy", score: float, member: Member, config: Config) -> None:
        assert self.path is not None
        unfinished, best = files.unfinished(self.path / _BEST), self.path / _BEST
        directory = RunDirectory.create(unfinished, overwrite=True)
        directory.write_config(config, member.hparams, seeds=member.seed)
        directory.write_policy(policy)
        directory.write_evaluation({"eval/return": score, "member": member.number})
        files.replace_directory(unfinished, best)

    def _read_best(self) -> None:
        """Reads the best policy so far."""
        assert self.path is not None
        best = self.path / _BEST
        if (best / EVALUATION).is_file():
            directory = RunDirectory.open(best)
            record = json.loads((best / EVALUATION).read_text())
            self.best_score = from_plain(record)["eval/return"]
            with contextlib.suppress(ConfigError):  # a network of the user's own is not in the file
                self.best_policy = directory.read_policy()

    def collect(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Returns all tables in the sweep's order and, with a path, writes them to disk."""
        if not self.parts:
            return pd.DataFrame(), pd.DataFrame()
        if self.path is not None:
            self._write_waiting()
        order = {"members": ["member"], "curves": ["member", "update"]}
        tables = []
        for i, name in enumerate(RESULTS):
            table = pd.concat([part[i] for part in self.parts], ignore_index=True)
            table = table.sort_values(order[name], ignore_index=True)
            for column in table.columns:  # a column of a Parquet file has a single type
                kinds = {type(value) for value in table[column] if value is not None}
                if str in kinds and len(kinds) > 1:
                    table[column] = table[column].map(str)
            tables.append(table)
            if self.path is not None:
                self._attempt(name, functools.partial(_write_table, self.path, name, table))
        return tables[0], tables[1]


def to_json(description: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a description as it is read back from JSON, with NumPy scalars as numbers."""
    return json.loads(json.dumps(description, default=lambda number: number.item()))


def _write_part(folder: Path, tables: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    """Writes the tables of a chunk, those of the members last."""
    # The first member's number makes the names unique, in any order of groups.
    first = int(tables[0]["member"].iloc[0])
    for name, table in reversed(list(zip(RESULTS, tables, strict=True))):
        files.write_file(folder / f"{name}-{first:06d}.parquet", table.to_parquet)


def _write_table(folder: Path, name: str, table: pd.DataFrame) -> None:
    files.write_file(folder / f"{name}.parquet", table.to_parquet)
    files.write_file(folder / f"{name}.csv", functools.partial(table.to_csv, index=False))
