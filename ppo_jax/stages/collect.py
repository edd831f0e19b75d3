"""The second stage: a rollout becomes a batch, with values, advantages and normalised rewards."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.config import Config
from ppo_jax.envs.environment import Environment
from ppo_jax.errors import ConfigError
from ppo_jax.hparams import HParams
from ppo_jax.ops import objectives, running_stats
from ppo_jax.ops.advantages import discounted_returns, sums_over_episodes
from ppo_jax.ops.blocks import largest_divisor
from ppo_jax.ops.blockwise import map_blockwise
from ppo_jax.policy.policy import Policy
from ppo_jax.policy.spec import ObsStats, head_of, images_in_cache
from ppo_jax.stages.algorithm import Algorithm
from ppo_jax.stages.rollout import reset, rollout
from ppo_jax.types import (
    Batch,
    EpisodeStats,
    Estimates,
    RolloutState,
    Shard,
    Statistics,
    Trajectory,
    Values,
)


class Collected(NamedTuple):
    """The results of one rollout."""

    rollout: RolloutState
    """State of the environments after the rollout."""
    trajectory: Trajectory
    """Observations, actions and raw rewards of the rollout, `[T, N]`."""
    batch: Batch
    """Data for the update, `[T, N]`."""
    ended: EpisodeStats
    """Sums over the episodes that ended."""
    statistics: Statistics
    """The statistics with this rollout merged in."""


class Rollout(NamedTuple):
    """A rollout, with the states before and after it; stepped on the device or on the host."""

    before: RolloutState
    trajectory: Trajectory
    after: RolloutState
    """The critic's recurrent state is that of before; only the actor's is up to date."""
    ended: EpisodeStats
    """Sums over the episodes that ended."""


def collect(
    policy: Policy,
    state: RolloutState,
    statistics: Statistics,
    *,
    config: Config,
    algorithm: Algorithm,
    env: Environment,
    env_params: Any,
    hparams: HParams,
    key: jax.Array,
    shard: Shard,
) -> Collected:
    """Acts for one rollout and returns it as a batch.

    Args:
      policy: acts; its critic, if it has one, evaluates the states.
      state: state of the environments before the rollout. An algorithm of whole episodes resets
        them first.
      statistics: as in `to_batch`.
      config: a complete config: every setting of the algorithm has a value.
      algorithm: estimates advantages and targets.
      env: the environment.
      env_params: its parameters.
      hparams: complete hyperparameters: each that the algorithm uses has a value.
      key: random key.
      shard: the environments of this device.

    Returns:
      The batch, and the state and statistics after the rollout.
    """
    if algorithm.whole_episodes:
        # An episode that an earlier rollout began is no sample of a whole trajectory.
        reset_key, key = jax.random.split(key)
        state = reset(
            env,
            env_params,
            reset_key,
            num_envs=shard.num_envs,
            recurrent_state=state.recurrent_state,
        )
    after, trajectory, ended = rollout(
        env,
        env_params,
        policy,
        state,
        key,
        num_steps=config.num_steps,
        reset_pool=config.device_reset_pool,
    )
    return to_batch(
        policy,
        Rollout(state, trajectory, after, ended),
        statistics,
        config=config,
        algorithm=algorithm,
        hparams=hparams,
        shard=shard,
    )


def to_batch(
    policy: Policy,
    rollout: Rollout,
    statistics: Statistics,
    *,
    config: Config,
    algorithm: Algorithm,
    hparams: HParams,
    shard: Shard,
) -> Collected:
    """Turns a rollout into a batch, with values, advantages and normalised rewards.

    Args:
      policy: the policy that acted; its critic, if it has one, evaluates the states.
      rollout: the rollout of this policy.
      statistics: statistics before the rollout. They normalise the observations of the batch, as
        they did when the policy acted. Rewards are normalised by statistics that include the
        rollout, because actions do not depend on the statistics of rewards.
      config: a complete config: every setting of the algorithm has a value.
      algorithm: estimates advantages and targets.
      hparams: complete hyperparameters: each that the algorithm uses has a value.
      shard: the environments of this device.

    Returns:
      The batch, and the state and statistics after the rollout.
    """
    before, trajectory, state, ended = rollout
    values, starts, state = evaluate_trajectory(
        policy, trajectory, before=before, after=state, config=config, shard=shard
    )
    # Rewards are normalised first, because advantages are estimated from normalised rewards.
    reward, discounted_return, reward_stats = _learned_reward(
        trajectory, state.discounted_return, statistics.reward, hparams, shard.axis_name
    )
    state = state.replace(discounted_return=discounted_return)
    with jax.named_scope("advantages"):
        estimates = algorithm.estimate(config, trajectory._replace(reward=reward), values, hparams)
    if not isinstance(estimates, Estimates):
        raise ConfigError(
            f"estimate must return Estimates(advantages, targets, mask); that of "
            f"{config.algorithm} returns {type(estimates).__name__}."
        )
    advantages = estimates.advantages
    # With "minibatch" the update rule normalises instead.
    if config.normalize_advantage == "batch":
        advantages = objectives.standardize(advantages, estimates.mask, shard.axis_name)
    # After the rollout, whose loop holds only what the next action needs. An environment without
    # metrics adds no code.
    sums = {
        name: sums_over_episodes(x, trajectory.done, state.episode_metrics[name])
        for name, x in trajectory.metrics.items()
    }
    state = state.replace(episode_metrics={name: after for name, (_, after) in sums.items()})
    if estimates.mask is None:
        ended = ended._replace(metric_sums={name: total for name, (total, _) in sums.items()})
    else:
        ended = _first_episodes(trajectory, estimates.mask)
    # Log-probabilities come from the stored parameters, so that no network runs again.
    distribution = head_of(policy.spec).distribution(trajectory.action_params)
    batch = Batch(
        # Normalised once here instead of in every epoch.
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
        recurrent_state=before.recurrent_state,
    )
    # Merged after the batch was normalised: the policy that acted had the old statistics.
    obs_stats = statistics.obs
    if obs_stats is not None:
        obs_stats = _merged_obs_stats(obs_stats, trajectory.obs, shard.axis_name)
    return Collected(state, trajectory, batch, ended, Statistics(obs_stats, reward_stats))


@jax.named_scope("values")
def evaluate_trajectory(
    policy: Policy,
    trajectory: Trajectory,
    *,
    before: RolloutState,
    after: RolloutState,
    config: Config,
    shard: Shard,
) -> tuple[Values | None, jax.Array | None, RolloutState]:
    """Evaluates a trajectory by the critic, which may be recurrent or missing.

    Args:
      policy: has the critic.
      trajectory: of the rollout.
      before: state before the rollout.
      after: state after the rollout.
      config: a complete config.
      shard: the environments of this device.

    Returns:
      The values, the starts of episodes `[T, N]` (None without a memory), and the state after the
      rollout with the critic's recurrent state brought up to date: the rollout carries that of the
      actor alone.
    """
    num_states = _evaluated_together(config, shard)
    has_critic = policy.spec.has_critic
    if before.recurrent_state is None:
        values = None
        if has_critic:
            # A CPU core's cache holds 512 states, or fewer images. Accelerators have memory for
            # more, and launch kernels for every block.
            together = min(num_states, 2**9, images_in_cache(policy.spec) or num_states)
            values = jax.lax.platform_dependent(
                policy,
                trajectory,
                cpu=partial(_values, num_states=together),
                default=partial(_values, num_states=num_states),
            )
        return values, None, after
    starts = jnp.concatenate([before.start[None], trajectory.done[:-1]])
    if not has_critic:
        return None, starts, after
    values, critic_state = _values_in_sequence(
        policy, trajectory, before.recurrent_state, starts, num_states=num_states
    )
    recurrent_state = {**after.recurrent_state, **critic_state}
    return values, starts, after.replace(recurrent_state=recurrent_state)


def _evaluated_together(config: Config, shard: Shard) -> int:
    """Returns the maximum number of states that the critic evaluates together.

    Each is evaluated with its successor, so the activations take as much memory as those of one
    minibatch. The bound does not hold for a single step of all environments, the smallest block.
    """
    assert config.num_minibatches is not None, "the config is complete"
    return shard.num_envs * config.num_steps // config.num_minibatches // 2


def _values(policy: Policy, trajectory: Trajectory, num_states: int) -> Values:
    """Returns V(s_t) and V(s'_t), `[T, N]`, computed for about `num_states` states at a time."""

    def block_values(obs: tuple[jax.Array, jax.Array]) -> Values:
        return Values(*map(policy.value, obs))

    # Successors are evaluated separately, because at an episode's end the next observation is
    # another episode's.
    obs = (trajectory.obs, trajectory.final_obs)
    return map_blockwise(block_values, obs, num_samples=num_states)


def _values_in_sequence(
    policy: Policy,
    trajectory: Trajectory,
    recurrent_state: Any,
    starts: jax.Array,
    *,
    num_states: int,
) -> tuple[Values, Any]:
    """Returns V(s_t) and V(s'_t), `[T, N]`, of a recurrent critic, and its state afterwards.

    Computed for about `num_states` states at a time. A true successor is evaluated from the
    recurrent state after s_t, before a reset clears it.
    """
    num_steps, num_envs = trajectory.reward.shape
    size = largest_divisor(num_steps, at_most=max(1, num_states // num_envs))

    def block_values(state: Any, block: tuple) -> tuple[Any, Values]:
        obs, final_obs, start = block
        value, states = policy.values(obs, state, start)

        # One step of size · N environments, each with the recurrent state after its observation.
        flat_obs = jax.tree.map(lambda x: x.reshape(1, start.size, *x.shape[2:]), final_obs)
        flat_states = jax.tree.map(lambda x: x.reshape(start.size, *x.shape[2:]), states)
        no_start = jnp.zeros((1, start.size), bool)
        next_value, _ = policy.values(flat_obs, flat_states, no_start)
        last = jax.tree.map(lambda x: x[-1], states)
        return last, Values(value, next_value.reshape(start.shape))

    part = "critic" if policy.spec.has_critic_torso else "actor"
    blocks = jax.tree.map(
        lambda x: x.reshape(num_steps // size, size, *x.shape[1:]),
        (trajectory.obs, trajectory.final_obs, starts),
    )
    state, values = jax.lax.scan(block_values, {part: recurrent_state[part]}, blocks)
    return jax.tree.map(lambda x: x.reshape(num_steps, num_envs), values), state


def _learned_reward(
    trajectory: Trajectory,
    discounted_return: jax.Array,
    stats: running_stats.RunningStats | None,
    hparams: HParams,
    axis_name: str | None,
) -> tuple[jax.Array, jax.Array, running_stats.RunningStats | None]:
    """Returns rewards normalised, scaled and clipped, in this order, as they are learned from.

    Returns also the discounted return after the rollout and the statistics with it merged in.
    """
    reward = trajectory.reward
    if stats is not None:
        returns, discounted_return = discounted_returns(
            reward, trajectory.done, discounted_return, gamma=hparams.gamma
        )
        stats = running_stats.merge(stats, returns, axis_name)
        reward = running_stats.scale(stats, reward)
    # A value of None adds no code.
    if hparams.reward_scale is not None:
        reward = reward * hparams.reward_scale
    if hparams.reward_clip is not None:
        reward = jnp.clip(reward, -hparams.reward_clip, hparams.reward_clip)
    return reward, discounted_return, stats


def _merged_obs_stats(stats: ObsStats, obs: Any, axis_name: str | None) -> ObsStats:
    return tuple(
        None if old is None else running_stats.merge(old, x, axis_name)
        for old, x in zip(stats, jax.tree.leaves(obs), strict=True)
    )


def _first_episodes(trajectory: Trajectory, mask: jax.Array) -> EpisodeStats:
    """Returns sums over the episodes that count; later ones in a rollout are cut short."""
    return EpisodeStats(
        return_sum=jnp.sum(trajectory.reward * mask),
        length_sum=jnp.sum(mask),
        num_episodes=jnp.sum(mask[0]),
        metric_sums={name: jnp.sum(x, where=mask) for name, x in trajectory.metrics.items()},
    )
