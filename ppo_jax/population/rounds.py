"""Shared parts of searches inside the compile: a population trains for a round and is scored."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from ppo_jax.errors import require_known, require_positive_integer
from ppo_jax.evaluation import evaluate
from ppo_jax.hparams import HParams
from ppo_jax.population.member import is_finite
from ppo_jax.stages.metrics import Metrics
from ppo_jax.trainer import Trainer
from ppo_jax.types import TrainState

Score = Callable[[jax.Array, TrainState, Metrics], jax.Array]
"""`(key, state, metrics) -> score` of one member after a round; higher is better. The metrics are
sums over the round. The key is the same for all members, so that they meet the same episodes."""

TrainRound = Callable[[jax.Array, TrainState, HParams], tuple[TrainState, jax.Array, jax.Array]]
"""`(key, states [S], hparams [S]) -> (states, scores [S], learner is finite [S])`."""


def evaluation_score(trainer: Trainer, num_episodes: int = 16, max_steps: int = 10_000) -> Score:
    """Returns the score of a search by default: the mean return of complete episodes.

    Episodes that end while training are no fair score: of two policies that balance a pole, the
    better one ends no episode in a short round, and the worse one ends many.

    Args:
      trainer: trains every member.
      num_episodes: episodes of an evaluation, with sampled actions.
      max_steps: bound on the steps of an episode, for environments that never end one.
    """
    require_positive_integer("num_episodes", num_episodes)

    def score(key: jax.Array, state: TrainState, metrics: Metrics) -> jax.Array:
        del metrics
        result = evaluate(
            trainer.policy(state),
            trainer.env,
            state.env_params,
            key,
            num_episodes,
            greedy=False,
            max_steps=max_steps,
        )
        return jnp.mean(result.returns)

    return score


def training_score(key: jax.Array, state: TrainState, metrics: Metrics) -> jax.Array:
    """Scores a member by the mean return of the episodes that ended in the round; −∞ for none.

    It needs no evaluation. Use it only if rounds are much longer than episodes.
    """
    del key, state
    mean = metrics["episode/return"]
    return jnp.where(jnp.isfinite(mean), mean, -jnp.inf)  # the mean of no episode is NaN


def make_round(trainer: Trainer, updates_per_round: int, score: Score) -> TrainRound:
    """Returns a function that trains every member for a round and scores it.

    A member whose learner is no longer finite has a score of −∞, because its policy may still act
    and score by chance.
    """
    step = jax.vmap(trainer.step)
    score_members = jax.vmap(score, in_axes=(None, 0, 0))

    def train(
        key: jax.Array, states: TrainState, hparams: HParams
    ) -> tuple[TrainState, jax.Array, jax.Array]:
        def one_update(states: TrainState, _: None) -> tuple[TrainState, Metrics]:
            return step(states, hparams)

        states, metrics = jax.lax.scan(one_update, states, length=updates_per_round)
        # Sums and counts are added up, so that an update with many episodes weighs more.
        metrics = jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)
        scores = score_members(key, states, metrics)
        finite_learner = jax.vmap(is_finite)(states.learner.params)
        has_score = finite_learner & ~jnp.isnan(scores)
        return states, jnp.where(has_score, scores, -jnp.inf), finite_learner

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
