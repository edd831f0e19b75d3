"""A policy as a value: it acts, it is a pytree, and it can be saved and loaded."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import serialization, struct

from ppo_jax.config import Config, ConfigError
from ppo_jax.envs.environment import Environment
from ppo_jax.envs.spaces import Box, Discrete, Space
from ppo_jax.policy.distributions import Head, make_head
from ppo_jax.policy.networks import ActorCritic


class PolicySpec(NamedTuple):
    """The static part of a policy: enough to build its network again. Hashable."""

    observation_space: Box
    action_space: Space
    hidden_sizes: tuple[int, ...]
    activation: str
    shared_torso: bool
    has_critic: bool = True


class Policy(struct.PyTreeNode):
    """A policy that acts.

    `policy(obs, key)` samples an action, `policy(obs)` takes the most likely one; `obs` may
    have leading batch axes. Actions in a box are not clipped to its bounds; environments of
    `ppo_jax.envs` do that themselves. A pytree: it can be passed to jitted functions, and a
    population of them is the same value with leading axes, for `jax.vmap`.
    """

    params: Any
    spec: PolicySpec = struct.field(pytree_node=False)

    def __call__(self, obs: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Actions `[..., *action shape]` for observations `[..., *observation shape]`."""
        head = head_of(self.spec)
        action_params = self.action_params(obs)
        if key is None:
            return head.mode(action_params)
        batch_shape = obs.shape[: obs.ndim - len(self.spec.observation_space.shape)]
        return head.sample(action_params, head.noise(key, batch_shape))

    def action_params(self, obs: jax.Array) -> Any:
        """Parameters of the action distribution: logits, or mean and log standard deviation."""
        return network_of(self.spec).apply(self.params, obs, method="actor")

    def value(self, obs: jax.Array) -> jax.Array:
        """The critic's V(s), `[...]`; a `ConfigError` if the algorithm has no critic."""
        if not self.spec.has_critic:
            raise ConfigError("value needs a critic; this policy was trained without one.")
        return network_of(self.spec).apply(self.params, obs, method="critic")


def make_spec(config: Config, env: Environment, *, has_critic: bool = True) -> PolicySpec:
    """The spec of the policies that `config` trains in `env`."""
    return PolicySpec(
        observation_space=env.observation_space,
        action_space=env.action_space,
        hidden_sizes=config.hidden_sizes,
        activation=config.activation,
        shared_torso=config.shared_torso,
        has_critic=has_critic,
    )


@functools.cache
def head_of(spec: PolicySpec) -> Head:
    """The action head of a spec."""
    return make_head(spec.action_space)


@functools.cache
def network_of(spec: PolicySpec) -> ActorCritic:
    """The network of a spec."""
    return ActorCritic(
        head=head_of(spec),
        obs_ndim=len(spec.observation_space.shape),
        hidden_sizes=spec.hidden_sizes,
        activation=getattr(nn, spec.activation),
        shared_torso=spec.shared_torso,
        has_critic=spec.has_critic,
    )


def save_policy(policy: Policy, path: Path) -> None:
    """Writes a policy, parameters and spec, into one msgpack file."""
    record = {"spec": json.dumps(_spec_to_plain(policy.spec)), "params": policy.params}
    path.write_bytes(serialization.msgpack_serialize(record))


def load_policy(path: Path) -> Policy:
    """Reads what `save_policy` wrote; needs no environment."""
    record = serialization.msgpack_restore(path.read_bytes())
    params = jax.tree.map(jnp.asarray, record["params"])
    return Policy(params=params, spec=_spec_from_plain(json.loads(record["spec"])))


_SPACES = {kind.__name__: kind for kind in (Box, Discrete)}


def _spec_to_plain(spec: PolicySpec) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        is_space = isinstance(value, (Box, Discrete))
        return {"kind": type(value).__name__, **value._asdict()} if is_space else value

    return {name: plain(value) for name, value in spec._asdict().items()}


def _spec_from_plain(plain: dict[str, Any]) -> PolicySpec:
    def value_of(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(value)
        if isinstance(value, dict):
            fields = {name: value_of(field) for name, field in value.items()}
            return _SPACES[fields.pop("kind")](**fields)
        return value

    return PolicySpec(**{name: value_of(value) for name, value in plain.items()})
