"""A run's directory: what is in it, and how it is written and read."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ppo_jax.config import MODULE, Config, ConfigError, HParams, named_network

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

    `config.json` holds what was asked for (`seeds` is a number, or a list if there is an axis
    of seeds), `metrics.jsonl` a row per logged update and seed,
    `policy.msgpack` the trained policy (of all seeds, stacked), `evaluation.json` its returns.
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
        """Makes the directory; with `overwrite`, only the files of a run make way."""
        cls.check(path, overwrite=overwrite)
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            (path / name).unlink(missing_ok=True)
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> "RunDirectory":
        """An existing run; `ConfigError` if there is none."""
        path = Path(path)
        if not (path / CONFIG).is_file():
            raise ConfigError(f"a run's directory must hold {CONFIG}; {path} does not.")
        return cls(path)

    def write_config(self, config: Config, hparams: HParams, *, seeds: int | Iterable[int]) -> None:
        """Writes what is needed to start the same run again."""
        fields = dict(vars(config))
        if not isinstance(config.network, str):
            fields["network"] = f"{MODULE}{type(config.network).__name__}"
        record = {
            "config": fields,
            "hparams": {k: v for k, v in vars(hparams).items() if v is not None},
            "seeds": seeds if isinstance(seeds, int) else list(seeds),
        }
        _write_json(self.path / CONFIG, record)

    def read_config(self, network: Any = None) -> tuple[Config, HParams]:
        """What `write_config` wrote.

        Args:
          network: the module that was `Config.network`, where it was not one of ours by name.

        Raises:
          ConfigError: the module is needed and not given.
        """
        record = json.loads((self.path / CONFIG).read_text())
        fields = dict(record["config"])
        fields["network"] = named_network(fields["network"], network)
        return Config(**fields), HParams(**record["hparams"])

    def read_seeds(self) -> int | list[int]:
        """The seed, or the seeds, that `write_config` wrote."""
        return json.loads((self.path / CONFIG).read_text())["seeds"]

    def append_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows to the metrics' file."""
        with (self.path / METRICS).open("a") as file:
            file.writelines(json.dumps(_plain(row)) + "\n" for row in rows)

    def write_policy(self, policy: "Policy") -> None:
        """Writes the policy."""
        from ppo_jax.policy.saving import save_policy

        save_policy(policy, self.path / POLICY)

    def read_policy(self, network: Any = None) -> "Policy":
        """What `write_policy` wrote; `ConfigError` if the run has none yet."""
        from ppo_jax.policy.saving import load_policy

        if not (self.path / POLICY).is_file():
            raise ConfigError(f"a finished run must hold {POLICY}; {self.path} does not.")
        return load_policy(self.path / POLICY, network)

    def write_evaluation(self, record: Mapping[str, Any]) -> None:
        """Writes the result of an evaluation."""
        _write_json(self.path / EVALUATION, record)


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(_plain(record), indent=2) + "\n")


def _plain(value: Any) -> Any:
    """JSON's types: NumPy's and JAX's numbers unwrapped, NaN and infinities as null or text."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
