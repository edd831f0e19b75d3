"""A policy as a value: a pytree that acts."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.errors import ScopeParamShapeError

from ppo_jax.envs import spaces
from ppo_jax.errors import ConfigError
from ppo_jax.ops import running_stats
from ppo_jax.policy.spec import (
    ObsStats,
    PolicySpec,
    head_of,
    initial_recurrent_state,
    network_of,
)


def _as_arrays(space: spaces.Space, obs: Any) -> Any:
    """Converts the leaves of an observation to arrays; JAX would take a list for a tree of scalars.

    An observation whose structure is not that of `space` is returned unchanged.
    """
    if isinstance(space, spaces.Dict):
        if isinstance(obs, Mapping) and obs.keys() != set(space.names):
            raise ConfigError(
                f"obs must have the entries {', '.join(space.names)}; got {', '.join(obs)}."
            )
        if isinstance(obs, Mapping):
            return {name: _as_arrays(entry, obs[name]) for name, entry in space.spaces}
        return obs
    if isinstance(space, spaces.Tuple):
        if isinstance(obs, (tuple, list)) and len(obs) == len(space.spaces):
            return tuple(map(_as_arrays, space.spaces, obs))
        return obs
    array = jnp.asarray(obs)
    if isinstance(space, spaces.Box) and space.dtype == "uint8" != array.dtype:
        # A convolution divides bytes by 255 where it gathers its patches, and leaves other dtypes
        # as they are, so that the same image would be 255 times as large.
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ConfigError(
                f"observations must be integers from 0 to 255, as in the environment; got "
                f"{array.dtype}. Pass them as uint8."
            )
        return array.astype(jnp.uint8)
    return array


class Policy(struct.PyTreeNode):
    """A trained policy with everything that it needs to act.

    `policy(obs, key)` samples an action, `policy(obs)` takes the most likely one. `obs` may have
    leading batch axes. A policy with a memory is called by `act`, which takes and returns its
    recurrent state. Actions of a Gaussian are not clipped to a box's bounds; environments of
    `ppo_jax.envs` clip them.

    A policy is a pytree: it can be passed to jitted functions. A population of policies is the same
    value with leading axes, for `jax.vmap`.
    """

    params: Any
    obs_stats: ObsStats | None = None
    """Statistics that observations are normalised by; None leaves observations as they are."""
    spec: PolicySpec = struct.field(pytree_node=False, kw_only=True)

    def __call__(self, obs: Any, key: jax.Array | None = None) -> jax.Array:
        """Returns actions `[..., *action shape]` for observations `[..., *observation shape]`."""
        return self.act(obs, None, key)[0]

    def act(
        self, obs: Any, recurrent_state: Any, key: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Returns actions as `__call__` does, and the recurrent state for the next observation.

        Args:
          obs: observations `[..., *observation shape]`.
          recurrent_state: `initial_recurrent_state(batch_shape)` at the start of an episode; None
            for a policy without a memory.
          key: random key for sampled actions; None takes the most likely ones.
        """
        head = head_of(self.spec)
        obs, batch_shape = self._checked(obs)
        ndim = len(batch_shape)
        for x in jax.tree.leaves(recurrent_state):
            if jnp.shape(x)[:ndim] != batch_shape:
                raise ConfigError(
                    f"recurrent_state must have the batch axes of obs, {batch_shape}; got an array "
                    f"of shape {jnp.shape(x)}. Start from initial_recurrent_state({batch_shape})."
                )
        obs, recurrent_state = jax.tree.map(
            lambda x: x.reshape(math.prod(batch_shape), *x.shape[ndim:]), (obs, recurrent_state)
        )
        try:
            action_params, recurrent_state = self.step(obs, recurrent_state)
        except ScopeParamShapeError as error:
            raise ConfigError(
                "a policy acts with the parameters of one seed; these have another shape. Choose a "
                "seed by jax.tree.map(lambda x: x[0], policy), or use jax.vmap."
            ) from error
        if key is None:
            action = head.mode(action_params)
        else:
            batch = jax.tree.leaves(action_params)[0].shape[0]
            action = head.sample(action_params, head.noise(key, (batch,)))
        return jax.tree.map(
            lambda x: x.reshape(*batch_shape, *x.shape[1:]), (head.to_env(action), recurrent_state)
        )

    def _checked(self, obs: Any) -> tuple[Any, tuple[int, ...]]:
        """Returns an observation as arrays, and its batch shape, or a `ConfigError`."""
        space = self.spec.observation_space
        obs = _as_arrays(space, obs)
        expected = [spaces.shape_of(leaf) for leaf in spaces.leaves(space)]
        shapes = [jnp.shape(x) for x in jax.tree.leaves(obs)]
        batch_shape = shapes[0][: len(shapes[0]) - len(expected[0])] if shapes else ()
        if shapes != [(*batch_shape, *shape) for shape in expected]:
            raise ConfigError(
                f"obs must have the shapes of the observation space, {expected}, behind the same "
                f"batch axes; got {shapes}."
            )
        return obs, batch_shape

    def initial_recurrent_state(self, batch_shape: tuple[int, ...] = ()) -> Any:
        """Returns the recurrent state at the start of an episode; None without a memory."""
        if isinstance(batch_shape, int):
            raise ConfigError(
                f"batch_shape must be a tuple; got {batch_shape}. Pass ({batch_shape},)."
            )
        return initial_recurrent_state(self.spec, batch_shape)

    def __repr__(self) -> str:
        size = sum(jnp.size(x) for x in jax.tree.leaves(self.params))
        spaces = f"{self.spec.observation_space} -> {self.spec.action_space}"
        return f"Policy({spaces}, {size:,} parameters)"

    def step(
        self, obs: Any, recurrent_state: Any, start: jax.Array | None = None
    ) -> tuple[Any, Any]:
        """Returns the distribution's parameters `[N, *]` for one step, and the recurrent state.

        Args:
          obs: observations of N environments, `[N, ...]`.
          recurrent_state: before them, `[N, ...]`; None without a memory.
          start: `[N]`, the observation is the first of an episode; None where none is.
        """
        self._require_recurrent_state(recurrent_state)
        obs = self.normalized(obs)
        network = network_of(self.spec)
        if recurrent_state is None:
            return network.apply(self.params, obs, method="actor")[0], None
        num_envs = jax.tree.leaves(recurrent_state)[0].shape[0]
        start = jnp.zeros(num_envs, bool) if start is None else start
        # Recurrent networks have one form, sequences; this is one of length 1.
        sequence = jax.tree.map(lambda x: x[None], obs)
        result = network.apply(self.params, sequence, recurrent_state, start[None], method="actor")
        action_params, actor_state = jax.tree.map(lambda x: x[0], result)
        # The critic's part of the state passes through; `collect` brings it up to date.
        return action_params, {**recurrent_state, **actor_state}

    def action_params(self, obs: Any) -> Any:
        """Returns the distribution's parameters of a policy without a memory."""
        self._require_recurrent_state(None)
        return network_of(self.spec).apply(self.params, self.normalized(obs), method="actor")[0]

    def value(self, obs: Any) -> jax.Array:
        """Returns the critic's V(s), `[...]`, of a policy without a memory.

        Raises:
          ConfigError: the algorithm has no critic.
        """
        return self.values(obs)[0]

    def values(
        self, obs: Any, recurrent_state: Any = None, start: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Returns V(s) of a sequence, `[T, N]`, and the critic's recurrent state after every step.

        Args:
          obs: observations, `[T, N, ...]`; any batch shape without a memory.
          recurrent_state: before the first step, `[N, ...]`.
          start: `[T, N]`, the observation is the first of an episode.

        Raises:
          ConfigError: the algorithm has no critic.
        """
        if not self.spec.has_critic:
            raise ConfigError("value needs a critic; this policy was trained without one.")
        self._require_recurrent_state(recurrent_state)
        network = network_of(self.spec)
        return network.apply(
            self.params, self.normalized(obs), recurrent_state, start, method="critic"
        )

    def _require_recurrent_state(self, recurrent_state: Any) -> None:
        if self.spec.memory is not None and recurrent_state is None:
            raise ConfigError(
                f"a policy with a memory ({self.spec.memory}) needs its recurrent state. Call "
                "policy.act(obs, recurrent_state, key), starting from "
                "policy.initial_recurrent_state()."
            )

    def normalized(self, obs: Any) -> Any:
        """Returns observations as the network sees them."""
        if self.obs_stats is None:
            return obs
        leaves, structure = jax.tree.flatten(obs)
        pairs = zip(self.obs_stats, leaves, strict=True)
        normalized = [
            x if stats is None else running_stats.normalize(stats, x) for stats, x in pairs
        ]
        return jax.tree.unflatten(structure, normalized)


def require_policy(policy: Any, expected: Policy) -> None:
    """Raises a `ConfigError` unless a training can start from a policy.

    Args:
      policy: the policy that a caller gave.
      expected: a policy of the training, whose leaves may be shapes.
    """
    rule = "a training must start from a policy of its own kind"
    if not isinstance(policy, Policy):
        raise ConfigError(
            f"{rule}; got {policy!r}. Pass what trainer.policy(state) or ppo_jax.load returns."
        )
    # Parameters of one shape can belong to networks that compute something else.
    for field in dataclasses.fields(policy.spec):
        if field.name == "compute_dtype":  # which does not change the parameters
            continue
        theirs, ours = (_comparable(getattr(x.spec, field.name)) for x in (policy, expected))
        if theirs != ours:
            raise ConfigError(
                f"{rule}; its {field.name} is {theirs}, and that of the training is {ours}."
            )
    if (policy.obs_stats is None) != (expected.obs_stats is None):
        is_normalised = policy.obs_stats is not None
        raise ConfigError(
            f"{rule}; it {'normalises' if is_normalised else 'does not normalise'} observations. "
            f"Set normalize_obs to {is_normalised}."
        )
    shapes = [jax.tree.map(jnp.shape, (x.params, x.obs_stats)) for x in (policy, expected)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"{rule}; its parameters have other shapes. Choose one of several seeds by "
            "jax.tree.map(lambda x: x[0], policy)."
        )


def _comparable(value: Any) -> Any:
    """Returns a field of a spec; spaces without bounds, which do not shape the network."""
    if isinstance(value, spaces.Box):
        return value._replace(low=None, high=None)
    if isinstance(value, spaces.Dict):
        return spaces.Dict.of({name: _comparable(entry) for name, entry in value.spaces})
    if isinstance(value, spaces.Tuple):
        return spaces.Tuple(tuple(map(_comparable, value.spaces)))
    return value
