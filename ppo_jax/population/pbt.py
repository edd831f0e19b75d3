"""Population-based training as pure functions.

Jaderberg et al. 2017 (arXiv:1711.09846), section 4: after every round, the worst members copy the
learners of the best and perturb their hyperparameters.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.defaults import INITIAL_HPARAMS
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
from ppo_jax.stages.metrics import Metrics
from ppo_jax.trainer import Trainer


class Lineage(NamedTuple):
    """History of a population, round by round."""

    scores: jax.Array  # [R, S]; −∞ where a member is not healthy; see `rounds.Scores`
    hparams: HParams  # [R, S], used in the round
    parents: jax.Array  # [R, S], number of the member whose learner is used in the next round
    metrics: Metrics  # [R, S], sums over the round


def exploit(key: jax.Array, scores: jax.Array, *, num_replaced: int) -> jax.Array:
    """Returns the parent of each member by truncation selection, `[S]`.

    Each of the `num_replaced` members with the lowest scores gets a parent that is drawn uniformly
    from as many members with the highest scores. Every other member is its own parent.

    >>> scores = jnp.array([3.0, 1.0, 2.0, 4.0])
    >>> exploit(jax.random.key(0), scores, num_replaced=1).tolist()
    [0, 3, 2, 3]
    """
    order = jnp.argsort(scores)
    chosen = jax.random.randint(key, (num_replaced,), 0, num_replaced)
    best = order[scores.size - num_replaced :]
    return jnp.arange(scores.size).at[order[:num_replaced]].set(best[chosen])


def explore(
    key: jax.Array, hparams: HParams, replaced: jax.Array, names: Sequence[str], factor: float
) -> HParams:
    """Multiplies or divides hyperparameters of replaced members, within their ranges.

    Args:
      key: random key; up and down are equally likely.
      hparams: of all members, `[S]`.
      replaced: bool, `[S]`.
      names: hyperparameters to change.
      factor: by which a value is multiplied or divided.
    """
    ranges = hparams.ranges()
    changes = {}
    for name, name_key in zip(names, jax.random.split(key, len(names)), strict=True):
        value = getattr(hparams, name)
        up = jax.random.bernoulli(name_key, 0.5, value.shape)
        # Multiplied, because most hyperparameters matter on a logarithmic scale.
        moved = jnp.clip(jnp.where(up, value * factor, value / factor), *ranges[name])
        changes[name] = jnp.where(replaced, moved, value)
    return hparams.replace(**changes)


def make_pbt(
    trainer: Trainer,
    names: Sequence[str],
    *,
    num_rounds: int,
    updates_per_round: int,
    replaced: float = 0.25,
    factor: float = 1.25,
    score: Score | None = None,
    member_map: MemberMap = jax.vmap,
) -> Search:
    """Returns population-based training as a `Search`, whose record is a `Lineage`.

    A replaced member copies the learner (parameters and the state of the update rule) and the
    statistics that normalise observations and rewards. It keeps its environments and random key.
    Nothing is replaced after the last round. Give the trainer's config
    `num_rounds * updates_per_round` updates or a constant schedule; otherwise the learning rate
    falls too early or too late.

    Args:
      trainer: trains every member.
      names: hyperparameters that are changed; each must be `[S]` in the argument of `init`. An
        adaptive β is state of the learner and cannot be changed here.
      num_rounds: R.
      updates_per_round: updates between two replacements.
      replaced: share of the members that are replaced after a round, at most half.
      factor: by which a value is multiplied or divided.
      score: scores a member after a round; None evaluates complete episodes, by
        `rounds.evaluation_score`.
      member_map: maps a function over members.

    Raises:
      ConfigError: an unknown name or that of a gain, or a number that is out of range.
    """
    check_hparam_names(names, trainer.hparams)
    # A change after the first round would have no effect.
    early = sorted(set(INITIAL_HPARAMS) & set(names))
    if early:
        raise ConfigError(
            "hyperparameters that are changed must act throughout; got "
            f"{', '.join(early)}, which only set the initial weights. Leave them out."
        )
    if not 0 < replaced <= 0.5:
        raise ConfigError(f"the share that is replaced must be in (0, 0.5]; got {replaced}.")
    if not 1 < factor < math.inf:
        raise ConfigError(f"factor must be a finite number above 1; got {factor}.")

    def start(keys: jax.Array, hparams: HParams | None) -> Start:
        num_members = keys.shape[0]
        if int(replaced * num_members) < 1:
            raise ConfigError(
                f"a population must be large enough to replace one member; {replaced:g} of "
                f"{num_members} is none. Use more members, or a larger share."
            )
        hparams = type(trainer.hparams)() if hparams is None else hparams
        for name in names:
            value: Any = getattr(hparams, name)
            if jnp.shape(value) != (num_members,):
                raise ConfigError(
                    f"every hyperparameter that is changed must have a value for each of the "
                    f"{num_members} members; {name} is {value}."
                )
        split = jax.vmap(jax.random.split)(keys)
        # The first member's second key decides for the whole population.
        round_keys = jax.random.split(split[0, 1], num_rounds)
        return Start(split[:, 0], for_every_member(hparams, num_members), round_keys, ())

    def decide(keys: jax.Array, state: SearchState, after: Scores) -> tuple[SearchState, Lineage]:
        exploit_key, explore_key = keys
        members = jnp.arange(after.scores.size)
        # Scores of −∞ sort first, so that members with NaNs are replaced.
        num_replaced = int(replaced * after.scores.size)
        parents = exploit(exploit_key, after.scores, num_replaced=num_replaced)
        parents = jnp.where(after.is_last, members, parents)
        # Environments and keys are not copied: members with the same key would draw the same
        # random numbers.
        inherited = state.states.replace(
            learner=jax.tree.map(lambda x: x[parents], state.states.learner),
            statistics=jax.tree.map(lambda x: x[parents], state.states.statistics),
        )
        copied = jax.tree.map(lambda x: x[parents], state.hparams)
        changed = explore(explore_key, copied, parents != members, names, factor)
        # The record has the values of the round that is over, not the changed ones of the next.
        lineage = Lineage(after.scores, state.hparams, parents, after.metrics)
        return state._replace(states=inherited, hparams=changed), lineage

    return make_search(
        trainer,
        num_rounds=num_rounds,
        updates_per_round=updates_per_round,
        start=start,
        decide=decide,
        score=score,
        member_map=member_map,
    )
