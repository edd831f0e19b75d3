"""A policy in one file."""

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import serialization

from ppo_jax.config import MODULE, named_network
from ppo_jax.envs import spaces
from ppo_jax.policy.policy import Policy
from ppo_jax.policy.spec import PolicySpec
from ppo_jax.running_stats import RunningStats


def save_policy(policy: Policy, path: Path) -> None:
    """Writes a policy, parameters, statistics and spec, into one msgpack file."""
    stats = None
    if policy.obs_stats is not None:
        stats = {str(i): x._asdict() for i, x in enumerate(policy.obs_stats) if x is not None}
    record = {
        "spec": json.dumps(_spec_to_plain(policy.spec)),
        "params": policy.params,
        "obs_stats": stats,
    }
    path.write_bytes(serialization.msgpack_serialize(record))


def load_policy(path: Path, network: nn.Module | None = None) -> Policy:
    """Reads what `save_policy` wrote; needs no environment.

    Args:
      path: the file.
      network: the module that was `Config.network`, where it was not one of ours by name.

    Raises:
      ConfigError: the module is needed and not given.
    """
    record = serialization.msgpack_restore(path.read_bytes())
    spec = _spec_from_plain(json.loads(record["spec"]), network)
    obs_stats = None
    if record["obs_stats"] is not None:
        stats = {int(i): RunningStats(**x) for i, x in record["obs_stats"].items()}
        count = len(spaces.leaves(spec.observation_space))
        obs_stats = tuple(stats.get(i) for i in range(count))
    params, obs_stats = jax.tree.map(jnp.asarray, (record["params"], obs_stats))
    return Policy(params=params, obs_stats=obs_stats, spec=spec)


_SPACES = ("observation_space", "action_space")


def _spec_to_plain(spec: PolicySpec) -> dict[str, Any]:
    plain = spec._asdict()
    plain |= {name: spaces.to_plain(plain[name]) for name in _SPACES}
    if not isinstance(spec.network, str):
        plain["network"] = f"{MODULE}{type(spec.network).__name__}"
    return plain


def _spec_from_plain(plain: dict[str, Any], network: nn.Module | None) -> PolicySpec:
    fields = {name: _tupled(value) for name, value in plain.items()}
    fields |= {name: spaces.from_plain(plain[name]) for name in _SPACES}
    fields["network"] = named_network(plain["network"], network)
    return PolicySpec(**fields)


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value
