"""From a policy to what it can learn from: a rollout, the critic's opinion, the advantages."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax import objectives, running_stats
from ppo_jax.advantages import discounted_returns
from ppo_jax.algorithms import Values, get_algorithm
from ppo_jax.config import Config, HParams, largest_divisor
from ppo_jax.envs.environment import Environment
from ppo_jax.policy.policy import Policy
from ppo_jax.policy.spec import ObsStats, head_of
from ppo_jax.rollout import reset, rollout
from ppo_jax.types import Batch, EpisodeStats, RolloutState, Statistics, Trajectory


class Collected(NamedTuple):
    """What one rollout leaves."""

    rollout: RolloutState
    """Where the environments stand now."""
    batch: Batch
    """`[T, N]`, to learn from."""
    ended: EpisodeStats
    """The episodes that ended."""
    statistics: Statistics
    """Including this rollout."""


def collect(
    config: Config,
    env: Environment,
    env_params: Any,
    policy: Policy,
    state: RolloutState,
    statistics: Statistics,
    key: jax.Array,
    hparams: HParams,
    axis_name: str | None = None,
) -> Collected:
    """One rollout as a batch.

    Args:
      config: complete, with no setting left to the algorithm.
      env: acted in.
      env_params: its parameters.
      policy: acts; its critic, if it has one, judges.
      state: where the environments stand; an algorithm of whole episodes starts them anew.
      statistics: so far. Observations of the batch are normalised as they were when the policy
        acted, without this rollout; rewards, which no action has seen yet, with it.
      key: random key.
      hparams: complete, with no value left to the algorithm.
      axis_name: mesh axis of the devices that hold the other environments; None for one device.
    """
    algorithm = get_algorithm(config.algorithm)
    if algorithm.whole_episodes:
        reset_key, key = jax.random.split(key)
        state = reset(env, env_params, reset_key, num_envs=config.num_envs, memory=state.memory)
    start, carried = state.start, state.memory
    state, trajectory, ended = rollout(
        env, env_params, policy, state, key, num_steps=config.num_steps
    )
    if carried is None:
        starts = None
        values = _values(config, policy, trajectory) if algorithm.has_critic else None
    else:
        starts = jnp.concatenate([start[None], trajectory.done[:-1]])
        values = None
        if algorithm.has_critic:
            values, memory = _values_in_sequence(policy, trajectory, carried, starts)
            state = state.replace(memory={**state.memory, **memory})
    reward, state, statistics = _learned_reward(
        config, trajectory, state, statistics, hparams, axis_name
    )
    estimates = algorithm.estimate(config, trajectory._replace(reward=reward), values, hparams)
    advantages = estimates.advantages
    if config.normalize_advantage == "batch":
        advantages = objectives.standardize(advantages, estimates.mask, axis_name)
    if estimates.mask is not None:
        ended = _first_episodes(trajectory, estimates.mask)
    distribution = head_of(policy.spec).distribution(trajectory.action_params)
    batch = Batch(
        obs=policy.normalized(trajectory.obs),
        action=trajectory.action,
        action_params=trajectory.action_params,
        log_prob=distribution.log_prob(trajectory.action),
        advantages=advantages,
        value=None if values is None else values.value,
        targets=estimates.targets,
        mask=estimates.mask,
        done=trajectory.done,
        start=starts,
        memory=carried,
    )
    if statistics.obs is not None:
        statistics = statistics._replace(
            obs=_updated_obs_stats(statistics.obs, trajectory.obs, axis_name)
        )
    return Collected(state, batch, ended, statistics)


def _valued_at_once(config: Config) -> int:
    """States, each with its successor: enough to fill a device, few enough that the activations
    take no more memory than a minibatch's, whose gradient needs them anyway, and stay in a cache.
    """
    fitting = 2**9 if jax.default_backend() == "cpu" else 2**12
    return min(fitting, config.batch_size // (config.num_minibatches or 1) // 2)


def _values(config: Config, policy: Policy, trajectory: Trajectory) -> Values:
    """V(s_t) and V(s'_t), `[T, N]`, for a block of steps at a time."""
    num_steps, num_envs = trajectory.reward.shape
    size = largest_divisor(num_steps, at_most=max(1, _valued_at_once(config) // num_envs))

    def of_block(obs: tuple[jax.Array, jax.Array]) -> Values:
        return Values(*map(policy.value, obs))

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(num_steps // size, size, *x.shape[1:])

    blocks = jax.tree.map(split, (trajectory.obs, trajectory.final_obs))
    values = jax.lax.map(of_block, blocks)
    return jax.tree.map(lambda x: x.reshape(num_steps, num_envs), values)


def _values_in_sequence(
    policy: Policy, trajectory: Trajectory, carried: Any, starts: jax.Array
) -> tuple[Values, Any]:
    """V(s_t) and V(s'_t), `[T, N]`, of a critic with a memory, and what it carries then.

    A true successor is judged from what is remembered after s_t, before any reset forgets it.
    """
    num_steps, num_envs = trajectory.reward.shape
    value, memories = policy.values(trajectory.obs, carried, starts)
    flat = jax.tree.map(
        lambda x: x.reshape(1, num_steps * num_envs, *x.shape[2:]), trajectory.final_obs
    )
    before = jax.tree.map(lambda x: x.reshape(num_steps * num_envs, *x.shape[2:]), memories)
    goes_on = jnp.zeros((1, num_steps * num_envs), bool)
    next_value, _ = policy.values(flat, before, goes_on)
    last = jax.tree.map(lambda x: x[-1], memories)
    return Values(value, next_value.reshape(num_steps, num_envs)), last


def _learned_reward(
    config: Config,
    trajectory: Trajectory,
    state: RolloutState,
    statistics: Statistics,
    hparams: HParams,
    axis_name: str | None,
) -> tuple[jax.Array, RolloutState, Statistics]:
    """Rewards as they are learned from: normalised, scaled, clipped, in this order."""
    reward = trajectory.reward
    if config.normalize_reward:
        assert statistics.reward is not None
        returns, last = discounted_returns(
            reward, trajectory.done, state.discounted_return, gamma=hparams.gamma
        )
        state = state.replace(discounted_return=last)
        stats = running_stats.update(statistics.reward, returns, axis_name)
        statistics = statistics._replace(reward=stats)
        reward = running_stats.scale(stats, reward)
    if hparams.reward_scale is not None:
        reward = reward * hparams.reward_scale
    if hparams.reward_clip is not None:
        reward = jnp.clip(reward, -hparams.reward_clip, hparams.reward_clip)
    return reward, state, statistics


def _updated_obs_stats(stats: ObsStats, obs: Any, axis_name: str | None) -> ObsStats:
    return tuple(
        None if old is None else running_stats.update(old, x, axis_name)
        for old, x in zip(stats, jax.tree.leaves(obs), strict=True)
    )


def _first_episodes(trajectory: Trajectory, mask: jax.Array) -> EpisodeStats:
    """Statistics of the episodes that count: later ones in a rollout are cut short."""
    return EpisodeStats(
        return_sum=jnp.sum(trajectory.reward * mask),
        length_sum=jnp.sum(mask),
        episodes=jnp.sum(mask[0]),
    )
