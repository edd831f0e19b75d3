"""Evaluations while a run trains: always at the same updates, on the same episodes."""

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.envs.environment import Environment
from ppo_jax.evaluation import Evaluation, evaluate, evaluation_key
from ppo_jax.policy.policy import Policy
from ppo_jax.runs import processes
from ppo_jax.runs.host_evaluation import evaluate_on_host
from ppo_jax.runs.kept import made_once

Evaluate = Callable[[Policy], Evaluation]
"""`policy -> evaluation`, of one policy or of a stack of them."""


def make_evaluate(
    env: Environment, keys: jax.Array, num_episodes: int, *, greedy: bool = True
) -> Evaluate:
    """Returns a function that evaluates the policies of a training; it is compiled once.

    Args:
      env: the environment, with its parameters.
      keys: the key of the training, or those of its seeds. Each call plays the same episodes.
      num_episodes: episodes for each seed.
      greedy: take the most likely actions instead of sampling.
    """
    if env.host is not None:
        key = evaluation_key(keys)
        return lambda policy: evaluate_on_host(policy, env, key, num_episodes, greedy=greedy)
    has_seeds = bool(keys.ndim)
    episode_keys = jax.vmap(evaluation_key)(keys) if has_seeds else evaluation_key(keys)

    def one(policy: Policy, key: jax.Array) -> Evaluation:
        return evaluate(policy, env, env.params, key, num_episodes, greedy=greedy)

    compiled = made_once(
        env,
        ("evaluation", num_episodes, greedy, has_seeds),
        lambda: jax.jit(jax.vmap(one) if has_seeds else one),
    )
    return lambda policy: compiled(policy, episode_keys)


class Best(NamedTuple):
    """The policy of each seed that had the highest mean return so far."""

    policy: Policy | None
    """None before the first evaluation."""
    returns: np.ndarray  # [seeds]
    updates: np.ndarray  # [seeds], updates after which the policies were evaluated

    def until(self, updates: int) -> "Best":
        """Returns a record in which policies from later updates have a return of −∞."""
        is_later = self.updates > updates
        return self._replace(returns=np.where(is_later, -np.inf, self.returns))


class PeriodicEvaluation:
    """Evaluates the policy every few updates, and keeps the best of each seed."""

    def __init__(
        self, evaluate: Evaluate, seeds: Sequence[int], batch_size: int, every: int | None
    ) -> None:
        """Prepares the evaluations; nothing is evaluated yet.

        Args:
          evaluate: evaluates the policies of all seeds.
          seeds: of the training.
          batch_size: environment steps of an update, for each seed.
          every: updates between two evaluations; None for no evaluation.
        """
        self._evaluate, self._seeds = evaluate, seeds
        self._batch_size, self._every = batch_size, every
        self._newest: tuple[int, Evaluation] | None = None
        self.seconds = 0.0
        """Seconds of the evaluations so far; the first includes compilation."""
        self.best = Best(None, np.full(len(seeds), -np.inf), np.zeros(len(seeds), int))

    def updates_left(self, updates: int) -> int | None:
        """Returns the updates until the next evaluation; None if there is none."""
        return None if self._every is None else self._every - updates % self._every

    def is_due(self, updates: int) -> bool:
        """Returns whether there is an evaluation after a number of updates."""
        return self._every is not None and updates % self._every == 0

    def evaluate(self, updates: int, policy: Policy) -> Evaluation:
        """Evaluates the policy after a number of updates, unless the newest evaluation did so.

        The time that it takes is added to `seconds`.
        """
        # The final evaluation may follow a periodic one, and whole games of Atari take minutes.
        if self._newest is not None and self._newest[0] == updates:
            return self._newest[1]
        started = time.perf_counter()
        # Dispatch is asynchronous: without the wait the time would be that of the next update.
        evaluation = jax.block_until_ready(self._evaluate(policy))
        self.seconds += time.perf_counter() - started
        self._newest = updates, evaluation
        cut = np.sum(~np.asarray(evaluation.finished))
        if cut and processes.is_first():
            warnings.warn(
                f"{cut} of {evaluation.finished.size} episodes of the evaluation after "
                f"{updates * self._batch_size:,} steps did not end within "
                f"{np.max(evaluation.lengths):,} steps; their returns are cut there.",
                RuntimeWarning,
                stacklevel=3,
            )
        return evaluation

    def after(self, updates: int, policy: Policy) -> list[dict[str, Any]]:
        """Evaluates the policy after a number of updates, and returns a row for each seed."""
        evaluation = self.evaluate(updates, policy)
        means = np.reshape(evaluation.returns, (len(self._seeds), -1)).mean(axis=1)
        # A return that was reached again is no better: a run that continues repeats evaluations.
        is_better = means > self.best.returns
        # Seeds have their best policies at different updates.
        old = policy if self.best.policy is None else self.best.policy
        self.best = Best(
            jax.tree.map(lambda new, x: _choose(is_better, new, x), policy, old),
            np.where(is_better, means, self.best.returns),
            np.where(is_better, updates, self.best.updates),
        )
        return evaluation_rows(evaluation, self._seeds, updates, self._batch_size)


def evaluation_rows(
    evaluation: Evaluation, seeds: Sequence[int], updates: int, batch_size: int
) -> list[dict[str, Any]]:
    """Returns a row for each seed of an evaluation.

    Args:
      evaluation: evaluation of the policies of all seeds.
      seeds: seeds of the training.
      updates: number of updates before the evaluation.
      batch_size: environment steps of an update, for each seed.
    """
    returns = np.reshape(evaluation.returns, (len(seeds), -1))
    lengths = np.reshape(evaluation.lengths, returns.shape)
    own = {name: np.reshape(x, returns.shape) for name, x in evaluation.metrics.items()}
    return [
        {
            "update": updates,
            "timesteps": updates * batch_size,
            "seed": seed,
            "eval/return": float(returns[i].mean()),
            "eval/return_std": float(returns[i].std()),
            "eval/length": float(lengths[i].mean()),
            **{f"eval/{name}": float(x[i].mean()) for name, x in own.items()},
        }
        for i, seed in enumerate(seeds)
    ]


def _choose(is_better: np.ndarray, new: jax.Array, old: jax.Array) -> jax.Array:
    """Returns `new` for the seeds that are better, `old` for the others.

    With a single seed, the arrays may have no axis of seeds.
    """
    if len(is_better) == 1:
        return jnp.copy(new if is_better[0] else old)
    return jnp.where(is_better.reshape(-1, *[1] * (new.ndim - 1)), new, old)
