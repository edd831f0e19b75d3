"""Finished members of a sweep, in memory and on disk."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ppo_jax.errors import ConfigError
from ppo_jax.population.search_space import Row
from ppo_jax.runs.report import iqm
from ppo_jax.runs.sweep_tables import to_cell

_SWEEP = "sweep.json"
_PARTS = "parts"
RESULTS = ("members", "curves")


@dataclasses.dataclass
class SweepStore:
    """Finished members of a sweep, in memory and, with a path, on disk.

    Each chunk is two files, which are renamed into place once they are complete; the file of the
    members is renamed last. So the files in place are complete, whenever a process was killed.
    """

    path: Path | None
    parts: list[tuple[pd.DataFrame, pd.DataFrame]] = dataclasses.field(default_factory=list)

    @classmethod
    def open(cls, path: str | Path | None, description: dict[str, Any]) -> "SweepStore":
        """Returns a new store, or the existing one of the same sweep."""
        if path is None:
            return cls(None)
        path = Path(path)
        wanted = json.loads(json.dumps(description))
        if (path / _SWEEP).is_file():
            found = json.loads((path / _SWEEP).read_text())
            if found != wanted:
                changed = [name for name in wanted if found.get(name) != wanted[name]]
                raise ConfigError(
                    f"run_dir must be new or hold the same sweep; {path} holds another "
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
        """Returns whether a directory is empty, or was left by a sweep that was killed at once."""
        return all(file.name == _unfinished(path / _SWEEP).name for file in path.iterdir())

    def finished(self) -> set[int]:
        """Returns the numbers of the finished members."""
        return {int(index) for members, _ in self.parts for index in members["member"]}

    def require(self, configurations: Sequence[Row], first: int) -> None:
        """Raises a `ConfigError` if finished members have other values than these."""
        records = (r for members, _ in self.parts for r in members.to_dict("records"))
        for record in records:
            place = record["configuration"] - first
            if not 0 <= place < len(configurations):
                continue
            for name, value in configurations[place].items():
                found, asked = record[name], to_cell(value)
                if found != asked and not (asked is None and pd.isna(found)):
                    raise ConfigError(
                        "run_dir must hold the configurations that the sampler asks for; "
                        f"{self.path} has {name} = {found} in configuration {place + first}, and "
                        f"now it is {asked}: another version of the sampler? Choose another "
                        "directory."
                    )

    def scores(self, configurations: Iterable[int]) -> list[float]:
        """Returns interquartile means over the seeds of finished configurations."""
        members = pd.concat([members for members, _ in self.parts])
        returns = members.groupby("configuration")["eval/return"]
        return [float(iqm(returns.get_group(number))) for number in configurations]

    def add(self, tables: tuple[pd.DataFrame, pd.DataFrame]) -> None:
        """Keeps the tables of a chunk."""
        self.parts.append(tables)
        if self.path is not None:
            # The first member's number makes the names unique, in any order of groups.
            first = int(tables[0]["member"].iloc[0])
            for name, table in reversed(list(zip(RESULTS, tables, strict=True))):
                _write(self.path / _PARTS / f"{name}-{first:06d}.parquet", table.to_parquet)

    def collect(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Returns all tables in the sweep's order and, with a path, writes them to disk."""
        if not self.parts:
            return pd.DataFrame(), pd.DataFrame()
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
                _write(self.path / f"{name}.parquet", table.to_parquet)
                _write(self.path / f"{name}.csv", functools.partial(table.to_csv, index=False))
        return tables[0], tables[1]


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.unfinished")


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file under a temporary name and renames it, so that it is complete or not there."""
    unfinished = _unfinished(path)
    write(unfinished)
    os.replace(unfinished, path)
