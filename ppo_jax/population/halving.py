"""Successive halving as pure functions: stopped trials make way for new draws.

Successive halving by Jamieson & Talwalkar 2016 (arXiv:1502.07943), for a population of fixed size.
A slot is one position in the vmapped population. A trial is stopped at a rung unless it is among
the best 1/η of all trials that reached the rung, as in Li et al. 2020 (arXiv:1810.05934), algorithm
2. A new trial takes its slot, so that no slot is idle.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.devices import MemberMap
from ppo_jax.errors import ConfigError
from ppo_jax.hparams import HParams
from ppo_jax.population.rounds import (
    Score,
    Scores,
    Search,
    SearchState,
    Start,
    check_hparam_names,
    for_every_member,
    make_search,
)
from ppo_jax.population.search_space import Choice, Distribution, extremes
from ppo_jax.stages.metrics import Metrics
from ppo_jax.trainer import Trainer
from ppo_jax.types import TrainState


class Record(NamedTuple):
    """History of a search, round by round."""

    trials: jax.Array  # [R, S], number of the trial in a slot, in the order of their draws
    hparams: HParams  # [R, S], used in the round
    ages: jax.Array  # [R, S], rounds that the trial had been trained for after this round
    scores: jax.Array  # [R, S]; −∞ where a member is not healthy; see `rounds.Scores`
    stopped: jax.Array  # [R, S], the trial ended there
    metrics: Metrics  # [R, S], sums over the round


class _Trials(NamedTuple):
    """The trials so far."""

    numbers: jax.Array  # [S], of the trials in the slots
    age: jax.Array  # [S], rounds that they have trained for
    num_drawn: jax.Array  # []
    scores: jax.Array  # [R, S], of all rounds so far
    ages: jax.Array  # [R, S], of all rounds so far; 0 for rounds that have not run yet


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
    member_map: MemberMap = jax.vmap,
) -> Search:
    """Returns successive halving as a `Search`, whose record is a `Record`.

    Every slot trains in every round, for `num_rounds * updates_per_round` updates in all. A trial
    that is not healthy is stopped after its round. After the last round nothing is stopped. A new
    trial starts from new parameters and environments, and at the start of its learning rate's
    schedule: give the trainer's config that many updates, or a constant schedule.

    Args:
      trainer: trains every trial.
      space: distributions of hyperparameters, by name. The `hparams` of `init` are values that are
        not drawn.
      num_rounds: R.
      updates_per_round: updates between two decisions.
      factor: η; at a rung one trial in η goes on.
      score: scores a trial after a round; None evaluates complete episodes, by
        `rounds.evaluation_score`.
      member_map: maps a function over slots.

    Raises:
      ConfigError: an unknown name, or a number that is out of range.

    >>> from ppo_jax import Config, make_trainer
    >>> from ppo_jax.population.search_space import LogUniform
    >>> trainer = make_trainer(Config(num_envs=2, num_steps=16, hidden_sizes=(8,)))
    >>> space = {"learning_rate": LogUniform(1e-4, 1e-2)}
    >>> search = make_halving(trainer, space, num_rounds=2, updates_per_round=1)
    >>> state, record = jax.jit(search.run)(jax.random.split(jax.random.key(0), 3))
    >>> record.ages.tolist()  # one of three goes on
    [[1, 1, 1], [1, 1, 2]]
    """
    check_hparam_names(space, trainer.hparams)
    for name, distribution in space.items():
        for value in extremes(distribution):
            trainer.hparams.replace(**{name: value})  # raises if it is out of range
    if not space:
        raise ConfigError("a space must have a hyperparameter to draw; it is empty.")
    if factor < 2:
        raise ConfigError(f"factor must be at least 2; got {factor}.")

    def draw(key: jax.Array, hparams: HParams, num_slots: int) -> HParams:
        quantiles = jax.random.uniform(key, (len(space), num_slots))
        drawn = zip(space.items(), quantiles, strict=True)
        return hparams.replace(**{name: _at(entry, u) for (name, entry), u in drawn})

    def start(keys: jax.Array, hparams: HParams | None) -> Start:
        num_slots = keys.shape[0]
        if num_slots < factor:
            raise ConfigError(
                "a population must be at least as large as factor, so that one trial goes on; got "
                f"{num_slots} and {factor}. Use more members, or a smaller factor."
            )
        # Converted to the algorithm's own type, which has all hyperparameters that can be drawn.
        given = {} if hparams is None else hparams.given()
        fixed = for_every_member(type(trainer.hparams)(**given), num_slots)
        # The first member's second key draws for the whole search.
        split = jax.vmap(jax.random.split)(keys)
        round_keys = jax.random.split(split[0, 1], 1 + num_rounds)
        numbers = jnp.arange(num_slots)
        empty = jnp.zeros((num_rounds, num_slots))
        trials = _Trials(
            numbers,
            jnp.zeros_like(numbers),
            jnp.int32(num_slots),
            empty,
            empty.astype(numbers.dtype),
        )
        first = draw(round_keys[0], fixed, num_slots)
        return Start(split[:, 0], first, round_keys[1:], trials)

    def decide(keys: jax.Array, state: SearchState, after: Scores) -> tuple[SearchState, Record]:
        init_key, draw_key = keys
        trials: _Trials = state.memory
        number, num_slots = state.rounds_done - 1, after.scores.size
        age = trials.age + 1
        scores = trials.scores.at[number].set(after.scores)
        ages = trials.ages.at[number].set(age)
        stopped = stopped_trials(scores, ages, number, factor=factor) | ~after.is_healthy
        # A trial that replaced another in the last round would never be trained.
        stopped &= ~after.is_last
        record = Record(trials.numbers, state.hparams, age, after.scores, stopped, after.metrics)
        drawn = draw(draw_key, state.hparams, num_slots)
        # New trials are made for all slots and used in those that were stopped: shapes are fixed.
        env_params = jax.tree.map(lambda x: x[0], state.states.env_params)
        new = init(jax.random.split(init_key, num_slots), drawn, env_params)
        states = jax.vmap(_choose)(stopped, new, state.states)
        hparams = jax.tree.map(lambda x, y: jnp.where(stopped, x, y), drawn, state.hparams)
        # Numbers go up in the order of slots, without gaps.
        numbers = jnp.where(stopped, trials.num_drawn + jnp.cumsum(stopped) - 1, trials.numbers)
        num_drawn = trials.num_drawn + jnp.sum(stopped)
        memory = _Trials(numbers, jnp.where(stopped, 0, age), num_drawn, scores, ages)
        return state._replace(states=states, hparams=hparams, memory=memory), record

    init = member_map(trainer.init, in_axes=(0, 0, None))
    return make_search(
        trainer,
        num_rounds=num_rounds,
        updates_per_round=updates_per_round,
        start=start,
        decide=decide,
        score=score,
        member_map=member_map,
    )


def _choose(condition: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """Returns `new` where the condition is true and `old` elsewhere, random keys included."""
    return jax.tree.map(partial(jnp.where, condition), new, old)


def _at(distribution: Distribution, u: jax.Array) -> jax.Array:
    """Returns the values at quantiles u, inside jit."""
    if not isinstance(distribution, Choice):
        return distribution.at(u)
    # `Choice.at` takes a Python number; this is its form for arrays.
    values = jnp.array(distribution.values, jnp.float32)
    return values[jnp.minimum((u * values.size).astype(int), values.size - 1)]
