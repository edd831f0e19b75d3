"""The settings of a training in files: `Config` and `HParams` as JSON, and back."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ppo_jax.config import Config
from ppo_jax.errors import ConfigError, require_known
from ppo_jax.hparams import HParams


def settings_to_plain(config: Config, hparams: HParams) -> dict[str, Any]:
    """Returns settings as JSON, under "config" and "hparams"."""
    from ppo_jax.policy.saving import network_name

    record = {**vars(config), "network": network_name(config.network)}
    return {"config": to_plain(record), "hparams": to_plain(hparams.given())}


def settings_from_plain(
    record: Mapping[str, Any], path: Path, network: Any = None
) -> tuple[Config, HParams]:
    """Returns the settings in a record of JSON.

    Args:
      record: has "config" and "hparams".
      path: of the file, for errors.
      network: the module that was `Config.network`, unless that was the name of one of ours.

    Raises:
      ConfigError: the module is needed and not given, the environment or the algorithm is not
        registered, or a setting breaks a rule.
    """
    from ppo_jax.algorithms import get_algorithm
    from ppo_jax.policy.saving import network_from_name

    try:
        fields = dict(record["config"])
        values = dict(record["hparams"])
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path} must hold the settings of a run; it lacks {error}.") from error
    known = [field.name for field in dataclasses.fields(Config)]
    for name in fields:
        require_known(f"setting in {path}", name, known)
    _require_registered(fields, path.parent)
    fields["network"] = network_from_name(fields["network"], network)
    try:
        config = Config(**fields)
        kind = get_algorithm(config.algorithm).hparams_type
        for name in values:
            require_known("hyperparameter", name, kind.names())
        # A list has a value for each member of a population.
        lists = {name: np.array(x, np.float32) for name, x in values.items() if isinstance(x, list)}
        return config, kind(**{**values, **lists})
    except ConfigError as error:
        raise ConfigError(f"{path} breaks a rule: {error}") from error


def _require_registered(fields: Mapping[str, Any], path: Path) -> None:
    """Checks that the parts that a run names are known: a file never imports a module."""
    from ppo_jax import envs
    from ppo_jax.algorithms import ALGORITHMS

    for kind, known in {"env": envs.names(), "algorithm": ALGORITHMS}.items():
        if fields[kind] not in known:
            raise ConfigError(
                f"the {kind} of a run must be registered before the run is read; {path} "
                f"names {fields[kind]!r}. Import the module that registers it, or pass "
                "--import MODULE to the command."
            )


def to_plain(value: Any) -> Any:
    """Converts to the types of JSON: numbers of NumPy and JAX are unwrapped, NaN becomes null."""
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return to_plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        # JSON has no NaN, and readers other than Python's refuse it.
        return None if math.isnan(value) else str(value)
    return value
