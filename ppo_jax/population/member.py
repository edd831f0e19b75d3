"""A population as one function: every member trains, is watched, and is judged, on the device."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.config import HParams
from ppo_jax.evaluation import evaluate, evaluation_key
from ppo_jax.trainer import Trainer
from ppo_jax.types import Metrics, TrainState


class Outcome(NamedTuple):
    """What a member leaves; with a leading axis of members `[S]` after `vmap`."""

    curves: Metrics
    """Means over `num_rows` windows of updates, `[num_rows]`; of episodes over those that
    ended, NaN where none did."""
    returns: jax.Array
    """Of the final greedy evaluation, `[num_episodes]`."""
    failed_at: jax.Array
    """[], the update that would have made a parameter NaN or infinite; −1 where none did."""


def train_member(
    trainer: Trainer,
    num_updates: int,
    key: jax.Array,
    hparams: HParams,
    env_params: Any,
    *,
    num_rows: int,
    num_episodes: int,
) -> Outcome:
    """One training from its first key to its evaluation. Pure: vmap it over members.

    A member whose parameters are no longer finite is frozen as it was before.
    """
    state = trainer.init(key, hparams, env_params)
    _, shapes = jax.eval_shape(trainer.step, state, hparams)
    sums = {name: jnp.zeros(num_rows) for name in shapes}
    weights = {name: jnp.zeros(num_rows) for name in shapes}

    def update(carry: tuple, index: jax.Array) -> tuple[tuple, None]:
        state, failed_at, sums, weights = carry
        new_state, metrics = trainer.step(state, hparams)
        is_running = (failed_at < 0) & is_finite(new_state.learner.params)
        failed_at = jnp.where((failed_at < 0) & ~is_running, index, failed_at)
        state = choose_state(is_running, new_state, state)
        row = index * num_rows // num_updates
        for name, value in metrics.items():
            weight = metrics["episode/count"] if name in _OF_EPISODES else 1.0
            weight = jnp.where(is_running, weight, 0.0)
            counted = jnp.where(weight > 0, value * weight, 0.0)
            sums[name] = sums[name].at[row].add(counted)
            weights[name] = weights[name].at[row].add(weight)
        return (state, failed_at, sums, weights), None

    start = (state, jnp.int32(-1), sums, weights)
    (state, failed_at, sums, weights), _ = jax.lax.scan(update, start, jnp.arange(num_updates))
    curves = {
        name: sums[name] if name == "episode/count" else sums[name] / weights[name] for name in sums
    }
    policy = trainer.policy(state)
    evaluation = evaluate(policy, trainer.env, env_params, evaluation_key(key), num_episodes)
    return Outcome(curves, evaluation.returns, failed_at)


_OF_EPISODES = ("episode/return", "episode/length")


def is_finite(tree: Any) -> jax.Array:
    """No number in the tree is NaN or infinite."""
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def choose_state(condition: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """One of two states, keys and all."""

    def choose(x: jax.Array, y: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = jnp.where(condition, jax.random.key_data(x), jax.random.key_data(y))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        return jnp.where(condition, x, y)

    return jax.tree.map(choose, new, old)
