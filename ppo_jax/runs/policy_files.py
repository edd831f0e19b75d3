"""Files of a policy, in the format of a checkpoint; they are read without the environment."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.envs import spaces
from ppo_jax.errors import ConfigError
from ppo_jax.policy.policy import Policy
from ppo_jax.policy.spec import PolicySpec, init_params, initial_obs_stats
from ppo_jax.runs import checkpoint
from ppo_jax.runs.settings import network_from_name, network_name, require_registered

_SPACES = ("observation_space", "action_space")
_FOUND_BY_NAME = ("module", "make_box_head")


def save_policy(policy: Policy, path: Path, notes: Mapping[str, Any] | None = None) -> None:
    """Writes parameters, statistics and spec of a policy, or of a stack of policies.

    Args:
      policy: the policy.
      path: directory to be written; one of the same name is replaced.
      notes: JSON-serialisable values, which `load_policy_and_notes` returns.
    """
    arrays, record = encode_policy(policy)
    checkpoint.write(path, arrays, {**record, "notes": dict(notes or {})})


def encode_policy(policy: Policy) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the arrays and the record of a policy's files."""
    arrays, keys = checkpoint.flatten(_tree(policy.params, policy.obs_stats))
    # As text, because the bounds of a space may be infinite, which JSON does not have.
    spec = json.dumps(_spec_to_plain(policy.spec))
    return arrays, {"keys": keys, "spec": spec, "has_obs_stats": policy.obs_stats is not None}


def load_policy(path: Path, network: Any = None) -> Policy:
    """Reads a policy that `save_policy` wrote; see `load_policy_and_notes`."""
    return load_policy_and_notes(path, network)[0]


def load_policy_and_notes(path: Path, network: Any = None) -> tuple[Policy, dict[str, Any]]:
    """Reads a policy that `save_policy` wrote, with its notes.

    Args:
      path: the directory.
      network: the module that was `Config.network`, unless that was a name.

    Raises:
      ConfigError: the module is needed and not given, or the files are damaged.
    """
    arrays, record = checkpoint.read(path)
    try:
        plain, has_obs_stats = json.loads(record["spec"]), record["has_obs_stats"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} must hold a policy; it holds something else.") from error
    try:
        spec = _spec_from_plain(plain, network, path)
        # Shapes alone: nothing is allocated before the arrays are known to fit the spec.
        template = jax.eval_shape(lambda: _initial(spec, has_obs_stats))
    except ConfigError:
        raise
    # A forged spec leads to whatever flax and JAX raise for it.
    except Exception as error:
        raise ConfigError(f"{path} must hold a policy; its spec breaks a rule: {error}.") from error
    found = checkpoint.unflatten(template, arrays, {}, path)
    policy = Policy(params=found["params"], obs_stats=found["obs_stats"], spec=spec)
    return policy, record.get("notes", {})


def _initial(spec: PolicySpec, has_obs_stats: bool) -> dict[str, Any]:
    """Returns the arrays of an untrained policy, for their shapes."""
    params = init_params(spec, jax.random.key(0), _observations(spec.observation_space))
    return _tree(params, initial_obs_stats(spec.observation_space) if has_obs_stats else None)


def _tree(params: Any, obs_stats: Any) -> dict[str, Any]:
    return {"params": params, "obs_stats": obs_stats}


def _observations(space: spaces.Space) -> Any:
    """Returns a batch of one observation."""
    if isinstance(space, spaces.Dict):
        return {name: _observations(entry) for name, entry in space.spaces}
    if isinstance(space, spaces.Tuple):
        return tuple(map(_observations, space.spaces))
    return jnp.zeros((1, *spaces.shape_of(space)), spaces.dtype_of(space))


def _spec_to_plain(spec: PolicySpec) -> dict[str, Any]:
    plain = {
        field.name: getattr(spec, field.name)
        for field in dataclasses.fields(spec)
        if field.name not in _FOUND_BY_NAME
    }
    plain |= {name: spaces.to_plain(plain[name]) for name in _SPACES}
    return plain | {"network": network_name(spec.network)}


def _spec_from_plain(plain: dict[str, Any], network: Any, path: Path) -> PolicySpec:
    fields = {name: _as_tuple(value) for name, value in plain.items()}
    fields |= {name: spaces.from_plain(plain[name]) for name in _SPACES}
    fields["network"] = network_from_name(plain["network"], network)
    named = {"network": fields["network"] if network is None else None}
    require_registered({**named, "action_distribution": plain["action_distribution"]}, path)
    return PolicySpec(**fields)


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value
