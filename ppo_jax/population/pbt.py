"""Population-based training inside one compiled function.

Jaderberg et al. 2017 (arXiv:1711.09846), section 4: after every round, the worst members take over
what the best have learnt, and change its hyperparameters a little.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.config import HPARAM_RANGES, ConfigError, HParams
from ppo_jax.policy.initializers import GAINS
from ppo_jax.population.rounds import check_hparam_names, for_every_member, make_round
from ppo_jax.trainer import Trainer
from ppo_jax.types import TrainState


class Lineage(NamedTuple):
    """What happened, round by round."""

    scores: jax.Array  # [R, S], mean return of the episodes that ended; −∞ where none did
    hparams: HParams  # [R, S], that the round was trained with
    parents: jax.Array  # [R, S], whose learner a member goes on with; its own number if it stays


class Population(NamedTuple):
    """A population after its last round."""

    states: TrainState  # [S, ...]
    hparams: HParams  # [S]
    lineage: Lineage


def exploit(key: jax.Array, scores: jax.Array, *, num_replaced: int) -> jax.Array:
    """Truncation selection: the parent of each member, `[S]`.

    Each of the `num_replaced` members with the lowest scores gets one of as many with the highest,
    drawn uniformly; all others are their own.

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
    """Multiplies or divides the named values of replaced members by `factor`, evenly, in range."""
    changes = {}
    for name, name_key in zip(names, jax.random.split(key, len(names)), strict=True):
        value = getattr(hparams, name)
        up = jax.random.bernoulli(name_key, 0.5, value.shape)
        moved = jnp.clip(jnp.where(up, value * factor, value / factor), *HPARAM_RANGES[name])
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
) -> Callable[..., Population]:
    """Population-based training as a pure function; jit is the caller's.

    What is taken over is the learner (parameters, optimiser, adapted coefficients) and the
    statistics that observations and rewards are normalised by. Environments and random keys stay a
    member's own. Nothing is replaced after the last round. Make the trainer's config of
    `num_rounds * updates_per_round` updates, or a constant schedule, or the learning rate
    falls too early or too late.

    Args:
      trainer: of every member.
      names: hyperparameters that are changed; each must be `[S]` in what the function is given.
        An adapted β is the learner's own, and not a hyperparameter to change.
      num_rounds: R.
      updates_per_round: between two replacements.
      replaced: share of the members that are replaced after a round, at most half.
      factor: by which a value is multiplied or divided.

    Returns:
      `(keys [S], hparams, env_params=None) -> Population`; environments' parameters are
      shared.

    Raises:
      ConfigError: an unknown name or one of the first weights, or a number that makes no sense.
    """
    check_hparam_names(names)
    early = sorted(GAINS.keys() & set(names))
    if early:
        raise ConfigError(
            "hyperparameters that are changed must act throughout; got "
            f"{', '.join(early)}, of the first weights alone. Leave them out."
        )
    if not 0 < replaced <= 0.5:
        raise ConfigError(f"the share that is replaced must be in (0, 0.5]; got {replaced}.")
    if min(num_rounds, updates_per_round) < 1 or factor <= 1:
        raise ConfigError(
            "num_rounds and updates_per_round must be at least 1 and factor above 1; got "
            f"{num_rounds}, {updates_per_round} and {factor}."
        )
    init = jax.vmap(trainer.init, in_axes=(0, 0, None))
    train = make_round(trainer, updates_per_round)

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
        search_key = split[0, 1]  # of the whole population
        states = init(split[:, 0], hparams, env_params)

        def one_round(
            carry: tuple[TrainState, HParams], inputs: tuple[jax.Array, jax.Array]
        ) -> tuple[tuple[TrainState, HParams], Lineage]:
            states, hparams = carry
            key, is_last = inputs
            exploit_key, explore_key = jax.random.split(key)
            states, scores, _ = train(states, hparams)
            own = jnp.arange(num_members)
            parents = exploit(exploit_key, scores, num_replaced=num_replaced)
            parents = jnp.where(is_last, own, parents)
            inherited = states.replace(
                learner=jax.tree.map(lambda x: x[parents], states.learner),
                statistics=jax.tree.map(lambda x: x[parents], states.statistics),
            )
            copied = jax.tree.map(lambda x: x[parents], hparams)
            changed = explore(explore_key, copied, parents != own, names, factor)
            return (inherited, changed), Lineage(scores, hparams, parents)

        round_keys = jax.random.split(search_key, num_rounds)
        is_last = jnp.arange(num_rounds) == num_rounds - 1
        (states, hparams), lineage = jax.lax.scan(
            one_round, (states, hparams), (round_keys, is_last)
        )
        return Population(states, hparams, lineage)

    return run
