"""Trainings that failed: their updates were NaN or infinite."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ppo_jax.config import Config
from ppo_jax.diagnosis import Diagnosis, make_diagnosis, make_operation_finder
from ppo_jax.envs import make_env
from ppo_jax.hparams import HParams
from ppo_jax.population.member import Guard
from ppo_jax.runs import processes
from ppo_jax.stages.gradient_steps import CRITIC_SKIPPED, SKIPPED
from ppo_jax.stages.metrics import Metrics
from ppo_jax.types import TrainState

_OF_ENVIRONMENTS = re.compile("^(reward|(next )?observation)")
"""Quantities that come from an environment, whatever is learned from them."""


class Failure(NamedTuple):
    """A seed whose training failed, because its updates were NaN or infinite."""

    seed: int
    update: int
    """Number of the update with which it failed, from 1."""
    timesteps: int
    """Environment steps of the seed up to and including the update."""
    cause: str | None
    """The first quantity that was not finite when an update was repeated, or the reason why it is
    not known; None if all quantities were finite."""

    def __str__(self) -> str:
        cause = f"; the first quantity that is not finite is {self.cause}" if self.cause else ""
        remedy = "Try a lower learning_rate, or max_grad_norm."
        if self.cause and _OF_ENVIRONMENTS.search(self.cause):
            remedy = "Look for the fault in the environment, with ppo_jax.testing.check_env."
        return (
            f"seed {self.seed} failed with update {self.update}, after {self.timesteps:,} steps: "
            f"its updates would be NaN or infinite{cause}. The last finite policy is kept. "
            f"{remedy}"
        )


FindFailures = Callable[[TrainState, Any, Guard], list[Failure]]
"""`(state, failed_before [seeds], guard) -> failures` of the seeds that failed since."""


def failure_finder(
    config: Config, hparams: HParams, seeds: Sequence[int], *, debug_nans: bool
) -> FindFailures:
    """Returns a function that describes new failures.

    Args:
      config: of the training.
      hparams: complete.
      seeds: of the training.
      debug_nans: name the operation that made the first NaN as well.
    """

    # Made by the first failure: each builds the training again.
    @functools.cache
    def diagnoses() -> list[Diagnosis]:
        both = [make_diagnosis, make_operation_finder] if debug_nans else [make_diagnosis]
        return [make(config) for make in both]

    def diagnose(state: TrainState) -> str | None:
        # A diagnosis takes memory of its own, and must not end the training of the other seeds.
        try:
            if make_env(config).host is not None:
                return "not known, because a rollout on the host cannot be repeated"
            quantity, *operation = (diagnosis(state, hparams) for diagnosis in diagnoses())
        except Exception as error:
            return f"not known, because its search failed with {type(error).__name__}"
        if quantity is None and config.num_devices == 1:
            # A diagnosis ends with the gradient of the whole batch before the first step.
            quantity = "a gradient after the first gradient step"
        made = [f"{name} made the first NaN" for name in operation if name]
        return "; ".join([quantity or "not found", *made]) if made else quantity

    def find(state: TrainState, failed_before: Any, guard: Guard) -> list[Failure]:
        found = []
        failed = np.flatnonzero(~failed_before & (guard.failed_at >= 0)).tolist()
        if failed:
            state = processes.fetch(state)
        for i in failed:
            # Updates are counted from 1 in files and messages, and from 0 on the device.
            update = int(guard.failed_at[i]) + 1
            # A training of one seed without an axis of seeds has a scalar key.
            one = jax.tree.map(lambda x, i=i: x[i], state) if state.key.ndim else state
            cause = diagnose(one)
            found.append(Failure(seeds[i], update, update * config.batch_size, cause))
        return found

    return find


def fail_at_first_skip(guard: Guard, metrics: Metrics, update: int) -> Guard:
    """Returns the guard in which every seed that skipped this update has failed.

    Args:
      guard: guard before the update, `[seeds]`.
      metrics: metrics of this single update, `[1, seeds]`.
      update: index of the update.
    """
    skipped = sum(metrics[name][0] for name in (SKIPPED, CRITIC_SKIPPED) if name in metrics)
    fails = (guard.failed_at < 0) & (np.asarray(skipped) > 0)
    return guard._replace(failed_at=np.where(fails, np.int32(update), guard.failed_at))
