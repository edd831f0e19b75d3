"""Shared parts of searches: a population trains in rounds, is scored, and a method decides."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.devices import MemberMap
from ppo_jax.errors import require_known, require_positive_integer, require_positive_integers
from ppo_jax.evaluation import evaluate
from ppo_jax.hparams import HParams
from ppo_jax.population.member import all_skipped, is_finite
from ppo_jax.stages.metrics import Metrics
from ppo_jax.trainer import Trainer
from ppo_jax.types import TrainState

Score = Callable[[jax.Array, TrainState, Metrics], jax.Array]
"""`(key, state, metrics) -> score` of one member after a round; higher is better. The metrics are
sums over the round. The key is the same for all members, so that they meet the same episodes."""


class SearchState(NamedTuple):
    """A population in the course of a search."""

    states: TrainState  # [S, ...]
    hparams: HParams  # [S]
    sums: Metrics  # [S], of the updates of this round so far
    memory: Any
    """State of the method itself, such as the scores of earlier rounds."""
    round_keys: jax.Array  # [R]
    rounds_done: jax.Array  # []


class Start(NamedTuple):
    """The beginning of a search, before its members exist."""

    member_keys: jax.Array  # [S]
    hparams: HParams  # [S]
    round_keys: jax.Array  # [R]
    memory: Any


class Scores(NamedTuple):
    """The members after a round."""

    scores: jax.Array  # [S]; −∞ where a member is not healthy
    is_healthy: jax.Array  # [S]; the learner is finite, and not all updates were skipped
    metrics: Metrics  # [S], sums over the round
    is_last: jax.Array  # []


class Search(NamedTuple):
    """A search as pure functions; jit is the caller's."""

    init: Callable[..., SearchState]
    """`(keys [S], hparams=None, env_params=None) -> state`; environments' parameters are shared."""
    advance: Callable[[SearchState, Any], SearchState]
    """`(state, count) -> state`: trains every member for `count` updates of a round."""
    finish_round: Callable[[SearchState], tuple[SearchState, Any]]
    """`(state) -> (state, record)`: scores the members and decides who goes on."""
    run: Callable[..., tuple[SearchState, Any]]
    """`(keys [S], hparams=None, env_params=None) -> (state, record [R])`: all rounds."""


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


def make_search(
    trainer: Trainer,
    *,
    num_rounds: int,
    updates_per_round: int,
    start: Callable[[jax.Array, HParams | None], Start],
    decide: Callable[[jax.Array, SearchState, Scores], tuple[SearchState, Any]],
    score: Score | None = None,
    member_map: MemberMap = jax.vmap,
) -> Search:
    """Returns a search, given the functions that start it and that decide after each round.

    A member whose learner is not finite, or whose updates were all skipped in the round because
    their gradients were not, has a score of −∞: its policy may still act and score by chance.

    Args:
      trainer: trains every member.
      num_rounds: R.
      updates_per_round: updates between two decisions.
      start: `(keys [S], hparams) -> Start`.
      decide: `(keys [2], state, scores) -> (state, record)`; `rounds_done` counts this round.
      score: scores a member after a round; None evaluates complete episodes, by
        `evaluation_score`.
      member_map: maps a function over members.
    """
    require_positive_integers({"num_rounds": num_rounds, "updates_per_round": updates_per_round})
    score_one = score or evaluation_score(trainer)
    init_members = member_map(trainer.init, in_axes=(0, 0, None))

    def train_one(state: TrainState, hparams: HParams, sums: Metrics, count: Any) -> Any:
        def one_update(_: Any, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, sums = carry
            state, metrics = trainer.step(state, hparams)
            # Sums and counts are added up, so that an update with many episodes weighs more.
            return state, jax.tree.map(jnp.add, sums, metrics)

        # A loop with a traced count instead of a scan, so that a host can train in pieces of any
        # length without compiling again.
        return jax.lax.fori_loop(0, count, one_update, (state, sums))

    def judge(key: jax.Array, state: TrainState, sums: Metrics) -> tuple[jax.Array, jax.Array]:
        value = score_one(key, state, sums)
        is_healthy = is_finite(state.learner.params) & ~all_skipped(sums)
        has_score = is_healthy & ~jnp.isnan(value)
        return jnp.where(has_score, value, -jnp.inf), is_healthy

    train = member_map(train_one, in_axes=(0, 0, 0, None))
    judge_members = member_map(judge, in_axes=(None, 0, 0))

    def init(
        keys: jax.Array, hparams: HParams | None = None, env_params: Any = None
    ) -> SearchState:
        begun = start(keys, hparams)
        states = init_members(begun.member_keys, begun.hparams, env_params)
        # The sums need the names of the metrics before the first step.
        _, shapes = jax.eval_shape(jax.vmap(trainer.step), states, begun.hparams)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return SearchState(
            states, begun.hparams, zeros, begun.memory, begun.round_keys, jnp.int32(0)
        )

    def advance(state: SearchState, count: Any) -> SearchState:
        states, sums = train(state.states, state.hparams, state.sums, count)
        return state._replace(states=states, sums=sums)

    def finish_round(state: SearchState) -> tuple[SearchState, Any]:
        *method_keys, score_key = jax.random.split(state.round_keys[state.rounds_done], 3)
        scores, are_healthy = judge_members(score_key, state.states, state.sums)
        is_last = state.rounds_done == num_rounds - 1
        round_scores = Scores(scores, are_healthy, state.sums, is_last)
        state = state._replace(
            sums=jax.tree.map(jnp.zeros_like, state.sums), rounds_done=state.rounds_done + 1
        )
        return decide(jnp.stack(method_keys), state, round_scores)

    def run(
        keys: jax.Array, hparams: HParams | None = None, env_params: Any = None
    ) -> tuple[SearchState, Any]:
        def one_round(state: SearchState, _: None) -> tuple[SearchState, Any]:
            return finish_round(advance(state, updates_per_round))

        return jax.lax.scan(one_round, init(keys, hparams, env_params), length=num_rounds)

    return Search(init, advance, finish_round, run)


def for_every_member(hparams: HParams, num_members: int) -> HParams:
    """Broadcasts every hyperparameter that has a value to `[S]`."""
    return jax.tree.map(
        lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.float32), num_members), hparams
    )


def check_hparam_names(names: Iterable[str], hparams: HParams) -> None:
    """Raises a `ConfigError` for a name that is not a hyperparameter of that record."""
    for name in names:
        require_known("hyperparameter", name, hparams.names())
