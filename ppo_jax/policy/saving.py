"""A policy in one file, and the names of networks in files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import serialization

from ppo_jax.envs import spaces
from ppo_jax.errors import ConfigError
from ppo_jax.ops.running_stats import RunningStats
from ppo_jax.policy.policy import Policy
from ppo_jax.policy.spec import PolicySpec

_MODULE = "a module: "  # stands before the name of a user's network, which a file cannot hold


def network_name(network: Any) -> str:
    """Returns the name of a network in a file: one of ours, or a note that it is a module.

    >>> network_name(nn.Dense(2))
    'a module: Dense'
    """
    return network if isinstance(network, str) else f"{_MODULE}{type(network).__name__}"


def network_from_name(name: str, network: Any) -> Any:
    """Returns the network that a file names: one of ours, or `network`, the user's module.

    Raises:
      ConfigError: a user's module is needed and not given.
    """
    if not name.startswith(_MODULE):
        return name
    if network is None:
        raise ConfigError(
            f"a file does not hold the code of a network; it names {name}. Pass that module in "
            "Python, as network=…."
        )
    return network


def save_policy(policy: Policy, path: Path) -> None:
    """Writes parameters, statistics and spec of a policy into one msgpack file."""
    path.write_bytes(to_bytes(policy))


def to_bytes(policy: Policy) -> bytes:
    """Returns the content of a policy's file."""
    stats = None
    if policy.obs_stats is not None:
        # Keys of msgpack maps are text; arrays without statistics are left out.
        stats = {str(i): x._asdict() for i, x in enumerate(policy.obs_stats) if x is not None}
    record = {
        "spec": json.dumps(_spec_to_plain(policy.spec)),
        "params": policy.params,
        "obs_stats": stats,
    }
    return serialization.msgpack_serialize(record)


def load_policy(path: Path, network: nn.Module | None = None) -> Policy:
    """Reads a file of `save_policy`; needs no environment.

    Args:
      path: the file.
      network: the module that was `Config.network`, unless that was the name of one of ours.

    Raises:
      ConfigError: the module is needed and not given, or the file is damaged.
    """
    try:
        record = serialization.msgpack_restore(path.read_bytes())
        plain = json.loads(record["spec"])
    except Exception as error:  # msgpack and its extensions raise whatever the bytes lead to
        raise ConfigError(
            f"{path} must hold a policy; it is damaged or something else: {error}."
        ) from error
    spec = _spec_from_plain(plain, network)
    obs_stats = None
    if record["obs_stats"] is not None:
        stats = {int(i): RunningStats(**x) for i, x in record["obs_stats"].items()}
        count = len(spaces.leaves(spec.observation_space))
        obs_stats = tuple(stats.get(i) for i in range(count))
    # msgpack gives NumPy arrays, which every jitted call would transfer to the device again.
    params, obs_stats = jax.tree.map(jnp.asarray, (record["params"], obs_stats))
    return Policy(params=params, obs_stats=obs_stats, spec=spec)


_SPACES = ("observation_space", "action_space")


def _spec_to_plain(spec: PolicySpec) -> dict[str, Any]:
    plain = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    plain |= {name: spaces.to_plain(plain[name]) for name in _SPACES}
    return plain | {"network": network_name(spec.network)}


def _spec_from_plain(plain: dict[str, Any], network: nn.Module | None) -> PolicySpec:
    fields = {name: _as_tuple(value) for name, value in plain.items()}
    fields |= {name: spaces.from_plain(plain[name]) for name in _SPACES}
    fields["network"] = network_from_name(plain["network"], network)
    return PolicySpec(**fields)


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value
