"""One member of a population as pure functions: it starts, trains in pieces, and is evaluated."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.evaluation import evaluate, evaluation_key
from ppo_jax.hparams import HParams
from ppo_jax.policy.policy import Policy
from ppo_jax.stages.metrics import Metrics
from ppo_jax.trainer import Trainer
from ppo_jax.types import TrainState


class MemberState(NamedTuple):
    """A member between two pieces of its training; with a leading axis `[S]` after `vmap`."""

    train: TrainState
    failed_at: jax.Array
    """[], the update that would have made a parameter NaN or infinite; −1 where none did."""
    curves: Metrics
    """Sums over `num_rows` windows of updates, `[num_rows]`."""


class Outcome(NamedTuple):
    """The results of a member; with a leading axis of members `[S]` after `vmap`."""

    curves: Metrics
    """Sums over `num_rows` windows of updates, `[num_rows]`."""
    returns: jax.Array
    """Returns of the final greedy evaluation, `[num_episodes]`."""
    failed_at: jax.Array
    """[], the update that would have made a parameter NaN or infinite; −1 where none did."""
    policy: Policy


class MemberProgram(NamedTuple):
    """The training of a member in three parts. Pure: vmap them over members."""

    start: Callable[[jax.Array, HParams, Any], MemberState]
    """`(key, hparams, env_params) -> state` before the first update."""
    advance: Callable[[MemberState, HParams, jax.Array, jax.Array], MemberState]
    """`(state, hparams, first, count) -> state` after the updates `first` to `first + count − 1`.
    The numbers are traced, so that pieces of any length share one compilation."""
    finish: Callable[[MemberState, jax.Array], Outcome]
    """`(state, key) -> outcome`; the key is that of `start`."""


def make_member(
    trainer: Trainer, *, num_updates: int, num_rows: int, num_episodes: int
) -> MemberProgram:
    """Returns the training of a member.

    A member whose parameters would become NaN or infinite keeps its last finite state.

    Args:
      trainer: trains the member.
      num_updates: updates of the whole training.
      num_rows: windows of updates in its curves.
      num_episodes: episodes of its evaluation.
    """
    step = guarded_step(trainer)

    def start(key: jax.Array, hparams: HParams, env_params: Any) -> MemberState:
        state = trainer.init(key, hparams, env_params)
        # The accumulators need the names of the metrics before the first step.
        _, shapes = jax.eval_shape(trainer.step, state, hparams)
        curves = jax.tree.map(lambda _: jnp.zeros(num_rows), shapes)
        return MemberState(state, jnp.int32(-1), curves)

    def advance(
        member: MemberState, hparams: HParams, first: jax.Array, count: jax.Array
    ) -> MemberState:
        def one_update(i: jax.Array, member: MemberState) -> MemberState:
            state, failed_at, metrics = step(member.train, member.failed_at, i, hparams)
            # Memory does not grow with the number of updates: windows are summed on the device.
            row = i * num_rows // num_updates
            is_running = failed_at < 0
            curves = jax.tree.map(
                lambda total, x: total.at[row].add(jnp.where(is_running, x, 0.0)),
                member.curves,
                metrics,
            )
            return MemberState(state, failed_at, curves)

        return jax.lax.fori_loop(first, first + count, one_update, member)

    def finish(member: MemberState, key: jax.Array) -> Outcome:
        policy = trainer.policy(member.train)
        env_params = member.train.env_params
        result = evaluate(policy, trainer.env, env_params, evaluation_key(key), num_episodes)
        return Outcome(member.curves, result.returns, member.failed_at, policy)

    return MemberProgram(start, advance, finish)


GuardedStep = Callable[
    [TrainState, jax.Array, jax.Array, HParams], tuple[TrainState, jax.Array, Metrics]
]
"""`(state, failed_at, index, hparams) -> (state, failed_at, metrics)`."""


def guarded_step(trainer: Trainer) -> GuardedStep:
    """Returns a step that keeps the last state whose parameters were finite.

    `failed_at` is the index of the first update that would have made a parameter NaN or infinite,
    and −1 before. From then on the state does not change.
    """

    def step(
        state: TrainState, failed_at: jax.Array, index: jax.Array, hparams: HParams
    ) -> tuple[TrainState, jax.Array, Metrics]:
        new_state, metrics = trainer.step(state, hparams)
        is_running = (failed_at < 0) & is_finite(new_state.learner.params)
        failed_at = jnp.where((failed_at < 0) & ~is_running, index, failed_at)
        # A select instead of a branch: members of a vmap take both sides anyway, and a NaN in a
        # state that is not chosen does no harm.
        return choose_state(is_running, new_state, state), failed_at, metrics

    return step


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
