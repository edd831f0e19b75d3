"""One member of a population as a pure function: it trains, is recorded, and is evaluated."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.evaluation import evaluate, evaluation_key
from ppo_jax.hparams import HParams
from ppo_jax.stages.metrics import Metrics
from ppo_jax.trainer import Trainer
from ppo_jax.types import TrainState


class Outcome(NamedTuple):
    """The results of a member; with a leading axis of members `[S]` after `vmap`."""

    curves: Metrics
    """Sums over `num_rows` windows of updates, `[num_rows]`."""
    returns: jax.Array
    """Returns of the final greedy evaluation, `[num_episodes]`."""
    failed_at: jax.Array
    """[], the update that would have made a parameter NaN or infinite; −1 where none did."""


def train_member(
    trainer: Trainer,
    key: jax.Array,
    hparams: HParams,
    env_params: Any,
    *,
    num_updates: int,
    num_rows: int,
    num_episodes: int,
) -> Outcome:
    """Trains a member from its first key and evaluates it. Pure: vmap it over members.

    A member whose parameters would become NaN or infinite keeps its last finite state.

    Args:
      trainer: of the member.
      key: random key of the training.
      hparams: hyperparameters.
      env_params: parameters of the environment.
      num_updates: updates of the training.
      num_rows: windows of updates in its curves.
      num_episodes: episodes of its evaluation.
    """
    state = trainer.init(key, hparams, env_params)
    # The accumulators need the names of the metrics before the first step.
    _, shapes = jax.eval_shape(trainer.step, state, hparams)
    sums = jax.tree.map(lambda _: jnp.zeros(num_rows), shapes)

    def one_update(carry: tuple, index: jax.Array) -> tuple[tuple, None]:
        state, failed_at, sums = carry
        new_state, metrics = trainer.step(state, hparams)
        is_running = (failed_at < 0) & is_finite(new_state.learner.params)
        failed_at = jnp.where((failed_at < 0) & ~is_running, index, failed_at)
        # A select instead of a branch: members of a vmap take both sides anyway, and a NaN in a
        # state that is not chosen does no harm.
        state = choose_state(is_running, new_state, state)
        # Memory does not grow with the number of updates: windows are summed on the device.
        row = index * num_rows // num_updates
        sums = jax.tree.map(
            lambda total, x: total.at[row].add(jnp.where(is_running, x, 0.0)), sums, metrics
        )
        return (state, failed_at, sums), None

    start = (state, jnp.int32(-1), sums)
    (state, failed_at, sums), _ = jax.lax.scan(one_update, start, jnp.arange(num_updates))
    policy = trainer.policy(state)
    evaluation = evaluate(policy, trainer.env, env_params, evaluation_key(key), num_episodes)
    return Outcome(sums, evaluation.returns, failed_at)


def is_finite(tree: Any) -> jax.Array:
    """Returns whether no number in the tree is NaN or infinite."""
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def choose_state(condition: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """Returns `new` where the condition is true and `old` elsewhere, random keys included."""

    def choose(x: jax.Array, y: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = jnp.where(condition, jax.random.key_data(x), jax.random.key_data(y))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        return jnp.where(condition, x, y)

    return jax.tree.map(choose, new, old)
