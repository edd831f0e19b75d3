"""Successive halving inside one compiled function: stopped trials make way for new draws.

Successive halving by Jamieson & Talwalkar 2016 (arXiv:1502.07943), for a population of fixed size.
A slot is one position in the vmapped population. A trial is stopped at a rung unless it is among
the best 1/η of all trials that reached the rung, as in Li et al. 2020 (arXiv:1810.05934), algorithm
2. A new trial takes its slot, so that no slot is idle.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.errors import ConfigError, require_positive_integers
from ppo_jax.hparams import HParams
from ppo_jax.population.member import choose_state
from ppo_jax.population.rounds import (
    Score,
    check_hparam_names,
    evaluation_score,
    for_every_member,
    make_round,
)
from ppo_jax.population.search_space import Choice, Distribution, extremes
from ppo_jax.trainer import Trainer
from ppo_jax.types import TrainState


class Record(NamedTuple):
    """History of a search, round by round."""

    trials: jax.Array  # [R, S], number of the trial in a slot, in the order of their draws
    hparams: HParams  # [R, S], used in the round
    ages: jax.Array  # [R, S], rounds that the trial had been trained for after this round
    scores: jax.Array  # [R, S]; −∞ where a learner is no longer finite
    stopped: jax.Array  # [R, S], the trial ended there


class Halving(NamedTuple):
    """The trials in the slots after the last round."""

    states: TrainState  # [S, ...]
    hparams: HParams  # [S]
    record: Record


def stopped_trials(
    scores: jax.Array, ages: jax.Array, round_number: jax.Array, *, factor: int
) -> jax.Array:
    """Returns which trials are stopped after a round, `[S]`.

    A trial is stopped at a rung if it is not among the best 1/η of all trials that reached the
    rung. Rungs are the ages 1, η, η², …. Ties go to the earlier round, then to the lower slot.

    Args:
      scores: of all rounds up to this one, `[R, S]`.
      ages: rounds that each trial has trained for, `[R, S]`; 0 for rounds that have not run yet.
      round_number: the row of this round.
      factor: η.

    >>> scores = jnp.array([[5.0, 1.0, 3.0, 2.0, 4.0, 6.0], [0.0] * 6])
    >>> ages = jnp.array([[1] * 6, [0] * 6])
    >>> stopped_trials(scores, ages, 0, factor=3).tolist()
    [False, True, True, True, True, False]
    """
    num_rounds, num_slots = scores.shape
    age, score = ages[round_number], scores[round_number]
    order = jnp.arange(scores.size).reshape(scores.shape)

    def rank(age: jax.Array, score: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Counts the trials of the same age that are better, and all of the same age."""
        is_peer = ages == age
        is_better = (scores > score) | ((scores == score) & (order < place))
        return jnp.sum(is_peer & is_better), jnp.sum(is_peer)

    places = round_number * num_slots + jnp.arange(num_slots)
    num_better, num_peers = jax.vmap(rank)(age, score, places)
    # The last round decides nothing, so rungs beyond it do not exist.
    rungs = [1]
    while rungs[-1] * factor < num_rounds:
        rungs.append(rungs[-1] * factor)
    return jnp.isin(age, jnp.array(rungs)) & (num_better * factor >= num_peers)


