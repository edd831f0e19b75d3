"""Shared parts of searches inside the compile: a population trains for a round and is scored."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from ppo_jax.errors import require_known
from ppo_jax.hparams import HParams
from ppo_jax.population.member import is_finite
from ppo_jax.stages.metrics import Metrics
from ppo_jax.trainer import Trainer
from ppo_jax.types import TrainState

TrainRound = Callable[[TrainState, HParams], tuple[TrainState, jax.Array, jax.Array]]
"""`(states [S], hparams [S]) -> (states, scores [S], learner is finite [S])`."""


def make_round(trainer: Trainer, updates_per_round: int) -> TrainRound:
    """Returns a function that trains every member and scores it by its mean return.

    The mean is over the episodes that ended in the round. A score is −∞ where none ended, and where
    a learner is no longer finite: such a policy may still act, and score by chance.
    """
    step = jax.vmap(trainer.step)

    def train(states: TrainState, hparams: HParams) -> tuple[TrainState, jax.Array, jax.Array]:
        def one_update(states: TrainState, _: None) -> tuple[TrainState, Metrics]:
            return step(states, hparams)

        # Sums and counts are added up, so that an update with many episodes weighs more.
        states, metrics = jax.lax.scan(one_update, states, length=updates_per_round)
        mean = jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)["episode/return"]
        finite_learner = jax.vmap(is_finite)(states.learner.params)
        has_score = jnp.isfinite(mean) & finite_learner  # the mean of no episode is NaN
        return states, jnp.where(has_score, mean, -jnp.inf), finite_learner

    return train


def for_every_member(hparams: HParams, num_members: int) -> HParams:
    """Returns the values that are set as arrays `[S]`."""
    return jax.tree.map(
        lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.float32), num_members), hparams
    )


def check_hparam_names(names: Iterable[str], hparams: HParams) -> None:
    """Raises a `ConfigError` for a name that is not a hyperparameter of that record."""
    for name in names:
        require_known("hyperparameter", name, hparams.names())
