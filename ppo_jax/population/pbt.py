"""Population-based training inside one compiled function.

Jaderberg et al. 2017 (arXiv:1711.09846), section 4: after every round, the worst members copy the
learners of the best and perturb their hyperparameters.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.defaults import GAINS
from ppo_jax.errors import ConfigError, require_positive_integers
from ppo_jax.hparams import HParams
from ppo_jax.population.rounds import (
    Score,
    check_hparam_names,
    evaluation_score,
    for_every_member,
    make_round,
)
from ppo_jax.trainer import Trainer
from ppo_jax.types import TrainState


class Lineage(NamedTuple):
    """History of a population, round by round."""

    scores: jax.Array  # [R, S]; −∞ where a learner is no longer finite
    hparams: HParams  # [R, S], used in the round
    parents: jax.Array  # [R, S], number of the member whose learner is used in the next round


class Population(NamedTuple):
    """A population after its last round."""

    states: TrainState  # [S, ...]
    hparams: HParams  # [S]
    lineage: Lineage


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
) -> Callable[..., Population]:
    """Returns population-based training as a pure function; jit is the caller's.

    A replaced member copies the learner (parameters and the state of the update rule) and the
    statistics that normalise observations and rewards. It keeps its environments and random key.
    Nothing is replaced after the last round. Give the trainer's config
    `num_rounds * updates_per_round` updates or a constant schedule; otherwise the learning rate
    falls too early or too late.

    Args:
      trainer: trains every member.
      names: hyperparameters that are changed; each must be `[S]` in the function's argument. An
        adaptive β is state of the learner and cannot be changed here.
      num_rounds: R.
      updates_per_round: updates between two replacements.
      replaced: share of the members that are replaced after a round, at most half.
      factor: by which a value is multiplied or divided.
      score: scores a member after a round; None evaluates complete episodes, by
        `rounds.evaluation_score`.

    Returns:
      `(keys [S], hparams, env_params=None) -> Population`; environments' parameters are
      shared.

    Raises:
      ConfigError: an unknown name or that of a gain, or a number that is out of range.
    """
    check_hparam_names(names, trainer.hparams)
    # A change of the first weights' gain after the first round would have no effect.
    early = sorted(GAINS.keys() & set(names))
    if early:
        raise ConfigError(
            "hyperparameters that are changed must act throughout; got "
            f"{', '.join(early)}, of the first weights alone. Leave them out."
        )
    if not 0 < replaced <= 0.5:
        raise ConfigError(f"the share that is replaced must be in (0, 0.5]; got {replaced}.")
    require_positive_integers({"num_rounds": num_rounds, "updates_per_round": updates_per_round})
    if factor <= 1:
        raise ConfigError(f"factor must be above 1; got {factor}.")
    init = jax.vmap(trainer.init, in_axes=(0, 0, None))
    train = make_round(trainer, updates_per_round, score or evaluation_score(trainer))

    def run(keys: jax.Array, hparams: HParams, env_params: Any = None) -> Population:
        num_members = keys.shape[0]
        num_replaced = int(replaced * num_members)
        if num_replaced < 1:
            raise ConfigError(
                f"a population must be large enough to replace one member; {replaced:g} of "
                f"{num_members} is none. Use more members, or a larger share."
            )
        for name in names:
            if jnp.shape(getattr(hparams, name)) != (num_members,):
                raise ConfigError(
                    f"every hyperparameter that is changed must have a value for each of the "
                    f"{num_members} members; {name} is {getattr(hparams, name)}."
                )
        hparams = for_every_member(hparams, num_members)
        split = jax.vmap(jax.random.split)(keys)
        search_key = split[0, 1]  # decides for the whole population
        states = init(split[:, 0], hparams, env_params)

        def one_round(
            carry: tuple[TrainState, HParams], inputs: tuple[jax.Array, jax.Array]
        ) -> tuple[tuple[TrainState, HParams], Lineage]:
            states, hparams = carry
            key, is_last = inputs
            exploit_key, explore_key, score_key = jax.random.split(key, 3)
            states, scores, _ = train(score_key, states, hparams)
            members = jnp.arange(num_members)
            # Scores of −∞ sort first, so that members with NaNs are replaced.
            parents = exploit(exploit_key, scores, num_replaced=num_replaced)
            parents = jnp.where(is_last, members, parents)
            # Environments and keys are not copied: members with the same key would draw the same
            # random numbers.
            inherited = states.replace(
                learner=jax.tree.map(lambda x: x[parents], states.learner),
                statistics=jax.tree.map(lambda x: x[parents], states.statistics),
            )
            copied = jax.tree.map(lambda x: x[parents], hparams)
            changed = explore(explore_key, copied, parents != members, names, factor)
            return (inherited, changed), Lineage(scores, hparams, parents)

        round_keys = jax.random.split(search_key, num_rounds)
        is_last = jnp.arange(num_rounds) == num_rounds - 1
        (states, hparams), lineage = jax.lax.scan(
            one_round, (states, hparams), (round_keys, is_last)
        )
        return Population(states, hparams, lineage)

    return run