def make_halving(
    trainer: Trainer,
    space: Mapping[str, Distribution],
    *,
    num_rounds: int,
    updates_per_round: int,
    factor: int = 3,
    score: Score | None = None,
) -> Callable[..., Halving]:
    """Returns successive halving as a pure function; jit is the caller's.

    Every slot trains in every round, for `num_rounds * updates_per_round` updates in all. A trial
    whose learner is no longer finite is stopped after its round. After the last round nothing is
    stopped. A new trial starts from new parameters and environments, and at the start of its
    learning rate's schedule: give the trainer's config that many updates, or a constant schedule.

    Args:
      trainer: trains every trial.
      space: distributions of hyperparameters, by name.
      num_rounds: R.
      updates_per_round: updates between two decisions.
      factor: η; at a rung one trial in η goes on.
      score: scores a trial after a round; None evaluates complete episodes, by
        `rounds.evaluation_score`.

    Returns:
      `(keys [S], hparams=None, env_params=None) -> Halving`; `hparams` are values that are not
      drawn.

    Raises:
      ConfigError: an unknown name, or a number that is out of range.

    >>> from ppo_jax import Config, make_trainer
    >>> from ppo_jax.population.search_space import LogUniform
    >>> trainer = make_trainer(Config(num_envs=2, num_steps=16, hidden_sizes=(8,)))
    >>> space = {"learning_rate": LogUniform(1e-4, 1e-2)}
    >>> run = make_halving(trainer, space, num_rounds=2, updates_per_round=1)
    >>> result = jax.jit(run)(jax.random.split(jax.random.key(0), 3))
    >>> result.record.ages.tolist()  # one of three goes on
    [[1, 1, 1], [1, 1, 2]]
    """
    check_hparam_names(space, trainer.hparams)
    for name, distribution in space.items():
        for value in extremes(distribution):
            trainer.hparams.replace(**{name: value})  # within its range, or an error
    if not space:
        raise ConfigError("a space must have a hyperparameter to draw; it is empty.")
    require_positive_integers({"num_rounds": num_rounds, "updates_per_round": updates_per_round})
    if factor < 2:
        raise ConfigError(f"factor must be at least 2; got {factor}.")
    init = jax.vmap(trainer.init, in_axes=(0, 0, None))
    train = make_round(trainer, updates_per_round, score or evaluation_score(trainer))

    def draw(key: jax.Array, hparams: HParams, num_slots: int) -> HParams:
        quantiles = jax.random.uniform(key, (len(space), num_slots))
        drawn = zip(space.items(), quantiles, strict=True)
        return hparams.replace(**{name: _at(entry, u) for (name, entry), u in drawn})

    def run(keys: jax.Array, hparams: HParams | None = None, env_params: Any = None) -> Halving:
        num_slots = keys.shape[0]
        if num_slots < factor:
            raise ConfigError(
                f"a population must be as large as factor, to leave one of them; got {num_slots} "
                f"and {factor}. Use more members, or a smaller factor."
            )
        # A record of the algorithm's type, which may have hyperparameters that are drawn.
        given = {} if hparams is None else hparams.given()
        fixed = for_every_member(type(trainer.hparams)(**given), num_slots)
        # The first member's second key draws for the whole search.
        split = jax.vmap(jax.random.split)(keys)
        first_key, *round_keys = jax.random.split(split[0, 1], 1 + num_rounds)
        first = draw(first_key, fixed, num_slots)
        empty = jnp.zeros((num_rounds, num_slots))

        def one_round(carry: tuple, inputs: tuple[jax.Array, jax.Array]) -> tuple[tuple, tuple]:
            states, hparams, trials, age, next_trial, scores, ages = carry
            number, key = inputs
            init_key, draw_key, score_key = jax.random.split(key, 3)
            states, round_scores, is_finite = train(score_key, states, hparams)
            age = age + 1
            scores, ages = scores.at[number].set(round_scores), ages.at[number].set(age)
            stopped = stopped_trials(scores, ages, number, factor=factor) | ~is_finite
            # A trial that replaced another in the last round would never be trained.
            stopped &= number < num_rounds - 1
            seen = trials, hparams, stopped
            drawn = draw(draw_key, fixed, num_slots)
            # New trials are made for all slots and used in those that were stopped: shapes are
            # fixed.
            new = init(jax.random.split(init_key, num_slots), drawn, env_params)
            states = jax.vmap(choose_state)(stopped, new, states)
            hparams = jax.tree.map(lambda x, y: jnp.where(stopped, x, y), drawn, hparams)
            # Numbers go up in the order of slots, without gaps.
            trials = jnp.where(stopped, next_trial + jnp.cumsum(stopped) - 1, trials)
            age = jnp.where(stopped, 0, age)
            next_trial = next_trial + jnp.sum(stopped)
            return (states, hparams, trials, age, next_trial, scores, ages), seen

        trials = jnp.arange(num_slots)
        start = (
            init(split[:, 0], first, env_params),
            first,
            trials,
            jnp.zeros_like(trials),
            jnp.int32(num_slots),
            empty,
            empty.astype(trials.dtype),
        )
        numbered = jnp.arange(num_rounds), jnp.stack(round_keys)
        (states, hparams, *_, scores, ages), seen = jax.lax.scan(one_round, start, numbered)
        held, trained_with, stopped = seen
        return Halving(states, hparams, Record(held, trained_with, ages, scores, stopped))

    return run


def _at(distribution: Distribution, u: jax.Array) -> jax.Array:
    """Returns the values at quantiles u, inside jit."""
    if not isinstance(distribution, Choice):
        return distribution.at(u)
    # `Choice.at` takes a Python number; this is its form for arrays.
    values = jnp.array(distribution.values, jnp.float32)
    return values[jnp.minimum((u * values.size).astype(int), values.size - 1)]
