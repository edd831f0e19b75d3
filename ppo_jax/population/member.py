"""One member of a population as pure functions: it starts, trains in pieces, and is evaluated."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.evaluation import evaluate, evaluation_key
from ppo_jax.hparams import HParams
from ppo_jax.policy.policy import Policy
from ppo_jax.stages.gradient_steps import CRITIC_SKIPPED, SKIPPED
from ppo_jax.stages.metrics import Metrics
from ppo_jax.trainer import Trainer
from ppo_jax.types import TrainState


class Guard(NamedTuple):
    """Record of the updates of a training that were not finite."""

    consecutive_skips: jax.Array | np.ndarray
    """[], consecutive updates that were skipped, up to the last one."""
    failed_at: jax.Array | np.ndarray
    """[], index of the update with which the training failed; −1 while it has not."""


class MemberState(NamedTuple):
    """A member between two pieces of its training; with a leading axis `[S]` after `vmap`."""

    train: TrainState
    guard: Guard
    curves: Metrics
    """Sums over `num_rows` windows of updates, `[num_rows]`."""


class Outcome(NamedTuple):
    """The results of a member; with a leading axis of members `[S]` after `vmap`."""

    curves: Metrics
    """Sums over `num_rows` windows of updates, `[num_rows]`."""
    returns: jax.Array
    """Returns of the final greedy evaluation, `[num_episodes]`."""
    failed_at: jax.Array
    """[], index of the update with which the training failed; −1 where it did not."""
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
    trainer: Trainer,
    *,
    max_skipped_updates: int,
    num_updates: int,
    num_rows: int,
    num_episodes: int,
) -> MemberProgram:
    """Returns the training of a member.

    A member that fails, as `guarded_step` tells, keeps its policy.

    Args:
      trainer: trains the member.
      max_skipped_updates: see `Config.max_skipped_updates`.
      num_updates: updates of the whole training.
      num_rows: windows of updates in its curves.
      num_episodes: episodes of its evaluation.
    """
    step = guarded_step(trainer, max_skipped_updates, num_updates)

    def start(key: jax.Array, hparams: HParams, env_params: Any) -> MemberState:
        state = trainer.init(key, hparams, env_params)
        # The accumulators need the names of the metrics before the first step.
        _, shapes = jax.eval_shape(trainer.step, state, hparams)
        curves = jax.tree.map(lambda _: jnp.zeros(num_rows), shapes)
        return MemberState(state, initial_guard(), curves)

    def advance(
        member: MemberState, hparams: HParams, first: jax.Array, count: jax.Array
    ) -> MemberState:
        def one_update(i: jax.Array, member: MemberState) -> MemberState:
            state, guard, metrics = step(member.train, member.guard, i, hparams)
            # Memory does not grow with the number of updates: windows are summed on the device.
            row = i * num_rows // num_updates
            is_running = guard.failed_at < 0
            curves = jax.tree.map(
                lambda total, x: total.at[row].add(jnp.where(is_running, x, 0.0)),
                member.curves,
                metrics,
            )
            return MemberState(state, guard, curves)

        return jax.lax.fori_loop(first, first + count, one_update, member)

    def finish(member: MemberState, key: jax.Array) -> Outcome:
        policy = trainer.policy(member.train)
        env_params = member.train.env_params
        result = evaluate(policy, trainer.env, env_params, evaluation_key(key), num_episodes)
        failed_at = jnp.asarray(member.guard.failed_at)
        return Outcome(member.curves, result.returns, failed_at, policy)

    return MemberProgram(start, advance, finish)


GuardedStep = Callable[[TrainState, Guard, jax.Array, HParams], tuple[TrainState, Guard, Metrics]]
"""`(state, guard, index, hparams) -> (state, guard, metrics)`."""


def initial_guard(shape: tuple[int, ...] = ()) -> Guard:
    """Returns the guard of trainings before their first update."""
    return Guard(jnp.zeros(shape, jnp.int32), jnp.full(shape, -1, jnp.int32))


def guarded_step(trainer: Trainer, max_skipped_updates: int, num_updates: int) -> GuardedStep:
    """Returns a step that tells when a training has failed, and keeps the policy from then on.

    A training fails with an update that would make parameters NaN or infinite. It also fails once
    `max_skipped_updates` consecutive updates were skipped, or half of all updates if that is fewer.
    With 0, skipped updates do not make a training fail.
    """
    limit = min(max_skipped_updates, math.ceil(num_updates / 2))

    def step(
        state: TrainState, guard: Guard, index: jax.Array, hparams: HParams
    ) -> tuple[TrainState, Guard, Metrics]:
        new, metrics = trainer.step(state, hparams)
        consecutive_skips = jnp.where(all_skipped(metrics), guard.consecutive_skips + 1, 0)
        # A user's update rule need not skip updates that are not finite.
        fails = ~is_finite(new.learner.params)
        if limit:
            fails |= consecutive_skips >= limit
        had_failed = guard.failed_at >= 0
        failed_at = jnp.where(~had_failed & fails, index, guard.failed_at)
        # A select instead of a branch: members of a vmap take both sides anyway. Parameters and
        # statistics make the policy; a copy of the optimiser's state would take twice the memory.
        keep = partial(jnp.where, had_failed | fails)
        params = jax.tree.map(keep, state.learner.params, new.learner.params)
        new = new.replace(
            learner=new.learner.replace(params=params),
            statistics=jax.tree.map(keep, state.statistics, new.statistics),
        )
        return new, Guard(consecutive_skips, failed_at), metrics

    return step


def all_skipped(metrics: Metrics) -> jax.Array:
    """Returns whether all updates of the policy, or of the critic, were skipped."""
    shares = [metrics[name] for name in (SKIPPED, CRITIC_SKIPPED) if name in metrics.totals]
    return jnp.any(jnp.array([share == 1.0 for share in shares], bool))


def is_finite(tree: Any) -> jax.Array:
    """Returns whether no number in the tree is NaN or infinite."""
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))
