"""The settings of a training in files: `Config` and `HParams` as JSON, and back."""

import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ppo_jax.config import LR_SCHEDULES, NETWORKS, Config
from ppo_jax.defaults import OPTIMIZERS
from ppo_jax.errors import ConfigError, require_known, suggestion
from ppo_jax.hparams import HParams

_MODULE = "a module: "  # stands before the name of a user's network, which a file cannot hold


def network_name(network: Any) -> str:
    """Returns the name of a network in a file, or a note that it is a module without a name.

    >>> import flax.linen as nn
    >>> network_name(nn.Dense(2))
    'a module: Dense'
    """
    return network if isinstance(network, str) else f"{_MODULE}{type(network).__name__}"


def network_from_name(name: str, network: Any) -> Any:
    """Returns the network that a file names, or `network`, the user's module without a name.

    Raises:
      ConfigError: a user's module is needed and not given.
    """
    # Another type than text is refused by `Config`.
    if not isinstance(name, str) or not name.startswith(_MODULE):
        return name if network is None or name in NETWORKS else network
    if network is None:
        raise ConfigError(
            f"a file does not hold the code of a network; it names {name}. Pass that module in "
            "Python, as network=…, or train with a name that register_network gave to it."
        )
    return network


def settings_to_plain(config: Config, hparams: HParams) -> dict[str, Any]:
    """Returns settings as JSON, under "config" and "hparams"."""
    record = {**vars(config), "network": network_name(config.network)}
    return {"config": to_plain(record), "hparams": to_plain(hparams.given())}


def settings_from_plain(
    record: Mapping[str, Any], path: Path, network: Any = None
) -> tuple[Config, HParams]:
    """Returns the settings in a record of JSON.

    Args:
      record: has "config" and "hparams".
      path: of the file, for errors.
      network: the module that was `Config.network`, unless that was a name.

    Raises:
      ConfigError: the module is needed and not given, a part that the run names is
        not registered, or a setting breaks a rule.
    """
    from ppo_jax.algorithms import get_algorithm

    try:
        fields = dict(from_plain(record["config"]))
        values = dict(from_plain(record["hparams"]))
        fields["env"], fields["algorithm"], fields["network"]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} must hold the settings of a run; it lacks {error}.") from error
    known = [field.name for field in dataclasses.fields(Config)]
    for name in fields:
        require_known(f"setting in {path}", name, known)
    # A module that is given takes the place of a name.
    named = fields if network is None else {**fields, "network": None}
    require_registered(named, path.parent)
    fields["network"] = network_from_name(fields["network"], network)
    try:
        config = Config(**fields)
        kind = get_algorithm(config.algorithm).hparams_type
        for name in values:
            require_known("hyperparameter", name, kind.names())
        # A list has a value for each member of a population.
        lists = {name: _array(name, x) for name, x in values.items() if isinstance(x, list)}
        return config, kind(**{**values, **lists})
    except ConfigError as error:
        raise ConfigError(f"{path} breaks a rule: {error}") from error


def _array(name: str, values: list[Any]) -> np.ndarray:
    try:
        # A number beyond single precision becomes infinite, which the range refuses or allows.
        with np.errstate(over="ignore"):
            return np.array(values, np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{name} must be numbers; got {values}.") from error


def require_registered(fields: Mapping[str, Any], path: Path) -> None:
    """Checks that the parts that a run names are known: a file never imports a module.

    Args:
      fields: settings by name; those that are missing or None have a default.
      path: of the run, for errors.

    Raises:
      ConfigError: a part is not registered.
    """
    from ppo_jax import envs
    from ppo_jax.algorithms import ALGORITHMS
    from ppo_jax.envs.wrappers import WRAPPERS
    from ppo_jax.policy.distributions import BOX_HEADS

    tables: dict[str, Iterable[str]] = {
        "env": envs.names(),
        "algorithm": ALGORITHMS,
        "network": NETWORKS,
        "action_distribution": BOX_HEADS,
        "optimizer": OPTIMIZERS,
        "lr_schedule": LR_SCHEDULES,
        "wrapper": WRAPPERS,
    }
    named = [(kind, fields.get(kind)) for kind in tables]
    named += [("wrapper", name) for name, *_ in _pairs(fields.get("wrappers"))]
    for kind, name in named:
        if name is None or (isinstance(name, str) and _is_registered(kind, name, tables[kind])):
            continue
        raise ConfigError(
            f"the {kind} of a run must be registered before the run is read; {path} names "
            f"{name!r}. Import the module that registers it, or pass --import MODULE to the "
            f"command.{suggestion(str(name), tables[kind])}"
        )


def _is_registered(kind: str, name: str, table: Iterable[str]) -> bool:
    from ppo_jax import envs

    if kind == "env":
        module = envs.imported_by(name)
        return envs.is_name(name) and (module is None or module in sys.modules)
    return name in table or (kind == "network" and name.startswith(_MODULE))


def _pairs(value: Any) -> list[Any]:
    """Returns the pairs of a file; `Config` refuses anything else."""
    if not isinstance(value, list):
        return []
    return [pair for pair in value if isinstance(pair, list) and pair]


def from_plain(value: Any) -> Any:
    """Returns a value that `to_plain` wrote, with the infinities that JSON does not have.

    >>> from_plain(to_plain({"max_grad_norm": math.inf}))
    {'max_grad_norm': inf}
    """
    if isinstance(value, dict):
        return {key: from_plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    return float(value) if value in ("inf", "-inf") else value


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
