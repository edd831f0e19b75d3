"""The directory of a run: its files, and how they are written and read."""

import dataclasses
import json
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_jax.config import ALGORITHM_SETTINGS, Config
from ppo_jax.errors import ConfigError, require_known, require_seed
from ppo_jax.hparams import HParams
from ppo_jax.runs import files
from ppo_jax.runs.metrics_file import MetricsFile
from ppo_jax.runs.settings import (
    from_plain,
    settings_from_plain,
    settings_to_plain,
    to_plain,
)
from ppo_jax.runs.trackers import TENSORBOARD, WANDB

if TYPE_CHECKING:
    from ppo_jax.policy.policy import Policy
    from ppo_jax.runs.periodic_evaluation import Best

CONFIG = "config.json"
_SWEEP = "sweep.json"  # the name in `sweep_store`, which imports this module
METRICS = "metrics.jsonl"
METRICS_TABLE = "metrics.csv"
POLICY = "policy"
_OLD_POLICY = "policy.msgpack"
EVALUATION = "evaluation.json"
EVALUATIONS = "evaluations.jsonl"
BEST = "best"
CHECKPOINTS = "checkpoints"
START = "start"
_LOCK = ".lock"  # the name in `lock`, whose library the command line loads late
OPTIONS = (
    "member_devices",
    "checkpoint_every",
    "eval_episodes",
    "eval_every",
    "log_every",
    "log",
    "stop_at_return",
)
"""Arguments of `train` that do not change the training."""
_CHANGEABLE = ("total_timesteps", "num_devices")  # settings with which a run may continue
_LARGEST_CONFIG = 2**24  # bytes; a real file has a few thousand
EXPORT = "export"
PAGE = "report.html"
PLOTS = ("curves.png", "curves.svg")
_FILES = (METRICS, METRICS_TABLE, EVALUATION, EVALUATIONS, _OLD_POLICY, PAGE, *PLOTS)
_FOLDERS = (POLICY, BEST, CHECKPOINTS, START, TENSORBOARD, WANDB, EXPORT)


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """The files of one training run.

    `config.json` holds the settings of the run (`seeds` is a number, or a list if there is an axis
    of seeds), `metrics.jsonl` a row per logged update and seed, `policy` the trained policy
    (of all seeds, stacked), `evaluation.json` its returns, and `checkpoints` the last states of the
    training. A run that is evaluated while it trains has `evaluations.jsonl` and `best`, the best
    policy of each seed.
    """

    path: Path

    @staticmethod
    def check(path: str | Path, *, overwrite: bool) -> None:
        """Raises a `ConfigError` unless `path` is new or empty, or holds a run to overwrite."""
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise ConfigError(f"run_dir must be a directory; {path} is a file. Choose another.")
        # A run that was killed before it wrote its settings leaves only these.
        unused = (_LOCK, files.unfinished(path / CONFIG).name)
        is_used = path.exists() and any(entry.name not in unused for entry in path.iterdir())
        if is_used and not overwrite:
            raise ConfigError(
                f"run_dir must be new or empty; {path} holds files. Choose another, pass resume "
                "(ppo-jax resume) to continue that run, or overwrite (--overwrite) to replace it."
            )
        # Only runs are overwritten: a user's own folder may have names such as checkpoints, too.
        if is_used and not is_run(path):
            what = "a sweep" if (path / _SWEEP).exists() else "files that are no run"
            raise ConfigError(
                f"overwrite replaces the run in run_dir; {path} holds {what}. Choose another."
            )

    @classmethod
    def create(cls, path: str | Path, *, overwrite: bool) -> "RunDirectory":
        """Makes the directory. A run that `overwrite` replaces stays until `write_config`."""
        cls.check(path, overwrite=overwrite)
        from ppo_jax.runs.lock import writable

        path = Path(path)
        with writable(path):
            path.mkdir(parents=True, exist_ok=True)
        return cls(path)

    @staticmethod
    def holds_run(path: str | Path) -> bool:
        """Returns whether a run was started in the directory."""
        return (Path(path) / CONFIG).is_file()

    @classmethod
    def open(cls, path: str | Path) -> "RunDirectory":
        """Returns an existing run; a `ConfigError` if there is none."""
        path = Path(path)
        if (path / _SWEEP).is_file():
            raise ConfigError(
                f"{path} is a sweep and not a run. Its best policy is the run {path / 'best'}; "
                f"ppo-jax report {path} compares its configurations."
            )
        if not cls.holds_run(path):
            what = f"has no {CONFIG}" if path.is_dir() else "does not exist"
            raise ConfigError(f"a run's directory must hold {CONFIG}; {path} {what}.")
        return cls(path)

    def owned(self) -> AbstractContextManager[None]:
        """Owns the directory, as `lock.owned` does."""
        from ppo_jax.runs.lock import owned

        return owned(self.path, (CHECKPOINTS,))

    @property
    def metrics(self) -> MetricsFile:
        """The file of metrics."""
        return MetricsFile(self.path / METRICS)

    @property
    def evaluations(self) -> MetricsFile:
        """The file of the evaluations while the run trains."""
        return MetricsFile(self.path / EVALUATIONS)

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / CHECKPOINTS

    def write_table(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes the rows of metrics as CSV."""
        import pandas as pd

        files.write_text(self.path / METRICS_TABLE, pd.DataFrame(rows).to_csv(index=False))

    def read_settings(self) -> dict[str, Any]:
        """Reads the settings of the run as they are on the disk, and what it was made with."""
        names = ("config", "hparams", "resolved", "seeds", "made_with")
        record = self._read_record()
        return {name: record[name] for name in names if name in record}

    def write_config(
        self,
        config: Config,
        hparams: HParams,
        *,
        seeds: int | Iterable[int],
        options: Mapping[str, Any] | None = None,
        start_from: "Policy | None" = None,
    ) -> None:
        """Starts a run: removes the files of an earlier one, and writes settings and provenance.

        `config` has the settings as they were asked for, `resolved` the algorithm's settings with
        its defaults, and `made_with` versions, device, commit and time.

        Args:
          config: as it was asked for.
          hparams: complete hyperparameters.
          seeds: the seed, or the seeds of a run with an axis of seeds.
          options: arguments of the run that do not change its training.
          start_from: policy that the run starts from, which the directory keeps.
        """
        from ppo_jax.runs import provenance
        from ppo_jax.runs.policy_files import save_policy

        # Only files that a run writes: a user may keep notes in the directory. The settings stay
        # until others replace them, so that the directory is that of a run all the time.
        for name in _FILES:
            (self.path / name).unlink(missing_ok=True)
        for name in _FOLDERS:
            files.remove_directory(self.path / name)
        # Written before the settings. Otherwise a run that is killed in between would be resumed
        # from new parameters.
        if start_from is not None:
            save_policy(start_from, self.path / START)
        record = {
            **_settings(config, hparams),
            "seeds": seeds if isinstance(seeds, int) else list(seeds),
            "options": dict(options or {}),
            "made_with": provenance.describe(),
        }
        _write_json(self.path / CONFIG, record)

    def continue_config(
        self, config: Config, hparams: HParams, *, options: Mapping[str, Any], updates: int
    ) -> None:
        """Writes the settings of a resumed run, and adds the resumption to its record.

        Args:
          config: config of the run; `total_timesteps` and `num_devices` may differ.
          hparams: complete hyperparameters.
          options: arguments of the run that do not change its training.
          updates: updates that are done.
        """
        from ppo_jax.runs import provenance

        record = self._read_record()
        continued = [*record.get("continued", []), {**provenance.describe(), "updates": updates}]
        record |= {**_settings(config, hparams), "options": dict(options), "continued": continued}
        _write_json(self.path / CONFIG, record)

    def require_same_run(self, config: Config, hparams: HParams, seeds: int | list[int]) -> None:
        """Raises a `ConfigError` unless these settings continue the run.

        Args:
          config: may have another `total_timesteps` and another `num_devices`.
          hparams: complete hyperparameters.
          seeds: the seed, or the list of seeds.
        """
        record, asked = self._read_record(), to_plain(_settings(config, hparams))
        differences: dict[str, str] = {}
        # A setting that the file lacks is newer than the run, which had its default.
        found = {**to_plain(vars(Config())), **record["config"]}
        for group, before, now in (
            ("config", found, asked["config"]),
            ("hparams", record["hparams"], asked["hparams"]),
            # Settings that were left to the algorithm, whose defaults another version may change.
            ("resolved", record.get("resolved", {}), asked["resolved"]),
        ):
            for name in sorted(before if group == "resolved" else before.keys() | now.keys()):
                if name not in _CHANGEABLE and before.get(name) != now.get(name):
                    # `resolved` repeats settings of `config`, whose entry is the one that is shown.
                    change = f"{name} (was {before.get(name)}, now {now.get(name)})"
                    differences.setdefault(name, change)
        if record["seeds"] != seeds:
            differences["seeds"] = f"seeds (was {record['seeds']}, now {seeds})"
        if differences:
            raise ConfigError(
                f"a run continues with its own settings, apart from {' and '.join(_CHANGEABLE)}; "
                f"{self.path} differs in {', '.join(differences.values())}. Leave them as they "
                "were, or start another run."
            )

    def is_repeated_by(self, config: Config) -> bool:
        """Returns whether resuming with this config repeats the updates after the checkpoint."""
        found = self._read_record()["config"]
        return all(found.get(name) == getattr(config, name) for name in _CHANGEABLE)

    def warn_of_other_devices(self, config: Config) -> None:
        """Warns the caller of `train` if a run continues on another number of devices."""
        before = self._read_record()["config"].get("num_devices")
        if before != config.num_devices:
            warnings.warn(
                f"{self.path} was made with num_devices {before}, now {config.num_devices}. The "
                "training continues, but with other random numbers, because each device draws "
                "its own.",
                RuntimeWarning,
                stacklevel=3,
            )

    def read_config(self, network: Any = None) -> tuple[Config, HParams]:
        """Reads the settings of the run.

        Args:
          network: the module that was `Config.network`, unless that was a name.

        Raises:
          ConfigError: the module is needed and not given, or a part that the run names is not
            registered.
        """
        return settings_from_plain(self._read_record(), self.path / CONFIG, network)

    def read_options(self) -> dict[str, Any]:
        """Reads the arguments of the run that do not change its training."""
        options = self._read_record().get("options", {})
        if not isinstance(options, dict):
            raise ConfigError(
                f"the options in {self.path / CONFIG} must be a mapping; got {options}."
            )
        for name in options:
            require_known(f"option in {self.path / CONFIG}", name, OPTIONS)
        return options

    def read_seeds(self) -> int | list[int]:
        """Reads the seed of the run, or the list of its seeds."""
        seeds: Any = self._read_record().get("seeds")
        for seed in seeds if isinstance(seeds, list) and seeds else [seeds]:
            require_seed(seed)
        return seeds

    def _read_record(self) -> dict[str, Any]:
        path = self.path / CONFIG
        # A file of this size is none of ours, and must not fill the memory.
        if path.stat().st_size > _LARGEST_CONFIG:
            raise ConfigError(f"{path} must hold the settings of a run; it is too large.")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} must hold JSON; it is damaged: {error}.") from error
        groups = ("config", "hparams")
        if not isinstance(record, dict) or not all(isinstance(record.get(x), dict) for x in groups):
            raise ConfigError(f"{path} must hold the settings of a run; it holds something else.")
        return record

    def write_policy(self, policy: "Policy") -> None:
        """Writes the trained policy. The evaluation of an earlier one is removed."""
        from ppo_jax.runs.policy_files import save_policy

        save_policy(policy, self.path / POLICY)
        (self.path / EVALUATION).unlink(missing_ok=True)

    def has_start(self) -> bool:
        """Returns whether the run started from a policy, and not from new parameters."""
        return (self.path / START).is_dir()

    def read_start(self, network: Any = None) -> "Policy":
        """Reads the policy that the run started from."""
        from ppo_jax.runs.policy_files import load_policy

        return load_policy(self.path / START, network)

    def write_best(self, best: "Best") -> None:
        """Writes the best policy of each seed so far."""
        from ppo_jax.runs.policy_files import save_policy

        assert best.policy is not None, "there was an evaluation"
        notes = to_plain({"returns": best.returns, "updates": best.updates})
        save_policy(best.policy, self.path / BEST, notes)

    def read_best(self, network: Any = None) -> "Best":
        """Reads the best policy of each seed; a `ConfigError` if the run has none."""
        import numpy as np

        from ppo_jax.runs.periodic_evaluation import Best
        from ppo_jax.runs.policy_files import load_policy_and_notes

        path = self.path / BEST
        if not path.is_dir():
            raise ConfigError(
                f"a run has a best policy if it was evaluated while it trained; {self.path} has "
                "none. Train with eval_every (--eval-every)."
            )
        policy, notes = load_policy_and_notes(path, network)
        returns = np.array(from_plain(notes["returns"]))
        return Best(policy, returns, np.array(notes["updates"]))

    def read_policy(self, network: Any = None) -> "Policy":
        """Reads the trained policy; a `ConfigError` if the run has none yet."""
        from ppo_jax.runs.policy_files import load_policy

        if (self.path / _OLD_POLICY).is_file():
            raise ConfigError(
                f"a policy must be in {POLICY}/; {self.path / _OLD_POLICY} was written by an "
                "earlier version, which reads it. Train the run again for this version."
            )
        if not (self.path / POLICY).is_dir():
            raise ConfigError(f"a finished run must hold {POLICY}; {self.path} does not.")
        return load_policy(self.path / POLICY, network)

    def write_evaluation(self, record: Mapping[str, Any]) -> None:
        """Writes the result of an evaluation."""
        _write_json(self.path / EVALUATION, record)


def is_run(path: Path) -> bool:
    """Returns whether a directory is that of a run, and not of a sweep."""
    try:
        RunDirectory.open(path)._read_record()
    except ConfigError:
        return False
    return True


def _settings(config: Config, hparams: HParams) -> dict[str, Any]:
    from ppo_jax.resolve import complete_config

    complete = complete_config(config)
    resolved = {name: getattr(complete, name) for name in ALGORITHM_SETTINGS}
    return {**settings_to_plain(config, hparams), "resolved": resolved}


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    files.write_text(path, json.dumps(to_plain(record), indent=2) + "\n")
