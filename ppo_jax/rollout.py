"""The first stage: act in the environments for T steps."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.envs.environment import Environment
from ppo_jax.policy.policy import Policy
from ppo_jax.policy.spec import head_of
from ppo_jax.types import EpisodeStats, RolloutState, Trajectory, strongly_typed

Carry = tuple[RolloutState, EpisodeStats]


def reset(
    env: Environment, env_params: Any, key: jax.Array, *, num_envs: int, memory: Any = None
) -> RolloutState:
    """N environments at the start of an episode; `memory` is what the policy carries, if any."""
    keys = jax.random.split(key, num_envs)
    obs, env_state = jax.vmap(env.reset, in_axes=(0, None))(keys, env_params)
    return RolloutState(
        env_state=strongly_typed(env_state),
        obs=obs,
        episode_return=jnp.zeros(num_envs, jnp.float32),
        episode_length=jnp.zeros(num_envs, jnp.int32),
        discounted_return=jnp.zeros(num_envs, jnp.float32),
        memory=memory,
    )


def rollout(
    env: Environment,
    env_params: Any,
    policy: Policy,
    state: RolloutState,
    key: jax.Array,
    *,
    num_steps: int,
) -> tuple[RolloutState, Trajectory, EpisodeStats]:
    """Acts for `num_steps` in every environment.

    The loop holds what the next action needs and no more: noise and keys are drawn before it,
    log-probabilities and values are computed after it, in one batch each.
    """
    head = head_of(policy.spec)
    num_envs = state.episode_return.shape[0]
    noise_key, env_key = jax.random.split(key)
    noise = head.noise(noise_key, (num_steps, num_envs))
    env_keys = jax.random.split(env_key, (num_steps, num_envs, 2))
    begin = _new_episodes(env, env_params, env_keys[:, :, 1])
    env_step = jax.vmap(env.step, in_axes=(0, 0, 0, None))

    def act(carry: Carry, inputs: tuple) -> tuple[Carry, Trajectory]:
        state, ended = carry
        noise_t, env_keys_t = inputs
        step_keys, reset_keys = env_keys_t[:, 0], env_keys_t[:, 1]
        action_params, memory = policy.step(state.obs, state.memory, state.start)
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
        done = transition.done
        episode_return = state.episode_return + step.reward
        episode_length = state.episode_length + 1
        fresh = begin(reset_keys, ended.episodes)
        ended = EpisodeStats(  # [N] each: sums over environments wait until after the loop
            return_sum=ended.return_sum + jnp.where(done, episode_return, 0.0),
            length_sum=ended.length_sum + jnp.where(done, episode_length, 0),
            episodes=ended.episodes + done,
        )
        obs, env_state = _where(done, fresh, (step.obs, step.state))
        state = state.replace(
            env_state=env_state,
            obs=obs,
            episode_return=jnp.where(done, 0.0, episode_return),
            episode_length=jnp.where(done, 0, episode_length),
            memory=memory,
        )
        return (state, ended), transition

    none_ended = EpisodeStats(
        return_sum=jnp.zeros(num_envs, jnp.float32),
        length_sum=jnp.zeros(num_envs, jnp.int32),
        episodes=jnp.zeros(num_envs, jnp.int32),
    )
    inputs = noise, env_keys
    (state, ended), trajectory = jax.lax.scan(act, (state, none_ended), inputs)
    return state, trajectory, jax.tree.map(jnp.sum, ended)


def _new_episodes(
    env: Environment, env_params: Any, keys: jax.Array
) -> Callable[[jax.Array, jax.Array], tuple[Any, Any]]:
    """`(keys [N], episodes begun so far [N]) -> (obs, env_state)`, `[N, ...]`, for one step.

    Drawn at every step for every environment, since to draw only where needed takes a branch;
    before the loop where fewer can begin. `keys` are those of all steps `[T, N]`.
    """

    def draw(keys: jax.Array) -> tuple[Any, Any]:
        obs, state = jax.vmap(env.reset, in_axes=(0, None))(keys, env_params)
        return obs, strongly_typed(state)

    if env.shortest_episode == 1:
        return lambda keys, _: draw(keys)
    num_steps, num_envs = keys.shape
    count = math.ceil(num_steps / env.shortest_episode)
    drawn = jax.vmap(draw)(keys[:count])

    def take(_: jax.Array, num_begun: jax.Array) -> tuple[Any, Any]:
        return jax.tree.map(lambda x: x[num_begun % count, jnp.arange(num_envs)], drawn)

    return take


def _where(done: jax.Array, fresh: Any, successor: Any) -> Any:
    """Leaf by leaf `[N, ...]`, `fresh` where an episode ended."""

    def where(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where(done.reshape(-1, *[1] * (x.ndim - 1)), x, y)

    return jax.tree.map(where, fresh, successor)
