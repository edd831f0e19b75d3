"""What searches inside the compile share: a population that trains for a round and is scored."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from ppo_jax.config import HPARAM_RANGES, HParams, unknown_name
from ppo_jax.population.member import is_finite
from ppo_jax.trainer import Trainer
from ppo_jax.types import TrainState

TrainRound = Callable[[TrainState, HParams], tuple[TrainState, jax.Array, jax.Array]]
"""`(states [S], hparams [S]) -> (states, scores [S], learner is finite [S])`."""


def make_round(trainer: Trainer, updates_per_round: int) -> TrainRound:
    """Updates of every member, scored by the mean return of the episodes that ended in them.

    A score is −∞ where none ended, and where a learner is no longer finite: it may still act, and
    score.
    """
    step = jax.vmap(trainer.step)

    def train(states: TrainState, hparams: HParams) -> tuple[TrainState, jax.Array, jax.Array]:
        def update(states: TrainState, _: None) -> tuple[TrainState, tuple[jax.Array, jax.Array]]:
            states, metrics = step(states, hparams)
            count = metrics["episode/count"]
            total = jnp.where(count > 0, metrics["episode/return"] * count, 0.0)
            return states, (total, count)

        states, (totals, counts) = jax.lax.scan(update, states, length=updates_per_round)
        total, count = jnp.sum(totals, axis=0), jnp.sum(counts, axis=0)
        mean = total / jnp.maximum(count, 1)
        sound = jax.vmap(is_finite)(states.learner.params)
        has_score = (count > 0) & jnp.isfinite(mean) & sound
        return states, jnp.where(has_score, mean, -jnp.inf), sound

    return train


def for_every_member(hparams: HParams, num_members: int) -> HParams:
    """Values that are set as `[S]`."""
    return jax.tree.map(
        lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.float32), num_members), hparams
    )


def check_hparam_names(names: Iterable[str]) -> None:
    """Raises a `ConfigError` for a name that is no hyperparameter's."""
    for name in names:
        if name not in HPARAM_RANGES:
            raise unknown_name("hyperparameter", name, HPARAM_RANGES)
