"""The directory of a run: its files, and how they are written and read."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_jax.config import ALGORITHM_SETTINGS, Config
from ppo_jax.errors import ConfigError
from ppo_jax.hparams import HParams
from ppo_jax.runs import files
from ppo_jax.runs.settings import settings_from_plain, settings_to_plain, to_plain

if TYPE_CHECKING:
    from ppo_jax.policy.policy import Policy

CONFIG = "config.json"
METRICS = "metrics.jsonl"
POLICY = "policy.msgpack"
EVALUATION = "evaluation.json"
_FILES = (CONFIG, METRICS, POLICY, EVALUATION)


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """The files of one training run.

    `config.json` holds the settings of the run (`seeds` is a number, or a list if there is an axis
    of seeds), `metrics.jsonl` a row per logged update and seed, `policy.msgpack` the trained policy
    (of all seeds, stacked), and `evaluation.json` its returns.
    """

    path: Path

    @staticmethod
    def check(path: str | Path, *, overwrite: bool) -> None:
        """Raises a `ConfigError` unless `path` is free, empty, or may be overwritten."""
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise ConfigError(f"run_dir must be a directory; {path} is a file. Choose another.")
        if path.exists() and any(path.iterdir()) and not overwrite:
            raise ConfigError(
                f"run_dir must be new or empty; {path} holds files. "
                "Choose another, or pass overwrite (--overwrite) to replace that run."
            )

    @classmethod
    def create(cls, path: str | Path, *, overwrite: bool) -> "RunDirectory":
        """Makes the directory. A run that `overwrite` replaces stays until `write_config`."""
        cls.check(path, overwrite=overwrite)
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"run_dir must be a directory that can be made; {path} cannot: {error.strerror}. "
                "Choose another."
            ) from error
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> "RunDirectory":
        """Returns an existing run; a `ConfigError` if there is none."""
        path = Path(path)
        if (path / "sweep.json").is_file():
            raise ConfigError(
                f"{path} is a sweep and not a run. Its best policy is the run {path / 'best'}; "
                f"ppo-jax report {path} compares its configurations."
            )
        if not (path / CONFIG).is_file():
            raise ConfigError(f"a run's directory must hold {CONFIG}; {path} does not.")
        return cls(path)

    def write_config(self, config: Config, hparams: HParams, *, seeds: int | Iterable[int]) -> None:
        """Writes the settings that start the same run again, and what it was made with.

        It starts a run: files of an earlier one are removed.

        `config` has the settings as they were asked for, `resolved` the algorithm's settings with
        its defaults, and `made_with` versions, device, commit and time.

        Args:
          config: as it was asked for.
          hparams: complete hyperparameters.
          seeds: the seed, or the seeds of a run with an axis of seeds.
        """
        from ppo_jax.resolve import complete_config
        from ppo_jax.runs import provenance

        # Only files that a run writes: a user may keep notes in the directory.
        for name in _FILES:
            (self.path / name).unlink(missing_ok=True)
        complete = complete_config(config)
        record = {
            **settings_to_plain(config, hparams),
            "resolved": {name: getattr(complete, name) for name in ALGORITHM_SETTINGS},
            "seeds": seeds if isinstance(seeds, int) else list(seeds),
            "made_with": provenance.describe(),
        }
        _write_json(self.path / CONFIG, record)

    def read_config(self, network: Any = None) -> tuple[Config, HParams]:
        """Reads the settings of the run.

        Args:
          network: the module that was `Config.network`, unless that was the name of one of ours.

        Raises:
          ConfigError: the module is needed and not given, or the environment or the algorithm is
            not registered.
        """
        return settings_from_plain(self._read_record(), self.path / CONFIG, network)

    def read_seeds(self) -> int | list[int]:
        """Reads the seed of the run, or the list of its seeds."""
        return self._read_record()["seeds"]

    def _read_record(self) -> dict[str, Any]:
        try:
            return json.loads((self.path / CONFIG).read_text())
        except ValueError as error:
            raise ConfigError(
                f"{self.path / CONFIG} must hold JSON; it is damaged: {error}."
            ) from error

    def append_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows to the file of metrics."""
        # Opened for each piece, so that a killed process loses no rows that were written.
        with (self.path / METRICS).open("a") as file:
            file.writelines(json.dumps(to_plain(row)) + "\n" for row in rows)

    def write_policy(self, policy: "Policy") -> None:
        """Writes the trained policy."""
        from ppo_jax.policy.saving import save_policy

        save_policy(policy, self.path / POLICY)

    def read_policy(self, network: Any = None) -> "Policy":
        """Reads the trained policy; a `ConfigError` if the run has none yet."""
        from ppo_jax.policy.saving import load_policy

        if not (self.path / POLICY).is_file():
            raise ConfigError(f"a finished run must hold {POLICY}; {self.path} does not.")
        return load_policy(self.path / POLICY, network)

    def write_evaluation(self, record: Mapping[str, Any]) -> None:
        """Writes the result of an evaluation."""
        _write_json(self.path / EVALUATION, record)


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    files.write_text(path, json.dumps(to_plain(record), indent=2) + "\n")
