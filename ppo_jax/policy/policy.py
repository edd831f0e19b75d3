"""A policy as a value: it acts, and it is a pytree."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ppo_jax import running_stats
from ppo_jax.config import ConfigError
from ppo_jax.policy import networks
from ppo_jax.policy.spec import ObsStats, PolicySpec, head_of, initial_memory_of, network_of


class Policy(struct.PyTreeNode):
    """A policy that acts.

    `policy(obs, key)` samples an action, `policy(obs)` takes the most likely one; `obs` may
    have leading batch axes. One with a memory is asked by `act`, which takes and returns what it
    remembers. Actions of a Gaussian are not clipped to a box's bounds; environments of
    `ppo_jax.envs` do that themselves. A pytree: it can be passed to jitted functions, and a
    population of them is the same value with leading axes, for `jax.vmap`.
    """

    params: Any
    obs_stats: ObsStats | None = None
    """What observations are normalised by; None leaves them as they are."""
    spec: PolicySpec = struct.field(pytree_node=False, kw_only=True)

    def __call__(self, obs: Any, key: jax.Array | None = None) -> jax.Array:
        """Actions `[..., *action shape]` for observations `[..., *observation shape]`."""
        return self.act(obs, None, key)[0]

    def act(self, obs: Any, memory: Any, key: jax.Array | None = None) -> tuple[jax.Array, Any]:
        """Actions as `__call__` gives them, and the memory for the next observation.

        `memory` is `initial_memory(batch_shape)` at the start of an episode, and `None` will do
        for a policy without one.
        """
        head = head_of(self.spec)
        batch_shape = networks.batch_shape_of(self.spec.observation_space, obs)
        ndim = len(batch_shape)
        flat, carried = (
            jax.tree.map(lambda x: x.reshape(-1, *x.shape[ndim:]), tree) for tree in (obs, memory)
        )
        action_params, carried = self.step(flat, carried)
        if key is None:
            action = head.mode(action_params)
        else:
            batch = jax.tree.leaves(action_params)[0].shape[0]
            action = head.sample(action_params, head.noise(key, (batch,)))
        return jax.tree.map(
            lambda x: x.reshape(*batch_shape, *x.shape[1:]), (head.to_env(action), carried)
        )

    def initial_memory(self, batch_shape: tuple[int, ...] = ()) -> Any:
        """What a policy remembers when nothing happened yet; None without a memory."""
        return initial_memory_of(self.spec, batch_shape)

    def step(self, obs: Any, memory: Any, start: jax.Array | None = None) -> tuple[Any, Any]:
        """Distribution parameters `[N, *]` for one step of N environments, and the memory then.

        `start` `[N]` says which observations begin an episode; None: none of them.
        """
        self._require_memory(memory)
        obs = self.normalized(obs)
        network = network_of(self.spec)
        if memory is None:
            return network.apply(self.params, obs, method="actor")[0], None
        num_envs = jax.tree.leaves(memory)[0].shape[0]
        start = jnp.zeros(num_envs, bool) if start is None else start
        sequence = jax.tree.map(lambda x: x[None], obs)
        result = network.apply(self.params, sequence, memory, start[None], method="actor")
        action_params, carried = jax.tree.map(lambda x: x[0], result)
        return action_params, {**memory, **carried}

    def action_params(self, obs: Any) -> Any:
        """Parameters of the action distribution of a policy without a memory."""
        self._require_memory(None)
        return network_of(self.spec).apply(self.params, self.normalized(obs), method="actor")[0]

    def value(self, obs: Any) -> jax.Array:
        """The critic's V(s), `[...]`, of a policy without a memory.

        Raises:
          ConfigError: the algorithm has no critic.
        """
        return self.values(obs)[0]

    def values(
        self, obs: Any, memory: Any = None, start: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """V(s) of a sequence `[T, N, ...]`, and what the critic remembers after every step."""
        if not self.spec.has_critic:
            raise ConfigError("value needs a critic; this policy was trained without one.")
        self._require_memory(memory)
        network = network_of(self.spec)
        return network.apply(self.params, self.normalized(obs), memory, start, method="critic")

    def _require_memory(self, memory: Any) -> None:
        if self.spec.memory is not None and memory is None:
            raise ConfigError(
                f"a policy with a memory ({self.spec.memory}) must be told what it remembers. "
                "Call policy.act(obs, memory, key), starting from policy.initial_memory()."
            )

    def normalized(self, obs: Any) -> Any:
        """Observations as the network sees them."""
        if self.obs_stats is None:
            return obs
        leaves, structure = jax.tree.flatten(obs)
        pairs = zip(self.obs_stats, leaves, strict=True)
        seen = [x if stats is None else running_stats.normalize(stats, x) for stats, x in pairs]
        return jax.tree.unflatten(structure, seen)
