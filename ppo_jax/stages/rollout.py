"""The first stage: acting in the environments for T steps."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.envs.environment import Environment
from ppo_jax.ops.blocks import largest_divisor
from ppo_jax.policy.policy import Policy
from ppo_jax.policy.spec import head_of
from ppo_jax.types import EpisodeStats, RolloutState, Trajectory, strongly_typed

Carry = tuple[RolloutState, EpisodeStats]


def reset(
    env: Environment, env_params: Any, key: jax.Array, *, num_envs: int, recurrent_state: Any = None
) -> RolloutState:
    """Starts an episode in each environment.

    Args:
      env: the environment.
      env_params: its parameters.
      key: random key.
      num_envs: N.
      recurrent_state: of the policy, `[N, ...]`; None without a memory.
    """
    keys = jax.random.split(key, num_envs)
    obs, env_state = jax.vmap(env.reset, in_axes=(0, None))(keys, env_params)
    return RolloutState(
        env_state=strongly_typed(env_state),
        obs=obs,
        episode_return=jnp.zeros(num_envs, jnp.float32),
        episode_length=jnp.zeros(num_envs, jnp.int32),
        discounted_return=jnp.zeros(num_envs, jnp.float32),
        recurrent_state=recurrent_state,
    )


@jax.named_scope("rollout")
def rollout(
    env: Environment,
    env_params: Any,
    policy: Policy,
    state: RolloutState,
    key: jax.Array,
    *,
    num_steps: int,
) -> tuple[RolloutState, Trajectory, EpisodeStats]:
    """Acts for `num_steps` steps in every environment.

    The loop computes only what the next action needs. Noise and keys are drawn before the loop;
    log-probabilities and values are computed after it, in one batch each.

    Args:
      env: the environment.
      env_params: its parameters.
      policy: acts.
      state: of the N environments at the first step.
      key: random key.
      num_steps: T.

    Returns:
      The state after the last step, the trajectory `[T, N]`, and sums over the episodes that ended.
    """
    # Static: looked up while tracing.
    head = head_of(policy.spec)
    num_envs = state.episode_return.shape[0]
    noise_key, env_key = jax.random.split(key)
    noise = head.noise(noise_key, (num_steps, num_envs))
    env_keys = jax.random.split(env_key, (num_steps, num_envs, 2))
    env_reset = jax.vmap(env.reset, in_axes=(0, None))
    env_step = jax.vmap(env.step, in_axes=(0, 0, 0, None))

    def act(new_episode: tuple, carry: Carry, inputs: tuple) -> tuple[Carry, Trajectory]:
        state, ended = carry
        noise_t, step_keys = inputs
        action_params, recurrent_state = policy.step(state.obs, state.recurrent_state, state.start)
        action = head.sample(action_params, noise_t)
        step = env_step(step_keys, state.env_state, head.to_env(action), env_params)
        transition = Trajectory(
            obs=state.obs,
            action=action,
            action_params=action_params,
            reward=step.reward,
            terminated=step.terminated,
            truncated=step.truncated,
            final_obs=step.obs,
        )
        # The rollout resets environments itself, because suites differ in whether and how they do.
        done = transition.done
        episode_return = state.episode_return + step.reward
        episode_length = state.episode_length + 1
        ended = EpisodeStats(  # [N] each: sums over environments wait until after the loop
            return_sum=ended.return_sum + jnp.where(done, episode_return, 0.0),
            length_sum=ended.length_sum + jnp.where(done, episode_length, 0),
            num_episodes=ended.num_episodes + done,
        )
        obs, env_state = _where(done, new_episode, (step.obs, step.state))
        state = state.replace(
            env_state=env_state,
            obs=obs,
            episode_return=jnp.where(done, 0.0, episode_return),
            episode_length=jnp.where(done, 0, episode_length),
            recurrent_state=recurrent_state,
        )
        return (state, ended), transition

    def act_in_block(carry: Carry, inputs: tuple) -> tuple[Carry, Trajectory]:
        # A new episode is drawn for every environment: drawing only where one ends would need a
        # branch, and under `vmap` both sides of a branch are computed anyway.
        noise, keys = inputs
        # The first step's reset key serves the block; those of later steps are not used.
        obs, env_state = env_reset(keys[0, :, 1], env_params)
        new_episode = obs, strongly_typed(env_state)
        return jax.lax.scan(partial(act, new_episode), carry, (noise, keys[:, :, 0]))

    none_ended = EpisodeStats(
        return_sum=jnp.zeros(num_envs, jnp.float32),
        length_sum=jnp.zeros(num_envs, jnp.int32),
        num_episodes=jnp.zeros(num_envs, jnp.int32),
    )
    # Within `shortest_episode` steps an environment starts at most one new episode, so that one
    # draw of new episodes serves a whole block of steps.
    size = largest_divisor(num_steps, at_most=env.shortest_episode)
    blocks = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), (noise, env_keys))
    (state, ended), trajectory = jax.lax.scan(act_in_block, (state, none_ended), blocks)
    trajectory = jax.tree.map(lambda x: x.reshape(num_steps, *x.shape[2:]), trajectory)
    return state, trajectory, jax.tree.map(jnp.sum, ended)


def _where(done: jax.Array, new_episode: Any, successor: Any) -> Any:
    """Selects `new_episode` where an episode ended, for every leaf `[N, ...]`."""

    def where(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where(done.reshape(-1, *[1] * (x.ndim - 1)), x, y)

    return jax.tree.map(where, new_episode, successor)
