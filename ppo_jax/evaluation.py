"""Evaluation of a policy over complete episodes, inside jit."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.envs.environment import Environment, vectorized
from ppo_jax.policy.policy import Policy
from ppo_jax.types import NO_METRICS


class Evaluation(NamedTuple):
    """Results of an evaluation, one entry per episode."""

    returns: jax.Array  # [E], undiscounted; the mean over agents
    lengths: jax.Array  # [E]
    finished: jax.Array  # [E], False where max_steps cut the episode
    metrics: dict[str, jax.Array] = (
        NO_METRICS  # each [E], sums over the episode; see `Environment.metrics`
    )


_EVALUATION_STREAM = 0xE7A1  # folded into a key, so that training and evaluation draw differently


def evaluation_key(key: jax.Array) -> jax.Array:
    """Returns the key of the final evaluation of a training that started from `key`."""
    return jax.random.fold_in(key, _EVALUATION_STREAM)


def evaluate(
    policy: Policy,
    env: Environment,
    env_params: Any,
    key: jax.Array,
    num_episodes: int,
    *,
    greedy: bool = True,
    max_steps: int = 100_000,
) -> Evaluation:
    """Runs the first episode of `num_episodes` new environments, each to its end.

    Each environment contributes one episode. An average over the episodes that end first would
    count short episodes more often than long ones. Pure: jit and vmap it.

    Args:
      policy: the policy to evaluate.
      env: the environment, as from `ppo_jax.make_env`.
      env_params: its parameters; `env.params` are the defaults.
      key: random key, independent of those of the training.
      num_episodes: E, a static integer.
      greedy: take the most likely action (static); False samples.
      max_steps: bound on the steps of an episode, for environments that never end one.

    Returns:
      `Evaluation`, each field `[num_episodes]`.

    >>> from ppo_jax import Config, envs, make_trainer
    >>> trainer = make_trainer(Config(num_envs=2, num_steps=8))
    >>> policy = trainer.policy(trainer.init(jax.random.key(0)))
    >>> result = evaluate(policy, trainer.env, trainer.env.params, jax.random.key(1), 3)
    >>> result.returns.shape, bool(result.finished.all())
    ((3,), True)
    """
    reset_key, act_key = jax.random.split(key)
    many = vectorized(env)
    num_players = num_episodes * env.num_agents
    obs, env_state = many.reset(jax.random.split(reset_key, num_players), env_params)
    start = Evaluation(
        returns=jnp.zeros(num_episodes),
        lengths=jnp.zeros(num_episodes, jnp.int32),
        finished=jnp.zeros(num_episodes, bool),
        metrics={name: jnp.zeros(num_episodes) for name in env.metrics},
    )

    # A while loop instead of a scan: the longest episode decides, and its length is not known.
    def unfinished(carry: tuple) -> jax.Array:
        time, *_, result = carry
        return (time < max_steps) & ~jnp.all(result.finished)

    def step(carry: tuple) -> tuple:
        time, env_state, obs, recurrent_state, result = carry
        # Folded in instead of split beforehand, because the number of steps is not known.
        action_key, env_key = jax.random.split(jax.random.fold_in(act_key, time))
        action, recurrent_state = policy.act(obs, recurrent_state, None if greedy else action_key)
        step = many.step(jax.random.split(env_key, num_players), env_state, action, env_params)
        rewards = step.reward.reshape(num_episodes, -1).mean(axis=-1)
        done = (step.terminated | step.truncated)[:: env.num_agents]
        # Environments whose episode is over keep stepping without a reset, but no longer count.
        running = ~result.finished
        result = Evaluation(
            returns=result.returns + jnp.where(running, rewards, 0.0),
            lengths=result.lengths + running,
            finished=result.finished | done,
            metrics={
                name: result.metrics[name] + jnp.where(running, x[:: env.num_agents], 0.0)
                for name, x in step.metrics.items()
            },
        )
        return time + 1, step.state, step.obs, recurrent_state, result

    time = jnp.zeros((), jnp.int32)
    recurrent_state = policy.initial_recurrent_state((num_players,))
    first = (time, env_state, obs, recurrent_state, start)
    *_, result = jax.lax.while_loop(unfinished, step, first)
    return result
