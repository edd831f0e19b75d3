"""From a policy to what it can learn from: a rollout, the critic's opinion, the advantages."""

from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax import objectives
from ppo_jax.algorithms import Values, get_algorithm
from ppo_jax.config import Config, HParams
from ppo_jax.envs.environment import Environment
from ppo_jax.policy.policy import Policy, head_of
from ppo_jax.rollout import reset, rollout
from ppo_jax.types import Batch, EpisodeStats, RolloutState, Trajectory


def collect(
    config: Config,
    env: Environment,
    env_params: Any,
    policy: Policy,
    state: RolloutState,
    key: jax.Array,
    hparams: HParams,
    axis_name: str | None = None,
) -> tuple[RolloutState, Batch, EpisodeStats]:
    """One rollout as a batch.

    Args:
      config: complete, with no setting left to the algorithm.
      env: acted in.
      env_params: its parameters.
      policy: acts; its critic, if it has one, judges.
      state: where the environments stand; an algorithm of whole episodes starts them anew.
      key: random key.
      hparams: complete, with no value left to the algorithm.
      axis_name: mesh axis of the devices that hold the other environments; None for one device.

    Returns:
      Where the environments stand then, the batch `[T, N]`, and the episodes that ended.
    """
    algorithm = get_algorithm(config.algorithm)
    if algorithm.whole_episodes:
        reset_key, key = jax.random.split(key)
        state = reset(env, env_params, reset_key, num_envs=config.num_envs)
    state, trajectory, ended = rollout(
        env, env_params, policy, state, key, num_steps=config.num_steps
    )
    values = None
    if algorithm.has_critic:
        values = _values(policy, trajectory)
    estimates = algorithm.estimate(config, trajectory, values, hparams)
    advantages = estimates.advantages
    if config.normalize_advantage == "batch":
        advantages = objectives.standardize(advantages, estimates.mask, axis_name)
    if estimates.mask is not None:
        ended = _first_episodes(trajectory, estimates.mask)
    distribution = head_of(policy.spec).distribution(trajectory.action_params)
    batch = Batch(
        obs=trajectory.obs,
        action=trajectory.action,
        action_params=trajectory.action_params,
        log_prob=distribution.log_prob(trajectory.action),
        advantages=advantages,
        value=None if values is None else values.value,
        targets=estimates.targets,
        mask=estimates.mask,
        done=jnp.logical_or(trajectory.terminated, trajectory.truncated),
    )
    return state, batch, ended


_VALUED_AT_ONCE = 2**13
"""Samples: enough to fill a device, few enough that the activations of a large batch do not take
more memory than the batch; of 2048 x 32 samples on a CPU they took three quarters of it."""


def _values(policy: Policy, trajectory: Trajectory) -> Values:
    """V(s_t) and V(s'_t), `[T, N]`, for a block of steps at a time."""
    num_steps, num_envs = trajectory.reward.shape
    fitting = max(1, _VALUED_AT_ONCE // num_envs)
    size = max(size for size in range(1, fitting + 1) if num_steps % size == 0)

    def of_block(obs: tuple[jax.Array, jax.Array]) -> Values:
        return Values(*map(policy.value, obs))

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(num_steps // size, size, *x.shape[1:])

    blocks = jax.tree.map(split, (trajectory.obs, trajectory.final_obs))
    values = jax.lax.map(of_block, blocks)
    return jax.tree.map(lambda x: x.reshape(num_steps, num_envs), values)


def _first_episodes(trajectory: Trajectory, mask: jax.Array) -> EpisodeStats:
    """Statistics of the episodes that count: later ones in a rollout are cut short."""
    return EpisodeStats(
        return_sum=jnp.sum(trajectory.reward * mask),
        length_sum=jnp.sum(mask),
        episodes=jnp.sum(mask[0]),
    )
